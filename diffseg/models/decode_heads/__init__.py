"""Decode heads: maps -> classes of pixels."""

from .pixel_classifier import PixelClassifierHead

__all__ = ['PixelClassifierHead']
