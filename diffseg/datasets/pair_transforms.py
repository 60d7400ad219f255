"""Transforms of pairs of images with their keypoints, boxes and visibility.

They work on the `results` that `PairDataset` describes, and on the Pillow images that `LoadPair` adds as `image0` and
`image1`. Geometry (flip, crop) comes before `ResizePair`: keypoints refer to the image before that resize. A keypoint
(x, y) is the pixel in column x and row y.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from PIL import Image, ImageEnhance

from diffseg.diffusion.images import open_image
from diffseg.structures import PairSample

from .pairs import VIEWS, DamagedFile


@TRANSFORMS.register_module()
class LoadPair(BaseTransform):
    """Read both images.

    Raises:
        DamagedFile: an image cannot be read, or its size is not the annotated one.
    """

    def transform(self, results: dict) -> dict:
        """Add `image{0,1}`, RGB, `ori_shape{0,1}` and `img_shape{0,1}`, (height, width)."""
        for view in VIEWS:
            path = results[f'img_path{view}']
            try:
                image = open_image(path)
            except ValueError as error:
                raise DamagedFile(str(error)) from error
            shape = image.height, image.width
            annotated = results.get(f'ori_shape{view}', shape)
            if tuple(annotated) != shape:
                raise DamagedFile(f'{path}: has height and width {shape}, its annotation says {tuple(annotated)}')
            results[f'image{view}'] = image
            _set_frame(results, view, shape)
        return results


@TRANSFORMS.register_module()
class CropToBoxPair(BaseTransform):
    """Crop each image to a square around its object as ACSM, GANgealing and Neural Congealing do for CUB.

    The box, whose ends are inclusive, is widened on all sides by a fraction of its extent and made square along its
    shorter side; where it leaves the image, the image's edge is repeated. The square is resized with Lanczos' filter
    and is the new frame of keypoints, box and PCK.

    Args:
        size: height and width of the new image.
        padding: fraction of the box's width and height.
    """

    def __init__(self, size: int = 256, padding: float = 0.05) -> None:
        self.size = size
        self.padding = padding

    def transform(self, results: dict) -> dict:
        """Crop both images."""
        for view in VIEWS:
            left, top, side = self._square(results[f'bbox{view}'])
            pixels = np.asarray(results[f'image{view}'])
            rows = np.arange(top, top + side).clip(0, pixels.shape[0] - 1)
            columns = np.arange(left, left + side).clip(0, pixels.shape[1] - 1)
            crop = Image.fromarray(pixels[rows][:, columns])
            results[f'image{view}'] = crop.resize((self.size, self.size), Image.Resampling.LANCZOS)
            scale = self.size / side
            results[f'keypoints{view}'] = (results[f'keypoints{view}'] - np.float32((left, top))) * np.float32(scale)
            results[f'bbox{view}'] = (results[f'bbox{view}'] - np.float32((left, top) * 2)) * np.float32(scale)
            _set_frame(results, view, (self.size, self.size))
        return results

    def _square(self, bbox: np.ndarray) -> tuple[int, int, int]:
        """Left and upper end and side of the crop, in whole pixels that may lie outside the image."""
        low, high = bbox[:2].astype(float), bbox[2:].astype(float)
        margin = self.padding * (high - low + 1)
        low, high = (np.array([_round_half_away(value) for value in end]) for end in (low - margin, high + margin))
        extent = high - low + 1
        side = int(extent.max())
        left, top = (
            int(start - _round_half_away((side - length) / 2)) for start, length in zip(low, extent, strict=True)
        )
        return left, top, side


@TRANSFORMS.register_module()
class SelectKeypointsPair(BaseTransform):
    """Make all but some keypoints invisible, so that neither training nor a test sees them.

    Args:
        keypoint_ids: those to keep, by their ids in the annotations.

    Raises:
        ValueError: the annotation has no ids.
    """

    def __init__(self, keypoint_ids: Sequence[int]) -> None:
        self.keypoint_ids = list(keypoint_ids)

    def transform(self, results: dict) -> dict:
        """Change `visible`."""
        if results.get('keypoint_ids') is None:
            raise ValueError(
                f'pair {results["pair_id"]} does not say which keypoints it has, so that none can be selected; leave '
                f'out SelectKeypointsPair'
            )
        results['visible'] = results['visible'] & np.isin(results['keypoint_ids'], self.keypoint_ids)
        return results


@TRANSFORMS.register_module()
class RandomFlipPair(BaseTransform):
    """Mirror images left to right.

    If both are mirrored, their keypoints correspond as before. If only one is, its keypoints are exchanged by `swaps`
    ("left eye" is matched with the mirrored "right eye"), as the left of one image corresponds to the left of the
    other; a keypoint whose counterpart is not in the pair becomes invisible. `variations` stay as annotated.

    Args:
        prob: probability of a change.
        views: "both" mirrors both images; "one" mirrors one of them, drawn at random.

    Raises:
        ValueError: `views="one"` and the category's `swaps` or the pair's `keypoint_ids` are unknown.
    """

    def __init__(self, prob: float = 0.5, views: Literal['both', 'one'] = 'both') -> None:
        if views not in ('both', 'one'):
            raise ValueError(f"views is {views!r}, choose 'both' or 'one'")
        self.prob = prob
        self.views = views

    def transform(self, results: dict) -> dict:
        """Mirror with probability `prob`."""
        if np.random.rand() >= self.prob:
            return results
        mirrored = VIEWS if self.views == 'both' else (int(np.random.randint(2)),)
        for view in mirrored:
            _check_frame(results, view)
            width = results[f'ori_shape{view}'][1]
            results[f'image{view}'] = results[f'image{view}'].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            x, y = results[f'keypoints{view}'].T
            results[f'keypoints{view}'] = np.stack([width - 1 - x, y], axis=1)
            x1, y1, x2, y2 = results[f'bbox{view}']
            results[f'bbox{view}'] = np.array([width - x2, y1, width - x1, y2])
        if self.views == 'both':
            return _rename(results)
        return _rematch(results, *mirrored)


def _rename(results: dict) -> dict:
    """Exchange the ids of left and right keypoints of a mirrored pair, if they are known."""
    if results.get('swaps') and results.get('keypoint_ids'):
        partner = _partners(results['swaps'])
        results['keypoint_ids'] = [partner.get(name, name) for name in results['keypoint_ids']]
    return results


def _rematch(results: dict, view: int) -> dict:
    """Reorder the keypoints of `view`, the only mirrored image, to match those of the other image."""
    swaps, ids = results.get('swaps'), results.get('keypoint_ids')
    if swaps is None or ids is None:
        raise ValueError(
            f'pair {results["pair_id"]} of category {results["category"]!r} does not say which keypoints are exchanged '
            'by mirroring (metainfo `swaps` of the data set, ids in the annotation); mirror both images'
        )
    partner = _partners(swaps)
    rows = {name: row for row, name in enumerate(ids)}
    order = [rows.get(partner.get(name, name), -1) for name in ids]
    matched = np.array(order, dtype=int) >= 0
    results[f'keypoints{view}'] = results[f'keypoints{view}'][order]
    results['visible'] = results['visible'] & results['visible'][order] & matched
    return results


def _partners(swaps: tuple) -> dict[int, int]:
    return dict(swaps) | {right: left for left, right in swaps}


@TRANSFORMS.register_module()
class RandomCropPair(BaseTransform):
    """Crop each image to a random window around a random keypoint that is visible in both.

    That keypoint stays in both images; those outside either window become invisible. Boxes are clipped to the window.

    Args:
        scale: (lowest, highest) height and width of a window as fractions of the image's.
    """

    def __init__(self, scale: tuple[float, float] = (0.6, 1.0)) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f'scale is {scale}, expected 0 < lowest <= highest <= 1')
        self.scale = scale

    def transform(self, results: dict) -> dict:
        """Crop both images."""
        shared = np.flatnonzero(results['visible'])
        anchor = np.random.choice(shared) if len(shared) else None
        visible = results['visible']
        for view in VIEWS:
            _check_frame(results, view)
            shape = np.array(results[f'ori_shape{view}'])[::-1]  # (width, height)
            extent = np.maximum(1, np.round(np.random.uniform(*self.scale) * shape)).astype(int)
            points = results[f'keypoints{view}']
            low, high = np.zeros(2, dtype=int), shape - extent  # of the window's left upper corner
            if anchor is not None:
                pixel = np.clip(np.floor(points[anchor]), 0, shape - 1).astype(int)
                low, high = np.maximum(low, pixel - extent + 1), np.minimum(high, pixel)
            corner = np.random.randint(low, high + 1)
            results[f'image{view}'] = results[f'image{view}'].crop((*corner.tolist(), *(corner + extent).tolist()))
            points = points - corner.astype(np.float32)
            visible = visible & (points >= 0).all(axis=1) & (points < extent).all(axis=1)
            results[f'keypoints{view}'] = points
            box = results[f'bbox{view}'] - np.tile(corner, 2)
            results[f'bbox{view}'] = np.clip(box, 0, np.tile(extent, 2)).astype(np.float32)
            _set_frame(results, view, (int(extent[1]), int(extent[0])))
        results['visible'] = visible
        return results


@TRANSFORMS.register_module()
class ColourJitterPair(BaseTransform):
    """Change brightness, contrast and saturation of each image by a random factor in [1 - value, 1 + value].

    The factors of the two images are independent, so that a model learns invariance to them.
    """

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2) -> None:
        values = {'brightness': brightness, 'contrast': contrast, 'saturation': saturation}
        for name, value in values.items():
            if not 0 <= value <= 1:
                raise ValueError(f'{name} is {value}, expected 0 to 1')
        self.enhancers = list(
            zip(values.values(), (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), strict=True)
        )

    def transform(self, results: dict) -> dict:
        """Change both images."""
        for view in VIEWS:
            for value, enhancer in self.enhancers:
                factor = np.random.uniform(1 - value, 1 + value)
                results[f'image{view}'] = enhancer(results[f'image{view}']).enhance(factor)
        return results


@TRANSFORMS.register_module()
class ResizePair(BaseTransform):
    """Resize both images; keypoints and boxes keep referring to the image before.

    Args:
        size: (height, width), or one number for both.
        keep_ratio: keep the aspect ratio, with the largest size that fits into `size`.
        divisor: round both sides to multiples of it, as DiTF does.
        interpolation: "bicubic" as DIFT and GDF do, or "bilinear" as Diffusion Hyperfeatures does; both with Pillow.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        keep_ratio: bool = False,
        divisor: int = 1,
        interpolation: Literal['bicubic', 'bilinear'] = 'bicubic',
    ) -> None:
        if interpolation not in ('bicubic', 'bilinear'):
            raise ValueError(f"interpolation is {interpolation!r}, choose 'bicubic' or 'bilinear'")
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.keep_ratio = keep_ratio
        self.divisor = divisor
        self.resampling = Image.Resampling[interpolation.upper()]

    def transform(self, results: dict) -> dict:
        """Replace `image{0,1}` and `img_shape{0,1}`."""
        for view in VIEWS:
            image = results[f'image{view}']
            height, width = self.size
            if self.keep_ratio:
                factor = min(height / image.height, width / image.width)
                height, width = factor * image.height, factor * image.width
            height, width = (self.divisor * max(1, round(side / self.divisor)) for side in (height, width))
            results[f'image{view}'] = image.resize((width, height), self.resampling)
            results[f'img_shape{view}'] = height, width
        return results


@TRANSFORMS.register_module()
class PackPair(BaseTransform):
    """Pack `results` into `inputs` and a `PairSample`."""

    METAINFO = (
        'img_path0', 'img_path1', 'category', 'pair_id', 'ori_shape0', 'ori_shape1', 'img_shape0', 'img_shape1',
        'variations',
    )  # fmt: skip

    def transform(self, results: dict) -> dict:
        """Pack images (3, H, W), uint8, and annotations."""
        sample = PairSample(metainfo={key: results[key] for key in self.METAINFO})
        for key in ('keypoints0', 'keypoints1', 'bbox0', 'bbox1'):
            sample.set_field(torch.from_numpy(results[key].astype(np.float32)), key)
        sample.visible = torch.from_numpy(results['visible'])
        ids = results.get('keypoint_ids')
        if ids is not None:
            sample.keypoint_ids = torch.tensor(ids, dtype=torch.long)
        if ids is not None and results.get('swaps') is not None:
            rows, partner = {name: row for row, name in enumerate(ids)}, _partners(results['swaps'])
            sample.mirror_rows = torch.tensor([rows.get(partner.get(name, name), -1) for name in ids], dtype=torch.long)
        images = {
            f'image{view}': torch.from_numpy(np.array(results[f'image{view}'])).permute(2, 0, 1).contiguous()
            for view in VIEWS
        }
        return {'inputs': images, 'data_samples': sample}


def _round_half_away(value: float) -> int:
    """Round half away from zero, as Python 2 does, in which ACSM is written."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _set_frame(results: dict, view: int, shape: tuple[int, int]) -> None:
    """Set the current image of `view`, with this (height, width), as the frame of keypoints and box."""
    results[f'ori_shape{view}'] = results[f'img_shape{view}'] = shape


def _check_frame(results: dict, view: int) -> None:
    if results[f'img_shape{view}'] != results[f'ori_shape{view}']:
        raise ValueError(
            'images must be mirrored and cropped before they are resized; put ResizePair after such transforms'
        )
