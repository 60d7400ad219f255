"""Metrics, and hooks around evaluations."""

from .davis import DAVISMetric
from .homography import HomographyMetric, corner_error, estimate_homography
from .hooks import ResultFileHook, ResumableTestHook, SelectionGuardHook
from .jhmdb import JHMDBMetric
from .pck import PCKMetric, correct_keypoints, pck
from .scarce import ScarceIoUMetric
from .video_results import VideoResultHook

__all__ = [
    'DAVISMetric',
    'HomographyMetric',
    'JHMDBMetric',
    'PCKMetric',
    'ResultFileHook',
    'ResumableTestHook',
    'ScarceIoUMetric',
    'SelectionGuardHook',
    'VideoResultHook',
    'corner_error',
    'correct_keypoints',
    'estimate_homography',
    'pck',
]
