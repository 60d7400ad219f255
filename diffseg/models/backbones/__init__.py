"""Backbones: image -> tuple of feature maps."""

from .diffusion import DiffusionBackbone
from .vision import VisionBackbone

__all__ = ['DiffusionBackbone', 'VisionBackbone']
