"""Data sets: the toy quadrupeds and the label-scarce part segmentation folders."""

from .scarce import IgnoreSmallClasses, LoadLabelArray, ScarceDataset
from .toy import ToySample, draw_sample

__all__ = ['IgnoreSmallClasses', 'LoadLabelArray', 'ScarceDataset', 'ToySample', 'draw_sample']
