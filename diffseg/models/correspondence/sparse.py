"""Matching of keypoints that are found in both images: descriptors there, and mutual nearest neighbours."""

from typing import Any, Literal

from mmseg.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from diffseg.structures import HomographySample

from .matching import Size, mutual_nearest_neighbours
from .model import PairModel

METRICS = 'cosine', 'l2'
CONVENTIONS = 'centres', 'published'


def sample_descriptors(
    maps: Tensor, points: Tensor, size: Size, convention: Literal['centres', 'published'] = 'centres'
) -> Tensor:
    """Interpolate a map of descriptors bilinearly at points of the image, whose coordinates need not be whole.

    The middle of pixel x of W lies at 2 (x + 1/2) / W - 1 of the map's extent [-1, 1], and what lies beyond the middles
    of border cells has their value, so that at whole pixels this is `descriptors_at`. Unlike DIFT (evaluation on
    HPatches), which takes the first and the last pixel for the ends of the extent, 2 x / (W - 1) - 1, as is right for
    `align_corners=True`, but interpolates without it and with zeros beyond the borders: points are up to half a pixel
    off, and descriptors at borders shorter. 'published' does that.

    Args:
        maps: with shape (C, h, w).
        points: (x, y) in pixels with shape (N, 2).
        size: height H and width W of the image in pixels.
        convention: 'centres', or 'published'.

    Returns:
        Shape (N, C).

    Raises:
        ValueError: another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'convention is {convention!r}; it is {" or ".join(map(repr, CONVENTIONS))}')
    extent = points.new_tensor(size[::-1])  # (W, H)
    if convention == 'published':
        middle = (extent - 1) / 2
        places, padding = (points - middle) / middle, 'zeros'
    else:
        places, padding = (2 * points + 1) / extent - 1, 'border'
    places = places.to(maps)[None, None]  # (1, 1, N, 2)
    sampled = F.grid_sample(maps[None], places, mode='bilinear', padding_mode=padding, align_corners=False)
    return sampled[0, :, 0].T  # (1, C, 1, N) -> (N, C)


@MODELS.register_module()
class SparseMatcher(PairModel):
    """Match keypoints of two images as DIFT (arXiv 2306.03881) does on HPatches.

    ```text
    predict: descriptors of both images, at the keypoints of both -> mutual nearest neighbours, `pred_matches`
    ```

    A checkpoint of a `CorrespondenceModel` with the same parts fits.

    Args:
        *args: what `PairModel` takes, without a prompt.
        metric: of descriptors, 'cosine' or 'l2'.
        convention: of interpolation, see `sample_descriptors`.
        **kwargs: what `PairModel` takes.

    Raises:
        ValueError: another metric, convention or precision, or a prompt.
    """

    PREDICTION = 'pred_matches'

    def __init__(
        self,
        *args: Any,
        metric: Literal['cosine', 'l2'] = 'cosine',
        convention: Literal['centres', 'published'] = 'centres',
        **kwargs: Any,
    ) -> None:
        for name, value, allowed in (('metric', metric, METRICS), ('convention', convention, CONVENTIONS)):
            if value not in allowed:
                raise ValueError(f'{name} is {value!r}; it is {" or ".join(map(repr, allowed))}')
        super().__init__(*args, **kwargs)
        if self.prompt is not None:
            raise ValueError(f'prompt is {self.prompt!r}, but images have no category here; give it to the backbone')
        self.metric = metric
        self.convention = convention

    def match(self, source: Tensor, target: Tensor, sample: HomographySample) -> Tensor:
        """Match the keypoints of one pair, from descriptors with shapes (C', h, w) and (C', h', w').

        Returns:
            Rows of keypoints0 and keypoints1 that correspond, int64 with shape (P, 2), on the CPU.
        """
        descriptors = [
            sample_descriptors(
                maps.float(), sample.get(f'keypoints{view}'), sample.get(f'ori_shape{view}'), self.convention
            )
            for view, maps in enumerate((source, target))
        ]
        return mutual_nearest_neighbours(*descriptors, self.metric).cpu()

    def _matching(self) -> dict[str, Any]:
        return {'metric': self.metric, 'convention': self.convention}
