"""Write the LoRA layers of a checkpoint for diffusers, in OUT/pytorch_lora_weights.safetensors.

Pipelines of PixArt, DiT and Hunyuan-DiT have no LoRA in diffusers: what was trained there is used from the checkpoint.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence

from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from torch import Tensor

from diffseg.inspection import read_training_checkpoint

LAYER = re.compile(r'(?P<backbone>.*)extractor\.network\.(?P<module>.+)\.(?P<matrix>lora_[AB])\.default\.weight')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='of a model whose backbone was trained with lora')
    parser.add_argument('out', help='folder, for lora_weights or for load_lora_weights of a pipeline')
    parser.add_argument('--backbone', help="where there are several: the beginning of its tensors' names")
    args = parser.parse_args(argv)
    try:
        checkpoint = read_training_checkpoint(args.checkpoint)
        part, layers = convert(checkpoint.get('state_dict', checkpoint), args.backbone)
    except OSError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except ValueError as error:
        print(f'error: {args.checkpoint}: {error}', file=sys.stderr)
        return 2
    pipeline = StableDiffusionLoraLoaderMixin if part == 'unet' else SD3LoraLoaderMixin  # as all of transformers
    pipeline.save_lora_weights(args.out, **{f'{part}_lora_layers': layers})
    return 0


def convert(state: Mapping[str, Tensor], backbone: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """The network's part and its LoRA layers with diffusers' names.

    They are scaled to an alpha equal to the rank, the default without metadata.
    """
    layers = {name: match for name in state if (match := LAYER.fullmatch(name))}
    prefixes = sorted({match['backbone'] for match in layers.values()})
    if not prefixes:
        raise ValueError('the checkpoint has no LoRA layers')
    selected = [name for name in prefixes if backbone in (None, name)]
    if len(selected) != 1:
        raise ValueError(f'LoRA layers belong to {" and ".join(prefixes)}; choose one of them with --backbone')
    (backbone,) = selected
    if f'{backbone}_extra_state' not in state:
        raise ValueError(f'the checkpoint lacks {backbone}_extra_state, which has the rank and alpha of its LoRA')
    fingerprint = json.loads(bytes(state[f'{backbone}_extra_state'].tolist()))
    lora, part = fingerprint['lora'], fingerprint['weights'].partition('-')[0]
    scales = {'lora_A': 1, 'lora_B': lora['lora_alpha'] / lora['r']}
    return part, {
        f'{match["module"]}.{match["matrix"]}.weight': state[name] * scales[match['matrix']]
        for name, match in layers.items()
        if match['backbone'] == backbone
    }


if __name__ == '__main__':
    raise SystemExit(main())
