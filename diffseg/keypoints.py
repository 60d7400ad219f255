"""Keypoints of images: read from files, or detected.

Keypoints are (x, y) in pixels, with pixel centres at integers, with shape (N, 2), float32.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import SuperPointForKeypointDetection


def read_keypoints(path: str | Path) -> np.ndarray:
    """Read points from a file.

    Text files have one line per point, `x y` or `x,y`, as the `.kp` files of DIFT's evaluation on HPatches; `.npy`
    files an array, `.json` files a list of pairs.

    Raises:
        ValueError: the file cannot be read, or has other content.
    """
    path = Path(path)
    try:
        if path.suffix == '.npy':
            points = np.load(path)
        elif path.suffix == '.json':
            points = json.loads(path.read_text('utf-8'))
        else:
            lines = path.read_text('utf-8').splitlines()
            points = [line.replace(',', ' ').split() for line in lines if line.strip()]
        points = np.asarray(points, dtype=np.float32)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as points, a line "x y" for each ({error})') from error
    if points.size == 0:
        return np.empty((0, 2), np.float32)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f'{path}: has an array of shape {points.shape}, expected (N, 2), x and y, all finite')
    return points


def sift_keypoints(image: Image.Image, num_points: int = 1000) -> np.ndarray:
    """Keypoints of OpenCV's SIFT with the strongest response, without duplicates."""
    detections = cv2.SIFT_create().detect(np.asarray(image.convert('L')), None)
    points = np.array([point.pt for point in detections], np.float32).reshape(-1, 2)
    return strongest(points, np.array([point.response for point in detections]), num_points)


def load_superpoint(model: str) -> SuperPointForKeypointDetection:
    """Load transformers' SuperPoint from a folder or a hub id, such as `magic-leap-community/superpoint`.

    Raises:
        ValueError: the model cannot be loaded.
    """
    try:
        return SuperPointForKeypointDetection.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f'{model}: cannot be loaded as SuperPoint ({error}); give the folder of a copy of '
            f'magic-leap-community/superpoint'
        ) from error


@torch.inference_mode()
def superpoint_keypoints(
    image: Image.Image, model: SuperPointForKeypointDetection, num_points: int = 1000
) -> np.ndarray:
    """Keypoints of SuperPoint (arXiv 1712.07629) with the highest score, at the image's original size."""
    grey = torch.from_numpy(np.array(image.convert('L'))).to(model.device) / 255
    detections = model(grey.expand(1, 3, -1, -1))
    points = (
        detections.keypoints[0] * detections.keypoints.new_tensor(image.size)
    ).round()  # back from fractions to pixels
    return strongest(points.cpu().numpy(), detections.scores[0].cpu().numpy(), num_points)


def strongest(points: np.ndarray, strengths: np.ndarray, num_points: int) -> np.ndarray:
    """The `num_points` strongest of points (N, 2) with strengths (N,), without duplicates, sorted by x and y."""
    points = points[np.argsort(-strengths, kind='stable')]
    _, first = np.unique(points, axis=0, return_index=True)
    return np.unique(points[np.sort(first)[:num_points]], axis=0)
