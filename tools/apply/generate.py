"""Generate images from prompts, and save the activations of the sampling steps with them.

    python tools/apply/generate.py sd15 --prompt 'a photo of a horse' 'a photo of a dog' --seed 0 1 --out generated \\
        --layers dhf --timesteps 0 80 180 280 380 480 580 680 780 880 980 --spacing leading --steps-offset 0

`generated/a-photo-of-a-horse-0.png` is the image, and `generated/a-photo-of-a-horse-0.png.safetensors` holds a tensor
(T, C, h, w) for each layer from the same DDIM trajectory, in the format of `extract_features.py`; with classifier-free
guidance they are those of the conditional call. `generated/config.json` records the configuration, and a run with
another one is refused there.

Timesteps are those at which the model is sampled: with 50 steps 981, 961, ..., 1 for Stable Diffusion; for its turbo
models, which take one to four steps, 999 with `--steps 1 --guidance 1`. Diffusion Hyperfeatures has 980, 960, ..., 0
and uses the ones above; the same noise levels of a real image, by inversion, are labelled -1, 60, 160, ..., 960. With
both in the same order, a model trained on real images can be applied to generated ones (`match.py --features
generated`).
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from diffseg.command_line import add_dtype_argument, add_vae_argument, parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import decode
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_vae
from diffseg.diffusion.schedules import SPACINGS
from diffseg.feature_files import DTYPES, check_configuration, write_features
from diffseg.inspection import available_sites
from diffseg.visualization import to_picture, to_pil


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='preset, hub id, diffusers folder or checkpoint file')
    add_vae_argument(parser)
    parser.add_argument('--prompt', nargs='+', default=[''])
    parser.add_argument('--seed', nargs='+', type=int, default=[0], help='one image per prompt and seed')
    parser.add_argument('--layers', nargs='+', required=True, help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, required=True)
    parser.add_argument('--out', type=Path, required=True, help='folder')
    parser.add_argument('--size', nargs='+', type=int, help='S x S or H x W pixels (default: that of the model)')
    parser.add_argument(
        '--guidance',
        type=float,
        help="scale of classifier-free guidance; 1 is none (default: 7.5, or its pipeline's; 1 without prompts)",
    )
    parser.add_argument('--embedded-guidance', type=float, help='that a network takes as an input (Flux-dev: 3.5)')
    parser.add_argument('--negative-prompt', default='')
    parser.add_argument('--steps', type=int, default=50, help='of the sampler, DDIM or Euler')
    parser.add_argument('--spacing', choices=SPACINGS, help="of the DDIM steps (default: the model's own)")
    parser.add_argument('--steps-offset', type=int, help="added to 'leading' steps (default: the model's own)")
    parser.add_argument('--mu', type=float, help="shift of rectified flow's steps, where it depends on the size (Flux)")
    add_dtype_argument(parser)
    parser.add_argument('--save-dtype', choices=DTYPES, default='float16', help='to store activations in')
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        parser.error('--size takes one number or two')
    args.size = tuple(args.size * 2)[:2] if args.size else None
    return args


def file_name(prompt: str, seed: int) -> str:
    """The prompt's letters and digits, and the seed."""
    return f'{re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:100] or "image"}-{seed}.png'


def run(args: argparse.Namespace) -> None:
    images = {file_name(prompt, seed): (prompt, seed) for prompt in args.prompt for seed in args.seed}
    if len(images) < len(args.prompt) * len(args.seed):
        raise ValueError(f'prompts or seeds would give files of the same name: {args.prompt}, {args.seed}')
    available, trained = available_sites(args.model)
    options = {name: getattr(args, name) for name in ('guidance', 'spacing', 'steps_offset', 'mu')}
    extractor = DiffusionExtractor(
        args.model,
        expand(args.layers, available),
        args.timesteps,
        trajectory={
            'type': 'generation',
            'steps': args.steps,
            'negative_prompt': args.negative_prompt,
            **{name: value for name, value in options.items() if value is not None},
        },
        prompt=args.prompt,
        dtype=args.dtype,
        embedded_guidance=args.embedded_guidance,
        weights={'vae': args.vae},
        runtime={'device': args.device},
    ).to(args.device)
    vae = None
    if extractor.vae is not None:
        vae = load_vae(args.model, vae=args.vae, dtype=extractor.vae.dtype).to(args.device)
    size = args.size or trained
    per_image = ('prompt', 'seed')
    configuration = {key: value for key, value in extractor.fingerprint.items() if key not in per_image}
    configuration |= {'size': size, 'save_dtype': args.save_dtype}
    check_configuration(args.out, configuration)
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
    for name, (prompt, seed) in tqdm(images.items(), unit='image', disable=None):
        extractor.seed = seed
        with torch.inference_mode():
            activations, latent = extractor.generate(size, prompt)
            image = decode(vae, latent)[0]
        stored = {
            layer: x[0].to('cpu', DTYPES[args.save_dtype]).contiguous()  # (T, C, h, w)
            for layer, x in activations.items()
        }
        if not all(x.isfinite().all() for x in stored.values()):
            raise ValueError(f'activations do not fit {args.save_dtype}; store them with --save-dtype float32')
        to_pil(to_picture(image)).save(args.out / name)
        metadata = {
            'source': name,
            'prompt': prompt,
            'seed': str(seed),
            'timesteps': json.dumps(extractor.timesteps),
            'configuration': digest,
            'input_size': 'x'.join(map(str, size)),
        }
        write_features(args.out / f'{name}.safetensors', stored, metadata)
        print(args.out / name)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, FloatingPointError, SafetensorError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
