"""Noise schedules: how latents and noise are mixed at a timestep, and what a network predicts.

There are two kinds: variance-preserving schedules (Stable Diffusion, SDXL, PixArt, DiT) and rectified flow (SD3, Flux,
Sana). A trajectory works with either.
"""

import inspect
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffseg.devices import upload

CLEAN = -1  # the timestep of a latent without noise
SPACINGS = ('leading', 'trailing', 'linspace')  # of the timesteps of a variance-preserving sampler
TOLERANCE = 0.5  # largest difference between a timestep and the step of a flow's sampler that is meant

Timestep = int | float
NUMBER = r'-?\d+(?:\.\d+)?'  # pattern of a timestep


def parse_timestep(text: str) -> Timestep:
    """A timestep in a text, a whole number if it is written as one. Raises a ValueError for other texts."""
    return float(text) if '.' in text else int(text)


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
    """Variance-preserving schedule: cumulative alphas, prediction type and spacing of sampling.

    Its timesteps are whole numbers, 0 (nearly clean) to 999 (noise), and -1 for the clean latent, whose cumulative
    alpha is 1.

    Args:
        alphas_cumprod: abar of timesteps 0, 1, ..., with shape (training steps,).
        prediction_type: 'epsilon' or 'v_prediction'.
        spacing: Of the timesteps of a sampler, see `sampling_timesteps`.
        steps_offset: Of the timesteps of a sampler, see `sampling_timesteps`.

    Raises:
        ValueError: Unknown prediction type.
    """

    sampler_options = ('spacing', 'steps_offset')  # those of a trajectory that have an effect

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

    def timesteps(self, *, clean: bool = False) -> Sequence[int]:
        """Every timestep, with that of the clean latent or without."""
        return range(CLEAN if clean else 0, len(self))

    def read(self, timesteps: Sequence[Timestep]) -> tuple[int, ...]:
        """Timesteps as written in a config, as integers.

        Raises:
            ValueError: They are not a sequence of whole numbers.
        """
        try:
            return tuple(map(index, timesteps))
        except TypeError:
            raise ValueError(
                f'timesteps is {timesteps!r}; it is a list of whole numbers, such as [50] or [50, 261]'
            ) from None

    def nearest(self, timestep: int, steps: Sequence[int]) -> int | None:
        """The step that a timestep is; None if it is none."""
        return timestep if timestep in steps else None

    def network_timestep(self, timestep: int) -> int:
        """The network's index of a timestep: the same."""
        return timestep

    def alpha_bar(self, t: int) -> float:
        """Cumulative alpha of timestep `t`; 1 for the clean latent's -1."""
        return 1.0 if t == CLEAN else self._alphas[t]

    def add_noise(self, latent: Tensor, noise: Tensor, timesteps: Sequence[int]) -> Tensor:
        """x_t, in float32 at least, of latents and noise with the shapes (N, 1, C, h, w) and (N, T or 1, C, h, w)."""
        return add_noise(latent, noise, self.alphas_cumprod[list(timesteps)].view(-1, 1, 1, 1))

    def step(self, x_t: Tensor, prediction: Tensor, t: int, t_next: int) -> Tensor:
        """One deterministic DDIM step from `t` to `t_next`, in either direction (DDIM, equation 12 with sigma = 0)."""
        signal, sigma = self.alpha_bar(t) ** 0.5, (1 - self.alpha_bar(t)) ** 0.5
        if self.prediction_type == 'epsilon':
            epsilon = prediction
            latent = (x_t - sigma * epsilon) / signal
        else:  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
            epsilon = signal * prediction + sigma * x_t
            latent = signal * x_t - sigma * prediction
        return add_noise(latent, epsilon, self.alpha_bar(t_next))

    def inversion_steps(self, steps: int) -> list[int]:
        """The ascending timesteps of the calls of an inversion, as Hyperfeatures has them: -1, 0, 20, ..., 960."""
        return [CLEAN, *sampling_timesteps(steps, len(self))[:0:-1]]

    def generation_steps(self, steps: int, spacing: str, steps_offset: int) -> list[int]:
        """The descending timesteps of the calls of a sampler.

        Raises:
            ValueError: The first one is for a nearly clean latent, as with a single 'leading' step.
        """
        timesteps = sampling_timesteps(steps, len(self), spacing, steps_offset)
        if timesteps[0] < len(self) // 2:
            raise ValueError(
                f'generation of {steps} step(s) with spacing={spacing!r} begins at t = {timesteps[0]}, where the '
                f"UNet expects a nearly clean latent, not noise; set spacing='trailing', or more steps"
            )
        return timesteps


class FlowTimesteps:
    """All timesteps of a rectified flow, to be asked with `in`."""

    def __init__(self, *, clean: bool):
        self.clean = clean

    def __contains__(self, timestep: Timestep) -> bool:
        return (timestep == CLEAN and self.clean) or 0 < timestep <= FlowSchedule.steps

    def __str__(self) -> str:
        return f'the indices above 1 to {FlowSchedule.steps}, or sigmas between 0 and 1' + (
            f', or {CLEAN} for the clean latent' if self.clean else ''
        )


class FlowSchedule:
    """Rectified flow: x_t = (1 - s) x_0 + s eps, and the network predicts v = eps - x_0 (SD3, 2403.03206, section 2).

    A timestep is a sigma s between 0 and 1, or the model's index 1000 s above 1, up to 1000, which is noise; or -1, the
    clean latent. In a config, 0 and 1 could be either, and are refused. Here they are indices, whole numbers where they
    are whole; those up to 1 stay sigmas.

    Args:
        scheduler_config: Configuration of diffusers' scheduler, whose shift the steps of a sampler have.
        evenly: Steps begin as sigmas 1, 1 - 1/n, ..., 1/n before the shift, as diffusers' pipelines of Flux give them
            to the scheduler; False is the scheduler's own choice, as for SD3.
    """

    steps = 1000
    sampler_options = ('mu',)
    prediction_type = 'flow'

    def __init__(self, scheduler_config: Mapping[str, Any], evenly: bool = True):
        self.config = dict(scheduler_config)
        self.evenly = evenly

    def timesteps(self, *, clean: bool = False) -> FlowTimesteps:
        """Every timestep, with that of the clean latent or without."""
        return FlowTimesteps(clean=clean)

    def read(self, timesteps: Sequence[Timestep]) -> tuple[Timestep, ...]:
        """Timesteps as written in a config, each as an index above 1, a sigma up to 0.001, or -1.

        Raises:
            ValueError: They are not a sequence of numbers in the range, or 0 or 1.
        """
        if isinstance(timesteps, str | bytes) or not isinstance(timesteps, Sequence):
            raise ValueError(f'timesteps is {timesteps!r}; it is a list of numbers, such as [260] or [0.26]')
        return tuple(map(self._read, timesteps))

    def _read(self, timestep: Timestep) -> Timestep:
        if isinstance(timestep, bool) or not isinstance(timestep, int | float):
            raise ValueError(f'timestep {timestep!r} is no number; it is an index such as 260, or a sigma such as 0.26')
        if timestep in (0, 1):
            other = '-1 for the clean latent' if timestep == 0 else '1000 for noise, or 0.001 for nearly none'
            raise ValueError(f'timestep {timestep} may be a sigma or an index of the model; write {other}')
        if timestep == CLEAN:
            return CLEAN
        if not 0 < timestep <= self.steps:
            raise ValueError(f'timestep {timestep} is not in the range; there are {FlowTimesteps(clean=True)}')
        return _rounded(self.steps * timestep) if timestep < 1 else _rounded(timestep)

    def nearest(self, timestep: Timestep, steps: Sequence[Timestep] | FlowTimesteps) -> Timestep | None:
        """The step that a timestep means, which may differ by half an index; None if there is none."""
        if isinstance(steps, FlowTimesteps):
            return timestep if timestep in steps else None
        step = min(steps, key=lambda step: abs(self.sigma(step) - self.sigma(timestep)))
        return step if abs(self.sigma(step) - self.sigma(timestep)) * self.steps <= TOLERANCE else None

    def sigma(self, timestep: Timestep) -> float:
        """The share of noise at a timestep."""
        if timestep == CLEAN:
            return 0.0
        return timestep if timestep < 1 else timestep / self.steps

    def network_timestep(self, timestep: Timestep) -> float:
        """The model's index of a timestep, 1000 s."""
        return self.steps * self.sigma(timestep)

    def add_noise(self, latent: Tensor, noise: Tensor, timesteps: Sequence[Timestep]) -> Tensor:
        """x_t, in float32 at least, of latents and noise with the shapes (N, 1, C, h, w) and (N, T or 1, C, h, w)."""
        sigmas = torch.tensor([self.sigma(t) for t in timesteps], device='cpu', dtype=torch.float64).view(-1, 1, 1, 1)
        dtype = torch.promote_types(latent.dtype, torch.float32)
        sigmas = upload(sigmas.to(dtype), latent.device)
        return (1 - sigmas) * latent.to(dtype) + sigmas * noise

    def step(self, x_t: Tensor, prediction: Tensor, t: Timestep, t_next: Timestep) -> Tensor:
        """One Euler step from `t` to `t_next`, in either direction."""
        return x_t + (self.sigma(t_next) - self.sigma(t)) * prediction

    def inversion_steps(self, steps: int, mu: float | None = None) -> list[Timestep]:
        """The ascending timesteps of the calls of an inversion: -1, and those of generation but the first."""
        return [CLEAN, *self.generation_steps(steps, mu)[:0:-1]]

    def generation_steps(self, steps: int, mu: float | None = None) -> list[Timestep]:
        """The descending timesteps of the calls of a sampler, as diffusers' scheduler shifts them.

        Args:
            steps: Number of calls.
            mu: Shift of schedules that depend on the size of the image; None is that of the largest size, 1024 pixels
                for Flux.

        Raises:
            ValueError: No steps, or `mu` for a schedule with a fixed shift.
        """
        if steps < 1:
            raise ValueError(f'steps is {steps}; it is 1 or more')
        accepted = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        config = {name: value for name, value in self.config.items() if name in accepted}
        if 'flow_shift' in self.config:  # of diffusers' DPM solver
            config['shift'] = self.config['flow_shift']
        with torch.device('cpu'):
            scheduler = FlowMatchEulerDiscreteScheduler(**config)
        if scheduler.config.use_dynamic_shifting:
            mu = scheduler.config.max_shift if mu is None else mu
        elif mu is not None:
            raise ValueError(f'mu is {mu}; the shift of this model is fixed at {scheduler.config.shift}: leave out mu')
        sigmas = np.linspace(1, 1 / steps, steps) if self.evenly else None
        scheduler.set_timesteps(steps, device='cpu', sigmas=sigmas, mu=mu)
        return [_rounded(self.steps * float(sigma)) for sigma in scheduler.sigmas[:-1].double()]


def _rounded(timestep: float) -> Timestep:
    """An index without the rounding errors of its computation, whole if it is; a sigma if it is at most 1."""
    timestep = round(timestep, 3)
    if timestep <= 1:
        return timestep / FlowSchedule.steps
    return int(timestep) if timestep == int(timestep) else timestep


def build_schedule(config: Mapping[str, Any], model: str, evenly: bool = True) -> NoiseSchedule | FlowSchedule:
    """The noise schedule of diffusers' scheduler configuration.

    Args:
        config: Of any scheduler: flow matching, or one with betas.
        model: Its name in errors.
        evenly: As in `FlowSchedule`.

    Raises:
        ValueError: The scheduler's noise levels are not a product of betas (EDM), or an unknown prediction type.
    """
    name = config.get('_class_name', '')
    if 'FlowMatch' in name or config.get('use_flow_sigmas') or config.get('prediction_type') == 'flow_prediction':
        return FlowSchedule(config, evenly)
    if 'sigma_data' in config:
        raise ValueError(
            f'{model} was trained on EDM noise levels ({name}), which have no betas; models with a variance-preserving '
            'schedule or rectified flow are supported'
        )
    accepted = inspect.signature(DDIMScheduler.__init__).parameters
    betas = {key: value for key, value in config.items() if 'beta' in key and key in accepted}
    with torch.device('cpu'):
        scheduler = DDIMScheduler(num_train_timesteps=config.get('num_train_timesteps', 1000), **betas)
    return NoiseSchedule(
        scheduler.alphas_cumprod,
        config.get('prediction_type', 'epsilon'),
        config.get('timestep_spacing', 'leading'),
        config.get('steps_offset', 0),
    )
