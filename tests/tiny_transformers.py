"""Tiny random diffusion transformers of every class whose activations can be read, and their arguments."""

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

HEADS = {'num_attention_heads': 2, 'attention_head_dim': 8}
WIDE_HEADS = {'num_attention_heads': 2, 'attention_head_dim': 16}
TEXT = 12  # channels of the text embeddings
TOKENS = 5
POOLED = 10
SD3 = {
    **HEADS,
    'sample_size': 16,
    'in_channels': 4,
    'out_channels': 4,
    'num_layers': 3,
    'joint_attention_dim': TEXT,
    'caption_projection_dim': 16,
    'pooled_projection_dim': POOLED,
    'pos_embed_max_size': 12,
}
PACKED = {**WIDE_HEADS, 'in_channels': 16, 'joint_attention_dim': TEXT}
KINDS = {
    'pixart': (
        PixArtTransformer2DModel,
        {**HEADS, 'sample_size': 16, 'num_layers': 2, 'cross_attention_dim': 16, 'caption_channels': TEXT},
    ),
    'dit': (
        DiTTransformer2DModel,
        {**HEADS, 'sample_size': 16, 'num_layers': 2, 'out_channels': 8, 'num_embeds_ada_norm': 10},
    ),
    'sd3': (SD3Transformer2DModel, SD3),
    'sd35-medium': (SD3Transformer2DModel, {**SD3, 'dual_attention_layers': (0, 1), 'qk_norm': 'rms_norm'}),
    'flux': (
        FluxTransformer2DModel,
        {
            **PACKED,
            'num_layers': 2,
            'num_single_layers': 2,
            'axes_dims_rope': (4, 6, 6),
            'pooled_projection_dim': POOLED,
            'guidance_embeds': True,
        },
    ),
    'flux2': (
        Flux2Transformer2DModel,
        {
            **PACKED,
            'num_layers': 2,
            'num_single_layers': 2,
            'axes_dims_rope': (4, 4, 4, 4),
            'timestep_guidance_channels': 8,
        },
    ),
    'qwen-image': (
        QwenImageTransformer2DModel,
        {**PACKED, 'num_layers': 2, 'out_channels': 4, 'axes_dims_rope': (4, 6, 6)},
    ),
    'sana': (
        SanaTransformer2DModel,
        {
            **HEADS,
            'in_channels': 4,
            'out_channels': 4,
            'num_layers': 2,
            'num_cross_attention_heads': 4,
            'cross_attention_head_dim': 4,
            'cross_attention_dim': 16,
            'caption_channels': TEXT,
            'sample_size': 8,
            'qk_norm': 'rms_norm_across_heads',
        },
    ),
    'hunyuan-dit': (
        HunyuanDiT2DModel,
        {
            **HEADS,
            'in_channels': 4,
            'patch_size': 2,
            'sample_size': 16,
            'hidden_size': 16,
            'num_layers': 4,
            'cross_attention_dim': TEXT,
            'cross_attention_dim_t5': 8,
            'pooled_projection_dim': POOLED,
            'text_len': TOKENS,
            'text_len_t5': 4,
            'use_style_cond_and_image_meta_size': False,
        },
    ),
    'auraflow': (
        AuraFlowTransformer2DModel,
        {
            **HEADS,
            'sample_size': 16,
            'num_mmdit_layers': 2,
            'num_single_dit_layers': 2,
            'joint_attention_dim': TEXT,
            'caption_projection_dim': 16,
            'pos_embed_max_size': 144,
        },
    ),
    'lumina2': (
        Lumina2Transformer2DModel,
        {
            'sample_size': 16,
            'in_channels': 4,
            'hidden_size': 32,
            'num_layers': 2,
            'num_refiner_layers': 1,
            'num_attention_heads': 2,
            'num_kv_heads': 1,
            'multiple_of': 8,
            'axes_dim_rope': (4, 6, 6),
            'axes_lens': (30, 16, 16),
            'cap_feat_dim': TEXT,
        },
    ),
    'z-image': (
        ZImageTransformer2DModel,
        {
            'in_channels': 4,
            'dim': 32,
            'n_layers': 2,
            'n_refiner_layers': 1,
            'n_heads': 2,
            'n_kv_heads': 2,
            'cap_feat_dim': TEXT,
            'axes_dims': [4, 6, 6],
            'axes_lens': [100, 16, 16],
        },
    ),
}
PATCH = {'sana': 1}
SQUARE = ('dit',)  # kinds whose own output is right for squares alone


def transformer(kind: str, seed: int = 0) -> nn.Module:
    """A tiny transformer; norms and biases, too, are random."""
    network, config = KINDS[kind]
    torch.manual_seed(seed)
    return randomise(network(**config).eval())


def randomise(network: nn.Module) -> nn.Module:
    """Change norms and biases, which are made as zeros and ones, in place."""
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or name.endswith('pad_token'):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return network


def inputs(kind: str, batch: int = 2, height: int = 8, width: int = 12) -> dict:
    """Random arguments of an `ActivationRecorder` for a latent of `height` x `width` cells."""
    h, w = height // 2, width // 2
    text = torch.randn(batch, TOKENS, TEXT)
    latent = torch.randn(batch, 4, height, width)
    packed = {'x_t': torch.randn(batch, h * w, 16), 'timestep': torch.tensor([0.3, 0.6])[:batch], 'grid': (h, w)}
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    ids = torch.stack([torch.zeros(h * w), rows.flatten(), columns.flatten()], dim=1)
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    mask[1:, 3:] = 0
    return {
        'pixart': lambda: {
            'x_t': latent,
            'timestep': 50,
            'encoder_hidden_states': text,
            'encoder_attention_mask': mask,
        },
        'dit': lambda: {'x_t': latent, 'timestep': 50, 'class_labels': torch.tensor([3, 10])[:batch]},
        'sd3': lambda: {
            'x_t': latent,
            'timestep': 260.0,
            'encoder_hidden_states': text,
            'pooled_projections': torch.randn(batch, POOLED),
        },
        'flux': lambda: {
            **packed,
            'encoder_hidden_states': text,
            'pooled_projections': torch.randn(batch, POOLED),
            'img_ids': ids,
            'txt_ids': torch.zeros(TOKENS, 3),
            'guidance': torch.full((batch,), 3.5),
        },
        'flux2': lambda: {
            **packed,
            'encoder_hidden_states': text,
            'img_ids': torch.cat([ids, torch.zeros(h * w, 1)], dim=1),
            'txt_ids': torch.cat([torch.zeros(TOKENS, 3), torch.arange(TOKENS)[:, None]], dim=1),
            'guidance': torch.full((batch,), 3.5),
        },
        'qwen-image': lambda: {
            **packed,
            'encoder_hidden_states': text,
            'encoder_hidden_states_mask': mask,
            'img_shapes': [[(1, h, w)]] * batch,
        },
        'sana': lambda: {
            'x_t': latent,
            'timestep': 260.0,
            'encoder_hidden_states': text,
            'encoder_attention_mask': mask,
        },
        'hunyuan-dit': lambda: {
            'x_t': latent,
            'timestep': 50,
            'encoder_hidden_states': text,
            'text_embedding_mask': mask,
            'encoder_hidden_states_t5': torch.randn(batch, 4, 8),
            'text_embedding_mask_t5': torch.ones(batch, 4, dtype=torch.long),
            'image_rotary_emb': tuple(
                f(torch.randn(h * w, 4)).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin)
            ),
        },
        'auraflow': lambda: {'x_t': latent, 'timestep': 0.3, 'encoder_hidden_states': text},
        'lumina2': lambda: {
            'x_t': latent,
            'timestep': 0.3,
            'encoder_hidden_states': text,
            'encoder_attention_mask': mask,
        },
        'z-image': lambda: {
            'x_t': latent,
            'timestep': 0.3,
            'cap_feats': [torch.randn(length, TEXT) for length in (5, 40)[:batch]],
        },
    }['sd3' if kind == 'sd35-medium' else kind]()
