"""Semantic correspondence."""

from .heads import ConvDescriptorHead, DescriptorHead
from .matching import UpsampledSimilarity, best_buddies, descriptors_at, match_points, mutual_nearest_neighbours
from .model import CorrespondenceModel, PairDataPreProcessor

__all__ = [
    'ConvDescriptorHead',
    'CorrespondenceModel',
    'DescriptorHead',
    'PairDataPreProcessor',
    'UpsampledSimilarity',
    'best_buddies',
    'descriptors_at',
    'match_points',
    'mutual_nearest_neighbours',
]
