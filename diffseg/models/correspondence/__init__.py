"""Correspondence, semantic and geometric."""

from .heads import ConvDescriptorHead, DescriptorHead
from .matching import UpsampledSimilarity, best_buddies, descriptors_at, match_points, mutual_nearest_neighbours
from .model import CorrespondenceModel, PairDataPreProcessor
from .sparse import SparseMatcher

__all__ = [
    'ConvDescriptorHead',
    'CorrespondenceModel',
    'DescriptorHead',
    'PairDataPreProcessor',
    'SparseMatcher',
    'UpsampledSimilarity',
    'best_buddies',
    'descriptors_at',
    'match_points',
    'mutual_nearest_neighbours',
]
