"""Distill the VAE of `pretrain_sd.py`'s model into an `AutoencoderTiny`, as TAESD is distilled.

The encoder learns the mean of the VAE's posterior, scaled as the UNet expects it, the decoder the pictures from these
means; both by their squared errors alone (TAESD's decoder is also trained against a discriminator). The folder is what
`vae=` of a backbone takes: safetensors in half precision, a model card, the training curve and a sheet of
reconstructions. The training resumes where it stopped.
"""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from training import (
    IMAGE_SIZE,
    TEST_SEED,
    TRAIN_SEED,
    Trainer,
    add_arguments,
    draw_corpus,
    encode_corpus,
    grid,
    mean_psnr,
    megabytes,
    millions,
    plot_loss,
    to_tensor,
)

TEST_IMAGES = 256
STUDENT = {  # a level less than TAESD, as the VAE; latents come scaled, which is the default
    'encoder_block_out_channels': (16,) * 3, 'num_encoder_blocks': (0, 1, 3),
    'decoder_block_out_channels': (16,) * 3, 'num_decoder_blocks': (3, 1, 1),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Draw the corpus, encode it, train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, 'tiny-sd-taesd', save_every=300)
    parser.add_argument('--teacher', type=Path, default=Path('demo/tiny-sd'), help='folder of the model with the VAE')
    parser.add_argument('--steps', type=int, default=3000)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--lr', type=float, default=2e-3)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    teacher = AutoencoderKL.from_pretrained(args.teacher, subfolder='vae').to(args.device).requires_grad_(False).eval()
    images, _ = draw_corpus(args.images, TRAIN_SEED, args.work_dir / 'train.npz')
    unseen, _ = draw_corpus(TEST_IMAGES, TEST_SEED, args.work_dir / 'test.npz')
    student, curve = train(args, teacher, images, unseen)
    save(args, teacher, student, unseen, curve)


def train(
    args: argparse.Namespace, teacher: AutoencoderKL, images: np.ndarray, unseen: np.ndarray
) -> tuple[AutoencoderTiny, list[list[float]]]:
    """The student and the curve of its losses."""
    torch.manual_seed(0)
    student = AutoencoderTiny(**STUDENT, latent_channels=teacher.config.latent_channels).to(args.device)
    trainer = Trainer('student', student, args.steps, args.lr, args)
    both_sides = np.concatenate([images, images[:, :, ::-1]])
    means = encode_corpus(teacher, images, args.device)[:, 0] if trainer.step < args.steps else None

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        picked = torch.randint(len(both_sides), (args.batch,), generator=generator)
        x = to_tensor(both_sides[picked.numpy()], args.device)
        return loss(student, x, means[picked])

    x, expected = to_tensor(unseen, args.device), encode_corpus(teacher, unseen, args.device)[: len(unseen), 0]
    trainer.run(loss_of, lambda step: float(loss(student, x, expected)))
    return student, trainer.curve


def loss(student: AutoencoderTiny, images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Squared error of the encoder in the latents (B, C, h, w) and of the decoder in the images (B, 3, H, W)."""
    decoded = student.decode(latents).sample
    return F.mse_loss(student.encode(images).latents, latents) + F.mse_loss(decoded, images)


def save(
    args: argparse.Namespace,
    teacher: AutoencoderKL,
    student: AutoencoderTiny,
    unseen: np.ndarray,
    curve: list[list[float]],
) -> None:
    """Write the folder with card, curve and reconstructions."""
    if args.out.exists():
        shutil.rmtree(args.out)
    student.half().save_pretrained(args.out)
    student.float()
    config = json.loads((args.out / 'config.json').read_text())
    del config['block_out_channels']  # which diffusers writes, and warns of when it reads it
    (args.out / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    with torch.no_grad():
        x = to_tensor(unseen, args.device)
        scaled = teacher.encode(x).latent_dist.mode() * teacher.config.scaling_factor
        latents = student.encode(x).latents
        decoded = {
            'both of the VAE': teacher.decode(scaled / teacher.config.scaling_factor).sample,
            'the tiny encoder, decoder of the VAE': teacher.decode(latents / teacher.config.scaling_factor).sample,
            'both tiny': student.decode(latents).sample,
        }
    error = F.mse_loss(latents, scaled) / scaled.var()
    reconstructed = decoded['both tiny'][:8].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)
    grid(np.concatenate([unseen[:8], reconstructed.cpu().numpy()]), 8).save(args.out / 'reconstructions.png')
    figure, axes = plt.subplots(figsize=(4.5, 3))
    plot_loss(axes, curve, f'{TEST_IMAGES} unseen pictures', ylabel='squared error, latents + pictures')
    figure.tight_layout()
    figure.savefig(args.out / 'curves.png', dpi=100)
    quality = {name: mean_psnr(pictures, x) for name, pictures in decoded.items()}
    (args.out / 'README.md').write_text(model_card(args, teacher, student, float(error), quality))


def model_card(
    args: argparse.Namespace, teacher: AutoencoderKL, student: AutoencoderTiny, error: float, quality: dict[str, float]
) -> str:
    """The README.md of the folder."""
    encoder, decoder = (
        f'{part} {millions(getattr(student, part)):.3f} M instead of {millions(getattr(teacher, part)):.3f} M'
        for part in ('encoder', 'decoder')
    )
    rows = '\n'.join(f'| {name} | {value:.1f} |' for name, value in quality.items())
    return f"""---
license: apache-2.0
library_name: diffusers
---
# tiny-sd-taesd

An `AutoencoderTiny` in place of the VAE of [tiny-sd](../tiny-sd/README.md), as TAESD is one in place of Stable
Diffusion's. It exists so that the price of such a VAE can be measured offline:
`DiffusionExtractor(..., vae='demo/tiny-sd-taesd')`.

* Parameters: {encoder}, {decoder}; {megabytes(args.out):.2f} MiB of float16
  safetensors.
* Latents: those of tiny-sd, scaled. On {TEST_IMAGES} unseen pictures (series {TEST_SEED}) the squared error is
  {error:.2%} of their variance.
* Data: {args.images} pictures of {IMAGE_SIZE} x {IMAGE_SIZE} pixels drawn by `tools/toy/quadrupeds.py`
  (series {TRAIN_SEED}), each also mirrored.
* {args.steps} steps of {args.batch} pictures, AdamW, peak learning rate {args.lr} with linear decay over the last
  30 %, EMA 0.999; squared errors of the encoder in the VAE's posterior means and of the decoder in the pictures.

| reconstruction of unseen pictures by | PSNR, dB |
|---|---|
{rows}

Made by

    python tools/toy/distill_vae.py --images {args.images} --steps {args.steps}

![training curve](curves.png)
![unseen pictures above their reconstructions](reconstructions.png)
"""


if __name__ == '__main__':
    main()
