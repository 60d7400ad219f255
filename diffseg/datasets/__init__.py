"""Data sets: label-scarce part segmentation folders, pairs of images, and videos."""

from .ap10k import AP10KDataset, ToyAP10KDataset
from .captions import LoadCaption
from .cub import CUBPairsDataset
from .davis import DAVISDataset
from .hpatches import DetectKeypoints, HPatchesDataset, PackHomographyPair
from .image_folder import ImageFolderDataset
from .jhmdb import JHMDBDataset
from .pair_transforms import (
    ColourJitterPair,
    CropToBoxPair,
    LoadPair,
    PackPair,
    RandomCropPair,
    RandomFlipPair,
    ResizePair,
    SelectKeypointsPair,
)
from .pairs import DamagedFile, PairDataset
from .pf import PFPascalDataset, PFWillowDataset
from .scarce import IgnoreSmallClasses, LoadLabelArray, ScarceDataset
from .spair import SPairDataset, SPairUDataset, ToyPairDataset
from .tss import TSSDataset
from .video import LoadVideo

__all__ = [
    'AP10KDataset',
    'CUBPairsDataset',
    'ColourJitterPair',
    'CropToBoxPair',
    'DAVISDataset',
    'DamagedFile',
    'DetectKeypoints',
    'HPatchesDataset',
    'IgnoreSmallClasses',
    'ImageFolderDataset',
    'JHMDBDataset',
    'LoadCaption',
    'LoadLabelArray',
    'LoadPair',
    'LoadVideo',
    'PFPascalDataset',
    'PFWillowDataset',
    'PackHomographyPair',
    'PackPair',
    'PairDataset',
    'RandomCropPair',
    'RandomFlipPair',
    'ResizePair',
    'SPairDataset',
    'SPairUDataset',
    'ScarceDataset',
    'SelectKeypointsPair',
    'TSSDataset',
    'ToyAP10KDataset',
    'ToyPairDataset',
]
