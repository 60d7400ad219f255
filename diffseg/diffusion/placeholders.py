"""Embeddings of no text, to count operations and to describe models without their text encoders."""

from collections.abc import Mapping
from typing import Any

import torch

from diffseg.diffusion.conditioning import pooled_size
from diffseg.diffusion.embeddings import MASKS, Conditioning
from diffseg.diffusion.pipeline_prompts import ENCODINGS

TOKENS = 77  # of a prompt of CLIP
# The widths of the fields of `Conditioning` that each class reads, in its configuration
_WIDTHS = {
    'PixArtTransformer2DModel': {'embeds': 'caption_channels'},
    'SD3Transformer2DModel': {'embeds': 'joint_attention_dim', 'pooled': 'pooled_projection_dim'},
    'FluxTransformer2DModel': {'embeds': 'joint_attention_dim', 'pooled': 'pooled_projection_dim'},
    'Flux2Transformer2DModel': {'embeds': 'joint_attention_dim'},
    'QwenImageTransformer2DModel': {'embeds': 'joint_attention_dim'},
    'SanaTransformer2DModel': {'embeds': 'caption_channels'},
    'HunyuanDiT2DModel': {'embeds': 'cross_attention_dim', 'embeds_2': 'cross_attention_dim_t5'},
    'AuraFlowTransformer2DModel': {'embeds': 'joint_attention_dim'},
    'Lumina2Transformer2DModel': {'embeds': 'cap_feat_dim'},
    'ZImageTransformer2DModel': {'embeds': 'cap_feat_dim'},
}
_CLIP_TOKENS = {'SD3Transformer2DModel': TOKENS}  # before those of T5
_WITHOUT_MASK = ('QwenImageTransformer2DModel',)  # where all tokens exist


def placeholder_conditioning(config: Mapping[str, Any], prompts: int = 1) -> Conditioning:
    """Embeddings of zeros with the shapes that a network reads.

    Prompts have the pipeline's number of tokens (PixArt's are those of PixArt-Sigma), the largest one where it does not
    pad them (QwenImage, Z-Image).

    Args:
        config: Configuration of the network, with `_class_name` unless it is a `UNet2DConditionModel`.
        prompts: Number of prompts.
    """
    name = config.get('_class_name', 'UNet2DConditionModel')
    if name in _WIDTHS:
        return _of_transformer(name, config, prompts)
    if 'num_embeds_ada_norm' in config:  # DiT, which reads labels
        labels = torch.full((prompts,), config['num_embeds_ada_norm'], device='cpu')
        return Conditioning(torch.empty(prompts, 0, 0, device='cpu'), labels=labels)
    if 'cross_attention_dim' not in config:  # pixel space
        return Conditioning(torch.empty(prompts, 0, 0, device='cpu'))
    pooled = pooled_size(config)
    return Conditioning(
        torch.zeros(prompts, TOKENS, config['cross_attention_dim'], device='cpu'),
        None if pooled is None else torch.zeros(prompts, pooled, device='cpu'),
    )


def _of_transformer(name: str, config: Mapping[str, Any], prompts: int) -> Conditioning:
    row = max((row for row in ENCODINGS.values() if row.network == name), key=lambda row: row.length or 0)
    tensors = {}
    for fields, arguments in row.calls:
        tokens = arguments.get('max_sequence_length', row.length) + _CLIP_TOKENS.get(name, 0)
        for field in filter(None, fields):
            if field in MASKS:
                if name not in _WITHOUT_MASK:
                    tensors[field] = torch.ones(prompts, tokens, dtype=torch.long, device='cpu')
                continue
            shape = (prompts,) if field == 'pooled' else (prompts, tokens)
            tensors[field] = torch.zeros(*shape, config[_WIDTHS[name][field]], device='cpu')
    return Conditioning(**tensors)
