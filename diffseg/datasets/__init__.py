"""Data sets: toy quadrupeds, label-scarce part segmentation folders, and pairs of images with keypoints."""

from .captions import LoadCaption
from .cub import CUBPairsDataset
from .pair_transforms import (
    ColourJitterPair,
    CropToBoxPair,
    LoadPair,
    PackPair,
    RandomCropPair,
    RandomFlipPair,
    ResizePair,
)
from .pairs import DamagedFile, PairDataset
from .pf import PFPascalDataset, PFWillowDataset
from .scarce import IgnoreSmallClasses, LoadLabelArray, ScarceDataset
from .spair import SPairDataset, ToyPairDataset
from .toy import ToySample, draw_sample

__all__ = [
    'CUBPairsDataset',
    'ColourJitterPair',
    'CropToBoxPair',
    'DamagedFile',
    'IgnoreSmallClasses',
    'LoadCaption',
    'LoadLabelArray',
    'LoadPair',
    'PFPascalDataset',
    'PFWillowDataset',
    'PackPair',
    'PairDataset',
    'RandomCropPair',
    'RandomFlipPair',
    'ResizePair',
    'SPairDataset',
    'ScarceDataset',
    'ToyPairDataset',
    'ToySample',
    'draw_sample',
]
