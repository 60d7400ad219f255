"""Metrics, and hooks around evaluations."""

from .davis import DAVISMetric
from .hooks import ResultFileHook, ResumableTestHook, SelectionGuardHook
from .jhmdb import JHMDBMetric
from .pck import PCKMetric, correct_keypoints, pck
from .scarce import ScarceIoUMetric
from .video_results import VideoResultHook

__all__ = [
    'DAVISMetric',
    'JHMDBMetric',
    'PCKMetric',
    'ResultFileHook',
    'ResumableTestHook',
    'ScarceIoUMetric',
    'SelectionGuardHook',
    'VideoResultHook',
    'correct_keypoints',
    'pck',
]
