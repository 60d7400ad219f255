"""Train a small diffusion model of pixels on toy quadrupeds and save it as a diffusers folder.

The counterpart of `pretrain_sd.py` without VAE and prompt, on the same pictures: its UNet has the structure of ADM's,
with twelve output blocks. The folder holds safetensors in half precision, a card, the training curve and samples.
"""

import argparse
import shutil

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from training import (
    IMAGE_SIZE,
    TRAIN_SEED,
    Trainer,
    add_arguments,
    draw_corpus,
    grid,
    megabytes,
    millions,
    min_snr_loss,
    plot_loss,
    to_tensor,
)

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
    add_arguments(parser, 'tiny-adm', save_every=250)
    parser.add_argument('--steps', type=int, default=2500)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--lr', type=float, default=6e-4)
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
        return min_snr_loss(scheduler, predicted, noise, timesteps)

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
    plot_loss(axes, curve, '128 fixed draws', ylabel='min-SNR weighted loss')
    figure.tight_layout()
    figure.savefig(args.out / 'curve.png', dpi=100)
    (args.out / 'README.md').write_text(model_card(args, unet, curve[-1]))


def model_card(args: argparse.Namespace, unet: UNet2DModel, last: list[float]) -> str:
    """The README.md of the folder."""
    size, parameters = megabytes(args.out), millions(unet)
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
