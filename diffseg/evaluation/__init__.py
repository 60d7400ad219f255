"""Metrics, and hooks around evaluations."""

from .hooks import ResumableTestHook, SelectionGuardHook
from .pck import PCKMetric, correct_keypoints, pck
from .scarce import ScarceIoUMetric

__all__ = ['PCKMetric', 'ResumableTestHook', 'ScarceIoUMetric', 'SelectionGuardHook', 'correct_keypoints', 'pck']
