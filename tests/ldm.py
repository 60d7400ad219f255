"""Stable Diffusion parts under the tensor names of the original (CompVis) single-file checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

_UNET_TOP = {
    'time_embedding.linear_1': 'time_embed.0',
    'time_embedding.linear_2': 'time_embed.2',
    'conv_in': 'input_blocks.0.0',
    'conv_norm_out': 'out.0',
    'conv_out': 'out.2',
}
_UNET_RESNET = {
    'norm1': 'in_layers.0',
    'conv1': 'in_layers.2',
    'norm2': 'out_layers.0',
    'conv2': 'out_layers.3',
    'time_emb_proj': 'emb_layers.1',
    'conv_shortcut': 'skip_connection',
}
_VAE_ATTENTION = {'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k', 'to_v': 'v', 'to_out.0': 'proj_out'}


def _unet_name(name: str, without_attention: set[int], per_level: int) -> str:
    if match := re.match(
        r'(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)', name
    ):
        side, level, kind, repeat, rest = match.groups()
        i = int(repeat) + (per_level + (side == 'up')) * int(level or 0)
        module, leaf = rest.rsplit('.', 1)
        rest = f'{_UNET_RESNET.get(module, module)}.{leaf}'
        if side == 'mid':
            return f'middle_block.{2 * int(repeat) if kind == "resnets" else 1}.{rest}'
        if kind == 'downsamplers':
            return f'input_blocks.{(per_level + 1) * (int(level) + 1)}.0.{re.sub("^conv", "op", rest)}'
        if kind == 'upsamplers':
            slot = 1 if int(level) in without_attention else 2
            return f'output_blocks.{(per_level + 1) * (int(level) + 1) - 1}.{slot}.{rest}'
        slot = 0 if kind == 'resnets' else 1
        return (
            f'input_blocks.{1 + i + int(level)}.{slot}.{rest}' if side == 'down' else f'output_blocks.{i}.{slot}.{rest}'
        )
    module, leaf = name.rsplit('.', 1)
    return f'{_UNET_TOP[module]}.{leaf}'


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r'up_blocks\.(\d+)', lambda m: f'up.{levels - 1 - int(m[1])}', name).replace('down_blocks.', 'down.')
    name = re.sub(r'mid_block\.resnets\.(\d+)', lambda m: f'mid.block_{int(m[1]) + 1}', name)
    name = re.sub(r'(down|up)\.(\d+)\.resnets', r'\1.\2.block', name).replace('mid_block.attentions.0', 'mid.attn_1')
    name = name.replace('downsamplers.0', 'downsample').replace('upsamplers.0', 'upsample')
    name = name.replace('conv_shortcut', 'nin_shortcut').replace('conv_norm_out', 'norm_out')
    if 'attn_1' in name:
        for ours, theirs in _VAE_ATTENTION.items():
            name = name.replace(f'attn_1.{ours}.', f'attn_1.{theirs}.')
    return name


def unet_state(unet: UNet2DConditionModel, prefix: str = 'model.diffusion_model.') -> dict[str, Tensor]:
    without = {i for i, block in enumerate(unet.up_blocks) if not hasattr(block, 'attentions')}
    per_level = unet.config.layers_per_block
    return {prefix + _unet_name(name, without, per_level): tensor for name, tensor in unet.state_dict().items()}


def vae_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    state = {}
    for name, tensor in vae.state_dict().items():
        theirs = _vae_name(name, len(vae.config.block_out_channels))
        is_projection = 'attn_1' in theirs and tensor.ndim == 2  # theirs is a 1x1 convolution
        state['first_stage_model.' + theirs] = tensor[..., None, None] if is_projection else tensor
    return state


def text_state(encoder: CLIPTextModel) -> dict[str, Tensor]:
    prefix = 'cond_stage_model.transformer.text_model.'
    state = {prefix + name.removeprefix('text_model.'): tensor for name, tensor in encoder.state_dict().items()}
    return {**state, f'{prefix}embeddings.position_ids': torch.arange(77).unsqueeze(0)}


def sd15_state(folder: Path) -> Mapping[str, Tensor]:
    """All parts of a diffusers folder of SD1.5's kind, as one checkpoint has them, with what else it has."""
    return {
        'alphas_cumprod': torch.ones(1000),
        'model_ema.decay': torch.tensor(0.9999),
        **unet_state(UNet2DConditionModel.from_pretrained(folder, subfolder='unet')),
        **vae_state(AutoencoderKL.from_pretrained(folder, subfolder='vae')),
        **text_state(CLIPTextModel.from_pretrained(folder, subfolder='text_encoder')),
    }
