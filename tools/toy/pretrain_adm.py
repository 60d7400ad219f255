"""Train a small diffusion model of pixels on toy quadrupeds and save it as a diffusers folder.

The counterpart of `pretrain_sd.py` without VAE and prompt, on the same pictures: its UNet has the structure of ADM's,
with twelve output blocks. The folder holds safetensors in half precision, a card, the training curve and samples.
"""

import argparse
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr
from PIL import Image
from pretrain_sd import IMAGE_SIZE, MIN_SNR_GAMMA, TRAIN_SEED, Trainer, draw_corpus, grid, to_tensor

matplotlib.use('Agg')
import matplotlib.pyplot as plt

UNET = {
    'sample_size': IMAGE_SIZE, 'block_out_channels': (16, 32, 48, 64), 'layers_per_block': 2, 'norm_num_groups': 8,
    'attention_head_dim': 16, 'resnet_time_scale_shift': 'scale_shift', 'downsample_type': 'resnet',
    'upsample_type': 'resnet',
    'down_block_types': ('ResnetDownsampleBlock2D', 'ResnetDownsampleBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
    'up_block_types': ('AttnUpBlock2D', 'AttnUpBlock2D', 'ResnetUpsampleBlock2D', 'ResnetUpsampleBlock2D'),
}  # fmt: skip
SCHEDULER = {'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear'}


def main(argv: list[str] | None = None) -> None:
    """Draw the corpus and train; both resume where they stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('demo/tiny-adm'), help='folder to write')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/tiny-adm'), help='corpus, checkpoint')
    parser.add_argument('--images', type=int, default=16384, help='number of pictures to draw')
    parser.add_argument('--steps', type=int, default=2500)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--lr', type=float, default=6e-4)
    parser.add_argument('--save-every', type=int, default=250, help='steps between two checkpoints')
    parser.add_argument('--device', default='cpu', help="where to train, e.g. cpu or a GPU's name")
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    images, _ = draw_corpus(args.images, TRAIN_SEED, args.work_dir / 'train.npz')
    unet, curve = train(args, images)
    save(args, unet, curve)


def train(args: argparse.Namespace, images: np.ndarray) -> tuple[UNet2DModel, list[list[float]]]:
    """The UNet, trained to predict the noise, min-SNR weighted (arXiv 2303.09556), and [step, loss, value] at times."""
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET).to(args.device)
    scheduler = DDPMScheduler(**SCHEDULER)

    def batch_loss(generator: torch.Generator, count: int) -> torch.Tensor:
        picked = torch.randint(len(images), (count,), generator=generator).numpy()
        x = to_tensor(images[picked], args.device)
        mirrored = torch.rand(count, generator=generator).to(args.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        timesteps = torch.randint(1000, (count,), generator=generator)
        x_t = scheduler.add_noise(x, noise, timesteps.to(args.device))
        predicted = unet(x_t, timesteps.to(args.device)).sample
        snr = compute_snr(scheduler, timesteps).to(x)
        weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
        return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    trainer = Trainer('unet', unet, args.steps, args.lr, args)
    trainer.run(
        lambda generator: batch_loss(generator, args.batch),
        lambda step: float(batch_loss(torch.Generator().manual_seed(12345), 128)),
    )
    return unet, trainer.curve


def sample_sheet(unet: UNet2DModel, count: int = 32, steps: int = 50) -> Image.Image:
    """Generated pictures (DDIM)."""
    pipeline = DDIMPipeline(unet, DDIMScheduler(**SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(count, num_inference_steps=steps, generator=generator, output_type='np').images
    return grid((pictures * 255).round().astype(np.uint8), 8)


def save(args: argparse.Namespace, unet: UNet2DModel, curve: list[list[float]]) -> None:
    """Write the folder with card, curve and samples."""
    if args.out.exists():
        shutil.rmtree(args.out)
    DDPMPipeline(unet.half(), DDPMScheduler(**SCHEDULER)).save_pretrained(args.out)
    sample_sheet(unet.float()).save(args.out / 'samples.png')
    figure, axes = plt.subplots(figsize=(4.5, 3))
    steps, losses, values = zip(*curve, strict=True)
    axes.plot(steps, losses, label='training, running mean')
    axes.plot(steps, values, label='EMA weights, 128 fixed draws')
    axes.set(xlabel='step', ylabel='min-SNR weighted loss', yscale='log')
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out / 'curve.png', dpi=100)
    (args.out / 'README.md').write_text(model_card(args, unet, curve[-1]))


def model_card(args: argparse.Namespace, unet: UNet2DModel, last: list[float]) -> str:
    """The README.md of the folder."""
    size = sum(path.stat().st_size for path in args.out.rglob('*.safetensors')) / 2**20
    parameters = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    return f"""---
license: apache-2.0
library_name: diffusers
---
# tiny-adm

A diffusion model of the pixels of toy quadrupeds (horse, giraffe, dog, elephant), {IMAGE_SIZE} x {IMAGE_SIZE}, without
classes or prompts, whose UNet has the structure of ADM's. It is not meant to generate images: it exists so that
diffseg's code paths of pixel space can be tried and tested offline.

* {parameters:.2f} M parameters; {size:.1f} MiB of float16 safetensors. Twelve output blocks, `adm-0` to `adm-11`.
* Data: {args.images} pictures drawn by `tools/toy/quadrupeds.py` (series {TRAIN_SEED}), which may be mirrored. No
  photographs and no other models were used.
* {args.steps} steps of {args.batch} pictures, AdamW, peak learning rate {args.lr} with linear decay over the last 30 %,
  EMA 0.999, linear betas, min-SNR weighted noise prediction; final loss {last[1]:.4f} in training, {last[2]:.4f} with
  the averaged weights.

Made by

    python tools/toy/pretrain_adm.py --images {args.images} --steps {args.steps}

![training curve](curve.png)
![samples](samples.png)
"""


if __name__ == '__main__':
    main()
