"""Parts for mmsegmentation: importing this package registers them in `mmseg.registry.MODELS`."""

from .backbones import DiffusionBackbone, EnsembleBackbone, VisionBackbone
from .correspondence import CorrespondenceModel
from .decode_heads import PixelClassifierHead
from .necks import AggregationNeck, ConcatNeck

__all__ = [
    'AggregationNeck',
    'ConcatNeck',
    'CorrespondenceModel',
    'DiffusionBackbone',
    'EnsembleBackbone',
    'PixelClassifierHead',
    'VisionBackbone',
]
