"""Images in, activations of a diffusion model's UNet or transformer out."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from diffseg.devices import choose_memory_format, upload
from diffseg.diffusion.class_labels import ClassLabelEncoder
from diffseg.diffusion.concepts import ConceptRecorder
from diffseg.diffusion.controlnet import load_control
from diffseg.diffusion.embeddings import Conditioning
from diffseg.diffusion.images import check_images, check_range, extend_images
from diffseg.diffusion.latents import Posterior, latent_space, scale_latents
from diffseg.diffusion.loading import load_parts
from diffseg.diffusion.lora import fuse_lora, read_lora
from diffseg.diffusion.network_call import network_dtype, transformer_call
from diffseg.diffusion.options import LoraSource, Runtime, Weights, as_group
from diffseg.diffusion.pipeline_prompts import prompt_encoder
from diffseg.diffusion.quantization import quantize
from diffseg.diffusion.schedules import Timestep
from diffseg.diffusion.sites import AttentionMode, Site, aggregates, kind_of, resolve, sites
from diffseg.diffusion.trajectories import (
    Activations,
    Condition,
    Denoiser,
    Generation,
    Transform,
    build_trajectory,
    seeded_noise,
)
from diffseg.geometry import fit_to_image

LATENT = 'the latent'  # what errors call the VAE's result

Prompts = str | Sequence[str] | Tensor | Conditioning  # texts, or embeddings (P, N, D)


class DiffusionExtractor(nn.Module):
    """A frozen diffusion model that turns images into activations of its UNet or transformer.

    ```
    images (B,3,H,W) -> VAE posterior, once -> E samples (B,E,4,h,w) -> trajectory -> network, T and E in the batch
    -> mean over E -> {name: (B,T,C,h',w')}
    ```

    Latents have 4 channels here and below, as those of Stable Diffusion; those of other models have 16, 32 or 128.

    A map of stride s has h = ceil(H/s) times w = ceil(W/s) cells, which tile the image, whatever its size: a cell is H
    / h pixels high and W / w pixels wide. The image is continued to the right and below, mirrored, up to a multiple of
    the network's stride. If a side of it is not a multiple of s, maps are then interpolated, see `fit_to_image`.

    A model of pixel space (its UNet is a `UNet2DModel`) has no VAE and no prompt: its latents are the images.

    With `noise='seeded'` the draws (the posterior's and the trajectory's) depend on nothing but the seed, the ensemble
    member and the latent's size; images and timesteps share them, so that results do not depend on the batch.

    Built under `torch.device('meta')` with all parts `random`, it takes no memory and gives the shapes of a full-size
    model, and its operations can be counted.

    Args:
        model: Preset, hub id, diffusers folder or single checkpoint file, see `load_parts`.
        layers: Names of the activations to read, or aliases of them, see `sites`.
        timesteps: Timesteps of the network, which must be on the trajectory; those of rectified flow (SD3, Flux, Sana)
            are sigmas between 0 and 1 or indices above 1, see `FlowSchedule`.
        trajectory: 'noise', 'clean', 'inversion', 'generation' or 'refinement', or a dict with `type` and the
            trajectory's options, to which belongs `negative_prompt` (default '') where there is guidance. By default
            there is none in pixel space, and its scale is the pipeline's for transformers. A prompt that is the
            negative prompt itself is not guided, which would change nothing and take twice as long.
        prompt: The prompt of all images; or several that are encoded beforehand, of which each call then chooses; or an
            embedding; or None, if each call passes prompts. Of class-conditional transformers (DiT) it is empty or the
            number of a class, see `ClassLabelEncoder`.
        label: The class of all images for a class-conditional transformer, in place of `prompt`.
        ensemble: Number of draws over which activations are averaged.
        noise: 'seeded', or 'random' for fresh draws from torch's global generator, one per image, timestep and member.
        seed: Of the seeded draws.
        attention_maps: Categories of aggregated attention ('up_cross', ...) to return too: after the layers, or where
            `layers` says ('attn', or 'attn-16' and so on).
        attention_mode: How it is aggregated: 'concat' as in GDF or 'average' as in VPD, see `aggregates`.
        dtype: Of the network, and of the VAE unless it would overflow; 'auto' is the fastest one of the device, and
            float32 for small networks, see `choose_dtype`.
        vae_sample: Take a 'sample' of the VAE's posterior or its 'mode'.
        scale_latent: Multiply latents by the VAE's scaling factor, as in the training of the UNet; VPD and Meta Prompts
            do not.
        truncate_prompts: Cut long prompts off instead of into chunks, see `PromptEncoder`.
        max_sequence_length: Tokens of prompts of transformers, where it is not that of the pipeline.
        embedded_guidance: Scale of guidance for networks that take it as an input (Flux-dev: 3.5); None is their
            pipeline's.
        discard: Channels of a transformer's raw features that are set to zero before they are modulated for `-mod`
            activations, see `ActivationRecorder`.
        average_draws: Average the ensemble of `-mod` activations before they are normalised and modulated, as DiTF's
            released code does; the other activations are averaged as they are.
        transform: Applied to each activation (N, C, h, w), with its name, as soon as it is read, so that what it leaves
            out takes no memory; where there is an ensemble, before the mean, and of the continued image. Its `repr` is
            in the fingerprint.
        weights: Which weights are loaded, as `Weights` or a mapping of its fields.
        runtime: How the network is run, as `Runtime` or a mapping of its fields.

    Attributes:
        multiple: What sides of images are continued to a multiple of: the largest stride of the network.

    Raises:
        ValueError: Unknown layer, or a timestep that is not on the trajectory, or an option outside its values or for
            parts that the model does not have.
    """

    def __init__(
        self,
        model: str | Path,
        layers: Sequence[str],
        timesteps: Sequence[Timestep],
        *,
        trajectory: str | Mapping[str, Any] = 'noise',
        prompt: Prompts | None = '',
        label: int | None = None,
        ensemble: int = 1,
        noise: str = 'seeded',
        seed: int = 0,
        attention_maps: Sequence[str] = (),
        attention_mode: AttentionMode = 'concat',
        dtype: str | torch.dtype = 'auto',
        vae_sample: str = 'sample',
        scale_latent: bool = True,
        truncate_prompts: bool = False,
        max_sequence_length: int | None = None,
        embedded_guidance: float | None = None,
        discard: Sequence[int] = (),
        average_draws: bool = False,
        transform: Transform | None = None,
        weights: Weights | Mapping[str, Any] | None = None,
        runtime: Runtime | Mapping[str, Any] | None = None,
    ):
        super().__init__()
        weights, runtime = as_group(Weights, weights or {}), as_group(Runtime, runtime or {})
        _check_option('noise', noise, ('seeded', 'random'))
        _check_option('vae_sample', vae_sample, ('sample', 'mode'))
        if ensemble < 1:
            raise ValueError(f'ensemble is {ensemble}; it is a number of draws, 1 or more')
        options = {'type': trajectory} if isinstance(trajectory, str) else dict(trajectory)
        negative_prompt = options.pop('negative_prompt', '')

        source = {'revision': weights.revision, 'variant': weights.variant, 'config': weights.config}
        self.parts = load_parts(
            model,
            **source,
            network_weights=weights.network_weights,
            vae=True if weights.vae is None else weights.vae,
            dtype=dtype,
            device=runtime.device,
            attention=runtime.attention,
            random=weights.random,
        )
        self.network = self.parts.network.requires_grad_(False).eval()
        self.vae = None if self.parts.vae is None else self.parts.vae.requires_grad_(False).eval()
        if self.vae is None:
            _refuse(
                model,
                negative_prompt=negative_prompt,
                lora_weights=weights.lora_weights,
                controlnet=weights.controlnet,
                textual_inversion=weights.textual_inversion,
                truncate_prompts=truncate_prompts,
                vae_sample=vae_sample != 'sample',
                scale_latent=not scale_latent,
                vae_slicing=runtime.vae_slicing,
                vae_tiling=runtime.vae_tiling,
            )
            prompt = '' if prompt is None else prompt
            if options.get('type') == 'generation':
                options.setdefault('guidance', 1.0)
        if isinstance(self.vae, AutoencoderTiny):
            _check_tiny(self.vae, scale_latent, runtime.vae_tiling)
        call = transformer_call(self.network)
        self._is_transformer = call is not None
        if self._is_transformer and options.get('type') == 'generation':
            options.setdefault('guidance', call.guidance)
        self._has_labels = isinstance(self.network, DiTTransformer2DModel)
        if self._is_transformer:
            _refuse_for_transformer(
                model,
                controlnet=weights.controlnet,
                textual_inversion=weights.textual_inversion,
                attention_maps=attention_maps,
                truncate_prompts=truncate_prompts,
            )
        if label is not None:
            if not self._has_labels or prompt != '':
                raise ValueError(f'label is {label}; it is for class-conditional transformers (DiT), without a prompt')
            prompt = str(label)
        self._lora = []
        for path, scale in map(_scaled, weights.lora_weights):
            lora = read_lora(path, self.network, scale)
            fuse_lora(self.network, lora)
            self._lora.append(lora.without(kind_of(self.network).part))  # what is left is for text encoders
        self.quantization = weights.quantization
        if self.quantization is not None:
            quantize(self.network, self.quantization)
        controlnets = [weights.controlnet] if isinstance(weights.controlnet, Mapping) else weights.controlnet
        self.controls = nn.ModuleList(
            load_control(self.network, **control, attention=runtime.attention) for control in controlnets
        )
        available = sites(self.network, self.parts.vae_scale_factor)
        attention_names = [site.name for site, _ in aggregates(available, attention_maps, attention_mode)]
        self._order = list(dict.fromkeys([*resolve(layers, [*available, *attention_names]), *attention_names]))
        self.trajectory = build_trajectory(options, timesteps, self.parts.schedule)
        if self.vae is None and self.trajectory.needs_negative:
            raise ValueError(f'{model} reads no prompt, so there is nothing to guide it from; set guidance=1')
        self.multiple = max(site.stride for site in available.values())
        self.attention_maps = tuple(attention_maps)
        self.attention_mode = attention_mode
        self.ensemble = ensemble
        self.noise = noise
        self.seed = seed
        self.vae_sample = vae_sample
        self.scale_latent = scale_latent
        self.vae_tiling = runtime.vae_tiling
        self.micro_batch = runtime.micro_batch
        self.check_finite = runtime.check_finite

        self.memory_format = choose_memory_format(runtime.memory_format, network_dtype(self.network), runtime.device)
        if self.memory_format is torch.channels_last:
            for part in filter(None, (self.network, self.vae)):
                _use_channels_last(part)
        if runtime.vae_slicing:
            self.vae.enable_slicing()
        if runtime.vae_tiling:
            self.vae.enable_tiling()
        if runtime.gradient_checkpointing:
            if not self.network._supports_gradient_checkpointing:
                raise ValueError(
                    f'diffusers has no gradient checkpointing for a {type(self.network).__name__}; leave out '
                    'gradient_checkpointing'
                )
            self.network.enable_gradient_checkpointing()
        self._denoiser = Denoiser(
            self.network,
            [name for name in self._order if name in available],
            self.attention_maps,
            runtime.micro_batch,
            attention_mode=attention_mode,
            vae_scale_factor=self.parts.vae_scale_factor,
            controls=self.controls,
            transform=transform,
            embedded_guidance=embedded_guidance,
            discard=discard,
            average_draws=average_draws,
        )
        if runtime.compile:
            compile_options = {} if runtime.compile is True else runtime.compile
            _compile_unread_blocks(self.network, self._denoiser.paths, compile_options)

        if self._has_labels:
            self.prompt_encoder = ClassLabelEncoder(model, self.network.config.num_embeds_ada_norm)
        else:
            self.prompt_encoder = prompt_encoder(
                model,
                type(self.network).__name__,
                **source,
                cache_dir=runtime.cache_dir,
                textual_inversion=weights.textual_inversion,
                lora_weights=self._lora,
                truncate=truncate_prompts,
                max_sequence_length=max_sequence_length,
            )
        self._prompt = prompt
        self.conditioning = None if prompt is None else self._encode(prompt)
        self.sites = self.describe(None if self.conditioning is None else self.conditioning.tokens)
        self._negative_prompt = negative_prompt if self.trajectory.needs_negative else None
        self._negative = None
        if self.trajectory.needs_negative:
            self._negative = self._encode(negative_prompt, self.prompt_encoder.for_negative_prompts())

    def reading(self, layers: Sequence[str], timesteps: Sequence[Timestep]) -> 'DiffusionExtractor':
        """An extractor of other layers at other timesteps, which shares the networks and all other options.

        Raises:
            ValueError: Unknown layer, or a timestep that is not on the trajectory.
        """
        other = copy.copy(self)
        other.attention_maps = ()
        other._order = list(dict.fromkeys(resolve(layers, sites(self.network, self.parts.vae_scale_factor))))
        other.trajectory = build_trajectory(self.trajectory.options, timesteps, self.trajectory.schedule)
        other._denoiser = Denoiser(
            self.network,
            other._order,
            micro_batch=self.micro_batch,
            vae_scale_factor=self.parts.vae_scale_factor,
            controls=self.controls,
            transform=self._denoiser.transform,
            embedded_guidance=self._denoiser.network_call.embedded_guidance,
            discard=self._denoiser.discard,
            average_draws=self._denoiser.average_draws,
        )
        other.sites = other.describe(None if self.conditioning is None else self.conditioning.tokens)
        return other

    def reading_concepts(self, recorder: ConceptRecorder) -> 'DiffusionExtractor':
        """An extractor of maps of concepts at the same timesteps, which shares the networks and all other options.

        Maps are means over the ensemble too.

        Raises:
            ValueError: A trajectory of steps, on which activations are not all that is read.
        """
        if not self.trajectory.folds_timesteps:
            raise ValueError(
                f"concepts cannot be read on the {self.trajectory.name} trajectory; use 'noise' or 'clean'"
            )
        other = copy.copy(self)
        other.attention_maps = ()
        site = recorder.site(self.parts.vae_scale_factor)
        other._order = [site.name]
        other._denoiser = self._denoiser.reading_with(recorder)
        other.sites = {site.name: site}
        return other

    def describe(self, tokens: int | None) -> dict[str, Site]:
        """What is returned, name by name, for prompts with this number of tokens; None if that is not known."""
        available = sites(self.network, self.parts.vae_scale_factor)
        for name, site in available.items():
            if name.endswith('cross-map'):
                available[name] = replace(site, channels=tokens)
        attention = aggregates(available, self.attention_maps, self.attention_mode, tokens)
        available.update({site.name: site for site, _ in attention})
        return {name: available[name] for name in self._order}

    @property
    def layers(self) -> list[str]:
        """Names of the activations, in the order in which they are returned."""
        return list(self.sites)

    @property
    def timesteps(self) -> tuple[Timestep, ...]:
        """The network's timesteps at which activations are read."""
        return self.trajectory.timesteps

    @property
    def channels(self) -> list[int | None]:
        """Channels of each layer; of attention to the constructor's prompt the tokens, None for other attention."""
        return [site.channels for site in self.sites.values()]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that the activations of an image depend on, ready for JSON. The model is identified by its weights.

        If calls pass prompts, these and the fingerprint of `prompt_encoder` belong to it too.
        """
        encoded = [*_texts(self._prompt), *_texts(self._negative_prompt)]
        return {
            'weights': self.parts.fingerprint,
            'lora_weights': [[weights.digest, weights.scale] for weights in self._lora],
            'controlnet': [[control.fingerprint, control.image, control.scale] for control in self.controls],
            'dtype': str(network_dtype(self.network)).removeprefix('torch.'),
            'layers': self.layers,
            'attention_maps': list(self.attention_maps),
            'attention_mode': self.attention_mode,
            'timesteps': list(self.timesteps),
            'trajectory': self.trajectory.options,
            'prompt': _describe(self._prompt),
            'negative_prompt': _describe(self._negative_prompt),
            'text_encoder': self.prompt_encoder.fingerprint if encoded else None,
            'textual_inversion': {inversion.token: inversion.digest for inversion in self.prompt_encoder.inversions},
            'truncate_prompts': self.prompt_encoder.truncate,
            'ensemble': self.ensemble,
            'noise': self.noise,
            'seed': self.seed,
            'vae_sample': self.vae_sample,
            'scale_latent': self.scale_latent,
            'vae_tiling': self.vae_tiling,
            **self._optional_settings(),
        }

    def _optional_settings(self) -> dict[str, Any]:
        """Entries of the fingerprint for what most models do not have."""
        rounds = network_dtype(self.network) in (torch.float16, torch.bfloat16)  # to sums in another order
        settings = {
            'memory_format': 'channels_last' if rounds and self.memory_format is torch.channels_last else None,
            'transform': None if self._denoiser.transform is None else repr(self._denoiser.transform),
            'embedded_guidance': self._denoiser.network_call.embedded_guidance,
            'discard': list(self._denoiser.discard) or None,
            'quantization': self.quantization,
            'average_draws': self._denoiser.average_draws or None,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Activations:
        """Read the activations of images.

        Args:
            images: RGB in [-1, 1], with shape (B, 3, H, W).
            prompts: One for all images or one for each; None uses those of the constructor.

        Returns:
            {name: (B, T, C, h, w)} with h = ceil(H / stride) and w = ceil(W / stride), cells that tile the image. The
            channels of an attention map are its keys; those of self-attention are the cells of the continued image.

        Raises:
            ValueError: Images of a wrong shape or type, smaller than one latent cell, or, if `check_finite`, out of
                range.
            FloatingPointError: NaN or infinity, if `check_finite`.
        """
        check_images(images, self.parts.vae_scale_factor)
        canvas = extend_images(images, self.multiple)
        encoded = None
        if self.trajectory.from_image:
            latents = encoded = self._encode_images(canvas, self.ensemble)
        else:
            size = (side // self.parts.vae_scale_factor for side in canvas.shape[-2:])
            shape = (len(images), self.parts.latent_channels, *size)
            draws = [self._draw('noise', member, shape, images.device) for member in range(self.ensemble)]
            latents = torch.stack(draws, dim=1)  # (B, E, 4, h, w)
        activations = self._extract(latents, prompts, canvas)  # {name: (B, T, C, h', w')}
        self._check(activations, images=images, latents=encoded)
        return {name: fit_to_image(x, self.sites[name].stride, images.shape[-2:]) for name, x in activations.items()}

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, 4, h, w) of images (B, 3, H, W), scaled as the network expects them: the first ensemble member's.

        They are those of the continued images. Raises what `forward` does.
        """
        check_images(images, self.parts.vae_scale_factor)
        latents = self._encode_images(extend_images(images, self.multiple), 1)[:, 0]
        self._check({}, images=images, latents=latents)
        return latents

    def extract_latents(
        self, latents: Tensor, prompts: Prompts | None = None, images: Tensor | None = None
    ) -> Activations:
        """Read the activations of latents, without the VAE.

        Gradients flow to the latents, to embeddings given as `prompts` and to those parameters of the UNet that require
        them.

        Args:
            latents: Where the trajectory starts: clean latents, or noise for 'generation'. With shape (B, 4, h, w), or
                (B, E, 4, h, w) with one for each ensemble member.
            prompts: One for all latents or one for each; None uses those of the constructor.
            images: What ControlNets look at, in [-1, 1], with shape (B, 3, 8h, 8w); needed only where there are such.

        Returns:
            {name: (B, T, C, h', w')}, where h' is ceil(h * VAE factor / stride).

        Raises:
            ValueError: There are ControlNets, but no images.
        """
        if self.controls and images is None:
            raise ValueError('ControlNets look at images; give those of the latents')
        activations = self._extract(latents, prompts, images)
        self._check(activations)
        return activations

    def read_latents(self, x_t: Tensor, timesteps: Tensor, prompts: Prompts | None = None) -> Activations:
        """Read the activations of latents as they are, each with a timestep of its own, whatever the trajectory.

        Gradients flow as in `extract_latents`, and to the timesteps.

        Args:
            x_t: Noised or clean latents, with shape (N, 4, h, w).
            timesteps: The network's indices, with shape (N,); fractions of them are possible.
            prompts: One for all latents or one for each; None uses those of the constructor.

        Returns:
            {name: (N, C, h', w')}, as in `extract_latents`.

        Raises:
            ValueError: There are ControlNets, for which `extract_latents` takes images.
        """
        if self.controls:
            raise ValueError('ControlNets look at images; use extract_latents, or leave out controlnet')
        conditioning, rows = self._choose(prompts, len(x_t))
        wanted = _wants_grad(self.network, x_t, timesteps, *conditioning.tensors)
        with torch.set_grad_enabled(wanted):
            activations = self._denoiser.read(x_t, timesteps, self._condition(conditioning, rows, x_t))
        return {name: activations[name] for name in self._order}

    def _extract(self, latents: Tensor, prompts: Prompts | None, images: Tensor | None) -> Activations:
        """`extract_latents` without the checks."""
        if latents.ndim == 4:
            latents = latents.unsqueeze(1).expand(-1, self.ensemble, -1, -1, -1)  # (B, E, 4, h, w)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))  # until the UNet, for the noise's sake
        b, e = latents.shape[:2]
        conditioning, rows = self._choose(prompts, b)
        guided = self._is_guided(prompts)
        views = {str(i): control.view(images) for i, control in enumerate(self.controls)}  # (B, 3, 8h, 8w) each
        folded = b * (len(self.timesteps) if self.trajectory.folds_timesteps else 1)
        fit = e if self.micro_batch is None or self._denoiser.average_draws else max(1, self.micro_batch // folded)
        total: Activations = {}
        with torch.set_grad_enabled(_wants_grad(self.network, latents, *conditioning.tensors)):
            for first in range(0, e, fit):  # a running mean, so that memory does not grow with E
                activations = self._read_members(
                    latents[:, first : first + fit], first, conditioning, rows, views, guided
                )
                for name, x in activations.items():  # (m, B, T, C, h, w)
                    part = x[0] if e == 1 else x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) / e
                    total[name] = total[name] + part if name in total else part
            return {name: total[name].to(activations[name].dtype) for name in self._order}

    def generate(self, size: tuple[int, int], prompt: Prompts | None = None) -> tuple[Activations, Tensor]:
        """Generate an image and read the activations on the way; they are those that `forward` gives.

        Args:
            size: Height and width of the image in pixels.
            prompt: None uses those of the constructor.

        Returns:
            {name: (1, T, C, h', w')}, and the clean latent (1, 4, h, w), see `latents.decode`. In pixel space it is the
            image (1, 3, H, W), which may exceed [-1, 1] a little.

        Raises:
            ValueError: The trajectory is another one than 'generation', there are several draws or ControlNets, or the
                UNet does not halve such a size evenly.
            FloatingPointError: NaN or infinity, if `check_finite`.
        """
        if not isinstance(self.trajectory, Generation):
            raise ValueError(f"images are generated with trajectory='generation', not {self.trajectory.name!r}")
        if self.ensemble > 1 or self.controls:
            raise ValueError('an image is generated from one draw, without ControlNets; set ensemble=1, controlnet=()')
        if any(side < 1 or side % self.multiple for side in size):
            raise ValueError(f'size is {tuple(size)}; height and width must be multiples of {self.multiple}')
        device = next(chain(self.network.parameters(), self.network.buffers())).device
        shape = (1, self.parts.latent_channels, *(side // self.parts.vae_scale_factor for side in size))
        noise = self._draw('noise', 0, shape, device)
        condition = self._condition(*self._choose(prompt, 1), noise)
        negative = None
        if self._is_guided(prompt):
            negative = self._condition(self._negative, torch.zeros(1, dtype=torch.long, device='cpu'), noise)
        with torch.set_grad_enabled(_wants_grad(self.network)):
            activations, latent = self.trajectory.generate(self._denoiser, noise, condition, negative=negative)
        self._check({**activations, 'the generated latent': latent})
        return activations, latent

    def _read_members(
        self,
        latents: Tensor,
        first: int,
        conditioning: Conditioning,
        rows: Tensor,
        views: Mapping[str, Tensor],
        guided: bool,
    ) -> Activations:
        """Activations (m, B, T, C, h, w) of the ensemble members from `first` on, with latents (B, m, 4, h, w)."""
        b, m = latents.shape[:2]
        rows = rows.repeat(m)
        views = {name: view.repeat(m, 1, 1, 1) for name, view in views.items()}
        noise = negative = None
        if self.trajectory.adds_noise:
            shape = (b, 1 if self.noise == 'seeded' else len(self.timesteps), *latents.shape[2:])
            noise = torch.cat([self._draw('noise', first + i, shape, latents.device) for i in range(m)])
        if guided:
            negative = self._condition(self._negative, torch.zeros_like(rows), latents) | {'views': views}
        activations = self.trajectory(
            self._denoiser,
            latents.transpose(0, 1).flatten(0, 1),  # (m*B, 4, h, w)
            self._condition(conditioning, rows, latents) | {'views': views, 'draws': m},
            noise=noise,  # (m*B, 1 or T, 4, h, w)
            negative=negative,
        )
        return {name: x.unflatten(0, (m, b)) for name, x in activations.items()}

    def _encode_images(self, images: Tensor, members: int) -> Tensor:
        """Latents (B, E, 4, h, w) of the first E ensemble members, float32; in pixel space the images themselves."""
        if self.vae is None:
            return images.float().unsqueeze(1).expand(-1, members, -1, -1, -1)
        posterior = self._posterior(images)
        return torch.stack([self._sample(posterior, member) for member in range(members)], dim=1)

    def _posterior(self, images: Tensor) -> Posterior:
        """The VAE's posterior, computed in its own dtype even under autocast, in which it might overflow."""
        images = images.to(self.vae.dtype)
        device = _autocast_device(images)
        with torch.set_grad_enabled(_wants_grad(self.vae, images)), torch.autocast(device, enabled=False):
            return latent_space(self.vae).encode(self.vae, images)

    def _sample(self, posterior: Posterior, member: int) -> Tensor:
        """One ensemble member's latent (B, 4, h, w), float32, scaled as the network expects it."""
        latent = posterior.mean.float()
        if self.vae_sample == 'sample' and posterior.std is not None:
            latent = latent + posterior.std.float() * self._draw('posterior', member, latent.shape, latent.device)
        return scale_latents(self.vae, latent) if self.scale_latent else latent

    def _draw(self, purpose: str, member: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal noise of `shape`, the batch first. Seeded noise is the same for the whole batch."""
        if self.noise == 'random':
            return torch.randn(shape, device=device)
        return upload(seeded_noise(shape[1:], self.seed, purpose, member), device).expand(shape)

    def _encode(self, prompts: Prompts, encoder: Callable[[Sequence[str]], Conditioning] | None = None) -> Conditioning:
        if isinstance(prompts, Tensor):
            prompts = Conditioning(prompts)
        if not isinstance(prompts, Conditioning):
            return (encoder or self.prompt_encoder)(_texts(prompts))
        if self.vae is None and prompts.embeds.shape[1]:
            raise ValueError(f'{self.parts.source.location} reads no prompt; leave out the embedding')
        return prompts

    def _choose(self, prompts: Prompts | None, batch: int) -> tuple[Conditioning, Tensor]:
        """Embeddings, and which row of them each of `batch` images takes, with shape (batch,)."""
        encoded, texts = _texts(self._prompt), _texts(prompts)
        if prompts is None:
            if self.conditioning is None:
                raise ValueError('the extractor has no prompt; give one with each call')
            conditioning, rows = self.conditioning, [0]
            if (n := len(conditioning.embeds)) > 1:
                raise ValueError(f'the extractor has {n} prompts; say with each call which image takes which')
        elif texts and set(texts) <= set(encoded):
            conditioning, rows = self.conditioning, [encoded.index(text) for text in texts]
        else:
            conditioning = self._encode(prompts)
            rows = list(range(len(conditioning.embeds)))
        if len(rows) not in (1, batch):
            raise ValueError(f'{len(rows)} prompts for a batch of {batch}; give one for all or one for each')
        return conditioning, torch.tensor(rows, device='cpu').expand(batch)

    def _is_guided(self, prompts: Prompts | None) -> bool:
        """Whether guidance changes anything: not where the prompts of a call are the negative prompt itself."""
        texts = set(_texts(self._prompt if prompts is None else prompts))  # none of embeddings
        return self._negative is not None and not (texts and texts == set(_texts(self._negative_prompt)))

    def _condition(self, conditioning: Conditioning, rows: Tensor, latents: Tensor) -> Condition:
        if self._is_transformer:
            return conditioning.rows(rows, latents.device, network_dtype(self.network))
        factor = self.parts.vae_scale_factor
        size = latents.shape[-2] * factor, latents.shape[-1] * factor
        return conditioning.unet_kwargs(rows, size, latents.device, network_dtype(self.network))

    def _check(
        self, activations: Mapping[str, Tensor], *, images: Tensor | None = None, latents: Tensor | None = None
    ) -> None:
        """Raise for images out of range, and for NaN and infinity in what was made of them, unless it is switched off.

        Waits for the device, once.
        """
        if not self.check_finite or next(iter(activations.values()), latents).is_meta:
            return
        extremes = [] if images is None else [x.detach().float() for x in images.aminmax()]
        computed = {} if latents is None or self.vae is None else {LATENT: (latents, self.vae.dtype)}
        computed |= {name: (x, self._computed_in(x)) for name, x in activations.items()}
        finite = [x.isfinite().all().float() for x, _ in computed.values()]
        numbers = torch.stack([*extremes, *finite]).tolist()
        if extremes:
            check_range(*numbers[:2])
        wrong = [name for name, ok in zip(computed, numbers[len(extremes) :], strict=True) if not ok]
        if wrong:
            names = wrong[:1] if wrong[0] == LATENT else wrong  # from which the others have it
            dtype = computed[wrong[0]][1]
            remedy = (
                "the images or the model's weights are damaged"
                if dtype in (torch.float32, torch.float64)
                else "use dtype 'bfloat16' or 'float32' (for a VAE alone, set force_upcast in its config)"
            )
            raise FloatingPointError(f'NaN or infinity in {", ".join(names)} computed in {dtype}: {remedy}')

    def _computed_in(self, x: Tensor) -> torch.dtype:
        """The dtype in which the UNet made an activation."""
        device = _autocast_device(x)
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else network_dtype(self.network)


def _wants_grad(module: nn.Module, *inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in chain(inputs, module.parameters()))


def _autocast_device(x: Tensor) -> str:
    return 'cpu' if x.is_meta else x.device.type  # the meta device has no autocast of its own


def _refuse(model: str | Path, **options: Any) -> None:
    """Raise a ValueError for options that have no effect, or none that could be meant, in pixel space."""
    if unsupported := [name for name, value in options.items() if value]:
        raise ValueError(f'{model} works on pixels, without VAE and text encoder; leave out {", ".join(unsupported)}')


def _check_tiny(vae: AutoencoderTiny, scale_latent: bool, vae_tiling: bool) -> None:
    """Raise a ValueError for options that an `AutoencoderTiny` does not have."""
    if not scale_latent:
        raise ValueError('scale_latent=False needs the VAE of the model; the latents of an AutoencoderTiny come scaled')
    if vae_tiling and vae.config.latent_channels != 4:
        raise ValueError(
            f'vae_tiling: diffusers encodes tiles only to 4 channels, not {vae.config.latent_channels}; leave it out, '
            'an AutoencoderTiny needs little memory'
        )


def _refuse_for_transformer(model: str | Path, **options: Any) -> None:
    """Raise a ValueError for options that are for UNets."""
    if unsupported := [name for name, value in options.items() if value]:
        raise ValueError(
            f'{model} is a transformer, for which {", ".join(unsupported)} cannot be used; leave it out (attention '
            'maps are activations of their own there, such as vit-block0-cross-map)'
        )


def _scaled(source: LoraSource) -> tuple[str | Path, float]:
    return (source, 1.0) if isinstance(source, str | Path) else (source[0], float(source[1]))


def _texts(prompts: Prompts | None) -> list[str]:
    """Prompts as a list; empty for embeddings."""
    if prompts is None or isinstance(prompts, Tensor | Conditioning):
        return []
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _describe(prompts: Prompts | None) -> list[str] | str | None:
    """Prompts for a fingerprint: the texts, or a digest of the embeddings."""
    if isinstance(prompts, Conditioning):
        parts = prompts.tensors
    elif isinstance(prompts, Tensor):
        parts = [prompts]
    else:
        return prompts if prompts is None else _texts(prompts)
    digest = hashlib.sha256(b''.join(x.detach().cpu().float().numpy().tobytes() for x in parts))
    return f'sha256:{digest.hexdigest()[:16]}'


def _use_channels_last(part: nn.Module) -> None:
    """Store the weights of convolutions of images so; those of videos, in QwenImage's VAE, are as they are."""
    for parameter in part.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _compile_unread_blocks(network: nn.Module, read: Iterable[str], options: Mapping[str, Any]) -> None:
    """Compile the transformer blocks, except those with a module that is read: hooks do not work in compiled code."""
    read = [f'{path}.' for path in read]
    blocks = {site.block for site in sites(network).values() if site.block}
    for name, module in network.named_modules():
        is_block = name in blocks or isinstance(module, BasicTransformerBlock)
        if is_block and not any(path.startswith(f'{name}.') for path in read):
            module.compile(**options)


def _check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f'{name} is {value!r}; it is {" or ".join(map(repr, allowed))}')
