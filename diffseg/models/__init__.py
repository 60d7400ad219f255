"""Parts for mmsegmentation: importing this package registers them in `mmseg.registry.MODELS`."""

from .backbones import (
    DiffusionBackbone,
    EnsembleBackbone,
    LearnedPrompts,
    MetaPrompts,
    MetaPromptsBackbone,
    TextAdapter,
    VisionBackbone,
)
from .captions import CaptionPreProcessor
from .correspondence import CorrespondenceModel, SparseMatcher
from .decode_heads import PixelClassifierHead
from .distillation import CleanDistiller
from .necks import AggregationNeck, ConcatNeck, GatedAggregationNeck, OrderedAggregationNeck, UpsamplingNeck
from .propagation import LabelPropagator
from .segmentors import TextMaskSegmentor
from .tta import VoteTTAModel

__all__ = [
    'AggregationNeck',
    'CaptionPreProcessor',
    'CleanDistiller',
    'ConcatNeck',
    'CorrespondenceModel',
    'DiffusionBackbone',
    'EnsembleBackbone',
    'GatedAggregationNeck',
    'LabelPropagator',
    'LearnedPrompts',
    'MetaPrompts',
    'MetaPromptsBackbone',
    'OrderedAggregationNeck',
    'PixelClassifierHead',
    'SparseMatcher',
    'TextAdapter',
    'TextMaskSegmentor',
    'UpsamplingNeck',
    'VisionBackbone',
    'VoteTTAModel',
]
