"""Loops and hooks of training and testing."""

from .hooks import (
    CheckpointFallbackHook,
    IterationSeedHook,
    MixingWeightsHook,
    ResultFileHook,
    ResumableTestHook,
    SelectionGuardHook,
    VideoResultHook,
)
from .loops import PixelClassifierLoop

__all__ = [
    'CheckpointFallbackHook',
    'IterationSeedHook',
    'MixingWeightsHook',
    'PixelClassifierLoop',
    'ResultFileHook',
    'ResumableTestHook',
    'SelectionGuardHook',
    'VideoResultHook',
]
