"""Labels of a video's first frame, propagated to all others."""

from .labels import decode_joints, decode_mask, encode_joints, encode_mask
from .model import LabelPropagator
from .windowed import propagate_labels

__all__ = [
    'LabelPropagator',
    'decode_joints',
    'decode_mask',
    'encode_joints',
    'encode_mask',
    'propagate_labels',
]
