"""Train a small latent diffusion model on toy quadrupeds and save it as a diffusers pipeline folder.

Three stages, each resumed where it stopped: draw the corpus, train the VAE until it reconstructs unseen pictures well,
train UNet and text encoder on its latents. The folder holds safetensors in half precision, a model card, the training
curves and a sheet of reconstructions and samples.
"""

import argparse
import json
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from quadrupeds import draw_sample
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffseg.datasets.toy import SPECIES

matplotlib.use('Agg')
import matplotlib.pyplot as plt

IMAGE_SIZE = 64
TRAIN_SEED, TEST_SEED = 1, 2  # series of drawn pictures; the demo and the tests draw from others
TEST_IMAGES = 256
REQUIRED_PSNR = 26.0
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
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
    parser.add_argument('--out', type=Path, default=Path('demo/tiny-sd'), help='pipeline folder to write')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/tiny-sd'), help='corpus, checkpoints, logs')
    parser.add_argument('--images', type=int, default=16384, help='number of pictures to draw')
    parser.add_argument('--vae-steps', type=int, default=4000)
    parser.add_argument('--vae-batch', type=int, default=8)
    parser.add_argument('--vae-lr', type=float, default=5e-4)
    parser.add_argument('--unet-steps', type=int, default=20000)
    parser.add_argument('--unet-batch', type=int, default=32)
    parser.add_argument('--unet-lr', type=float, default=1e-3)
    parser.add_argument('--save-every', type=int, default=500, help='steps between two checkpoints')
    parser.add_argument('--device', default='cpu', help="where to train, e.g. cpu or a GPU's name")
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    images, labels = draw_corpus(args.images, TRAIN_SEED, args.work_dir / 'train.npz')
    unseen, _ = draw_corpus(TEST_IMAGES, TEST_SEED, args.work_dir / 'test.npz')
    vae, psnr = train_vae(args, images, unseen)
    if psnr < REQUIRED_PSNR:
        raise SystemExit(
            f'the VAE reconstructs unseen pictures at {psnr:.1f} dB PSNR, {REQUIRED_PSNR} dB are needed before a UNet '
            'is worth training on its latents: give it more --vae-steps'
        )
    tokenizer = build_tokenizer(args.work_dir / 'tokenizer')
    unet, text_encoder = train_unet(args, vae, tokenizer, images, labels)
    save_pipeline(args, vae, unet, text_encoder, tokenizer, unseen, psnr)


def draw_corpus(count: int, seed: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, H, W, 3) uint8 and the index of each one's species (count,), drawn once and kept at `path`."""
    if path.exists():
        with np.load(path) as stored:
            if len(stored['images']) == count:
                return stored['images'], stored['labels']
    with ProcessPoolExecutor() as pool:
        draw = pool.map(partial(draw_sample, seed, size=IMAGE_SIZE), range(count), chunksize=64)
        samples = list(tqdm(draw, total=count, desc=f'drawing {path.stem}'))
    images = np.stack([sample.image for sample in samples])
    labels = np.array([SPECIES.index(sample.species) for sample in samples])
    np.savez(path, images=images, labels=labels)
    return images, labels


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """Pictures (B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


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
        self.step, self.curve = 0, []
        if self.path.exists():
            stored = torch.load(self.path, map_location=args.device, weights_only=True)
            self.step, self.curve = stored['step'], stored['curve']
            for part in ('module', 'optimizer', 'scheduler', 'ema'):
                getattr(self, part).load_state_dict(stored[part])

    def save(self) -> None:
        state = {part: getattr(self, part).state_dict() for part in ('module', 'optimizer', 'scheduler', 'ema')}
        partial_path = self.path.with_suffix('.partial')
        torch.save({'step': self.step, 'curve': self.curve, **state}, partial_path)
        partial_path.replace(self.path)

    def run(self, loss_of, evaluate) -> None:
        """Train until `steps`; `loss_of(generator)` returns a step's loss, `evaluate()` a value for the log."""
        progress = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        average = None
        while self.step < self.steps:
            loss = loss_of(torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.ema.step(self.module.parameters())
            self.step += 1
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.update()
            progress.set_postfix(loss=f'{average:.4f}', refresh=False)
            if self.step % self.args.save_every == 0 or self.step == self.steps:
                self.ema.store(self.module.parameters())
                self.ema.copy_to(self.module.parameters())
                self.module.eval()
                with torch.no_grad():
                    self.curve.append([self.step, average, evaluate(self.step)])
                self.module.train()
                self.ema.restore(self.module.parameters())
                self.save()
                tqdm.write(f'{self.name}: step {self.step}, loss {average:.4f}, value {self.curve[-1][2]:.4f}')
        progress.close()
        self.ema.copy_to(self.module.parameters())
        self.module.requires_grad_(False).eval()


def reconstruct(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    """Decoded posterior means (B, 3, H, W) in [-1, 1]."""
    batches = np.array_split(images, math.ceil(len(images) / 64))
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(to_tensor(batch, device)).latent_dist.mode()).sample for batch in batches]
    return torch.cat(decoded).clamp(-1, 1)


def mean_psnr(vae: AutoencoderKL, images: np.ndarray, device: str) -> float:
    """Peak signal-to-noise ratio in dB, over 8-bit pictures, mean over pictures."""
    error = (reconstruct(vae, images, device) - to_tensor(images, device)).div(2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


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


def train_vae(args: argparse.Namespace, images: np.ndarray, unseen: np.ndarray) -> tuple[AutoencoderKL, float]:
    """The trained VAE, its scaling factor set to one over the latents' standard deviation, and its PSNR."""
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

    trainer.run(loss_of, lambda step: mean_psnr(vae, unseen, args.device))
    with torch.no_grad():
        latents = vae.encode(to_tensor(images[:1024], args.device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return vae, mean_psnr(vae, unseen, args.device)


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


def encode_corpus(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    """Scaled posterior moments, mean and standard deviation, of pictures and mirrored pictures (2 N, 2, 4, h, w)."""
    moments = []
    with torch.no_grad():
        for batch in tqdm(np.array_split(images, math.ceil(len(images) / 64)), desc='encoding'):
            for view in (batch, batch[:, :, ::-1].copy()):
                posterior = vae.encode(to_tensor(view, device)).latent_dist
                moments.append(torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor)
    return torch.cat([*moments[::2], *moments[1::2]])


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
    both = torch.nn.ModuleDict({'unet': unet, 'text_encoder': text_encoder})
    trainer = Trainer('unet', both, args.unet_steps, args.unet_lr, args)
    if trainer.step < args.unet_steps:
        moments = encode_corpus(vae, images, args.device)
        species = torch.from_numpy(labels).repeat(2)
        captions = [f'a photo of {"an" if name[0] in "aeiou" else "a"} {name}' for name in SPECIES]
        tokens = tokenize(tokenizer, [*captions, '']).to(args.device)  # the last one for dropped captions
        scheduler = DDIMScheduler(**SCHEDULER)

    def batch_loss(generator: torch.Generator, count: int) -> torch.Tensor:
        picked = torch.randint(len(moments), (count,), generator=generator)
        latents, spread = moments[picked].unbind(dim=1)
        latents = latents + spread * torch.randn(latents.shape, generator=generator).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(1000, (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        conditions = text_encoder(tokens)[0][torch.where(dropped, len(SPECIES), species[picked])]
        x_t = scheduler.add_noise(latents, noise, timesteps.to(args.device))
        predicted = unet(x_t, timesteps.to(args.device), conditions).sample
        snr = compute_snr(scheduler, timesteps).to(latents)
        weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
        return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    def evaluate(step: int) -> float:
        if step % (4 * args.save_every) == 0:
            pipeline = StableDiffusionPipeline(**pipeline_parts(vae, unet, text_encoder, tokenizer))
            sample_sheet(pipeline, columns=4, steps=20).save(args.work_dir / f'samples-{step:06d}.png')
        return float(batch_loss(torch.Generator().manual_seed(12345), 256))

    trainer.run(lambda generator: batch_loss(generator, args.unet_batch), evaluate)
    return unet, text_encoder


def pipeline_parts(vae, unet, text_encoder, tokenizer) -> dict:
    """Arguments of `StableDiffusionPipeline`."""
    return {
        'vae': vae, 'unet': unet, 'text_encoder': text_encoder, 'tokenizer': tokenizer,
        'scheduler': DDIMScheduler(**SCHEDULER), 'safety_checker': None, 'feature_extractor': None,
        'requires_safety_checker': False,
    }  # fmt: skip


def sample_sheet(pipeline: StableDiffusionPipeline, columns: int = 8, steps: int = 50) -> Image.Image:
    """Generated pictures, one row per species (DDIM, guidance 3)."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f'a photo of {"an" if name[0] in "aeiou" else "a"} {name}' for name in SPECIES]
    generator = torch.Generator(pipeline.device).manual_seed(0)
    pictures = pipeline(
        prompts, num_images_per_prompt=columns, num_inference_steps=steps, guidance_scale=3.0, generator=generator,
        height=IMAGE_SIZE, width=IMAGE_SIZE, output_type="np",
    ).images  # fmt: skip
    return grid((pictures * 255).round().astype(np.uint8), columns)


def grid(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures (N, H, W, 3) uint8 in rows of `columns`, enlarged twice."""
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


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

    curves = {name: torch.load(args.work_dir / f'{name}.pt', weights_only=True)['curve'] for name in ('vae', 'unet')}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    steps, _, values = zip(*curves['vae'], strict=True)
    axes[0].plot(steps, values)
    axes[0].set(xlabel='step', ylabel='PSNR on unseen pictures (dB)', title='VAE')
    steps, losses, values = zip(*curves['unet'], strict=True)
    axes[1].plot(steps, losses, label='training, running mean')
    axes[1].plot(steps, values, label='EMA weights, 256 fixed draws')
    axes[1].set(xlabel='step', ylabel='min-SNR weighted loss', title='UNet', yscale='log')
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(args.out / 'curves.png', dpi=100)
    (args.out / 'README.md').write_text(model_card(args, unet, vae, text_encoder, psnr, curves['unet'][-1]))


def model_card(args, unet, vae, text_encoder, psnr: float, last: list[float]) -> str:
    """The README.md of the folder."""
    size = sum(path.stat().st_size for path in args.out.rglob('*.safetensors')) / 2**20
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in
              (("UNet", unet), ("VAE", vae), ("text encoder", text_encoder))}  # fmt: skip
    parameters = ', '.join(f'{name} {count:.2f} M' for name, count in counts.items())
    return f"""---
license: apache-2.0
library_name: diffusers
---
# tiny-sd

A latent diffusion model of toy quadrupeds (horse, giraffe, dog, elephant) at {IMAGE_SIZE} x {IMAGE_SIZE} pixels, with
the block types and the layer names of Stable Diffusion 1.5. It is not meant to generate images: it exists so that
diffseg can be tried and tested offline through the code paths of the real models.

* Parameters: {parameters}; {size:.1f} MiB of float16 safetensors.
* Latents: 4 channels at 1/4 of the image size. Captions: "a photo of a horse" and the like, at most {MAX_TOKENS}
  tokens.
* Data: {args.images} pictures drawn by `tools/toy/quadrupeds.py` (series {TRAIN_SEED}), each also mirrored for
  the UNet. No photographs and no other models were used.
* VAE: {args.vae_steps} steps of {args.vae_batch} pictures; {psnr:.1f} dB PSNR on {TEST_IMAGES} unseen pictures
  (series {TEST_SEED}).
* UNet and text encoder: {args.unet_steps} steps of {args.unet_batch} latents, AdamW, peak learning rate {args.unet_lr}
  with linear decay over the last 30 %, EMA 0.999, captions dropped at {CAPTION_DROPOUT:.0%}, min-SNR weighted noise
  prediction; final loss {last[1]:.4f} in training, {last[2]:.4f} with the averaged weights.

Made by

    python tools/toy/pretrain_sd.py --images {args.images} --vae-steps {args.vae_steps} --unet-steps {args.unet_steps}

![training curves](curves.png)
![unseen pictures and, below each row, their reconstructions](reconstructions.png)
![samples](samples.png)
"""


if __name__ == '__main__':
    main()
