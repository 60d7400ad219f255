"""Edit propagation: a sticker drawn over a source image is warped to the same parts of objects in target images.

Pure functions, after DIFT's edit propagation (arXiv 2306.03881). A *sticker* is the edit as RGBA with shape (H, W, 4),
uint8, on a canvas of the source's size. Some of its pixels are matched with each target (see
`diffseg.models.correspondence.match_points`), and a homography or a thin-plate spline of the matches warps it. Points
are (x, y) in pixels of their image.

Unlike DIFT, which resizes all images to 768 x 768 and aligns the corners of maps and images, images keep their sizes,
and the cells of a map tile its image.
"""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from diffseg.evaluation.homography import estimate_homography, transform
from diffseg.geometry import Size

MIN_INLIERS = 8  # any four matches agree on some homography
MIN_SHARE = 0.1  # of the matches
MAX_STRETCH = 10.0  # of a sticker in any direction, relative to the scale between the images; and 1 / 10
MAX_TORN = 0.1  # of a sticker's area
BEND = 0.2  # of a sticker's extent: how far a bent object may be from an affine map
NEIGHBOURS = 12
MARGIN = 0.1  # of a sticker's extent: how far beyond the matches a spline is trusted
STEPS = 128  # along the longer side of an image, at which a spline is evaluated; it is interpolated in between
PROBES = 10_000  # pixels at most, at which it is verified that a spline does not fold
OUTSIDE = -10.0  # a coordinate outside every source


def read_sticker(path: str | Path, size: Size) -> np.ndarray:
    """Read a sticker for a source of (height, width).

    Raises:
        ValueError: it cannot be read, has another size than the source, no alpha channel, or is transparent everywhere.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f'{path}: cannot be read as an image ({error})') from error
    if not image.has_transparency_data:
        raise ValueError(
            f'{path}: has mode {image.mode!r}, no alpha channel; a sticker is transparent where the source is '
            f'unchanged, so save it as a PNG with transparency'
        )
    if (image.height, image.width) != size:
        raise ValueError(
            f'{path}: has {image.width} x {image.height} pixels, but the source has {size[1]} x {size[0]}; draw the '
            f'sticker on a canvas of the size of the source'
        )
    sticker = np.array(image.convert('RGBA'))
    if not sticker[..., 3].any():
        raise ValueError(f'{path}: is transparent everywhere; give pixels that shall be propagated an alpha above 0')
    return sticker


def sample_points(sticker: np.ndarray, count: int = 1000, seed: int = 0) -> np.ndarray:
    """Draw random pixels of a sticker, each at most once.

    Args:
        sticker: with shape (H, W, 4).
        count: largest number of pixels.
        seed: of the draw.

    Returns:
        (x, y), row by row, with shape (N, 2), int64.
    """
    y, x = np.nonzero(sticker[..., 3])
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = np.sort(rng.permutation(len(x))[:count])
    return np.stack([x[chosen], y[chosen]], axis=1)


def fit_homography(
    points: np.ndarray, matches: np.ndarray, sticker: np.ndarray, size: Size, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a homography to the matches (RANSAC).

    Unlike DIFT, which uses every result, a homography with few inliers, or one that tears or crushes the sticker, is an
    error. One that mirrors is valid: objects may face the other way.

    Args:
        points: of the sticker, with shape (N, 2).
        matches: in the target, with shape (N, 2).
        sticker: with shape (H, W, 4).
        size: (height, width) of the target.
        threshold: largest error of an inlier, in pixels of the target.

    Returns:
        The homography with shape (3, 3), and a mask of the inliers, bool with shape (N,).

    Raises:
        ValueError: too few inliers; the horizon crosses the sticker, so that a part of it is turned over; or the
            homography is (nearly) singular on the sticker.
    """
    homography, inliers = estimate_homography(points.astype(float), matches.astype(float), 'ransac', threshold)
    remedy = 'other layers, a larger ensemble, a larger sticker or threshold, or a spline'
    _check_support(inliers, f'one homography to {threshold:.3g} px', remedy)
    y, x = np.nonzero(sticker[..., 3])
    corners = cv2.convexHull(np.stack([x, y], axis=1).astype(np.int32))[:, 0].astype(float)  # (K, 2)
    w = corners @ homography[2, :2] + homography[2, 2]  # (K,); the Jacobian's determinant is det(homography) / w^3
    if w.min() <= 0 <= w.max():
        raise ValueError(
            f'the homography turns a part of the sticker over: its horizon crosses the sticker, with {(w > 0).sum()} '
            f'of the {len(w)} corners of its hull on one side; use other layers, a larger ensemble or a smaller sticker'
        )
    places = transform(homography, corners)  # (K, 2)
    jacobians = (homography[:2, :2] - places[..., None] * homography[2, :2]) / w[:, None, None]  # (K, 2, 2)
    usual = np.sqrt(np.prod(size) / np.prod(sticker.shape[:2]))
    stretch = np.linalg.svd(jacobians, compute_uv=False) / usual  # (K, 2)
    if stretch.min() < 1 / MAX_STRETCH or stretch.max() > MAX_STRETCH:
        raise ValueError(
            f'the homography is nearly singular: it scales the sticker by {stretch.min():.3g} to {stretch.max():.3g}, '
            f'allowed is {1 / MAX_STRETCH:g} to {MAX_STRETCH:g} (times {usual:.3g}, the scale between the images); '
            f'use other layers, a higher resolution, or a sticker that is not a narrow strip'
        )
    return homography, inliers


def warp_homography(sticker: np.ndarray, homography: np.ndarray, size: Size) -> np.ndarray:
    """Warp a sticker by a homography (3, 3) to a target of (height, width).

    Returns:
        RGBA with shape (height, width, 4) in [0, 1], float32, its colours premultiplied by alpha.
    """
    return cv2.warpPerspective(_premultiplied(sticker), homography, size[::-1], flags=cv2.INTER_LINEAR)


def fit_spline(
    points: np.ndarray,
    matches: np.ndarray,
    returned: np.ndarray,
    source_size: Size,
    size: Size,
    threshold: float,
    tolerance: float,
    smoothing: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a thin-plate spline from the target to the source, for non-rigid objects (not in DIFT).

    Inliers are cycle-consistent (the match of the match is near the point), near an affine map (RANSAC), and their
    offset from it is near that of their neighbours.

    Args:
        points: of the sticker, with shape (N, 2).
        matches: in the target, with shape (N, 2).
        returned: the matches of `matches` in the source, with shape (N, 2).
        source_size: (height, width) of the source.
        size: that of the target.
        threshold: largest distance of an inlier from the median of its neighbours, in pixels of the target.
        tolerance: largest cycle error, in pixels of the source.
        smoothing: weight of the spline's bending energy, for coordinates in units of the sticker's extent.

    Returns:
        For each pixel of the target its position in the source, (x, y) with shape (height, width, 2), float32, outside
        the source far from the matches; and a mask of the inliers, bool with shape (N,).

    Raises:
        ValueError: too few inliers, all of them lie on a line, or the spline folds or crushes the sticker.
    """
    points, matches = points.astype(float), matches.astype(float)
    kept = np.linalg.norm(returned - points, axis=1) <= tolerance
    remedy = 'other layers, a larger ensemble, or a larger sticker'
    _check_support(kept, f'their backward matches to {tolerance:.3g} px', remedy)
    bend = BEND * _extent(matches[kept])
    affine, near = cv2.estimateAffine2D(points[kept], matches[kept], ransacReprojThreshold=max(bend, threshold))
    kept[kept] = near[:, 0] > 0
    _check_support(kept, f'an affine map to {bend:.3g} px', remedy)
    off = matches[kept] - points[kept] @ affine[:, :2].T - affine[:, 2]  # (K, 2)
    neighbours = cKDTree(points[kept]).query(points[kept], min(NEIGHBOURS + 1, len(off)))[1][:, 1:]
    kept[kept] = np.linalg.norm(off - np.median(off[neighbours], axis=1), axis=1) <= threshold
    _check_support(kept, f'their neighbours to {threshold:.3g} px', remedy)

    try:
        backward = _evaluate_spline(matches[kept], points[kept], size, smoothing)
    except np.linalg.LinAlgError as error:
        raise ValueError(f'all matches lie on a line, which determines no spline; use {remedy}') from error
    hull = cv2.convexHull(matches[kept].round().astype(np.int32))
    inside = cv2.fillConvexPoly(np.zeros(size, np.uint8), hull, 1)
    derivatives = [
        derivative[inside > 0] for derivative in np.gradient(backward, axis=(1, 0))
    ]  # along x and y, (P, 2) each
    jacobians = np.stack(derivatives, axis=2)[:: len(derivatives[0]) // PROBES + 1]  # (P, 2, 2)
    stretch = np.linalg.svd(jacobians, compute_uv=False) / np.sqrt(np.prod(source_size) / np.prod(size))  # (P, 2)
    crushed = ((stretch < 1 / MAX_STRETCH) | (stretch > MAX_STRETCH)).any(1)
    turned = np.linalg.det(jacobians) < 0
    torn = (crushed | (turned == (turned.mean() < 0.5))).mean()
    if torn > MAX_TORN:
        raise ValueError(
            f'the spline folds or crushes {torn:.0%} of the sticker, allowed is {MAX_TORN:.0%}; use {remedy}'
        )
    beyond = cv2.distanceTransform(1 - inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    backward[beyond > MARGIN * _extent(matches[kept])] = OUTSIDE
    return backward, kept


def warp_spline(sticker: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Warp a sticker by the spline that `fit_spline` returns.

    Returns:
        RGBA with shape (height, width, 4) in [0, 1], float32, its colours premultiplied by alpha.
    """
    return cv2.remap(_premultiplied(sticker), backward, None, cv2.INTER_LINEAR)


def composite(image: np.ndarray, warped: np.ndarray) -> np.ndarray:
    """Composite a warped sticker over an image. Pixels where its alpha is 0 are unchanged.

    Unlike DIFT, colours are premultiplied before the sticker is warped, so that those of transparent pixels do not
    bleed into its edges.

    Args:
        image: RGB with shape (H, W, 3), uint8.
        warped: see `warp_homography` and `warp_spline`.

    Returns:
        RGB with shape (H, W, 3), uint8.
    """
    return np.rint(255 * warped[..., :3] + (1 - warped[..., 3:]) * image).clip(0, 255).astype(np.uint8)


def _premultiplied(sticker: np.ndarray) -> np.ndarray:
    rgba = sticker.astype(np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=2)


def _check_support(agree: np.ndarray, with_what: str, remedy: str) -> None:
    """Raise ValueError if too few of the matches agree, bool with shape (N,)."""
    needed = max(MIN_INLIERS, math.ceil(MIN_SHARE * len(agree)))
    if agree.sum() < needed:
        raise ValueError(
            f'{agree.sum()} of {len(agree)} matches agree with {with_what}, needed are {needed}; use {remedy}'
        )


def _evaluate_spline(points: np.ndarray, values: np.ndarray, size: Size, smoothing: float) -> np.ndarray:
    """The smoothing spline of values (N, 2) at points (N, 2), for each pixel: shape (height, width, 2), float32."""
    unit = _extent(points)
    spline = RBFInterpolator(points / unit, values, smoothing=smoothing * len(points), kernel='thin_plate_spline')
    step = max(1, max(size) // STEPS)
    counts = [math.ceil((side - 1) / step) + 1 for side in size]
    y, x = (step * np.arange(count) for count in counts)
    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    coarse = torch.from_numpy(spline(places / unit)).T.unflatten(1, counts)[None]  # (1, 2, h, w)
    fine = F.interpolate(coarse, [(n - 1) * step + 1 for n in counts], mode='bilinear', align_corners=True)[0]
    return fine[:, : size[0], : size[1]].permute(1, 2, 0).float().contiguous().numpy()


def _extent(points: np.ndarray) -> float:
    """Approximate diameter of most of the points (N, 2), in pixels."""
    return max(1.0, 4 * float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1))))
