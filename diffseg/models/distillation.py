"""Distillation of a UNet to one pass without noise (CleanDIFT, arXiv 2412.03439)."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from mmseg.registry import MODELS
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffseg.diffusion.schedules import NoiseSchedule, add_noise
from diffseg.diffusion.timestep_heads import TimestepHeads
from diffseg.diffusion.trajectories import Activations, seeded_noise
from diffseg.files import whole_file

UNIT = 1000  # timesteps, of the learned one
NETWORK_FILE, HEADS_FILE = 'unet.safetensors', 'heads.safetensors'
EMBEDDING = 'time_embedding.linear_1'  # the layer of a UNet that reads the features of its timestep


def stratified_timesteps(batch: int, count: int, low: int, high: int, device: torch.device | str) -> Tensor:
    """Random timesteps (batch, count), int64, the i-th of them in the i-th of `count` equal parts of [low, high)."""
    parts = torch.arange(count, device=device) + torch.rand(batch, count, device=device)
    return (low + parts * (high - low) / count).long()


def mean_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Mean over cells of the cosine of the vectors of two maps (N, C, h, w): shape (N,), in float32."""
    return F.cosine_similarity(x.float(), y.float(), dim=1).flatten(1).mean(1)


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network by diffusers' names, with the LoRA layers in it added to those that they change."""
    tensors = chain(network.named_parameters(), network.named_buffers())
    state = {name.replace('.base_layer.', '.'): x.detach() for name, x in tensors if '.lora_' not in name}
    for name, module in network.named_modules():
        if hasattr(module, 'get_delta_weight'):
            weight = state[f'{name}.weight']
            state[f'{name}.weight'] = (weight.float() + module.get_delta_weight('default').detach().float()).to(weight)
    return state


def at_timestep(
    state: Mapping[str, Tensor], features: nn.Module, timestep: float, replacement: float
) -> dict[str, Tensor]:
    """Weights with which a UNet is at another timestep what it is with `state` at `timestep`, and nowhere else.

    Args:
        state: Of the UNet.
        features: Its module `time_proj`.
        timestep: Any, whole or not.
        replacement: The other one.

    Returns:
        The weights, in which the bias of the first layer behind the features differs.
    """
    weight, bias = state[f'{EMBEDDING}.weight'], state[f'{EMBEDDING}.bias']
    both = features(torch.tensor([timestep, replacement], device=weight.device))  # (2, C)
    change = weight.float() @ (both[0] - both[1]).float()
    return {**state, f'{EMBEDDING}.bias': (bias.float() + change).to(bias)}


@MODELS.register_module()
class CleanDistiller(BaseModel):
    """Teach a copy of a UNet to see in a clean latent what the frozen UNet sees in noised ones (CleanDIFT, section 3).

    ```text
    images -> latents -> noised at T timesteps each -> teacher's UNet -> maps (B*T, C, h, w) --------------> cosine
                   '---> student's UNet, at its one timestep -> maps (B, C, h, w) -> heads at T timesteps ----'
    ```

    The loss is minus the mean cosine over cells, timesteps and images, summed over maps. Unlike in the released code,
    where the student runs T times on the same latent, it runs once.

    The student's timestep is a parameter in units of 1000 timesteps. Unlike in the released code, where it is the index
    itself, which Adam cannot change at a learning rate of 1e-5: in float32, 261 + 1e-5 is 261.

    Args:
        backbone: config of the student, a `DiffusionBackbone` with a UNet of which parts are trained (`frozen=False`,
            `trainable`, `lora`), without timesteps and trajectory. Its layers are the maps.
        teacher: options in which the frozen backbone differs, such as `dtype='bfloat16'`.
        heads: options of `TimestepHeads`; None trains the student's maps to be the teacher's at all timesteps at once.
        timestep: the student's, when training begins.
        learn_timestep: whether it is trained.
        timesteps_per_image: T, one in each of as many equal parts of `timestep_range`.
        timestep_range: the first of the teacher's timesteps and the one behind the last.
        data_preprocessor: see `BaseModel`.

    Raises:
        ValueError: nothing is trained in the backbone, it is no UNet with a schedule of betas, or an option is outside
            its values.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        teacher: Mapping[str, Any] | None = None,
        *,
        heads: Mapping[str, Any] | None,
        timestep: int = 261,
        learn_timestep: bool = True,
        timesteps_per_image: int = 3,
        timestep_range: tuple[int, int] = (1, 999),
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        student = {**backbone, 'timesteps': [timestep], 'trajectory': 'clean'}
        self.backbone = MODELS.build(student)
        if not self.backbone.trained:
            raise ValueError('nothing of the backbone is trained; set frozen=False, or lora=dict(r=8)')
        trained = ('frozen', 'trainable', 'lora', 'gradient_checkpointing')
        frozen = {name: value for name, value in student.items() if name not in trained}
        self.teacher = MODELS.build({**frozen, **(teacher or {})})
        extractor = self.backbone.extractor
        extractor.vae = self.teacher.extractor.vae  # one is enough
        self.schedule = extractor.trajectory.schedule
        if not isinstance(self.schedule, NoiseSchedule) or not hasattr(extractor.network, 'time_proj'):
            raise ValueError(
                f'the network of {backbone["model"]} is a {type(extractor.network).__name__}; only UNets with a '
                'schedule of betas are distilled'
            )
        low, high = timestep_range
        if not 0 <= low < high <= len(self.schedule) or not 1 <= timesteps_per_image <= high - low:
            raise ValueError(
                f'timestep_range is {tuple(timestep_range)} for {timesteps_per_image} timesteps per image; it has at '
                f'least so many, within 0 to {len(self.schedule)}'
            )
        self.timesteps_per_image = timesteps_per_image
        self.timestep_range = (low, high)
        self.learned_timestep = nn.Parameter(torch.tensor(timestep / UNIT), requires_grad=learn_timestep)
        channels = dict(zip(self.backbone.layers, self.backbone.channels, strict=True))
        self.heads = None if heads is None else TimestepHeads(channels, **heads)

    @property
    def timestep(self) -> Tensor:
        """The student's timestep."""
        return self.learned_timestep * UNIT

    def forward(
        self, inputs: Tensor, data_samples: Sequence[BaseDataElement] | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | Sequence[BaseDataElement] | Activations:
        """Run in one of mmengine's modes.

        Args:
            inputs: images in [-1, 1], RGB, with shape (B, 3, H, W).
            data_samples: with `caption_row`, see `LoadCaption`, if the backbone's prompt is captions.
            mode: 'loss'; 'predict', which measures the agreement with the teacher; or 'tensor', the student's maps.

        Returns:
            The loss and the mean cosine; the samples, see `predict`; or {name: (B, C, h, w)}.
        """
        self.teacher.extractor.noise = 'random' if self.training else 'seeded'  # of the draw from the VAE's posterior
        latents = self.teacher.extractor.encode(inputs)  # (B, 4, h, w)
        prompts = self._prompts(data_samples)
        if mode == 'loss':
            return self.loss(latents, prompts)
        if mode == 'predict':
            return self.predict(latents, prompts, data_samples)
        return self.student_maps(latents, prompts)

    def loss(self, latents: Tensor, prompts: Sequence[str] | None) -> dict[str, Tensor]:
        """The loss, and the mean cosine over maps, of latents (B, 4, h, w) at fresh timesteps with fresh noise."""
        t = self.timesteps_per_image
        timesteps = stratified_timesteps(len(latents), t, *self.timestep_range, latents.device)  # (B, T)
        noise = torch.randn(len(latents), t, *latents.shape[1:], device=latents.device)
        targets = self.teacher_maps(latents, timesteps, noise, prompts)
        maps = self.student_maps(latents, prompts)
        cosines = torch.stack([x.mean() for x in self._cosines(maps, targets, timesteps).values()])
        return {'loss': -cosines.sum(), 'cosine': cosines.detach().mean()}

    @torch.no_grad()
    def predict(
        self, latents: Tensor, prompts: Sequence[str] | None, data_samples: Sequence[BaseDataElement]
    ) -> Sequence[BaseDataElement]:
        """Measure how the maps agree with the teacher's, at the middle of each part of the timesteps.

        The noise is the same for all images and calls. Samples get three mean cosines over maps, cells and timesteps:
        `cosine` of the student's maps behind the heads, `cosine_plain` of those before them, and `cosine_frozen` of the
        frozen UNet's on the clean latent.
        """
        (low, high), t = self.timestep_range, self.timesteps_per_image
        centres = torch.tensor([int(low + (i + 0.5) * (high - low) / t) for i in range(t)], device=latents.device)
        timesteps = centres.expand(len(latents), -1)  # (B, T)
        noise = torch.stack([seeded_noise(latents.shape[1:], 0, 'validation', i) for i in range(t)]).to(latents.device)
        targets = self.teacher_maps(latents, timesteps, noise.expand(len(latents), -1, -1, -1, -1), prompts)
        maps = self.student_maps(latents, prompts)
        start = torch.full((len(latents),), self.backbone.extractor.timesteps[0], device=latents.device)
        frozen = self.teacher.extractor.read_latents(latents, start, prompts)
        measured = {
            'cosine': self._cosines(maps, targets, timesteps),
            'cosine_plain': self._plain_cosines(maps, targets),
            'cosine_frozen': self._plain_cosines(frozen, targets),
        }
        for name, cosines in measured.items():
            means = torch.stack(list(cosines.values())).mean(0).view(-1, t).mean(1)  # (B,)
            for sample, mean in zip(data_samples, means.tolist(), strict=True):
                sample.set_field(mean, name)
        return data_samples

    @torch.no_grad()
    def teacher_maps(
        self, latents: Tensor, timesteps: Tensor, noise: Tensor, prompts: Sequence[str] | None
    ) -> Activations:
        """The teacher's maps {name: (B*T, C, h, w)} at timesteps (B, T), with noise (B, T, 4, h, w)."""
        alpha_bar = self.schedule.alphas_cumprod[timesteps.cpu()].view(*timesteps.shape, 1, 1, 1)
        x_t = add_noise(latents.unsqueeze(1), noise, alpha_bar).flatten(0, 1)  # (B*T, 4, h, w)
        if prompts is not None:
            prompts = [prompt for prompt in prompts for _ in range(timesteps.shape[1])]
        return self.teacher.extractor.read_latents(x_t, timesteps.flatten(), prompts)

    def student_maps(self, latents: Tensor, prompts: Sequence[str] | None) -> Activations:
        """The student's maps {name: (B, C, h, w)} of clean latents."""
        return self.backbone.extractor.read_latents(latents, self.timestep.expand(len(latents)), prompts)

    def _cosines(self, maps: Activations, targets: Activations, timesteps: Tensor) -> Activations:
        """Mean cosines (B*T,) of the student's maps behind the heads and the teacher's, by name."""
        if self.heads is None:
            return self._plain_cosines(maps, targets)
        embedding = self.heads.embed(timesteps.flatten())  # (B*T, width)

        def measure(name: str, x: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
            repeated = x.repeat_interleave(len(target) // len(x), 0)
            return mean_cosine(self.heads.apply_head(name, repeated, embedding), target)

        if not self.backbone.extractor.network.is_gradient_checkpointing:
            return {name: measure(name, x, targets[name], embedding) for name, x in maps.items()}
        return {
            name: checkpoint(measure, name, x, targets[name], embedding, use_reentrant=False)
            for name, x in maps.items()
        }

    def _plain_cosines(self, maps: Activations, targets: Activations) -> Activations:
        """Mean cosines (B*T,) of maps (B, C, h, w) and the teacher's, by name."""
        t = self.timesteps_per_image
        return {name: mean_cosine(x.repeat_interleave(t, 0), targets[name]) for name, x in maps.items()}

    def _prompts(self, data_samples: Sequence[BaseDataElement] | None) -> list[str] | None:
        """The captions of images; None for the backbone's prompt."""
        if (captions := self.backbone.captions) is None:
            return None
        rows = [sample.get('caption_row') for sample in data_samples or []]
        if not rows or None in rows:
            raise ValueError('the prompt is captions, but images come without; end the pipeline with LoadCaption')
        return [captions.texts[row] for row in rows]

    def export(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the student for `network_weights`, and its heads, if there are any, for `TimestepHeads.load`.

        The weights are those of the whole UNet, with LoRA layers merged, and such that it is to be read with
        `trajectory='clean'` at the timestep with which training began, where it is what it was at the learned one. Both
        timesteps are in the metadata of the files.

        Args:
            folder: of `unet.safetensors` and `heads.safetensors`.
            dtype: of the UNet's weights.
        """
        network = self.backbone.extractor.network
        learned, (whole,) = self.timestep.item(), self.backbone.extractor.timesteps
        state = at_timestep(merged_state(network), network.time_proj, learned, whole)
        metadata = {
            'format': 'pt',
            'trajectory': 'clean',
            'timestep': str(whole),
            'learned_timestep': f'{learned:.4f}',
            'teacher': self.teacher.extractor.parts.fingerprint,
        }
        with whole_file(Path(folder, NETWORK_FILE)) as partial:
            save_file({name: x.to('cpu', dtype).contiguous() for name, x in state.items()}, partial, metadata)
        if self.heads is not None:
            self.heads.save(Path(folder, HEADS_FILE), metadata)
