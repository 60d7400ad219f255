"""Necks: the backbone's maps -> one map per level, fine -> coarse."""

from .aggregation import AggregationNeck, MixingWeights
from .concat import ConcatNeck
from .gated import GatedAggregationNeck, OrderedAggregationNeck
from .sequence import NeckSequence
from .upsampling import UpsamplingNeck

__all__ = [
    'AggregationNeck',
    'ConcatNeck',
    'GatedAggregationNeck',
    'MixingWeights',
    'NeckSequence',
    'OrderedAggregationNeck',
    'UpsamplingNeck',
]
