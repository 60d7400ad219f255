"""Tiny random vision transformers, saved as the published ones are."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PATCH, WIDTH, DEPTH = 8, 32, 3
CONFIG = {
    'hidden_size': WIDTH,
    'num_hidden_layers': DEPTH,
    'num_attention_heads': 4,
    'intermediate_size': 64,
    'image_size': 4 * PATCH,
    'patch_size': PATCH,
    'initializer_range': 0.5,  # so that the blocks do something
}
TEXT = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16}
KINDS = ('dinov2', 'dinov2_with_registers', 'dinov3_vit', 'vit', 'vit_mae', 'clip')


def model(kind: str, seed: int = 1) -> PreTrainedModel:
    """What the hub has of each kind: MAE with its decoder, CLIP with its text model, DINO (vit) without a pooler."""
    torch.manual_seed(seed)
    if kind == 'clip':
        return CLIPModel(CLIPConfig(vision_config=CONFIG, text_config=TEXT)).eval()
    if kind == 'vit':
        return ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False).eval()
    cls, config = {
        'dinov2': (Dinov2Model, Dinov2Config(**CONFIG)),
        'dinov2_with_registers': (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**CONFIG)),
        'dinov3_vit': (DINOv3ViTModel, DINOv3ViTConfig(**CONFIG, num_register_tokens=2)),
        'vit_mae': (
            ViTMAEForPreTraining,
            ViTMAEConfig(
                **CONFIG,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            ),
        ),
    }[kind]
    return cls(config).eval()


def save(folder: Path, kind: str = 'dinov2', seed: int = 1) -> Path:
    """Write a folder with weights, configuration and the processor's configuration."""
    model(kind, seed).save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder
