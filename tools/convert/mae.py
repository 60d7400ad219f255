"""Turn a checkpoint of masked autoencoders (MAE, arXiv 2111.06377) into a folder that transformers and diffseg read.

    python tools/convert/mae.py lsun_horse.pth models/mae-l8-lsun-horse

It is for checkpoints under the names of facebookresearch/mae, such as those that yandex-research/ddpm-segmentation
trained on LSUN and FFHQ. Keys and shapes tell the configuration, except for how many heads attention has: as many as
there are 64 channels, as in all published ones. The decoder is left out. Images are normalised as those of ImageNet.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEModel

from diffseg.diffusion.loading import read_checkpoint
from diffseg.models.backbones.vision import IMAGENET

HEAD = 64  # channels of an attention head
EPSILON = 1e-6  # of MAE's layer norms
# MAE's modules -> transformers'
NAMES = {
    'cls_token': 'embeddings.cls_token',
    'pos_embed': 'embeddings.position_embeddings',
    'patch_embed.proj.': 'embeddings.patch_embeddings.projection.',
    'norm.': 'layernorm.',
    'norm1.': 'layernorm_before.',
    'norm2.': 'layernorm_after.',
    'attn.proj.': 'attention.o_proj.',
    'mlp.': 'mlp.',
}
QKV = 'attention.q_proj', 'attention.k_proj', 'attention.v_proj'


def mae_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of the encoder that a checkpoint holds.

    Raises:
        ValueError: it is no checkpoint of MAE.
    """
    if missing := [name for name in ('cls_token', 'pos_embed', 'patch_embed.proj.weight') if name not in state]:
        raise ValueError(
            f'this is no checkpoint of facebookresearch/mae: {missing[0]} is missing; it has '
            f'{", ".join(sorted({key.split(".")[0] for key in state})[:8]) or "nothing"}'
        )
    width, _, patch, _ = state['patch_embed.proj.weight'].shape
    if width % HEAD:
        raise ValueError(f'the encoder has {width} channels; expected are heads of {HEAD}')
    blocks = {int(match[1]) for key in state if (match := re.match(r'blocks\.(\d+)\.', key))}
    return {
        'hidden_size': width,
        'num_hidden_layers': len(blocks),
        'num_attention_heads': width // HEAD,
        'intermediate_size': len(state['blocks.0.mlp.fc1.weight']),
        'image_size': isqrt(state['pos_embed'].shape[1] - 1) * patch,
        'patch_size': patch,
        'layer_norm_eps': EPSILON,
    }


def convert_mae_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `ViTMAEModel`, in float32."""
    converted = {}
    for name, tensor in state.items():
        block = re.match(r'blocks\.(\d+)\.', name)
        inner = name[block.end() :] if block else name
        prefix = f'layers.{block[1]}.' if block else ''
        if inner.startswith('attn.qkv.'):
            for part, piece in zip(QKV, tensor.float().chunk(3), strict=True):
                converted[f'{prefix}{part}.{inner.rpartition(".")[2]}'] = piece.contiguous()
        elif start := next((start for start in NAMES if inner.startswith(start)), None):
            converted[prefix + NAMES[start] + inner.removeprefix(start)] = tensor.float()
    return converted


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise FileExistsError(f'{args.out} exists and is not empty; choose another folder')
    with torch.serialization.safe_globals([argparse.Namespace]):  # flags of training, beside the weights
        state = read_checkpoint(args.checkpoint)
    state = state.get('model', state)
    config = mae_config(state)
    with torch.device('meta'):
        model = ViTMAEModel(ViTMAEConfig(**config))
    missing, unexpected = model.load_state_dict(convert_mae_encoder(state), assign=True, strict=False)
    if missing or unexpected:
        raise ValueError(
            f'{args.checkpoint} lacks {missing or "nothing"} and has {unexpected or "nothing"} in addition'
        )
    model.save_pretrained(args.out)
    mean, std = IMAGENET
    settings = {'image_processor_type': 'ViTImageProcessor', 'image_mean': mean, 'image_std': std}
    (args.out / 'preprocessor_config.json').write_text(json.dumps(settings, indent=2) + '\n')
    print(
        f'{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, '
        f'{config["num_hidden_layers"]} blocks of {config["hidden_size"]} channels, patches of {config["patch_size"]}, '
        f'images of {config["image_size"]} x {config["image_size"]}'
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='.pth, .pt or .safetensors')
    parser.add_argument('out', type=Path, help='folder, new or empty')
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
