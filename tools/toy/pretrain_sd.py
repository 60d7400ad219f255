"""Train a small latent diffusion model on toy quadrupeds and save it as a diffusers pipeline folder.

Three stages, each resumed where it stopped: draw the corpus, train the VAE until it reconstructs unseen pictures well,
train UNet and text encoder on its latents. The folder holds safetensors in half precision, a model card, the training
curves and a sheet of reconstructions and samples. With `--continue-from`, the VAE is that of a folder that was made
before, and its UNet and text encoder are trained further.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from collages import draw_collage
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from training import (
    CAPTION_DROPOUT,
    CAPTIONS,
    IMAGE_SIZE,
    TEST_SEED,
    TRAIN_SEED,
    Trainer,
    add_arguments,
    draw_corpus,
    draw_latents,
    drop_captions,
    encode_corpus,
    grid,
    mean_psnr,
    megabytes,
    millions,
    min_snr_loss,
    plot_loss,
    sample_sheet,
    to_tensor,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffseg.datasets.toy import SPECIES

TEST_IMAGES = 256
REQUIRED_PSNR = 26.0
MAX_TOKENS = 16

VAE = {
    'down_block_types': ('DownEncoderBlock2D',) * 3, 'up_block_types': ('UpDecoderBlock2D',) * 3, 'latent_channels': 4,
    'block_out_channels': (16, 32, 64), 'layers_per_block': 1, 'norm_num_groups': 4, 'sample_size': IMAGE_SIZE,
}  # fmt: skip
UNET = {  # the block types and the number of layers are SD1.5's, which are the defaults
    'sample_size': IMAGE_SIZE // 4, 'block_out_channels': (48, 64, 96, 96), 'cross_attention_dim': 64,
    'attention_head_dim': 2, 'norm_num_groups': 16,
}  # fmt: skip
TEXT_ENCODER = {
    'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': MAX_TOKENS,
}  # fmt: skip
SCHEDULER = {
    'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear', 'steps_offset': 1,
    'clip_sample': False, 'set_alpha_to_one': False,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, 'tiny-sd', save_every=500)
    parser.add_argument('--vae-steps', type=int, default=4000)
    parser.add_argument('--vae-batch', type=int, default=8)
    parser.add_argument('--vae-lr', type=float, default=5e-4)
    parser.add_argument('--unet-steps', type=int, default=20000)
    parser.add_argument('--unet-batch', type=int, default=32)
    parser.add_argument('--unet-lr', type=float, default=1e-3)
    parser.add_argument(
        '--continue-from',
        type=Path,
        metavar='FOLDER',
        help="a folder of this tool, whose VAE is kept and whose UNet's steps come before --unet-steps",
    )
    parser.add_argument('--collages', type=int, default=0, help='collages to draw for the UNet (collages.py)')
    parser.add_argument('--compile', action='store_true', help="the UNet's training steps, with torch.compile")
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    images, labels = draw_corpus(args.images, TRAIN_SEED, args.work_dir / 'train.npz')
    unseen, _ = draw_corpus(TEST_IMAGES, TEST_SEED, args.work_dir / 'test.npz')
    vae = load_vae(args) if args.continue_from else train_vae(args, images, unseen)
    psnr = mean_psnr(reconstruct(vae, unseen, args.device), to_tensor(unseen, args.device))
    if psnr < REQUIRED_PSNR:
        raise SystemExit(
            f'the VAE reconstructs unseen pictures at {psnr:.1f} dB PSNR, {REQUIRED_PSNR} dB are needed before a UNet '
            'is worth training on its latents: give it more --vae-steps'
        )
    tokenizer = build_tokenizer(args.work_dir / 'tokenizer')
    if args.collages:
        collages = draw_corpus(args.collages, TRAIN_SEED, args.work_dir / 'collages.npz', draw_unlabelled)
        images, labels = (np.concatenate(pair) for pair in zip((images, labels), collages, strict=True))
    unet, text_encoder = train_unet(args, vae, tokenizer, images, labels)
    save_pipeline(args, vae, unet, text_encoder, tokenizer, unseen, psnr)


def draw_unlabelled(seed: int, index: int, size: int) -> tuple[np.ndarray, int]:
    """A collage, with the index of the empty caption."""
    return draw_collage(seed, index, size), len(SPECIES)


def reconstruct(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    """Decoded posterior means (B, 3, H, W) in [-1, 1]."""
    batches = np.array_split(images, math.ceil(len(images) / 64))
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(to_tensor(batch, device)).latent_dist.mode()).sample for batch in batches]
    return torch.cat(decoded).clamp(-1, 1)


@torch.no_grad()
def initialise_near_identity(vae: AutoencoderKL) -> None:
    """Initialise residual branches to zero and the posterior to a small variance: both speed up training."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
        elif isinstance(module, Attention):
            module.to_out[0].weight.zero_()
    log_variance = slice(VAE['latent_channels'], None)
    vae.quant_conv.weight[log_variance] *= 0.1
    vae.quant_conv.bias[log_variance] = -6.0


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The VAE of the folder to continue from, in float32."""
    vae = AutoencoderKL.from_pretrained(args.continue_from, subfolder='vae', torch_dtype=torch.float32)
    return vae.to(args.device).requires_grad_(False).eval()


def train_vae(args: argparse.Namespace, images: np.ndarray, unseen: np.ndarray) -> AutoencoderKL:
    """The trained VAE, its scaling factor set to one over the latents' standard deviation."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE).to(args.device)
    initialise_near_identity(vae)
    trainer = Trainer('vae', vae, args.vae_steps, args.vae_lr, args)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        picked = torch.randint(len(images), (args.vae_batch,), generator=generator).numpy()
        x = to_tensor(images[picked], args.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats per latent number
        return F.mse_loss(decoded, x) + 3e-4 * kl

    trainer.run(loss_of, lambda step: mean_psnr(reconstruct(vae, unseen, args.device), to_tensor(unseen, args.device)))
    with torch.no_grad():
        latents = vae.encode(to_tensor(images[:1024], args.device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return vae


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with the words of the captions as tokens; other words are spelled in letters.

    Byte-pair merges apply in the order of their rank, so 'photo' splits the later 'elephant' into five tokens.
    """
    words = ['a', 'an', 'photo', 'of', *SPECIES]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
    tokens = [*letters, *(f'{letter}</w>' for letter in letters)]
    merges = []
    for word in words:
        pieces = [*word[:-1], f'{word[-1]}</w>']
        while len(pieces) > 1:
            pair, pieces = (pieces[0], pieces[1]), [''.join(pieces[:2]), *pieces[2:]]
            if pair not in merges:
                merges.append(pair)
            if pieces[0] not in tokens:
                tokens.append(pieces[0])
    tokens += ['<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *(' '.join(pair) for pair in merges)]) + '\n')
    return CLIPTokenizer(
        str(folder / 'vocab.json'), str(folder / 'merges.txt'), model_max_length=MAX_TOKENS, pad_token='<|endoftext|>'
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, 16)."""
    return tokenizer(
        captions, padding='max_length', max_length=MAX_TOKENS, truncation=True, return_tensors='pt'
    ).input_ids


def train_unet(
    args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer, images: np.ndarray, labels: np.ndarray
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder, trained together to predict the noise, min-SNR weighted (arXiv 2303.09556)."""
    torch.manual_seed(0)
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ('bos_token_id', '<|startoftext|>'),
            ('eos_token_id', '<|endoftext|>'),
            ('pad_token_id', '<|endoftext|>'),
        )
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **special, **TEXT_ENCODER)).to(args.device)
    unet = UNet2DConditionModel(**UNET).to(args.device)
    if args.continue_from:
        for subfolder, module in (('unet', unet), ('text_encoder', text_encoder)):
            stored = type(module).from_pretrained(args.continue_from, subfolder=subfolder, torch_dtype=torch.float32)
            module.load_state_dict(stored.state_dict())
    both = torch.nn.ModuleDict({'unet': unet, 'text_encoder': text_encoder})
    trainer = Trainer('unet', both, args.unet_steps, args.unet_lr, args)
    if trainer.step < args.unet_steps:
        moments = encode_corpus(vae, images, args.device)
        species = torch.from_numpy(labels).repeat(2)
        tokens = tokenize(tokenizer, [*CAPTIONS, '']).to(args.device)
        scheduler = DDIMScheduler(**SCHEDULER)

    compiled = torch.compile(unet, dynamic=False) if args.compile else unet

    def batch_loss(network: torch.nn.Module, generator: torch.Generator, count: int) -> torch.Tensor:
        picked, latents, noise = draw_latents(moments, count, generator)
        timesteps = torch.randint(1000, (count,), generator=generator)
        conditions = text_encoder(tokens)[0][drop_captions(species[picked], generator)]
        x_t = scheduler.add_noise(latents, noise, timesteps.to(args.device))
        predicted = network(x_t, timesteps.to(args.device), conditions).sample
        return min_snr_loss(scheduler, predicted, noise, timesteps)

    def evaluate(step: int) -> float:
        if step % (4 * args.save_every) == 0:
            pipeline = StableDiffusionPipeline(**pipeline_parts(vae, unet, text_encoder, tokenizer))
            sample_sheet(pipeline, columns=4, steps=20).save(args.work_dir / f'samples-{step:06d}.png')
        return float(batch_loss(unet, torch.Generator().manual_seed(12345), 256))

    trainer.run(lambda generator: batch_loss(compiled, generator, args.unet_batch), evaluate)
    return unet, text_encoder


def pipeline_parts(vae, unet, text_encoder, tokenizer) -> dict:
    """Arguments of `StableDiffusionPipeline`."""
    return {
        'vae': vae, 'unet': unet, 'text_encoder': text_encoder, 'tokenizer': tokenizer,
        'scheduler': DDIMScheduler(**SCHEDULER), 'safety_checker': None, 'feature_extractor': None,
        'requires_safety_checker': False,
    }  # fmt: skip


def save_pipeline(args, vae, unet, text_encoder, tokenizer, unseen: np.ndarray, psnr: float) -> None:
    """Write the pipeline folder with card, curves and sheets."""
    pipeline = StableDiffusionPipeline(**pipeline_parts(vae, unet, text_encoder, tokenizer)).to(torch.float16)
    if args.out.exists():
        shutil.rmtree(args.out)
    pipeline.save_pretrained(args.out)
    pipeline.to(torch.float32)
    sample_sheet(pipeline).save(args.out / 'samples.png')
    shown = unseen[:16]
    decoded = (reconstruct(vae, shown, args.device).cpu() + 1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pairs = np.concatenate([shown[:8], decoded[:8], shown[8:], decoded[8:]])
    grid(pairs, 8).save(args.out / 'reconstructions.png')

    names = ('unet',) if args.continue_from else ('vae', 'unet')
    curves = {name: torch.load(args.work_dir / f'{name}.pt', weights_only=True)['curve'] for name in names}
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3), squeeze=False)
    if 'vae' in curves:
        steps, _, values = zip(*curves['vae'], strict=True)
        axes[0, 0].plot(steps, values)
        axes[0, 0].set(xlabel='step', ylabel='PSNR on unseen pictures (dB)', title='VAE')
    plot_loss(axes[0, -1], curves['unet'], '256 fixed draws', ylabel='min-SNR weighted loss', title='UNet')
    figure.tight_layout()
    figure.savefig(args.out / 'curves.png', dpi=100)
    (args.out / 'README.md').write_text(model_card(args, unet, vae, text_encoder, psnr, curves['unet'][-1]))


def model_card(args, unet, vae, text_encoder, psnr: float, last: list[float]) -> str:
    """The README.md of the folder."""
    source = args.continue_from
    vae_training = f'that of `{source}`' if source else f'{args.vae_steps} steps of {args.vae_batch} pictures'
    start = f'those of `{source}`, then ' if source else ''
    options = f'--continue-from {source}' if source else f'--vae-steps {args.vae_steps}'
    collages = f' and, for UNet and text encoder, {args.collages} by `tools/toy/collages.py`' if args.collages else ''
    options += f' --collages {args.collages}' if args.collages else ''
    options += ' --compile' if args.compile else ''
    parts = {'UNet': unet, 'VAE': vae, 'text encoder': text_encoder}
    parameters = ', '.join(f'{name} {millions(part):.2f} M' for name, part in parts.items())
    return f"""---
license: apache-2.0
library_name: diffusers
---
# tiny-sd

A latent diffusion model of toy quadrupeds (horse, giraffe, dog, elephant) at {IMAGE_SIZE} x {IMAGE_SIZE} pixels, with
the block types and the layer names of Stable Diffusion 1.5. It is not meant to generate images: it exists so that
diffseg can be tried and tested offline through the code paths of the real models.

* Parameters: {parameters}; {megabytes(args.out):.1f} MiB of float16 safetensors.
* Latents: 4 channels at 1/4 of the image size. Captions: "a photo of a horse" and the like, at most {MAX_TOKENS}
  tokens.
* Data: {args.images} pictures drawn by `tools/toy/quadrupeds.py`{collages} (series {TRAIN_SEED}), each also
  mirrored for the UNet. No photographs and no other models were used.
* VAE: {vae_training}; {psnr:.1f} dB PSNR on {TEST_IMAGES} unseen pictures
  (series {TEST_SEED}).
* UNet and text encoder: {start}{args.unet_steps} steps of {args.unet_batch} latents, AdamW, peak learning rate
  {args.unet_lr} with linear decay over the last 30 %, EMA 0.999, captions dropped at {CAPTION_DROPOUT:.0%}, min-SNR
  weighted noise prediction; final loss {last[1]:.4f} in training, {last[2]:.4f} with the averaged weights.

Made by

    python tools/toy/pretrain_sd.py --images {args.images} {options} --unet-steps {args.unet_steps}

![training curves](curves.png)
![unseen pictures and, below each row, their reconstructions](reconstructions.png)
![samples](samples.png)
"""


if __name__ == '__main__':
    main()
