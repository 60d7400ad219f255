"""Segmentors that need no training."""

from .text_masks import TextMaskSegmentor

__all__ = ['TextMaskSegmentor']
