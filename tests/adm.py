"""Networks of pixels under the tensor names of guided-diffusion."""

import ldm
import torch
from diffusers import UNet2DModel
from torch import Tensor


def unet_state(unet: UNet2DModel) -> dict[str, Tensor]:
    named = ldm.unet_state(unet, prefix='')
    state = {}
    for name, tensor in named.items():
        if '.to_q.' in name:  # queries, keys and values are one convolution, head after head
            three = torch.stack([named[name.replace('to_q', part)] for part in ('to_q', 'to_k', 'to_v')])  # (3, C, ...)
            fused = three.unflatten(1, (-1, unet.config.attention_head_dim)).transpose(0, 1).flatten(0, 2)
            state[name.replace('to_q', 'qkv')] = fused[..., None] if tensor.ndim == 2 else fused
        elif '.to_out.0.' in name:
            state[name.replace('to_out.0', 'proj_out')] = tensor[..., None] if tensor.ndim == 2 else tensor
        elif '.to_k.' not in name and '.to_v.' not in name:
            state[name.replace('group_norm', 'norm')] = tensor
    return state
