"""Hooks of training and testing."""

from .distillation import DistillationExportHook
from .evaluation import ResultFileHook, ResumableTestHook, SelectionGuardHook
from .training import CheckpointFallbackHook, IterationSeedHook, MixingWeightsHook
from .video_results import VideoResultHook

__all__ = [
    'CheckpointFallbackHook',
    'DistillationExportHook',
    'IterationSeedHook',
    'MixingWeightsHook',
    'ResultFileHook',
    'ResumableTestHook',
    'SelectionGuardHook',
    'VideoResultHook',
]
