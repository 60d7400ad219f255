"""Data sets: the toy quadrupeds and the label-scarce part segmentation folders."""

from .scarce import LoadLabelArray, ScarceDataset
from .toy import ToySample, draw_sample

__all__ = ['LoadLabelArray', 'ScarceDataset', 'ToySample', 'draw_sample']
