"""HPatches (arXiv 1704.05939), full sequences: pairs of images with the homography between them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS, TRANSFORMS
from transformers import SuperPointForKeypointDetection

from diffseg.keypoints import load_superpoint, read_keypoints, sift_keypoints, superpoint_keypoints
from diffseg.structures import HomographySample

from .pairs import VIEWS

TOO_LARGE = (
    'i_contruction', 'i_crownnight', 'i_dc', 'i_pencils', 'i_whitebuilding', 'v_artisans', 'v_astronautis', 'v_talent',
)  # fmt: skip
TARGETS = range(2, 7)  # images that are paired with image 1
SUFFIXES = '.kp', '.txt', '.csv', '.npy'


@DATASETS.register_module()
class HPatchesDataset(BaseDataset):
    """HPatches: 116 sequences of six images; without the eight that D2-Net leaves out, 540 pairs 1 -> 2, ..., 1 -> 6.

    ::

        hpatches-sequences-release
        ├── i_ajuntament, ...           57 sequences in which the light changes
        └── v_abstract, ...             59 in which the viewpoint changes
            ├── 1.ppm, ..., 6.ppm
            └── H_1_2, ..., H_1_6       3 x 3 numbers, from image 1 to the other one

    Pairs of a sequence follow one another, so that a model that caches descriptors encodes image 1 once.

    Args:
        data_root: the folder above.
        keypoints: folder with a file of points for each image, `SEQUENCE-NUMBER.kp` (or .txt, .csv, .npy), see
            `read_keypoints`; duplicates are dropped. With None they come from `DetectKeypoints`.
        exclude: sequences that are left out.
        **kwargs: see `BaseDataset`; `test_mode` is on by default.

    Raises:
        ValueError: the folder has no sequence, or an image, a homography or a file of points is missing or damaged.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'HPatches'}
    REMEDY: ClassVar[str] = (
        'Unpack hpatches-sequences-release.tar.gz and point data_root to the folder hpatches-sequences-release; '
        'tools/toy/make_hpatches.py OUT draws a toy set'
    )

    def __init__(
        self,
        data_root: str,
        keypoints: str | None = None,
        exclude: Sequence[str] = TOO_LARGE,
        test_mode: bool = True,
        **kwargs,
    ) -> None:
        self.keypoints = keypoints
        self.exclude = exclude
        super().__init__(data_root=data_root, test_mode=test_mode, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Entries with `pair_id`, `sequence`, `img_path{0,1}`, `homography`, and `keypoints{0,1}` if from files."""
        root = Path(self.data_root)
        folders = sorted(path.name for path in root.glob('[iv]_*') if path.is_dir())
        names = [name for name in folders if name not in self.exclude]
        if not names:
            raise ValueError(f'{root}: has no sequence, a folder i_NAME or v_NAME, that is not excluded. {self.REMEDY}')
        self._metainfo['num_sequences'] = len(names)
        return [pair for name in names for pair in self._pairs(root / name)]

    def _pairs(self, folder: Path) -> list[dict]:
        images = {number: folder / f'{number}.ppm' for number in (1, *TARGETS)}
        for path in images.values():
            if not path.is_file():
                raise ValueError(f'{path} is missing; a sequence has 1.ppm to 6.ppm. {self.REMEDY}')
        points = {}
        if self.keypoints is not None:
            points = {number: self._keypoints(f'{folder.name}-{number}') for number in images}
        return [
            {
                'pair_id': f'{folder.name}-1-{number}',
                'sequence': folder.name,
                'homography': read_homography(folder / f'H_1_{number}'),
                **{f'img_path{view}': str(images[index]) for view, index in zip(VIEWS, (1, number), strict=True)},
                **{f'keypoints{view}': points[index] for view, index in zip(VIEWS, (1, number), strict=True) if points},
                'keypoint_source': self.keypoints,
            }
            for number in TARGETS
        ]

    def _keypoints(self, stem: str) -> np.ndarray:
        paths = [Path(self.keypoints, stem + suffix) for suffix in SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f'{paths[0]} is missing (also as {", ".join(SUFFIXES[1:])}); give a file of points for every image, or '
                f'keypoints=None and DetectKeypoints in the pipeline'
            )
        return np.unique(read_keypoints(path), axis=0)


def read_homography(path: str | Path) -> np.ndarray:
    """Read a homography with shape (3, 3), float64, from a text file.

    Raises:
        ValueError: the file cannot be read, or does not hold nine finite numbers of an invertible matrix.
    """
    try:
        homography = np.array([line.split() for line in Path(path).read_text().splitlines() if line.strip()], float)
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as a homography, three lines of three numbers ({error})') from error
    if homography.shape != (3, 3) or not np.isfinite(homography).all():
        raise ValueError(f'{path}: is not a homography, three lines of three finite numbers')
    if np.linalg.matrix_rank(homography) < 3:
        raise ValueError(f'{path}: is singular ({homography.tolist()}), a homography can be inverted; copy it again')
    return homography


@TRANSFORMS.register_module()
class DetectKeypoints(BaseTransform):
    """Detect keypoints in both images of a pair at their original sizes; after `LoadPair`, before `ResizePair`.

    Keypoints that come from files are kept.

    Args:
        num_points: number of keypoints to keep in each image, those with the highest response.
        superpoint: folder or hub id of SuperPoint, see `load_superpoint`; by default OpenCV's SIFT is used.
    """

    def __init__(self, num_points: int = 1000, superpoint: str | None = None) -> None:
        self.num_points = num_points
        self.superpoint = superpoint

    @cached_property
    def _model(self) -> SuperPointForKeypointDetection:
        return load_superpoint(self.superpoint)

    def transform(self, results: dict) -> dict:
        """Add `keypoints{0,1}`, unless they exist, and `keypoint_source`."""
        if 'keypoints0' in results:
            return results
        results['keypoint_source'] = f'{self.num_points} of {self.superpoint or "SIFT"}'
        for view in VIEWS:
            image = results[f'image{view}']
            results[f'keypoints{view}'] = (
                sift_keypoints(image, self.num_points)
                if self.superpoint is None
                else superpoint_keypoints(image, self._model, self.num_points)
            )
        return results


@TRANSFORMS.register_module()
class PackHomographyPair(BaseTransform):
    """Pack `results` into `inputs` and a `HomographySample`.

    Raises:
        ValueError: an image has no keypoints, or some lie outside of it.
    """

    METAINFO = (
        'img_path0', 'img_path1', 'pair_id', 'sequence', 'keypoint_source', 'ori_shape0', 'ori_shape1', 'img_shape0',
        'img_shape1',
    )  # fmt: skip

    def transform(self, results: dict) -> dict:
        """Pack images (3, H, W), uint8, points and the homography, if known."""
        sample = HomographySample(metainfo={key: results[key] for key in self.METAINFO})
        if 'homography' in results:
            sample.homography = torch.from_numpy(results['homography'])
        images = {}
        for view in VIEWS:
            path, points = results[f'img_path{view}'], results.get(f'keypoints{view}')
            if points is None:
                raise ValueError(
                    f'{path}: has no points; give the data set a folder of keypoints, or put DetectKeypoints after '
                    f'LoadPair into the pipeline'
                )
            height, width = results[f'ori_shape{view}']
            if ((points < -0.5) | (points > (width - 0.5, height - 0.5))).any():
                raise ValueError(
                    f'{path}: has {width} x {height} pixels, but points from {points.min(0).tolist()} to '
                    f'{points.max(0).tolist()}; they must refer to the original size of the image'
                )
            sample.set_field(torch.from_numpy(points), f'keypoints{view}')
            images[f'image{view}'] = torch.from_numpy(np.array(results[f'image{view}'])).permute(2, 0, 1).contiguous()
        return {'inputs': images, 'data_samples': sample}
