"""Trajectories from a clean latent to the activations at some timesteps: five published methods.

=============  =========================================================================  ====================
`noise`        the latent noised to each t by the closed (VP) formula                     DIFT, GDF
`clean`        the clean latent, the UNet called with any t                               CleanDIFT, VPD
`inversion`    DDIM inversion, from the latent towards noise                              Hyperfeatures, real
`generation`   DDIM sampling, from noise towards a latent, with classifier-free guidance  Hyperfeatures, synthetic
`refinement`   passes of the UNet over its own output, pass i with timestep i             Meta Prompts
=============  =========================================================================  ====================

Timesteps are always those of the UNet calls: 0 (nearly clean) to 999 (noise), and -1 for the clean latent, whose
cumulative alpha is 1.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import index, itemgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffseg.devices import upload
from diffseg.diffusion.controlnet import Control, residual_kwargs
from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import AttentionMode, Network

CLEAN = -1  # the timestep of a latent without noise
PREDICTION = 'unet-out'  # the site where the UNet's prediction is read

SPACINGS = ('leading', 'trailing', 'linspace')  # of the timesteps of a sampler
SHARED = ('schedule', 'timesteps')  # fields of all trajectories; other fields are options of one kind

# Keyword arguments of the UNet, the tensors in it (nested or not) one row per latent. Two are not arguments of the
# UNet: `time_embeddings` (N, K, E) replace its embeddings of the timesteps 0 to K - 1, and `views` are the images of
# ControlNets, {'0': (N, 3, 8h, 8w), ...}.
Condition = Mapping[str, Any]
Activations = dict[str, Tensor]
Transform = Callable[[str, Tensor], Tensor]


def seeded_noise(shape: Sequence[int], seed: int, *key: int | str) -> Tensor:
    """Standard normal noise that depends only on the arguments.

    It is drawn on the CPU in float32, so it is the same on any device; drawn for one image at a time and shared by all
    images (as DDPM-Seg does), it is the same at any position of any batch. `key` distinguishes draws of one seed.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, 'little'))
    return torch.randn(tuple(shape), generator=generator)


def add_noise(latent: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Variance-preserving forward process, x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (DDPM, equation 4).

    Args:
        latent: x_0.
        noise: eps.
        alpha_bar: abar, a number or of a shape that broadcasts to that of `latent`.

    Returns:
        x_t in float32 at least: in bfloat16, the abar of small timesteps would be 1.
    """
    dtype = torch.promote_types(latent.dtype, torch.float32)
    if not isinstance(alpha_bar, Tensor):
        alpha_bar = torch.tensor(alpha_bar, device='cpu', dtype=torch.float64)
    alpha_bar = alpha_bar.to(dtype)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if alpha_bar.ndim:  # else they are numbers to any device
        signal, sigma = upload(signal, latent.device), upload(sigma, latent.device)
    return signal * latent.to(dtype) + sigma * noise


def sampling_timesteps(
    steps: int, training_steps: int = 1000, spacing: str = 'leading', steps_offset: int = 0
) -> list[int]:
    """The descending timesteps at which a sampler calls the UNet, as diffusers' schedulers space them.

    >>> sampling_timesteps(4), sampling_timesteps(4, steps_offset=1)
    ([750, 500, 250, 0], [751, 501, 251, 1])
    >>> sampling_timesteps(4, spacing='trailing'), sampling_timesteps(4, spacing='linspace')
    ([999, 749, 499, 249], [999, 666, 333, 0])

    Args:
        steps: Number of calls.
        training_steps: Number of timesteps that the model was trained with.
        spacing: 'leading', 'trailing' or 'linspace' (arXiv 2305.08891, table 2).
        steps_offset: Added to all of them, with 'leading' only.

    Raises:
        ValueError: Too many steps, unknown spacing, or an offset beyond the last timestep.
    """
    if not 1 <= steps <= training_steps:
        raise ValueError(f'{steps} steps; a schedule of {training_steps} timesteps allows 1 to {training_steps}')
    if spacing == 'leading':
        timesteps = np.arange(steps)[::-1] * (training_steps // steps) + steps_offset
    elif spacing == 'trailing':
        timesteps = np.arange(training_steps, 0, -training_steps / steps).round() - 1
    elif spacing == 'linspace':
        timesteps = np.linspace(0, training_steps - 1, steps).round()[::-1]
    else:
        raise ValueError(f'spacing is {spacing!r}; it is {", ".join(map(repr, SPACINGS))}')
    if timesteps[0] >= training_steps:
        raise ValueError(
            f'steps={steps} with steps_offset={steps_offset} begins at t = {timesteps[0]}, but the last timestep is '
            f'{training_steps - 1}; set steps_offset=0'
        )
    return [int(t) for t in timesteps]


class NoiseSchedule:
    """Noise schedule of a model: cumulative alphas, prediction type and spacing of sampling.

    Args:
        alphas_cumprod: abar of timesteps 0, 1, ..., with shape (training steps,).
        prediction_type: 'epsilon' or 'v_prediction'.
        spacing: Of the timesteps of a sampler, see `sampling_timesteps`.
        steps_offset: Of the timesteps of a sampler, see `sampling_timesteps`.

    Raises:
        ValueError: Unknown prediction type.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str = 'epsilon',
        spacing: str = 'leading',
        steps_offset: int = 0,
    ):
        if prediction_type not in ('epsilon', 'v_prediction'):
            raise ValueError(f"prediction type {prediction_type!r}; supported are 'epsilon' and 'v_prediction'")
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self._alphas: list[float] = self.alphas_cumprod.tolist()
        self.prediction_type = prediction_type
        self.spacing = spacing
        self.steps_offset = steps_offset

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_bar(self, t: int) -> float:
        """Cumulative alpha of timestep `t`; 1 for the clean latent's -1."""
        return 1.0 if t == CLEAN else self._alphas[t]

    def ddim_step(self, x_t: Tensor, prediction: Tensor, t: int, t_next: int) -> Tensor:
        """One deterministic DDIM step from `t` to `t_next`, in either direction (DDIM, equation 12 with sigma = 0)."""
        signal, sigma = self.alpha_bar(t) ** 0.5, (1 - self.alpha_bar(t)) ** 0.5
        if self.prediction_type == 'epsilon':
            epsilon = prediction
            latent = (x_t - sigma * epsilon) / signal
        else:  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
            epsilon = signal * prediction + sigma * x_t
            latent = signal * x_t - sigma * prediction
        return add_noise(latent, epsilon, self.alpha_bar(t_next))


def map_condition(function: Callable[[Tensor], Tensor], condition: Condition) -> dict[str, Any]:
    """`condition` with `function` applied to every tensor in it."""

    def apply(value: Any) -> Any:
        if isinstance(value, Mapping):
            return map_condition(function, value)
        return function(value) if isinstance(value, Tensor) else value

    return {name: apply(value) for name, value in condition.items()}


def unet_dtype(unet: Network) -> torch.dtype:
    """Dtype in which the UNet computes, independent of that of added trainable layers."""
    return unet.conv_in.weight.dtype


class Denoiser:
    """The UNet in a trajectory: a call reads activations, predicts, or both.

    Args:
        unet: The UNet to read from.
        layers: The activations to read.
        attention: Categories of aggregated attention to read, see `ActivationRecorder`.
        micro_batch: The largest number of latents in one UNet call; larger batches are split.
        attention_mode: How attention is aggregated.
        vae_scale_factor: Image pixels per latent cell; None as in `sites`.
        controls: ControlNets.
        transform: Applied to activations (N, C, h, w), with their names, as soon as a call of the UNet is over, so that
            dropped values take no memory. The prediction is not transformed.
    """

    def __init__(
        self,
        unet: Network,
        layers: Sequence[str],
        attention: Sequence[str] = (),
        micro_batch: int | None = None,
        attention_mode: AttentionMode = 'concat',
        vae_scale_factor: int | None = None,
        controls: Sequence[Control] = (),
        transform: Transform | None = None,
    ):
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f'micro_batch is {micro_batch}; it is a number of latents, 1 or more')
        self.unet = unet
        self.micro_batch = micro_batch
        self.controls = controls
        self.transform = transform
        self._layers = list(layers)
        both = self._layers if PREDICTION in self._layers else [*self._layers, PREDICTION]
        aggregated = {
            'attention': attention,
            'attention_mode': attention_mode,
            'vae_scale_factor': vae_scale_factor,
        }
        self._read = ActivationRecorder(unet, self._layers, **aggregated)
        self._read_and_predict = ActivationRecorder(unet, both, **aggregated)
        self._predict = ActivationRecorder(unet, [PREDICTION])

    @property
    def paths(self) -> set[str]:
        """The modules of the UNet that are read."""
        return {tap.path for tap in self._read_and_predict.taps}

    def read(self, x_t: Tensor, timestep: int | Tensor, condition: Condition) -> Activations:
        """Activations {name: (N, C, h, w)} of latents (N, 4, h, w) at one timestep, or at one each (N,)."""
        return self._call(self._read, x_t, timestep, condition)

    def predict(self, x_t: Tensor, timestep: int | Tensor, condition: Condition) -> Tensor:
        """The UNet's prediction (N, 4, h, w) in the dtype of `x_t`; without a learned variance."""
        return self._prediction(self._call(self._predict, x_t, timestep, condition), x_t)

    def read_and_predict(self, x_t: Tensor, timestep: int | Tensor, condition: Condition) -> tuple[Activations, Tensor]:
        """Results of `read` and `predict` from one call of the UNet."""
        activations = self._call(self._read_and_predict, x_t, timestep, condition)
        prediction = self._prediction(activations, x_t)
        if PREDICTION not in self._layers:
            del activations[PREDICTION]
        return activations, prediction

    def _prediction(self, activations: Activations, x_t: Tensor) -> Tensor:
        return activations[PREDICTION][:, : x_t.shape[1]].to(x_t.dtype)

    def _call(
        self, recorder: ActivationRecorder, x_t: Tensor, timestep: int | Tensor, condition: Condition
    ) -> Activations:
        n = len(x_t)
        x_t = x_t.to(unet_dtype(self.unet))
        if not isinstance(timestep, Tensor):
            timestep = torch.full((n,), timestep, device=x_t.device)
        size = self.micro_batch or n
        chunks = []
        for rows in (slice(start, start + size) for start in range(0, n, size)):
            kwargs = map_condition(itemgetter(rows), condition)
            views = kwargs.pop('views', {})
            if self.controls:
                embeddings = {name: kwargs[name] for name in ('encoder_hidden_states', 'added_cond_kwargs')}
                residuals = [
                    control(x_t[rows], timestep[rows], embeddings, view)
                    for control, view in zip(self.controls, views.values(), strict=True)
                ]
                kwargs |= residual_kwargs(residuals)
            with _embedded(self.unet, timestep[rows], kwargs.pop('time_embeddings', None)):
                activations = recorder(x_t[rows], timestep[rows], **kwargs)
            if self.transform is not None:
                activations = {
                    name: x if name == PREDICTION else self.transform(name, x) for name, x in activations.items()
                }
            chunks.append(activations)
        if len(chunks) == 1:
            return chunks[0]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


@contextmanager
def _embedded(unet: Network, timesteps: Tensor, embeddings: Tensor | None) -> Iterator[None]:
    """Replace the UNet's embeddings of timesteps (N,) by those in (N, K, E), if given."""
    if embeddings is None:
        yield
        return
    chosen = embeddings[torch.arange(len(timesteps), device=embeddings.device), timesteps]  # (N, E)
    handle = unet.time_embedding.register_forward_hook(lambda module, args, output: chosen)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Trajectory(ABC):
    """Base class: how to compute the inputs of the UNet at some timesteps.

    Raises:
        ValueError: A timestep is not on this trajectory.
    """

    schedule: NoiseSchedule
    timesteps: tuple[int, ...]

    from_image: ClassVar[bool] = True  # whether it starts from an image's latent, or else from noise
    adds_noise: ClassVar[bool] = False  # whether `__call__` needs `noise`
    folds_timesteps: ClassVar[bool] = False  # whether all timesteps are in one batch of the UNet, or one after another

    def __post_init__(self):
        allowed, name = self.allowed(), self.name
        values = ', '.join(map(str, allowed) if len(allowed) < 4 else (*map(str, allowed[:2]), '...', str(allowed[-1])))
        if not self.timesteps:
            raise ValueError(f'timesteps is empty; the {name} trajectory has {values}')
        if wrong := [t for t in self.timesteps if t not in allowed]:
            raise ValueError(f'timesteps {wrong} are not on the {name} trajectory, which has {values}')

    @property
    def name(self) -> str:
        """Its key in `TRAJECTORIES`."""
        return type(self).__name__.lower()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `build_trajectory` other than timesteps and schedule."""
        names = [field.name for field in fields(self) if field.name not in SHARED]
        return {'type': self.name, **{option: getattr(self, option) for option in names}}

    @property
    def needs_negative(self) -> bool:
        """Whether `__call__` needs `negative`, unless it is equal to the condition."""
        return False

    @abstractmethod
    def allowed(self) -> Sequence[int]:
        """Allowed timesteps, in the order of the UNet calls."""

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        latent: Tensor,
        condition: Condition,
        *,
        noise: Tensor | None = None,
        negative: Condition | None = None,
    ) -> Activations:
        """Read the activations at all `timesteps`.

        Args:
            denoiser: The UNet and the activations to read.
            latent: Start of the trajectory, with shape (N, 4, h, w).
            condition: Keyword arguments of the UNet for these latents.
            noise: Standard normal, with shape (N, T, 4, h, w) or, the same for all timesteps, (N, 1, 4, h, w).
            negative: Like `condition`, for the negative prediction of guidance; None if it is the same.

        Returns:
            {name: (N, T, C, h, w)}, T in the order of `timesteps`.
        """


def _read_at_once(denoiser: Denoiser, x_t: Tensor, timesteps: Sequence[int], condition: Condition) -> Activations:
    """Activations of x_t (N, T, 4, h, w), timesteps folded into the batch."""
    n, t = x_t.shape[:2]
    folded = upload(torch.tensor(timesteps, device='cpu').repeat(n), x_t.device)  # (N*T,)
    activations = denoiser.read(
        x_t.flatten(0, 1), folded, map_condition(lambda x: x.repeat_interleave(t, 0), condition)
    )
    return {name: activation.unflatten(0, (n, t)) for name, activation in activations.items()}


class Noise(Trajectory):
    """The latent with noise added, by the closed formula at exactly `timesteps`, all in one UNet call.

    Unlike GDF, whose t = 50 becomes 51 (SD1.5), 49 (SD2.1-base) or 50 (SDXL) in its schedulers.
    """

    adds_noise = True
    folds_timesteps = True

    def allowed(self) -> Sequence[int]:
        """Every timestep of the schedule."""
        return range(len(self.schedule))

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        alpha_bar = self.schedule.alphas_cumprod[list(self.timesteps)].view(-1, 1, 1, 1)  # (T, 1, 1, 1)
        return _read_at_once(denoiser, add_noise(latent.unsqueeze(1), noise, alpha_bar), self.timesteps, condition)


class Clean(Trajectory):
    """The latent without noise, with any timestep for the UNet: CleanDIFT's 261, Hyperfeatures' one-step -1."""

    folds_timesteps = True

    def allowed(self) -> Sequence[int]:
        """Every timestep of the schedule, and -1."""
        return range(CLEAN, len(self.schedule))

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        x_t = latent.unsqueeze(1).expand(-1, len(self.timesteps), -1, -1, -1)  # (N, T, 4, h, w)
        return _read_at_once(denoiser, x_t, self.timesteps, condition)


@dataclass(frozen=True)
class _DDIM(Trajectory):
    """UNet calls along `allowed()` up to the last of `timesteps`; the last call stops after the last activation.

    Args:
        steps: Number of steps between the clean latent and noise.
        guidance: Scale of classifier-free guidance; 1 is none. Activations are those of the conditional call.
    """

    steps: int = 50
    guidance: float = 1.0

    @property
    def needs_negative(self) -> bool:
        """True with guidance."""
        return self.guidance != 1

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        calls = self.allowed()
        last = max(calls.index(t) for t in self.timesteps)
        by_timestep, x_t = self._follow(calls[: last + 1], denoiser, latent, condition, negative)
        by_timestep[calls[last]] = denoiser.read(x_t, calls[last], condition)
        return self._stack(by_timestep)

    def _follow(
        self, calls: Sequence[int], denoiser: Denoiser, x_t: Tensor, condition: Condition, negative: Condition | None
    ) -> tuple[dict[int, Activations], Tensor]:
        """Step along `calls`: the activations of all calls but the last, and the latent at the last."""
        by_timestep = {}
        for t, t_next in pairwise(calls):
            if t in self.timesteps:
                by_timestep[t], prediction = denoiser.read_and_predict(x_t, t, condition)
            else:
                prediction = denoiser.predict(x_t, t, condition)
            if negative is not None and self.needs_negative:
                unconditional = denoiser.predict(x_t, t, negative)
                prediction = unconditional + self.guidance * (prediction - unconditional)
            x_t = self.schedule.ddim_step(x_t, prediction, t, t_next)
        return by_timestep, x_t

    def _stack(self, by_timestep: Mapping[int, Activations]) -> Activations:
        names = by_timestep[self.timesteps[0]]
        return {name: torch.stack([by_timestep[t][name] for t in self.timesteps], dim=1) for name in names}


@dataclass(frozen=True)
class Inversion(_DDIM):
    """DDIM inversion as Hyperfeatures runs it: the first UNet call is on the clean latent at t = -1.

    The others are at 0, 20, ..., whatever timesteps the model is sampled at.
    """

    def allowed(self) -> Sequence[int]:
        """-1, 0, 20, ..., 960 with 50 steps."""
        return [CLEAN, *sampling_timesteps(self.steps, len(self.schedule))[:0:-1]]


@dataclass(frozen=True)
class Generation(_DDIM):
    """DDIM sampling from noise, the `latent` it starts from.

    Hyperfeatures has `spacing='leading', steps_offset=0`, where Stable Diffusion's configurations have an offset of 1
    and those of its turbo models 'trailing'.

    Args:
        guidance: Scale of classifier-free guidance.
        spacing: Of the timesteps, 'leading', 'trailing' or 'linspace', see `sampling_timesteps`; None is that of the
            model.
        steps_offset: Of the timesteps with 'leading' spacing; None is that of the model.

    Raises:
        ValueError: The first timestep is for a nearly clean latent, as with a single 'leading' step.
    """

    guidance: float = 7.5
    spacing: str | None = None
    steps_offset: int | None = None
    from_image = False

    def __post_init__(self):
        for name in ('spacing', 'steps_offset'):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.schedule, name))
        if (first := self.allowed()[0]) < len(self.schedule) // 2:
            raise ValueError(
                f'generation of {self.steps} step(s) with spacing={self.spacing!r} begins at t = {first}, where the '
                f"UNet expects a nearly clean latent, not noise; set spacing='trailing', or more steps"
            )
        super().__post_init__()

    def allowed(self) -> Sequence[int]:
        """With 50 steps 981, 961, ..., 1 for Stable Diffusion, 999, 979, ..., 19 for its turbo models."""
        return sampling_timesteps(self.steps, len(self.schedule), self.spacing, self.steps_offset)

    def generate(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, negative: Condition | None = None
    ) -> tuple[Activations, Tensor]:
        """Follow the trajectory to its end: the activations as in `__call__`, and the clean latent."""
        by_timestep, latent = self._follow([*self.allowed(), CLEAN], denoiser, noise, condition, negative)
        return self._stack(by_timestep), latent


class Refinement(Trajectory):
    """Passes of the UNet over its own output, x <- UNet(x), as in Meta Prompts; the first is over the latent.

    Pass i is called with timestep i.
    """

    def allowed(self) -> Sequence[int]:
        """Every timestep of the schedule."""
        return range(len(self.schedule))

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        last = max(self.timesteps)
        x, by_timestep = latent, {}
        for t in range(last):
            if t in self.timesteps:
                by_timestep[t], x = denoiser.read_and_predict(x, t, condition)
            else:
                x = denoiser.predict(x, t, condition)
        by_timestep[last] = denoiser.read(x, last, condition)
        return {name: torch.stack([by_timestep[t][name] for t in self.timesteps], dim=1) for name in by_timestep[last]}


TRAJECTORIES: dict[str, type[Trajectory]] = {
    kind.__name__.lower(): kind for kind in (Noise, Clean, Inversion, Generation, Refinement)
}


def build_trajectory(
    trajectory: str | Mapping[str, Any], timesteps: Sequence[int], schedule: NoiseSchedule
) -> Trajectory:
    """Build a trajectory from its name, or from `dict(type=name, ...)` with its options.

    Raises:
        ValueError: Unknown name or option, or a timestep that is not on the trajectory.
    """
    options = {'type': trajectory} if isinstance(trajectory, str) else dict(trajectory)
    name = options.pop('type', None)
    if name not in TRAJECTORIES:
        raise ValueError(f'unknown trajectory {name!r}; there are {", ".join(TRAJECTORIES)}')
    kind = TRAJECTORIES[name]
    available = [field.name for field in fields(kind) if field.name not in SHARED]
    if wrong := sorted(set(options) - set(available)):
        raise ValueError(f'the {name} trajectory has no options {wrong}; it has {available}')
    return kind(schedule, whole_timesteps(timesteps), **options)


def whole_timesteps(timesteps: Sequence[int]) -> tuple[int, ...]:
    """Timesteps as integers.

    Raises:
        ValueError: They are not a sequence of whole numbers.
    """
    try:
        return tuple(map(index, timesteps))
    except TypeError:
        raise ValueError(
            f'timesteps is {timesteps!r}; it is a list of whole numbers, such as [50] or [50, 261]'
        ) from None


def dhf_timesteps(save_timestep: Sequence[int], trajectory: str = 'inversion', steps: int = 50) -> list[int]:
    """Translate the step indices of Hyperfeatures' `save_timestep` (49 clean, 0 noise) into timesteps of the UNet.

    The result is for `Inversion`, and for `Generation` with `spacing='leading', steps_offset=0`.

    >>> dhf_timesteps([49, 45, 40, 0])
    [-1, 60, 160, 960]
    >>> dhf_timesteps([49, 45, 40, 0], 'generation')
    [0, 80, 180, 980]
    """
    grid = sampling_timesteps(steps)[::-1]
    towards_noise = {'inversion': [CLEAN, *grid[:-1]], 'generation': grid}
    if trajectory not in towards_noise:
        raise ValueError(f'step indices exist for {" and ".join(towards_noise)}, not for {trajectory!r}')
    if wrong := [k for k in save_timestep if not 0 <= k < steps]:
        raise ValueError(f'step indices {wrong} are outside 0 to {steps - 1}')
    return [towards_noise[trajectory][steps - 1 - k] for k in save_timestep]
