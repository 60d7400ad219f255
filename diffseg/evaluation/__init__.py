"""Metrics, and hooks around evaluations."""

from .hooks import ResultFileHook, ResumableTestHook, SelectionGuardHook
from .pck import PCKMetric, correct_keypoints, pck
from .scarce import ScarceIoUMetric

__all__ = [
    'PCKMetric',
    'ResultFileHook',
    'ResumableTestHook',
    'ScarceIoUMetric',
    'SelectionGuardHook',
    'correct_keypoints',
    'pck',
]
