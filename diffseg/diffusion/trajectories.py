"""Trajectories from a clean latent to the activations at some timesteps: five published methods.

=============  =========================================================================  ====================
`noise`        the latent noised to each t by the closed formula                          DIFT, GDF
`clean`        the clean latent, the UNet called with any t                               CleanDIFT, VPD
`inversion`    DDIM or Euler steps from the latent towards noise                          Hyperfeatures, real
`generation`   DDIM or Euler steps from noise towards a latent, with guidance             Hyperfeatures, synthetic
`refinement`   passes of the UNet over its own output, pass i with timestep i             Meta Prompts
=============  =========================================================================  ====================

Timesteps are always those of the calls of the network: 0 (nearly clean) to 999 (noise), and -1 for the clean latent,
whose cumulative alpha is 1; those of rectified flow are in `FlowSchedule`.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffseg.devices import upload
from diffseg.diffusion.controlnet import Control, residual_kwargs
from diffseg.diffusion.network_call import NetworkCall
from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.schedules import CLEAN, FlowSchedule, FlowTimesteps, NoiseSchedule, Timestep, sampling_timesteps
from diffseg.diffusion.sites import AttentionMode, Network

SHARED = ('schedule', 'timesteps')  # fields of all trajectories; other fields are options of one kind

# Keyword arguments of a UNet, or the tensors of `Conditioning.rows` for a transformer; the tensors in it (nested or
# not) have one row per latent. Three are no arguments of a network: `time_embeddings` (N, K, E) replace a UNet's
# embeddings of the timesteps 0 to K - 1, `views` are the images of ControlNets, {'0': (N, 3, 8h, 8w), ...}, and `draws`
# is the number of draws among the N latents, of which those of the first come first.
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


def map_condition(function: Callable[[Tensor], Tensor], condition: Condition) -> dict[str, Any]:
    """`condition` with `function` applied to every tensor in it."""

    def apply(value: Any) -> Any:
        if isinstance(value, Mapping):
            return map_condition(function, value)
        return function(value) if isinstance(value, Tensor) else value

    return {name: apply(value) for name, value in condition.items()}


class Denoiser:
    """The network in a trajectory: a call reads activations, predicts, or both.

    Timesteps are the network's own indices, see `network_timestep` of the schedules.

    Args:
        network: The network to read from.
        layers: The activations to read.
        attention: Categories of aggregated attention to read, see `ActivationRecorder`.
        micro_batch: The largest number of latents in one call of the network; larger batches are split.
        attention_mode: How attention is aggregated.
        vae_scale_factor: Image pixels per latent cell; None as in `sites`.
        controls: ControlNets.
        transform: Applied to activations (N, C, h, w), with their names, as soon as a call of the network is over, so
            that dropped values take no memory. The prediction is not transformed.
        embedded_guidance: See `NetworkCall`.
        discard: Channels that are discarded for `-mod` activations, see `ActivationRecorder`.
        average_draws: Average draws before `-mod` activations are normalised, see `ActivationRecorder`.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[str],
        attention: Sequence[str] = (),
        micro_batch: int | None = None,
        attention_mode: AttentionMode = 'concat',
        vae_scale_factor: int | None = None,
        controls: Sequence[Control] = (),
        transform: Transform | None = None,
        embedded_guidance: float | None = None,
        discard: Sequence[int] = (),
        average_draws: bool = False,
    ):
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f'micro_batch is {micro_batch}; it is a number of latents, 1 or more')
        self.network = network
        self.micro_batch = micro_batch
        self.controls = controls
        self.transform = transform
        self.discard = tuple(discard)
        self.average_draws = average_draws
        self.network_call = NetworkCall(network, embedded_guidance)
        self._layers = list(layers)
        self._output = self.network_call.prediction_site
        both = self._layers if self._output in self._layers else [*self._layers, self._output]
        aggregated = {
            'attention': attention,
            'attention_mode': attention_mode,
            'vae_scale_factor': vae_scale_factor,
            'discard': discard,
            'average_draws': average_draws,
        }
        self._read = ActivationRecorder(network, self._layers, **aggregated)
        self._read_and_predict = ActivationRecorder(network, both, **aggregated)
        self._predict = ActivationRecorder(network, [self._output])

    def reading_with(self, recorder: Callable[..., Activations]) -> 'Denoiser':
        """A denoiser whose `read` calls another recorder, in the way of an `ActivationRecorder`."""
        other = copy.copy(self)
        other._read = recorder
        return other

    @property
    def paths(self) -> set[str]:
        """The modules of the network that are read."""
        return {tap.path for tap in self._read_and_predict.taps}

    def read(self, x_t: Tensor, timestep: float | Tensor, condition: Condition) -> Activations:
        """Activations {name: (N, C, h, w)} of latents (N, 4, h, w) at one timestep, or at one each (N,)."""
        return self._call(self._read, x_t, timestep, condition)

    def predict(self, x_t: Tensor, timestep: float | Tensor, condition: Condition) -> Tensor:
        """The network's prediction (N, 4, h, w) in the dtype of `x_t`; without a learned variance."""
        return self._prediction(self._call(self._predict, x_t, timestep, condition), x_t)

    def read_and_predict(
        self, x_t: Tensor, timestep: float | Tensor, condition: Condition
    ) -> tuple[Activations, Tensor]:
        """Results of `read` and `predict` from one call of the network."""
        activations = self._call(self._read_and_predict, x_t, timestep, condition)
        prediction = self._prediction(activations, x_t)
        if self._output not in self._layers:
            del activations[self._output]
        return activations, prediction

    def _prediction(self, activations: Activations, x_t: Tensor) -> Tensor:
        return self.network_call.prediction(activations[self._output], x_t)

    def _call(
        self, recorder: ActivationRecorder, x_t: Tensor, timestep: float | Tensor, condition: Condition
    ) -> Activations:
        n = len(x_t)
        x_t = x_t.to(self.network_call.dtype)
        if not isinstance(timestep, Tensor):
            timestep = torch.full((n,), timestep, device=x_t.device)
        size = self.micro_batch or n
        if self.average_draws and size < n:
            raise ValueError(
                f'micro_batch is {size}, but average_draws needs all draws of a batch in one call of the network: '
                f'set it to {n} at least, or leave it out'
            )
        chunks = []
        for rows in (slice(start, start + size) for start in range(0, n, size)):
            kwargs = map_condition(itemgetter(rows), condition)
            views, draws = kwargs.pop('views', {}), kwargs.pop('draws', 1)
            if self.controls:
                embeddings = {name: kwargs[name] for name in ('encoder_hidden_states', 'added_cond_kwargs')}
                residuals = [
                    control(x_t[rows], timestep[rows], embeddings, view)
                    for control, view in zip(self.controls, views.values(), strict=True)
                ]
                kwargs |= residual_kwargs(residuals)
            with _embedded(self.network, timestep[rows], kwargs.pop('time_embeddings', None)):
                activations = self.network_call(recorder, x_t[rows], timestep[rows], kwargs, draws)
            if self.transform is not None:
                activations = {
                    name: x if name == self._output else self.transform(name, x) for name, x in activations.items()
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
    """Base class: how to compute the inputs of the network at some timesteps.

    Raises:
        ValueError: A timestep is not on this trajectory.
    """

    schedule: NoiseSchedule | FlowSchedule
    timesteps: tuple[Timestep, ...]

    from_image: ClassVar[bool] = True  # whether it starts from an image's latent, or else from noise
    adds_noise: ClassVar[bool] = False  # whether `__call__` needs `noise`
    folds_timesteps: ClassVar[bool] = False  # whether all timesteps are in one batch of the UNet, or one after another

    def __post_init__(self):
        allowed = self.allowed()
        listed = _listed(allowed, every=isinstance(self.schedule, FlowSchedule))
        if not self.timesteps:
            raise ValueError(f'timesteps is empty; the {self.name} trajectory has {listed}')
        nearest = [self.schedule.nearest(t, allowed) for t in self.timesteps]
        if wrong := [t for t, step in zip(self.timesteps, nearest, strict=True) if step is None]:
            raise ValueError(f'timesteps {wrong} are not on the {self.name} trajectory, which has {listed}')
        object.__setattr__(self, 'timesteps', tuple(nearest))
        object.__setattr__(self, '_allowed', allowed)

    @property
    def name(self) -> str:
        """Its key in `TRAJECTORIES`."""
        return type(self).__name__.lower()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `build_trajectory` other than timesteps and schedule; without those of other schedules."""
        hidden = {*SHARED, *(_sampler_options() - set(self.schedule.sampler_options))}
        names = [field.name for field in fields(self) if field.name not in hidden]
        return {'type': self.name, **{option: getattr(self, option) for option in names}}

    @property
    def needs_negative(self) -> bool:
        """Whether `__call__` needs `negative`, unless it is equal to the condition."""
        return False

    @abstractmethod
    def allowed(self) -> Sequence[Timestep] | FlowTimesteps:
        """Allowed timesteps, in the order of the calls of the network."""

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
            denoiser: The network and the activations to read.
            latent: Start of the trajectory, with shape (N, 4, h, w).
            condition: Keyword arguments of the network for these latents.
            noise: Standard normal, with shape (N, T, 4, h, w) or, the same for all timesteps, (N, 1, 4, h, w).
            negative: Like `condition`, for the negative prediction of guidance; None if it is the same.

        Returns:
            {name: (N, T, C, h, w)}, T in the order of `timesteps`.
        """


def _listed(timesteps: Sequence[Timestep] | FlowTimesteps, every: bool) -> str:
    """Timesteps in an error message: every one, or the first and the last."""
    if isinstance(timesteps, FlowTimesteps):
        return str(timesteps)
    return ', '.join(map(str, timesteps if every or len(timesteps) < 4 else (*timesteps[:2], '...', timesteps[-1])))


def _read_at_once(
    schedule: NoiseSchedule | FlowSchedule,
    denoiser: Denoiser,
    x_t: Tensor,
    timesteps: Sequence[Timestep],
    condition: Condition,
) -> Activations:
    """Activations of x_t (N, T, 4, h, w), timesteps folded into the batch."""
    n, t = x_t.shape[:2]
    indices = torch.tensor([schedule.network_timestep(timestep) for timestep in timesteps], device='cpu')
    folded = upload(indices.repeat(n), x_t.device)  # (N*T,)
    activations = denoiser.read(
        x_t.flatten(0, 1), folded, map_condition(lambda x: x.repeat_interleave(t, 0), condition)
    )
    return {name: activation.unflatten(0, (n, t)) for name, activation in activations.items()}


class Noise(Trajectory):
    """The latent with noise added, by the closed formula at exactly `timesteps`, all in one call of the network.

    Unlike GDF, whose t = 50 becomes 51 (SD1.5), 49 (SD2.1-base) or 50 (SDXL) in its schedulers.
    """

    adds_noise = True
    folds_timesteps = True

    def allowed(self) -> Sequence[Timestep] | FlowTimesteps:
        """Every timestep of the schedule."""
        return self.schedule.timesteps()

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        x_t = self.schedule.add_noise(latent.unsqueeze(1), noise, self.timesteps)
        return _read_at_once(self.schedule, denoiser, x_t, self.timesteps, condition)


class Clean(Trajectory):
    """The latent without noise, with any timestep for the network: CleanDIFT's 261, Hyperfeatures' one-step -1."""

    folds_timesteps = True

    def allowed(self) -> Sequence[Timestep] | FlowTimesteps:
        """Every timestep of the schedule, and -1."""
        return self.schedule.timesteps(clean=True)

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        x_t = latent.unsqueeze(1).expand(-1, len(self.timesteps), -1, -1, -1)  # (N, T, 4, h, w)
        return _read_at_once(self.schedule, denoiser, x_t, self.timesteps, condition)


@dataclass(frozen=True)
class _Steps(Trajectory):
    """Calls along `allowed()` up to the last of `timesteps`; the last call stops after the last activation.

    Args:
        steps: Number of steps between the clean latent and noise.
        guidance: Scale of classifier-free guidance; 1 is none. Activations are those of the conditional call.
        mu: For rectified flow with a shift that depends on the size of the image, see `FlowSchedule.generation_steps`.
    """

    steps: int = 50
    guidance: float = 1.0
    mu: float | None = None

    def __post_init__(self):
        self._check_options()
        super().__post_init__()

    def _check_options(self) -> None:
        """Raise a ValueError for options that the schedule does not have."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for option in sorted(_sampler_options() - set(self.schedule.sampler_options)):
            if values.get(option) is not None:
                kind = 'rectified flow' if isinstance(self.schedule, FlowSchedule) else 'a schedule of betas'
                raise ValueError(f'{option} is {values[option]!r}, but the model has {kind}; leave out {option}')

    @property
    def needs_negative(self) -> bool:
        """True with guidance."""
        return self.guidance != 1

    @property
    def _sampler(self) -> dict[str, Any]:
        """Options of the schedule's steps."""
        return {name: getattr(self, name) for name in self.schedule.sampler_options if hasattr(self, name)}

    def __call__(self, denoiser, latent, condition, *, noise=None, negative=None) -> Activations:
        """See `Trajectory`."""
        calls = self._allowed
        last = max(calls.index(t) for t in self.timesteps)
        by_timestep, x_t = self._follow(calls[: last + 1], denoiser, latent, condition, negative)
        by_timestep[calls[last]] = denoiser.read(x_t, self.schedule.network_timestep(calls[last]), condition)
        return self._stack(by_timestep)

    def _follow(
        self,
        calls: Sequence[Timestep],
        denoiser: Denoiser,
        x_t: Tensor,
        condition: Condition,
        negative: Condition | None,
    ) -> tuple[dict[Timestep, Activations], Tensor]:
        """Step along `calls`: the activations of all calls but the last, and the latent at the last."""
        by_timestep = {}
        for t, t_next in pairwise(calls):
            timestep = self.schedule.network_timestep(t)
            if t in self.timesteps:
                by_timestep[t], prediction = denoiser.read_and_predict(x_t, timestep, condition)
            else:
                prediction = denoiser.predict(x_t, timestep, condition)
            if negative is not None and self.needs_negative:
                unconditional = denoiser.predict(x_t, timestep, negative)
                prediction = unconditional + self.guidance * (prediction - unconditional)
            x_t = self.schedule.step(x_t, prediction, t, t_next)
        return by_timestep, x_t

    def _stack(self, by_timestep: Mapping[Timestep, Activations]) -> Activations:
        names = by_timestep[self.timesteps[0]]
        return {name: torch.stack([by_timestep[t][name] for t in self.timesteps], dim=1) for name in names}


def _sampler_options() -> set[str]:
    return {*NoiseSchedule.sampler_options, *FlowSchedule.sampler_options}


@dataclass(frozen=True)
class Inversion(_Steps):
    """DDIM or Euler inversion: the first call of the network is on the clean latent at t = -1, as in Hyperfeatures.

    The others are at 0, 20, ..., whatever timesteps the model is sampled at; those of rectified flow are the sampler's.
    """

    def allowed(self) -> Sequence[Timestep]:
        """-1, 0, 20, ..., 960 with 50 steps."""
        return self.schedule.inversion_steps(self.steps, **self._sampler)


@dataclass(frozen=True)
class Generation(_Steps):
    """DDIM or Euler sampling from noise, the `latent` it starts from.

    Hyperfeatures has `spacing='leading', steps_offset=0`, where Stable Diffusion's configurations have an offset of 1
    and those of its turbo models 'trailing'.

    Args:
        guidance: Scale of classifier-free guidance.
        spacing: Of the timesteps, 'leading', 'trailing' or 'linspace', see `sampling_timesteps`; None is that of the
            model. Not for rectified flow.
        steps_offset: Of the timesteps with 'leading' spacing; None is that of the model. Not for rectified flow.

    Raises:
        ValueError: The first timestep is for a nearly clean latent, as with a single 'leading' step.
    """

    guidance: float = 7.5
    spacing: str | None = None
    steps_offset: int | None = None
    from_image = False

    def __post_init__(self):
        self._check_options()
        for name in ('spacing', 'steps_offset'):
            if getattr(self, name) is None and name in self.schedule.sampler_options:
                object.__setattr__(self, name, getattr(self.schedule, name))
        super().__post_init__()

    def allowed(self) -> Sequence[Timestep]:
        """With 50 steps 981, 961, ..., 1 for Stable Diffusion, 999, 979, ..., 19 for its turbo models."""
        return self.schedule.generation_steps(self.steps, **self._sampler)

    def generate(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, negative: Condition | None = None
    ) -> tuple[Activations, Tensor]:
        """Follow the trajectory to its end: the activations as in `__call__`, and the clean latent."""
        by_timestep, latent = self._follow([*self._allowed, CLEAN], denoiser, noise, condition, negative)
        return self._stack(by_timestep), latent


class Refinement(Trajectory):
    """Passes of the UNet over its own output, x <- UNet(x), as in Meta Prompts; the first is over the latent.

    Pass i is called with timestep i.

    Raises:
        ValueError: The model has rectified flow, for which the method is not defined.
    """

    def __post_init__(self):
        if isinstance(self.schedule, FlowSchedule):
            raise ValueError("the refinement trajectory is for schedules of betas; use 'noise' or 'clean'")
        super().__post_init__()

    def allowed(self) -> Sequence[int]:
        """Every timestep of the schedule."""
        return self.schedule.timesteps()

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
    trajectory: str | Mapping[str, Any], timesteps: Sequence[Timestep], schedule: NoiseSchedule | FlowSchedule
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
    return kind(schedule, schedule.read(timesteps), **options)


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
