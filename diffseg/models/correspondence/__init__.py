"""Semantic correspondence."""

from .matching import UpsampledSimilarity, best_buddies, descriptors_at, match_points, mutual_nearest_neighbours

__all__ = ['UpsampledSimilarity', 'best_buddies', 'descriptors_at', 'match_points', 'mutual_nearest_neighbours']
