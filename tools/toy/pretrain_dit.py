"""Train a small rectified-flow transformer on toy quadrupeds and save it as a diffusers pipeline folder.

The counterpart of `pretrain_sd.py` with a transformer of PixArt's class, on the same captions and on the latents of the
VAE that it trained. A text encoder of its own, a T5, is trained with it. The folder holds safetensors, in half
precision but for the small text encoder, a model card, the training curve and samples. The training resumes where it
stopped.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import (
    CAPTION_DROPOUT,
    CAPTIONS,
    IMAGE_SIZE,
    TRAIN_SEED,
    Trainer,
    add_arguments,
    draw_corpus,
    draw_latents,
    drop_captions,
    encode_corpus,
    megabytes,
    millions,
    plot_loss,
    sample_sheet,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

MAX_TOKENS = 32
TRANSFORMER = {
    'sample_size': IMAGE_SIZE // 4, 'patch_size': 2, 'in_channels': 4, 'out_channels': 4, 'num_layers': 6,
    'num_attention_heads': 4, 'attention_head_dim': 48, 'cross_attention_dim': 192, 'caption_channels': 64,
}  # fmt: skip
TEXT_ENCODER = {
    'd_model': 64, 'd_kv': 16, 'd_ff': 128, 'num_layers': 2, 'num_heads': 4, 'feed_forward_proj': 'gated-gelu',
    'dropout_rate': 0.0,
}  # fmt: skip
SCHEDULER = {'prediction_type': 'flow_prediction', 'use_flow_sigmas': True}  # as Sana has; PixArt's pipeline needs it
SAMPLING = {'max_sequence_length': MAX_TOKENS, 'use_resolution_binning': False}


def main(argv: list[str] | None = None) -> None:
    """Draw the corpus, encode it and train; each resumes where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, 'tiny-dit', save_every=500)
    parser.add_argument('--vae', type=Path, default=Path('demo/tiny-sd'), help='pipeline folder whose VAE to use')
    parser.add_argument('--steps', type=int, default=8000)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--lr', type=float, default=1e-3)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    vae = AutoencoderKL.from_pretrained(args.vae, subfolder='vae').to(args.device).requires_grad_(False).eval()
    images, labels = draw_corpus(args.images, TRAIN_SEED, args.work_dir / 'train.npz')
    moments = latent_moments(args, vae, images)
    pipeline, curve = train(args, vae, moments, torch.from_numpy(labels).repeat(2))
    save(args, pipeline, curve)


def latent_moments(args: argparse.Namespace, vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """What `encode_corpus` returns, computed once for a VAE and kept in the work directory."""
    digest = hashlib.sha256()
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    path = args.work_dir / f'moments-{len(images)}-{digest.hexdigest()[:12]}.safetensors'
    if not path.exists():
        partial_path = path.with_suffix('.partial')
        save_file({'moments': encode_corpus(vae, images, args.device)}, partial_path)
        partial_path.replace(path)
    return load_file(path, device=args.device)['moments']


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with the words of the captions as tokens; other words are spelled in letters."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789,.'-"
    special = ('<pad>', '</s>', '<unk>')
    vocabulary = [
        *((token, 0.0) for token in special),
        *((f'▁{word}', -1.0) for word in words),
        *((letter, -10.0) for letter in letters),
    ]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


@torch.no_grad()
def initialise(transformer: PixArtTransformer2DModel) -> None:
    """Initialise as PixArt-alpha does (arXiv 2310.00426): cross-attention and the output start at zero."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    torch.nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    embedder = transformer.adaln_single.emb.timestep_embedder
    captions = transformer.caption_projection
    for linear in (
        embedder.linear_1, embedder.linear_2, transformer.adaln_single.linear, captions.linear_1, captions.linear_2
    ):  # fmt: skip
        torch.nn.init.normal_(linear.weight, std=0.02)
    for linear in (transformer.proj_out, *(block.attn2.to_out[0] for block in transformer.transformer_blocks)):
        torch.nn.init.zeros_(linear.weight)


def train(
    args: argparse.Namespace, vae: AutoencoderKL, moments: torch.Tensor, species: torch.Tensor
) -> tuple[PixArtSigmaPipeline, list[list[float]]]:
    """The pipeline, whose transformer and text encoder learn the velocity together, and the curve of its losses.

    The flow is rectified, x_t = (1 - s) x_0 + s noise with the velocity noise - x_0; s is drawn from SD3's logit-normal
    distribution (arXiv 2403.03206, section 3.1) and the network is given 1000 s.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **TEXT_ENCODER)).to(args.device)
    transformer = PixArtTransformer2DModel(**TRANSFORMER).to(args.device)
    initialise(transformer)
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    pipeline = PixArtSigmaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    both = torch.nn.ModuleDict({'transformer': transformer, 'text_encoder': text_encoder})
    trainer = Trainer('transformer', both, args.steps, args.lr, args)
    tokens = tokenizer([*CAPTIONS, ''], padding=True, return_tensors='pt').to(args.device)

    def batch_loss(generator: torch.Generator, count: int) -> torch.Tensor:
        picked, latents, noise = draw_latents(moments, count, generator)
        s = compute_density_for_timestep_sampling('logit_normal', count, 0.0, 1.0, generator=generator).to(latents)
        captions = drop_captions(species[picked], generator)
        fraction = s[:, None, None, None]
        # on CPUs with bfloat16 the linear layers are faster in it, the fused attention is slower backwards
        with torch.autocast(latents.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeddings = text_encoder(**tokens).last_hidden_state
            velocity = transformer(
                (1 - fraction) * latents + fraction * noise,
                encoder_hidden_states=embeddings[captions],
                encoder_attention_mask=tokens.attention_mask[captions],
                timestep=1000 * s,
            ).sample
        return (velocity.float() - (noise - latents)).square().mean()

    def evaluate(step: int) -> float:
        if step % (2 * args.save_every) == 0:
            sheet = sample_sheet(pipeline, columns=4, steps=20, **SAMPLING)
            sheet.save(args.work_dir / f'samples-{step:06d}.png')
        return float(batch_loss(torch.Generator().manual_seed(12345), 256))

    trainer.run(lambda generator: batch_loss(generator, args.batch), evaluate)
    return pipeline, trainer.curve


def save(args: argparse.Namespace, pipeline: PixArtSigmaPipeline, curve: list[list[float]]) -> None:
    """Write the pipeline folder with card, curve and samples."""
    if args.out.exists():
        shutil.rmtree(args.out)
    for part in (
        pipeline.transformer,
        pipeline.vae,
    ):  # diffusers loads these in float32, transformers as they are stored
        part.half()
    pipeline.save_pretrained(args.out)
    pipeline.to(torch.float32)
    sample_sheet(pipeline, **SAMPLING).save(args.out / 'samples.png')
    figure, axes = plt.subplots(figsize=(4.5, 3))
    plot_loss(axes, curve, '256 fixed draws', ylabel='squared error of the velocity')
    figure.tight_layout()
    figure.savefig(args.out / 'curves.png', dpi=100)
    (args.out / 'README.md').write_text(model_card(args, pipeline, curve[-1]))


def model_card(args: argparse.Namespace, pipeline: PixArtSigmaPipeline, last: list[float]) -> str:
    """The README.md of the folder."""
    parts = {'transformer': pipeline.transformer, 'VAE': pipeline.vae, 'text encoder': pipeline.text_encoder}
    parameters = ', '.join(f'{name} {millions(part):.2f} M' for name, part in parts.items())
    return f"""---
license: apache-2.0
library_name: diffusers
---
# tiny-dit

A rectified-flow transformer of toy quadrupeds (horse, giraffe, dog, elephant) at {IMAGE_SIZE} x {IMAGE_SIZE} pixels, of
PixArt's class (`PixArtTransformer2DModel`, `PixArtSigmaPipeline`). It is the counterpart of `tiny-sd` for transformers:
it exists so that diffseg can be tried and tested offline through the code paths of the real models.

* Parameters: {parameters}; {megabytes(args.out):.1f} MiB of safetensors, in float16 but
  for the text encoder.
* {TRANSFORMER['num_layers']} blocks of {pipeline.transformer.inner_dim} channels, patches of 2 x 2 latent cells, so
  {(IMAGE_SIZE // 8) ** 2} tokens. The latents are those of `tiny-sd`, whose VAE this folder holds too. Captions,
  "a photo of a horse" and the like, are encoded by a T5 with its own tokenizer.
* Data: {args.images} pictures drawn by `tools/toy/quadrupeds.py` (series {TRAIN_SEED}), each also mirrored. No
  photographs and no other models were used.
* Transformer and text encoder: {args.steps} steps of {args.batch} latents, AdamW, peak learning rate {args.lr} with
  linear decay over the last 30 %, EMA 0.999, captions dropped at {CAPTION_DROPOUT:.0%}; the velocity noise - x_0 is
  predicted at logit-normal times as in SD3; final loss {last[1]:.4f} in training, {last[2]:.4f} with the
  averaged weights.
* The samples below took 50 steps of DPM-Solver++ at guidance 3.

Made by

    python tools/toy/pretrain_dit.py --images {args.images} --steps {args.steps}

![training curve](curves.png)
![samples](samples.png)
"""


if __name__ == '__main__':
    main()
