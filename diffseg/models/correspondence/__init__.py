"""Semantic correspondence."""

from .matching import match_points

__all__ = ['match_points']
