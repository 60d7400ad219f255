"""Metrics."""

from .pck import correct_keypoints, pck
from .scarce import ScarceIoUMetric

__all__ = ['ScarceIoUMetric', 'correct_keypoints', 'pck']
