"""Hooks of training and testing."""

from .evaluation import ResultFileHook, ResumableTestHook, SelectionGuardHook
from .training import CheckpointFallbackHook, IterationSeedHook, MixingWeightsHook
from .video_results import VideoResultHook

__all__ = [
    'CheckpointFallbackHook',
    'IterationSeedHook',
    'MixingWeightsHook',
    'ResultFileHook',
    'ResumableTestHook',
    'SelectionGuardHook',
    'VideoResultHook',
]
