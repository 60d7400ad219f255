"""Metrics."""

from .pck import correct_keypoints, pck

__all__ = ['correct_keypoints', 'pck']
