"""Metrics."""

from .agreement import AgreementMetric
from .davis import DAVISMetric
from .homography import HomographyMetric, corner_error, estimate_homography
from .jhmdb import JHMDBMetric
from .pck import PCKMetric, correct_keypoints, pck
from .scarce import ScarceIoUMetric
from .text_masks import TextMaskIoUMetric

__all__ = [
    'AgreementMetric',
    'DAVISMetric',
    'HomographyMetric',
    'JHMDBMetric',
    'PCKMetric',
    'ScarceIoUMetric',
    'TextMaskIoUMetric',
    'corner_error',
    'correct_keypoints',
    'estimate_homography',
    'pck',
]
