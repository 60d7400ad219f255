"""Loops and hooks of training and testing, and the visualizer."""

from .hooks import (
    CheckpointFallbackHook,
    DistillationExportHook,
    IterationSeedHook,
    MixingWeightsHook,
    ResultFileHook,
    ResumableTestHook,
    SelectionGuardHook,
    VideoResultHook,
)
from .loops import PixelClassifierLoop
from .visualizer import LabelSizeVisualizer

__all__ = [
    'CheckpointFallbackHook',
    'DistillationExportHook',
    'IterationSeedHook',
    'LabelSizeVisualizer',
    'MixingWeightsHook',
    'PixelClassifierLoop',
    'ResultFileHook',
    'ResumableTestHook',
    'SelectionGuardHook',
    'VideoResultHook',
]
