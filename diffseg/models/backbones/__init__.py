"""Backbones: image -> tuple of feature maps."""

from .diffusion import DiffusionBackbone

__all__ = ['DiffusionBackbone']
