"""Backbones: image -> tuple of feature maps."""

from .conditioners import LearnedPrompts, MetaPrompts, TextAdapter
from .diffusion import DiffusionBackbone
from .ensemble import EnsembleBackbone
from .meta_prompts import MetaPromptsBackbone
from .resnet import ResNetBackbone
from .vision import VisionBackbone

__all__ = [
    'DiffusionBackbone',
    'EnsembleBackbone',
    'LearnedPrompts',
    'MetaPrompts',
    'MetaPromptsBackbone',
    'ResNetBackbone',
    'TextAdapter',
    'VisionBackbone',
]
