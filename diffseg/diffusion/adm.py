"""Checkpoints of guided-diffusion, pixel-space networks known as ADM, as diffusers' `UNet2DModel`.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2105.05233). DIFT and DDPM-seg read the outputs of
`output_blocks.i`, which `sites.resolve` knows as `adm-{i}`.

The configuration follows from the keys and shapes of such a checkpoint, except for the width of attention heads.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

NORM_GROUPS = 32
HEAD_CHANNELS = 64  # of all published networks without classes
COARSEST = 8  # cells along a side of the coarsest map of all published networks

# diffusers' modules -> guided-diffusion's
_ENDS = {
    'time_embedding.linear_1': 'time_embed.0',
    'time_embedding.linear_2': 'time_embed.2',
    'conv_in': 'input_blocks.0.0',
    'conv_norm_out': 'out.0',
    'conv_out': 'out.2',
}
_PARTS = {
    'norm1': 'in_layers.0',
    'conv1': 'in_layers.2',
    'time_emb_proj': 'emb_layers.1',
    'norm2': 'out_layers.0',
    'conv2': 'out_layers.3',
    'conv_shortcut': 'skip_connection',
    'group_norm': 'norm',
    'to_q': 'qkv',
    'to_k': 'qkv',
    'to_v': 'qkv',
    'to_out.0': 'proj_out',
}


def is_adm_checkpoint(keys: Collection[str]) -> bool:
    """Whether these are the names of guided-diffusion's tensors; those of latent diffusion models have a prefix."""
    ends = ('time_embed.0.weight', 'input_blocks.0.0.weight', 'output_blocks.0.0.in_layers.0.weight', 'out.2.weight')
    return all(end in keys for end in ends) and not any('.transformer_blocks.' in key for key in keys)


def adm_config(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of the `UNet2DModel` that a checkpoint holds.

    Args:
        state: guided-diffusion's state dict.
        settings: Its flags by name, as far as available. `num_head_channels` (64), `image_size` (8 x 8 cells on the
            coarsest level) and `dropout` (0), which do not follow from the weights, are read from them. Flags that do
            must agree with the weights; flags without influence are ignored, as are strides and resolutions of
            attention that the network does not have.

    Raises:
        ValueError: Another kind of checkpoint, a network that depends on classes or on a second image, or settings that
            do not match.
    """
    settings = settings or {}
    if not is_adm_checkpoint(state):
        prefixes = ', '.join(sorted({key.split('.')[0] for key in state})[:8]) or 'nothing'
        raise ValueError(
            'this is no denoising network of guided-diffusion, whose tensors are named time_embed.*, input_blocks.*, '
            f'middle_block.*, output_blocks.* and out.*, without transformer_blocks; found are: {prefixes}'
        )
    if 'label_emb.weight' in state:
        raise ValueError(
            f'the checkpoint is conditioned on {len(state["label_emb.weight"])} classes (label_emb), which images '
            'lack; use one without classes, such as 256x256_diffusion_uncond.pt'
        )
    out_channels, in_channels = len(state['out.2.weight']), state['input_blocks.0.0.weight'].shape[1]
    if in_channels != 3 or out_channels not in (3, 6):
        raise ValueError(
            f'the checkpoint has {in_channels} channels going in and {out_channels} coming out; expected are 3 (RGB) '
            'and 3 or, with a learned variance, 6. An upsampler, which reads a second image, cannot be converted'
        )
    blocks = 1 + max(int(key.split('.')[1]) for key in state if key.startswith('output_blocks.'))
    samplers = {i: sampler for i in range(blocks) if (sampler := _upsampler(state, i)) is not None}
    repeats = min(samplers, default=blocks - 1) + 1  # residual blocks of a level, one more than in the encoder
    firsts = [f'output_blocks.{i}' for i in range(0, blocks, repeats)][::-1]  # of each level, fine -> coarse
    ends = [f'{first}.0.out_layers.3.weight' for first in firsts]
    if missing := [end for end in ends if end not in state]:
        raise ValueError(f'the checkpoint has no {missing[0]}, where a level of {repeats} blocks is expected to begin')
    channels = [len(state[end]) for end in ends]
    attention = [f'{first}.1.qkv.weight' in state for first in firsts]
    updown = 'conv' not in samplers.values()
    shifted = len(state['output_blocks.0.0.emb_layers.1.weight']) == 2 * channels[-1]
    image_size = settings.get('image_size', COARSEST * 2 ** (len(channels) - 1))
    head_channels = settings.get('num_head_channels', HEAD_CHANNELS if 'num_heads' not in settings else -1)
    for name, value in (('image_size', image_size), ('num_head_channels', head_channels)):
        if not isinstance(value, int):
            raise ValueError(f'{name} is {value!r}; it is a whole number')

    _check_settings(
        settings,
        {
            'num_channels': channels[0],
            'channel_mult': [count / channels[0] for count in channels],
            'num_res_blocks': repeats - 1,
            'attention_ds': {2**level: there for level, there in enumerate(attention)},
            'attention_resolutions': {image_size / 2**level: there for level, there in enumerate(attention)},
            'learn_sigma': out_channels == 6,
            'use_scale_shift_norm': shifted,
            'resblock_updown': updown,
            'class_cond': False,
            'use_new_attention_order': False,
            'noise_schedule': 'linear',
            'diffusion_steps': 1000,
            'predict_xstart': False,
        },
    )
    if head_channels < 1:
        raise ValueError(
            "guided-diffusion's num_heads gives heads of other widths on each level, which UNet2DModel cannot express; "
            'it has num_head_channels, one width for all'
        )
    widths = {count for count, there in zip(channels, [*attention[:-1], True], strict=True) if there}
    if wrong := sorted(count for count in widths if count % head_channels):
        raise ValueError(
            f'attention over {wrong} channels cannot have heads of {head_channels}; give their width '
            '(num_head_channels)'
        )
    plain, sampler = ('Resnet{}sampleBlock2D', 'resnet') if updown else ('{}Block2D', 'conv')
    kinds = ['Attn{}Block2D' if there else plain for there in attention]
    return {
        '_class_name': UNet2DModel.__name__,
        'sample_size': image_size,
        'in_channels': in_channels,
        'out_channels': out_channels,
        'block_out_channels': channels,
        'layers_per_block': repeats - 1,
        'down_block_types': [kind.format('Down') for kind in kinds],
        'up_block_types': [kind.format('Up') for kind in kinds[::-1]],
        'downsample_type': sampler,
        'upsample_type': sampler,
        'resnet_time_scale_shift': 'scale_shift' if shifted else 'default',
        'attention_head_dim': head_channels,
        'norm_num_groups': NORM_GROUPS,
        'attn_norm_num_groups': NORM_GROUPS,  # without it the middle block's attention has no norm
        'dropout': settings.get('dropout', 0.0),
    }


def convert_adm_unet(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a `UNet2DModel`, in float32.

    Args:
        state: guided-diffusion's, in any dtype.
        config: From `adm_config`.

    Raises:
        ValueError: The tensors do not match the configuration.
    """
    with torch.device('meta'):
        expected = UNet2DModel.from_config(dict(config)).state_dict()
    modules = dict(_modules(config))
    names = {name: f'{modules[module]}.{kind}' for name in expected for module, _, kind in [name.rpartition('.')]}
    missing, strange = set(names.values()) - state.keys(), state.keys() - set(names.values())
    problems = [
        f'{len(keys)} tensors {what}, such as {min(keys)}'
        for keys, what in ((missing, 'are missing'), (strange, 'are unexpected'))
        if keys
    ]
    converted = {}
    for name, original in names.items():
        if original in state:
            converted[name] = _tensor(name, state[original], config['attention_head_dim'])
            if converted[name].shape != expected[name].shape:
                shapes = f'{tuple(converted[name].shape)} instead of {tuple(expected[name].shape)}'
                problems.append(f'{original} has shape {shapes}')
                break
    if problems:
        shown = ('block_out_channels', 'layers_per_block', 'up_block_types')
        layout = ', '.join(f'{key} {config[key]}' for key in shown)
        raise ValueError(
            f'UNet2DModel cannot express the network of the checkpoint: with {layout}, {"; ".join(problems)}'
        )
    return converted


def _modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of modules in diffusers and in guided-diffusion; including some that a network lacks."""
    yield from _ENDS.items()
    for ours, theirs in _blocks(config):
        yield ours, theirs
        for part, original in _PARTS.items():
            yield f'{ours}.{part}', f'{theirs}.{original}'


def _blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of residual blocks, attention and samplers; for samplers that are convolutions, that of the convolution."""
    levels, repeats = len(config['block_out_channels']), config['layers_per_block']
    down, up = ('', '') if config['downsample_type'] == 'resnet' else ('.op', '.conv')
    ours = '.conv' if down else ''
    for level in range(levels):
        first = 1 + level * (repeats + 1)  # input_blocks.0 is the first convolution
        for repeat in range(repeats):
            yield f'down_blocks.{level}.resnets.{repeat}', f'input_blocks.{first + repeat}.0'
            yield f'down_blocks.{level}.attentions.{repeat}', f'input_blocks.{first + repeat}.1'
        yield f'down_blocks.{level}.downsamplers.0{ours}', f'input_blocks.{first + repeats}.0{down}'
    yield 'mid_block.resnets.0', 'middle_block.0'
    yield 'mid_block.attentions.0', 'middle_block.1'
    yield 'mid_block.resnets.1', 'middle_block.2'
    for level, kind in enumerate(config['up_block_types']):
        first = level * (repeats + 1)
        for repeat in range(repeats + 1):
            yield f'up_blocks.{level}.resnets.{repeat}', f'output_blocks.{first + repeat}.0'
            yield f'up_blocks.{level}.attentions.{repeat}', f'output_blocks.{first + repeat}.1'
        place = 2 if kind.startswith('Attn') else 1
        yield f'up_blocks.{level}.upsamplers.0{ours}', f'output_blocks.{first + repeats}.{place}{up}'


def _tensor(name: str, tensor: Tensor, head_channels: int) -> Tensor:
    """One of diffusers' tensors, from guided-diffusion's."""
    if part := re.search(r'\.to_([qkv])\.', name):  # (heads * 3 * d, ...): a head's queries, keys and values in turn
        tensor = tensor.unflatten(0, (-1, 3, head_channels))[:, 'qkv'.index(part[1])].flatten(0, 1)
    if '.attentions.' in name and tensor.ndim == 3:
        tensor = tensor.squeeze(-1)  # a convolution over cells: (out, in, 1)
    return tensor.to(torch.float32)


def _upsampler(state: Mapping[str, Tensor], i: int) -> str | None:
    """Kind of the upsampler at the end of an output block: a residual block ('resnet'), a convolution, or None."""
    for place in (1, 2):
        for kind, key in (('resnet', 'in_layers.0.weight'), ('conv', 'conv.weight')):
            if f'output_blocks.{i}.{place}.{key}' in state:
                return kind
    return None


def _check_settings(settings: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Compare settings with the values in the checkpoint or those that the conversion needs.

    Args:
        settings: Flags by name.
        required: The values by name; for a flag that lists levels, all levels of the network and whether they are
            listed.

    Raises:
        ValueError: A setting differs.
    """
    for name, expected in required.items():
        if name not in settings or (settings[name] == '' and isinstance(expected, list)):
            continue  # an empty channel_mult is guided-diffusion's default for the image size
        value = parsed = settings[name]
        if isinstance(expected, list | dict):
            try:
                parsed = list(map(float, value.split(',') if isinstance(value, str) else value))
            except (TypeError, ValueError):
                pass  # not numbers, so it differs
        if isinstance(expected, dict):
            if isinstance(parsed, list):
                parsed = [level for level in expected if level in parsed]
            expected = [level for level, named in expected.items() if named]
        if parsed != expected:
            raise ValueError(f'{name} is {value!r}, but the checkpoint has, or its conversion needs, {expected}')
