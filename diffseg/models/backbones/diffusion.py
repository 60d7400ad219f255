"""A pretrained diffusion model as an mmseg backbone."""

import copy
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffseg.cache import build_cache
from diffseg.captions import Captions
from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import Interpolation, resize_images
from diffseg.diffusion.layer_sets import Reading, split_timesteps
from diffseg.diffusion.lora import TARGET_MODULES, add_lora
from diffseg.diffusion.options import group_options
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.schedules import Timestep

from ..captions import split_rows
from .conditioners import build_prompt
from .frozen import FrozenBackbone, freeze, reached, verify_channels


@MODELS.register_module()
class DiffusionBackbone(FrozenBackbone):
    """Activations of a diffusion model's UNet as plain feature maps.

    ```text
    image (B, 3, H, W) in [-1, 1] -> DiffusionExtractor -> {layer: (B, T, C, h, w)} -> L maps (B, T*C, h, w)
    ```

    Maps are timestep-major, in the order of `layers` (aggregated attention that is not listed comes last), and in the
    dtype of the image. If layers have timesteps of their own, T differs between maps, which the necks support; the UNet
    still runs once for all timesteps. The data preprocessor brings images to [-1, 1] with `mean` and `std` of 127.5
    each and `bgr_to_rgb=True`.

    The network is a child module, so it follows `.to()`, autocast and distributed wrappers; it stays in evaluation mode
    and out of checkpoints, which hold a fingerprint of it instead. The frozen tensors are buffers, not parameters; a
    deep copy of the backbone shares them.

    Args:
        model: preset, hub id, diffusers folder or checkpoint file, see `DiffusionExtractor`.
        layers: names of activations, in the order of the maps; with timesteps of their own as in
            `'up-level1-upsampler-out@50'` or `'up-level1-upsampler-out@100+200'`, see `split_timesteps`.
        timesteps: timesteps of the UNet; may be omitted if every layer has its own.
        channels: expected channels of each layer (C, without the timesteps); verified if given.
        input_size: side or (height, width) to which images are resized, aspect ratio not kept.
        interpolation: by which they are resized, 'bilinear' as tensors in GDF or 'bicubic' as picture files in GDF and
            DIFT, see `resize_images`. The latter is for images at the size of their files, so that each member of an
            ensemble resizes them to its `input_size`.
        frozen: train nothing. Otherwise `dtype` is 'float32' by default.
        trainable: with `frozen=False`, patterns in the style of `fnmatch` on the UNet's parameter names, such as
            `up_blocks.1.*`; all of the UNet by default. Parameters that no activation depends on stay frozen.
        prompt: see `DiffusionExtractor`; or `dict(type='class_names', dataset='ADE20KDataset', template='{}')`, the
            names of a data set's classes joined with commas; or `dict(type='captions', file=...)`, the caption of each
            image, for which images have a fourth channel, see `CaptionPreProcessor`.
        conditioner: replaces the prompt by a module that is trained and saved, with gradients through the UNet: a
            config of `LearnedPrompts`, `TextAdapter` or another module that returns `Conditioning`.
        lora: train LoRA layers in the frozen UNet: `dict(r=8, target_modules=['to_q', ...])`, by default of the
            projections of attention, see `add_lora`. Needs peft. `dtype='bfloat16'` saves memory; in 'float16'
            gradients underflow unless the loss is scaled.
        train_noise: noise in training mode, where 'random' augments; by default the extractor's `noise`.
        cache: folder of cached maps, keyed by the bytes of the image and everything else that they depend on; or
            `dict(path=..., dtype='float16', max_size='20GB')`, see `FeatureCache`. Maps are rounded to that dtype. Not
            with random noise, nor with anything trainable in the backbone.
        check_fingerprint: reaction to a checkpoint of another network or other settings: 'error', or 'warn' if the
            difference does not matter, such as float32 instead of bfloat16.
        output_image: return the images after the maps, as they came, for `UpsamplingNeck`.
        extractor: further options of `DiffusionExtractor`, and fields of its `Weights` and `Runtime`: `trajectory`,
            `ensemble`, `noise`, `seed`, `dtype`, `variant`, `gradient_checkpointing`, ...

    Attributes:
        layers: name of each map, followed by its timesteps if they differ between maps.
        channels: channels C of each map; None for attention maps with an unknown number of keys.

    Raises:
        ValueError: `channels` do not match the model, the trainable parts are empty or contradictory, or maps cannot be
            cached because they change.
    """

    def __init__(
        self,
        model: str,
        layers: Sequence[str],
        timesteps: Sequence[Timestep] | None = None,
        *,
        channels: Sequence[int] | None = None,
        input_size: int | Sequence[int] | None = None,
        interpolation: Interpolation = 'bilinear',
        frozen: bool = True,
        trainable: Sequence[str] | None = None,
        prompt: Any = '',
        conditioner: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        train_noise: Literal['seeded', 'random'] | None = None,
        cache: str | Mapping[str, Any] | None = None,
        check_fingerprint: Literal['error', 'warn'] = 'error',
        output_image: bool = False,
        **extractor: Any,
    ) -> None:
        super().__init__(check_fingerprint)
        self.output_image = output_image
        if frozen and trainable is not None:
            raise ValueError(f'trainable={list(trainable)} has no effect with frozen=True; set frozen=False')
        if lora is not None and not frozen:
            raise ValueError('lora is for a frozen UNet; leave out lora, or frozen=False')
        prompt = build_prompt(prompt)
        self.captions = prompt if isinstance(prompt, Captions) else None
        constant = prompt if self.captions is None and conditioner is None else None
        readings, timesteps = split_timesteps(layers, timesteps)
        names = list(dict.fromkeys(reading.layer for reading in readings))
        if not frozen:
            extractor.setdefault('dtype', 'float32')  # in which the steps of an optimizer are not rounded away
        self.extractor = DiffusionExtractor(model, names, timesteps, prompt=constant, **group_options(extractor)).eval()
        self._add_readings(readings, timesteps)
        if self.captions is not None:
            self.extractor.prompt_encoder.prepare(self.captions.texts)
        self.conditioner: nn.Module | None = None
        if conditioner is not None:
            self._add_conditioner(conditioner, prompt)
        example = self._example()
        described = self.extractor.describe(None if example is None else example.tokens)
        self.channels = [described[layer].channels for layer, _ in self._readings]
        if channels is not None:
            verify_channels(self.layers, self.channels, channels)
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        if interpolation not in get_args(Interpolation):
            raise ValueError(
                f'interpolation is {interpolation!r}; it is {" or ".join(map(repr, get_args(Interpolation)))}'
            )
        self.interpolation = interpolation
        self.noise = self.extractor.noise
        self.train_noise = train_noise or self.noise
        if self.train_noise not in ('seeded', 'random'):
            raise ValueError(f"train_noise is {train_noise!r}; it is 'seeded' or 'random'")
        self.trained: dict[str, Any] = {}  # entries of the fingerprint for trained parts
        if lora is not None:
            freeze(self.extractor, trainable=self._add_lora(**lora))
        elif not frozen:
            self.trained['trainable'] = ['*'] if trainable is None else list(trainable)
            freeze(self.extractor, trainable=self._choose(self.trained['trainable']))
            for module in self.extractor.network.modules():
                if isinstance(module, nn.GroupNorm):
                    module.register_forward_pre_hook(_contiguous)
        else:
            freeze(self.extractor)
        self.cache = build_cache(cache)
        if self.cache is not None:
            self._check_cacheable()

    def reading(self, layers: Sequence[str], timesteps: Sequence[int] | None = None) -> 'DiffusionBackbone':
        """A backbone that reads other layers at other timesteps, and shares the frozen network and the cache.

        Args:
            layers: as those of the constructor.
            timesteps: likewise.

        Raises:
            ValueError: unknown layers or timesteps, or a network with trainable parts.
        """
        if self.trained or self.conditioner is not None:
            raise ValueError('only a frozen network is shared; build another backbone for other layers')
        readings, timesteps = split_timesteps(layers, timesteps)
        names = list(dict.fromkeys(reading.layer for reading in readings))
        extractor = self.extractor.reading(names, timesteps)
        other = copy.deepcopy(self, {id(self.extractor): extractor})
        other._add_readings(readings, timesteps)
        described = other.extractor.sites
        other.channels = [described[layer].channels for layer, _ in other._readings]
        return other

    def _add_readings(self, readings: Sequence[Reading], timesteps: Sequence[Timestep]) -> None:
        """Set the resolved layers and timesteps of each map, and its name."""
        every = tuple(self.extractor.timesteps)
        resolved = dict(zip(timesteps, every, strict=True))
        names = dict(zip(dict.fromkeys(layer for layer, _ in readings), self.extractor.layers, strict=False))
        attention = self.extractor.layers[len(names) :]
        self._readings = [Reading(names[layer], tuple(resolved[t] for t in at)) for layer, at in readings]
        self._readings += [Reading(name, every) for name in attention]
        self.layers = [reading.label(every) for reading in self._readings]

    def _add_conditioner(self, config: Mapping[str, Any], prompt: Any) -> None:
        """Build a conditioner that fits the network and learns.

        Raises:
            ValueError: a prompt is given as well, the network does not read one sequence of tokens, sizes do not match,
                or a parameter gets no gradient.
        """
        if prompt != '':
            raise ValueError(f'a conditioner replaces the prompt; leave out prompt={prompt!r}, or the conditioner')
        if self.extractor.vae is None:
            raise ValueError('a model of pixel space reads no prompt; leave out the conditioner')
        network = self.extractor.network
        placeholder = placeholder_conditioning({**network.config, '_class_name': type(network).__name__})
        if not placeholder.embeds.shape[1] or placeholder.embeds_2 is not None:
            read = 'two sequences of tokens' if placeholder.embeds.shape[1] else 'a class label'
            raise ValueError(f'a {type(network).__name__} reads {read}, not a prompt; leave out the conditioner')
        self.conditioner = MODELS.build(config)
        sizes, expected = (
            {'dim': each.embeds.shape[-1], 'pooled_dim': None if each.pooled is None else each.pooled.shape[-1]}
            for each in (self.conditioner(), placeholder)
        )
        if sizes != expected:
            raise ValueError(f'{config["type"]} has {sizes}, but the network of this model needs {expected}')
        leaves = self._leaves()
        if lost := [name for name, parameter in self.conditioner.named_parameters() if parameter not in leaves]:
            raise ValueError(
                f'no chosen layer depends on {lost} of {config["type"]}, so that they would not be trained; choose a '
                f'layer after cross-attention'
            )

    def _example(self) -> Conditioning | None:
        """Example conditioning of one image; None if every call passes its prompts."""
        if self.conditioner is not None:
            return self.conditioner()
        if self.captions is not None:
            return self.extractor.prompt_encoder(self.captions.texts[:1])
        return None if self.extractor.conditioning is None else self.extractor.conditioning.first()

    def _leaves(self) -> set[Tensor]:
        """Tensors that require a gradient and influence the maps."""
        device = self.extractor.network.device
        side, factor = self.extractor.multiple, self.extractor.parts.vae_scale_factor
        latent = torch.zeros(1, self.extractor.parts.latent_channels, side // factor, side // factor, device=device)
        image = torch.zeros(1, 3, side, side, device=device)
        with torch.enable_grad(), torch.device('cpu'):  # where noise is drawn, also for networks on the meta device
            return reached(self.extractor.extract_latents(latent, self._example(), image).values())

    def _choose(self, patterns: Sequence[str]) -> set[str]:
        """Names, within the extractor, of the parameters to train.

        Raises:
            ValueError: a pattern matches no parameter that influences the maps, or the UNet is not in float32.
        """
        if self.extractor.network.dtype != torch.float32:
            raise ValueError(
                f"training parts of the UNet needs dtype='float32', not {self.extractor.network.dtype}; mmengine's "
                f'AmpOptimWrapper still computes in lower precision, and lora works with any dtype'
            )
        if self.extractor.quantization is not None:
            raise ValueError(
                f'quantized weights ({self.extractor.quantization}) cannot be trained; leave out quantization, or '
                'train lora beside them'
            )
        influential = self._influential()
        selected = {pattern: [name for name in influential if fnmatchcase(name, pattern)] for pattern in patterns}
        if void := [pattern for pattern, names in selected.items() if not names]:
            raise ValueError(
                f'trainable patterns {void} select no parameter of the UNet that the chosen layers depend on; such are '
                f'{influential[0]!r} to {influential[-1]!r}'
            )
        return {f'network.{name}' for names in selected.values() for name in names}

    def _add_lora(self, target_modules: Sequence[str] = TARGET_MODULES, **options: Any) -> set[str]:
        """Add LoRA layers to modules that influence the maps; returns their parameters' names in the extractor."""
        names = add_lora(self.extractor.network, self._influential_layers(), target_modules=target_modules, **options)
        added = self.extractor.network.peft_config['default']
        self.trained['lora'] = {'r': added.r, 'lora_alpha': added.lora_alpha, 'target_modules': list(target_modules)}
        return {f'network.{name}' for name in names}

    def _influential(self) -> list[str]:
        """Names of the UNet's parameters that the maps depend on."""
        unet = self.extractor.network.requires_grad_(True)
        leaves = self._leaves()
        return [name for name, parameter in unet.named_parameters() if parameter in leaves]

    def _influential_layers(self) -> list[str]:
        """Names of the linear layers and convolutions of the UNet that the maps depend on, also of quantized ones."""
        unet = self.extractor.network.requires_grad_(True)
        marks: dict[str, Tensor] = {}  # zeros that are added to their outputs

        def mark(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + marks.setdefault(name, output.new_zeros((), requires_grad=True))

        layers = {name: x for name, x in unet.named_modules() if isinstance(x, nn.Linear | nn.Conv2d)}
        hooks = [layer.register_forward_hook(partial(mark, name)) for name, layer in layers.items()]
        try:
            leaves = self._leaves()
        finally:
            for hook in hooks:
                hook.remove()
        return [name for name in layers if marks.get(name) in leaves]

    def forward(self, x: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, ...]:
        """Extract.

        Args:
            x: images with shape (B, 3, H, W) in [-1, 1], RGB; with captions (B, 4, H, W), see `CaptionPreProcessor`.
            prompts: one for each image; None takes the configured one.

        Returns:
            L maps with shapes (B, T*C, h, w), one for each layer; with `output_image` then the images (B, 3, H, W),
            which the cells of every map tile.
        """
        if self.captions is not None and prompts is None:
            x, rows = split_rows(x, len(self.captions.texts))
            prompts = [self.captions.texts[row] for row in rows]
        self.extractor.noise = self.train_noise if self.training else self.noise
        maps = self._extract(x, prompts) if self.cache is None else self._fetch(x, prompts)
        return (*maps, x) if self.output_image else maps

    def _fetch(self, x: Tensor, prompts: Sequence[str] | None) -> tuple[Tensor, ...]:
        """The maps, from the cache where it has them."""
        self._check_cacheable()  # again: a subclass or a user may have added parameters
        context = self._cache_context()
        if prompts is not None:
            context['prompt'] = None  # part of the key of each image instead
            context['text_encoder'] = self.extractor.prompt_encoder.fingerprint
        return self.cache.fetch(x, context, self._extract, self.layers, prompts)

    def _extract(self, x: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, ...]:
        """The maps, without the cache."""
        if self.input_size is not None:
            x = resize_images(x, self.input_size, self.interpolation)
        if prompts is None and self.conditioner is not None:
            prompts = self.conditioner()
        with self.resident(x.device):
            activations = self.extractor(x, prompts)  # {name: (B, T, C, h, w)}
        every = tuple(self.extractor.timesteps)
        maps = []
        for layer, timesteps in self._readings:
            activation = activations[layer]
            if timesteps != every:
                activation = torch.stack([activation[:, every.index(t)] for t in timesteps], dim=1)
            maps.append(activation.flatten(1, 2).to(x.dtype))  # (B, T*C, h, w)
        return tuple(maps)

    def _check_cacheable(self) -> None:
        """Raise a ValueError if the maps of an image may differ between calls."""
        for name in ('noise', 'train_noise'):
            if getattr(self, name) == 'random':
                raise ValueError(
                    f"{name}='random' gives other maps in each call, which cannot be cached; set it to 'seeded', or "
                    f'leave out the cache'
                )
        if self.conditioner is not None:
            raise ValueError(
                f'maps depend on the state of {type(self.conditioner).__name__}, so that they cannot be cached; leave '
                f'out the cache'
            )
        trained = next((name for name, parameter in self.named_parameters() if parameter.requires_grad), None)
        if trained is not None:
            raise ValueError(
                f'{trained} is trained, so that maps change and cannot be cached; leave out the cache, or freeze '
                f'the backbone'
            )

    def _cache_context(self) -> dict[str, Any]:
        """Everything that maps depend on, except the image.

        In addition to the fingerprint: the noise, and the configurations, whose heads, groups and betas do not show in
        any weight.
        """
        parts = self.extractor.parts
        configs = (self.extractor.network.config, parts.vae_config, parts.scheduler_config)
        return {
            **self.fingerprint,
            **self.extractor.fingerprint,
            'layers': self.layers,
            'configs': [{key: value for key, value in (config or {}).items() if key[0] != '_'} for config in configs],
            'vae_dtype': None if self.extractor.vae is None else str(self.extractor.vae.dtype),
            'input_size': self.input_size,
            'interpolation': self.interpolation,
        }

    # Parts that are trained now may have been frozen in the checkpoint; older ones lack the text encoder.
    optional = ('lora', 'trainable', 'text_encoder')

    @property
    def network(self) -> DiffusionExtractor:
        """The frozen network."""
        return self.extractor

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that a head trained on the maps depends on; noise and memory format may differ."""
        settings = {**self.extractor.fingerprint, 'layers': self.layers, **self.trained}
        if self.captions is not None:
            settings['prompt'] = 'captions'  # of any images
            settings['text_encoder'] = self.extractor.prompt_encoder.fingerprint
        if self.conditioner is not None:
            settings['conditioner'] = self.conditioner.fingerprint
        fingerprint = json.loads(json.dumps(settings))
        return {key: value for key, value in fingerprint.items() if key not in ('noise', 'seed', 'memory_format')}


def _contiguous(norm: nn.GroupNorm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Make the input of a trained norm contiguous: PyTorch's CPU kernel crashes on channels-last without gradient.

    This is the format of the output of attention in a network of pixels. On other devices inputs are unchanged.
    """
    return tuple(x.contiguous() if x.device.type == 'cpu' else x for x in inputs)
