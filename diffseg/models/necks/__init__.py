"""Necks: the backbone's maps -> one map per level, fine -> coarse."""

from .aggregation import AggregationNeck, MixingWeights
from .concat import ConcatNeck
from .sequence import NeckSequence

__all__ = ['AggregationNeck', 'ConcatNeck', 'MixingWeights', 'NeckSequence']
