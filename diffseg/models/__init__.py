"""Parts for mmsegmentation: importing this package registers them in `mmseg.registry.MODELS`."""

from .backbones import DiffusionBackbone
from .necks import AggregationNeck, ConcatNeck

__all__ = ['AggregationNeck', 'ConcatNeck', 'DiffusionBackbone']
