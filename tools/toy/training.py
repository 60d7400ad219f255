"""What the pretraining tools share: pictures, their latents, a resumable training loop with EMA, sheets, curves."""

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from quadrupeds import caption, draw_sample
from tqdm import tqdm

from diffseg.datasets.toy import SPECIES

matplotlib.use('Agg')
import matplotlib.pyplot as plt

IMAGE_SIZE = 64
TRAIN_SEED, TEST_SEED = 1, 2  # series of drawn pictures; the demo and the tests draw from others
CAPTIONS = tuple(caption(species) for species in SPECIES)
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


def add_arguments(parser: argparse.ArgumentParser, name: str, save_every: int) -> None:
    """Add the options that all pretraining tools have; `name` is that of the model's folder."""
    parser.add_argument('--out', type=Path, default=Path('demo') / name, help='folder to write')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs') / name, help='corpus, checkpoints, logs')
    parser.add_argument('--images', type=int, default=16384, help='number of pictures to draw')
    parser.add_argument('--save-every', type=int, default=save_every, help='steps between two checkpoints')
    parser.add_argument('--device', default='cpu', help="where to train, e.g. cpu or a GPU's name")


def draw_quadruped(seed: int, index: int, size: int) -> tuple[np.ndarray, int]:
    """A picture of `quadrupeds.py` (H, W, 3) uint8 and the index of its species."""
    sample = draw_sample(seed, index, size)
    return sample.image, SPECIES.index(sample.species)


def draw_corpus(
    count: int, seed: int, path: Path, draw: Callable[..., tuple[np.ndarray, int]] = draw_quadruped
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, H, W, 3) uint8 and the index of each one's caption (count,), drawn once and kept at `path`."""
    if path.exists():
        with np.load(path) as stored:
            if len(stored['images']) == count:
                return stored['images'], stored['labels']
    with ProcessPoolExecutor() as pool:
        samples = pool.map(partial(draw, seed, size=IMAGE_SIZE), range(count), chunksize=64)
        pictures, indices = zip(*tqdm(samples, total=count, desc=f'drawing {path.stem}'), strict=True)
    images, labels = np.stack(pictures), np.array(indices)
    np.savez(path, images=images, labels=labels)
    return images, labels


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """Pictures (B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def mean_psnr(pictures: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1], mean over pictures."""
    error = (pictures.clamp(-1, 1) - expected).div(2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def learning_rate(step: int, steps: int, warm_up: int = 200, decay: float = 0.3) -> float:
    """Factor on the peak learning rate: linear warm-up, constant, linear to zero over the last `decay` of the steps.

    A run can thus be resumed with more steps, or ended with fewer, and its rates up to then are the same.
    """
    return min(1.0, (step + 1) / warm_up, (steps - step) / (decay * steps))


class Trainer:
    """A loop over steps with a learning rate schedule, EMA, checkpoints and resumption.

    The batch of a step is drawn with the step's seed, so that a resumed run sees the same batches as an uninterrupted
    one.
    """

    def __init__(self, name: str, module: torch.nn.Module, steps: int, lr: float, args: argparse.Namespace):
        self.name, self.module, self.steps, self.args = name, module, steps, args
        self.path = args.work_dir / f'{name}.pt'
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-2, betas=(0.9, 0.99))
        factor = partial(learning_rate, steps=steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.ema = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.step, self.average, self.curve = 0, None, []
        if self.path.exists():
            stored = torch.load(self.path, map_location=args.device, weights_only=True)
            self.step, self.average, self.curve = stored['step'], stored['average'], stored['curve']
            for part in ('module', 'optimizer', 'scheduler', 'ema'):
                getattr(self, part).load_state_dict(stored[part])

    def save(self) -> None:
        state = {part: getattr(self, part).state_dict() for part in ('module', 'optimizer', 'scheduler', 'ema')}
        partial_path = self.path.with_suffix('.partial')
        torch.save({'step': self.step, 'average': self.average, 'curve': self.curve, **state}, partial_path)
        partial_path.replace(self.path)

    def run(self, loss_of: Callable[[torch.Generator], torch.Tensor], evaluate: Callable[[int], float]) -> None:
        """Train until `steps` and leave the averaged weights in the module.

        Args:
            loss_of: gives the loss of a step, whose random numbers come from the generator that it gets.
            evaluate: gives a value of the averaged weights at a step, for the curve.
        """
        progress = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        while self.step < self.steps:
            loss = loss_of(torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.ema.step(self.module.parameters())
            self.step += 1
            self.average = loss.item() if self.average is None else 0.98 * self.average + 0.02 * loss.item()
            progress.update()
            progress.set_postfix(loss=f'{self.average:.4f}', refresh=False)
            if self.step % self.args.save_every == 0 or self.step == self.steps:
                self.ema.store(self.module.parameters())
                self.ema.copy_to(self.module.parameters())
                self.module.eval()
                with torch.no_grad():
                    self.curve.append([self.step, self.average, evaluate(self.step)])
                self.module.train()
                self.ema.restore(self.module.parameters())
                self.save()
                tqdm.write(f'{self.name}: step {self.step}, loss {self.average:.4f}, value {self.curve[-1][2]:.4f}')
        progress.close()
        self.ema.copy_to(self.module.parameters())
        self.module.requires_grad_(False).eval()


def encode_corpus(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    """Scaled posterior moments, mean and standard deviation, of pictures and mirrored pictures (2 N, 2, 4, h, w)."""
    moments = []
    with torch.no_grad():
        for batch in tqdm(np.array_split(images, math.ceil(len(images) / 64)), desc='encoding'):
            for view in (batch, batch[:, :, ::-1].copy()):
                posterior = vae.encode(to_tensor(view, device)).latent_dist
                moments.append(torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor)
    return torch.cat([*moments[::2], *moments[1::2]])


def draw_latents(moments: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A batch of `encode_corpus`'s moments.

    Returns:
        Indices of the drawn pictures (B,), samples of their posteriors and noise (B, 4, h, w) each.
    """
    picked = torch.randint(len(moments), (count,), generator=generator)
    latents, spread = moments[picked].unbind(dim=1)
    latents = latents + spread * torch.randn(latents.shape, generator=generator).to(latents)
    return picked, latents, torch.randn(latents.shape, generator=generator).to(latents)


def drop_captions(species: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Indices of captions (B,), of which `CAPTION_DROPOUT` become that of the empty one, which follows `CAPTIONS`."""
    dropped = torch.rand(len(species), generator=generator) < CAPTION_DROPOUT
    return torch.where(dropped, len(CAPTIONS), species)


def min_snr_loss(scheduler, predicted: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted noise (B, C, H, W), min-SNR weighted (arXiv 2303.09556, section 3.4)."""
    snr = compute_snr(scheduler, timesteps).to(noise)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()


def grid(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures (N, H, W, 3) uint8 in rows of `columns`, enlarged twice."""
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


def sample_sheet(pipeline: DiffusionPipeline, columns: int = 8, steps: int = 50, **options) -> Image.Image:
    """Pictures that a pipeline with prompts generates, one row per species (guidance 3)."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(pipeline.device).manual_seed(0)
    pictures = pipeline(
        list(CAPTIONS), num_images_per_prompt=columns, num_inference_steps=steps, guidance_scale=3.0,
        generator=generator, height=IMAGE_SIZE, width=IMAGE_SIZE, output_type='np', **options,
    ).images  # fmt: skip
    return grid((pictures * 255).round().astype(np.uint8), columns)


def plot_loss(axes: plt.Axes, curve: list[list[float]], evaluated: str, **labels: str) -> None:
    """Draw [step, running mean of the training loss, loss of the averaged weights] of a `Trainer`.

    Args:
        axes: axes to draw into.
        curve: a trainer's curve.
        evaluated: what the averaged weights were evaluated on.
        labels: `ylabel`, `title` and the like.
    """
    steps, losses, values = zip(*curve, strict=True)
    axes.plot(steps, losses, label='training, running mean')
    axes.plot(steps, values, label=f'EMA weights, {evaluated}')
    axes.set(xlabel='step', yscale='log', **labels)
    axes.legend()


def megabytes(folder: Path) -> float:
    """Size of the weights in a folder in MiB."""
    return sum(path.stat().st_size for path in folder.rglob('*.safetensors')) / 2**20


def millions(module: torch.nn.Module) -> float:
    """Parameters of a module in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
