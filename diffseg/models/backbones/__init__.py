"""Backbones: image -> tuple of feature maps."""

from .diffusion import DiffusionBackbone
from .ensemble import EnsembleBackbone
from .vision import VisionBackbone

__all__ = ['DiffusionBackbone', 'EnsembleBackbone', 'VisionBackbone']
