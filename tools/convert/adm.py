"""Turn a checkpoint of guided-diffusion (ADM) into a folder that diffusers and diffseg read.

    python tools/convert/adm.py 256x256_diffusion_uncond.pt models/adm-imagenet-256
    python tools/convert/adm.py ddpm.pt models/ddpm --config flags.json

The configuration follows from the checkpoint's keys and shapes, except for the width of attention heads, which is 64 in
the published networks without classes. `--config` takes guided-diffusion's flags as JSON, such as `{"image_size": 256,
"num_head_channels": 64, "dropout": 0.1}`: what the weights leave open is taken from it, the rest must agree with them.

The folder has `unet/` and `scheduler/` (linear betas), all in float32. Only tensors are read, no pickled objects.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffseg.diffusion.adm import adm_config, convert_adm_unet
from diffseg.diffusion.loading import read_checkpoint
from diffseg.diffusion.presets import ADM_SCHEDULER


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='.pt or .safetensors')
    parser.add_argument('out', type=Path, help='folder, new or empty')
    parser.add_argument('--config', type=Path, help="JSON of guided-diffusion's flags")
    parser.add_argument('--head-channels', type=int, help='width of an attention head (default: 64)')
    parser.add_argument('--image-size', type=int, help='side of the images (default: 8 times the coarsest stride)')
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace) -> dict:
    """guided-diffusion's flags from the file and the command line."""
    settings = {}
    if args.config is not None:
        try:
            settings = json.loads(args.config.read_text('utf-8'))
        except ValueError as error:
            raise ValueError(f'{args.config} is no valid JSON: {error}') from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"{args.config} holds a {type(settings).__name__}; expected guided-diffusion's flags by name"
            )
    arguments = {'num_head_channels': args.head_channels, 'image_size': args.image_size}
    return settings | {name: value for name, value in arguments.items() if value is not None}


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise FileExistsError(f'{args.out} exists and is not empty; choose another folder')
    settings = read_settings(args)
    state = read_checkpoint(args.checkpoint)
    config = adm_config(state, settings)
    weights = convert_adm_unet(state, config)
    with torch.device('meta'):
        unet = UNet2DModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    variance = 'learned_range' if config['out_channels'] > config['in_channels'] else 'fixed_large'
    scheduler = DDPMScheduler(**{**ADM_SCHEDULER, 'variance_type': variance})
    DDPMPipeline(unet, scheduler).save_pretrained(args.out)
    print(
        f'{args.out}: {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, channels '
        f'{config["block_out_channels"]}, attention heads of {config["attention_head_dim"]}, images of '
        f'{config["sample_size"]} x {config["sample_size"]}'
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
