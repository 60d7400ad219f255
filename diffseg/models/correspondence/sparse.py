"""Matching of detected keypoints of both images: mutual nearest neighbours of their descriptors."""

from typing import Any, Literal

from mmseg.registry import MODELS
from torch import Tensor

from diffseg.geometry import sample_points
from diffseg.structures import HomographySample

from .matching import mutual_nearest_neighbours
from .model import PairModel

METRICS = 'cosine', 'l2'
CONVENTIONS = 'centres', 'published'


@MODELS.register_module()
class SparseMatcher(PairModel):
    """Match keypoints of two images as DIFT (arXiv 2306.03881) does on HPatches.

    ```text
    predict: descriptors of both images, at the keypoints of both -> mutual nearest neighbours, `pred_matches`
    ```

    A checkpoint of a `CorrespondenceModel` with the same parts fits.

    Args:
        *args: see `PairModel`, without a prompt.
        metric: of descriptors, 'cosine' or 'l2'.
        convention: of interpolation, see `pixels_to_cells`: 'centres', or 'published' as in DIFT, with an error of up
            to half a pixel in the positions, and shorter descriptors at the borders.
        **kwargs: see `PairModel`.

    Raises:
        ValueError: unknown metric, convention or precision, or a prompt is given.
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
            sample_points(maps.float(), sample.get(f'keypoints{view}'), sample.get(f'ori_shape{view}'), self.convention)
            for view, maps in enumerate((source, target))
        ]
        return mutual_nearest_neighbours(*descriptors, self.metric).cpu()

    def _matching(self) -> dict[str, Any]:
        return {'metric': self.metric, 'convention': self.convention}
