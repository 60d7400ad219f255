"""The search for the activations and timesteps that serve a task best."""

from .grid import Candidate, Measure, Projection

__all__ = ['Candidate', 'Measure', 'Projection']
