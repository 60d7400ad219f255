"""Pairs of birds from CUB-200-2011."""

from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from mmseg.registry import DATASETS
from scipy.io import loadmat

from .pairs import PairDataset, require

NUM_SUBSETS = 14  # of Neural Congealing
NUM_PARTS = 15


@DATASETS.register_module()
class CUBPairsDataset(PairDataset):
    """Pairs of birds with fifteen keypoints, by one of two published protocols.

    ::

        DATA_ROOT
        ├── CUB_200_2011
        │   ├── images
        │   │   └── 001.Black_footed_Albatross
        │   │       └── IMAGE.jpg
        │   ├── parts
        │   │   └── part_locs.txt               image, part, x, y, visible
        │   ├── images.txt                      only for protocol "random"
        │   ├── bounding_boxes.txt              likewise
        │   └── train_test_split.txt            likewise
        └── cub_metadata                        only for protocol "subsets"
            ├── acsm_val_cub_cleaned.mat
            └── cub_subset_{0..13}_original_paths.txt

    "subsets" is Neural Congealing's (arXiv 2302.03956), which DIFT follows: 14 random subsets of 25 images, each paired
    with each in both directions (600 pairs a subset). The images are those that ACSM kept, and `bbox` is ACSM's box;
    `CropToBoxPair` crops as ACSM does. PCK has the cropped image as base (25.6 pixels of 256 at 0.1), is taken over
    points of a subset and averaged over the subsets, whose number is in `variations['subset']`.

    "random" is a stand-in for the CUB columns of Diffusion Hyperfeatures (arXiv 2305.14334): `num_pairs` random pairs
    of the test half of CUB, any two birds, uncropped, with CUB's own boxes. UNCERTAIN: which images, which pairs and
    whether they were cropped is not published with its code; "360 random pairs of the validation set" is unconfirmed,
    so figures of this protocol cannot be compared with the paper's.

    A keypoint is visible where it is in both images. Coordinates count from 0, one less than in CUB's files.

    Args:
        data_root: the folder above.
        protocol: "subsets" or "random".
        subset: one of the 14; None takes all.
        num_pairs: for protocol "random".
        seed: for protocol "random", which pairs are drawn.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does, on another protocol or subset, or metadata that cannot be read.
    """

    METAINFO: ClassVar[dict] = {
        'dataset': 'CUB-200-2011',
        'box': 'object',
        'swaps': {'bird': ((6, 10), (7, 11), (8, 12))},  # left and right eye, leg and wing
    }
    REMEDY: ClassVar[str] = (
        'Unpack CUB_200_2011.tgz from data.caltech.edu/records/65de6-vp158; cub_metadata is fetched by prepare_data.py '
        'of github.com/dolev104/neural_congealing'
    )

    def __init__(
        self,
        data_root: str,
        protocol: Literal['subsets', 'random'],
        subset: int | None = None,
        num_pairs: int = 360,
        seed: int = 0,
        **kwargs,
    ) -> None:
        if protocol not in ('subsets', 'random'):
            raise ValueError(f"protocol is {protocol!r}, choose 'subsets' or 'random'")
        if subset is not None and subset not in range(NUM_SUBSETS):
            raise ValueError(f'subset is {subset}, choose one of 0..{NUM_SUBSETS - 1}, or None for all')
        self.protocol, self.subset = protocol, subset
        self.num_pairs, self.seed = num_pairs, seed
        super().__init__(data_root, split='test', **kwargs)
        self._metainfo['protocol'] = protocol

    def list_pairs(self) -> Iterable[dict]:
        """Pairs of the protocol, each with the `ids` (as in CUB's files), image `paths` and `boxes` of its birds."""
        require(self.data_root, ('CUB_200_2011/images', 'CUB_200_2011/parts/part_locs.txt'), self.REMEDY)
        self._parts = _read_parts(Path(self.data_root, 'CUB_200_2011/parts/part_locs.txt'))
        return self._subset_pairs() if self.protocol == 'subsets' else self._random_pairs()

    def _subset_pairs(self) -> Iterable[dict]:
        subsets = range(NUM_SUBSETS) if self.subset is None else [self.subset]
        lists = [f'cub_metadata/cub_subset_{subset}_original_paths.txt' for subset in subsets]
        require(self.data_root, ('cub_metadata/acsm_val_cub_cleaned.mat', *lists), self.REMEDY)
        birds = _read_acsm(Path(self.data_root, 'cub_metadata/acsm_val_cub_cleaned.mat'))
        for subset, name in zip(subsets, lists, strict=True):
            for source, target in permutations(Path(self.data_root, name).read_text().split(), 2):
                paths = [path.removeprefix('CUB_200_2011/images/') for path in (source, target)]
                yield {
                    'pair_id': f'{subset:02d}-{Path(source).stem}-{Path(target).stem}',
                    'category': 'bird',
                    'where': str(Path(self.data_root, name)),
                    'birds': {path: birds.get(path) for path in paths},
                    'variations': {'subset': subset},
                }

    def _random_pairs(self) -> Iterable[dict]:
        names = ('images.txt', 'bounding_boxes.txt', 'train_test_split.txt')
        require(self.data_root, [f'CUB_200_2011/{name}' for name in names], self.REMEDY)
        paths, boxes, training = (_read_table(Path(self.data_root, 'CUB_200_2011', name)) for name in names)
        test = sorted(number for number, (in_training,) in training.items() if in_training == '0')
        rng = np.random.default_rng(self.seed)
        for number in range(self.num_pairs):
            birds = {}
            for index in rng.choice(len(test), 2, replace=False):
                x, y, width, height = (float(value) for value in boxes[test[index]])
                birds[paths[test[index]][0]] = test[index], (x - 1, y - 1, x - 1 + width, y - 1 + height)
            yield {
                'pair_id': f'{number:06d}-' + '-'.join(Path(path).stem for path in birds),
                'category': 'bird',
                'where': str(Path(self.data_root, 'CUB_200_2011/images.txt')),
                'birds': birds,
                'variations': {},
            }

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Keypoints and boxes of both birds."""
        entry = {'variations': raw_data_info['variations'], 'keypoint_ids': list(range(NUM_PARTS))}
        visible = np.ones(NUM_PARTS, dtype=bool)
        for view, (path, bird) in enumerate(raw_data_info['birds'].items()):
            if bird is None:
                raise ValueError(f'names {path}, which acsm_val_cub_cleaned.mat does not have')
            number, box = bird
            parts = self._parts[number]
            visible &= parts[:, 2] > 0
            entry |= {
                f'img_path{view}': str(Path(self.data_root, 'CUB_200_2011/images', path)),
                f'keypoints{view}': parts[:, :2],
                f'bbox{view}': box,
            }
        return entry | {'visible': visible}


def _read_table(path: Path) -> dict[int, list[str]]:
    """A file of lines "number value value ..."."""
    try:
        return {int(number): values for number, *values in map(str.split, path.read_text().splitlines())}
    except ValueError as error:
        raise ValueError(f'{path}: expected lines of a number and values ({error})') from error


def _read_parts(path: Path) -> dict[int, np.ndarray]:
    """Keypoints (x, y, visible) with shape (15, 3) of every image number, counted from 0."""
    try:
        rows = np.loadtxt(path)  # (images * parts, 5): image, part, x, y, visible
        parts = rows.reshape(-1, NUM_PARTS, 5)
    except ValueError as error:
        raise ValueError(f'{path}: expected {NUM_PARTS} lines of five numbers for every image ({error})') from error
    return {int(rows[0, 0]): rows[:, 2:] - (1, 1, 0) for rows in parts}


def _read_acsm(path: Path) -> dict[str, tuple[int, tuple[float, ...]]]:
    """Number and box (x1, y1, x2, y2), counted from 0, of every image that ACSM kept, by its path."""
    try:
        images = loadmat(path, simplify_cells=True)['images']
        return {
            image['rel_path']: (
                int(image['id']),
                tuple(float(image['bbox'][end]) - 1 for end in ('x1', 'y1', 'x2', 'y2')),
            )
            for image in images
        }
    except Exception as error:  # scipy's reader raises many types on damaged files
        raise ValueError(f'{path}: cannot be read as the images that ACSM kept ({error!r})') from error
