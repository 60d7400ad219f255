"""SPair-71k (arXiv 1908.10543), in its original layout or with the lists of Diffusion Hyperfeatures, and SPair-U."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from mmseg.registry import DATASETS

from .pairs import PairDataset, require
from .toy import SPECIES

_VARIATIONS = ('mirror', 'viewpoint_variation', 'scale_variation', 'truncation', 'occlusion', 'src_pose', 'trg_pose')

# Pairs of keypoint ids, left and right, that are exchanged when an image is mirrored; all others stay. They are those
# that GeoAware-SC (arXiv 2311.17034) trains with.
_LEGGED = ((0, 1), (2, 3), (4, 5), (6, 7), (9, 10), (11, 12))
_HOOFED = (*_LEGGED, (15, 16), (17, 18), (19, 20))
_ROAD = ((10, 20), (11, 21), (12, 22), (13, 23), (14, 24), (15, 25), (16, 17), (18, 19), (26, 27), (28, 29))
_SWAPS = {
    'aeroplane': ((4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17), (18, 19), (20, 21)),
    'bicycle': ((2, 3), (6, 7), (9, 10)),
    'bird': ((1, 2), (4, 5), (7, 8), (10, 11), (12, 13), (14, 15)),
    'boat': ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)),
    'bottle': ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)),
    'bus': ((0, 1), (2, 3), (5, 6), *_ROAD),
    'car': ((0, 1), (2, 3), (6, 7), *_ROAD),
    'cat': _LEGGED,
    'chair': ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13)),
    'cow': _HOOFED,
    'dog': ((0, 1), (2, 3), (4, 5), (9, 10), (11, 12)),
    'horse': ((0, 1), (2, 3), (4, 5), (6, 7), (10, 11), (12, 13), (16, 17), (18, 19)),
    'motorbike': ((0, 1), (2, 3)),
    'person': ((0, 1), (2, 3), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17), (18, 19)),
    'pottedplant': ((0, 2), (4, 5), (6, 8)),
    'sheep': _HOOFED,
    'train': ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17)),
    'tvmonitor': ((0, 2), (4, 6), (3, 7), (8, 10), (12, 14), (11, 15)),
}


@DATASETS.register_module()
class SPairDataset(PairDataset):
    """SPair-71k: 70,958 pairs of 1,800 images in 18 categories.

    ::

        SPair-71k
        ├── JPEGImages
        │   └── CATEGORY
        │       └── IMAGE.jpg
        ├── PairAnnotation
        │   ├── trn
        │   ├── val
        │   └── test
        │       └── PAIR-SOURCE-TARGET:CATEGORY.json
        └── Layout
            ├── large               53,340 trn, 5,384 val and 12,234 test pairs
            │   └── SPLIT.txt       names of pair annotations, without .json
            └── small

    Keypoints are those annotated in both images, so all are visible. With `ann_file`, the pairs are those of a list of
    Diffusion Hyperfeatures, e.g. "spair_71k_val-360.json" (20 pairs of each category); only the folder JPEGImages is
    needed then, and its images may be without subfolders of categories.

    Args:
        data_root: the folder above.
        split: "trn", "val" or "test"; with a list, the split that it was taken from.
        layout: "large" or "small", the latter a subset.
        ann_file: a list of Diffusion Hyperfeatures, relative to `data_root` or absolute.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does, on another split or layout, or on a file that is not a list of pairs.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'SPair-71k', 'box': 'object', 'swaps': _SWAPS}
    REMEDY: ClassVar[str] = (
        'Unpack SPair-71k.tar.gz from cvlab.postech.ac.kr/research/SPair-71k and point data_root to the folder '
        'SPair-71k; tools/toy/make_data.py OUT --pairs N draws a toy set'
    )

    def __init__(
        self,
        data_root: str,
        split: Literal['trn', 'val', 'test'],
        layout: Literal['large', 'small'] = 'large',
        ann_file: str = '',
        **kwargs,
    ) -> None:
        for name, value, allowed in (('split', split, ('trn', 'val', 'test')), ('layout', layout, ('large', 'small'))):
            if value not in allowed:
                raise ValueError(f'{name} is {value!r}, choose from {", ".join(allowed)}')
        self.layout = layout
        super().__init__(data_root, split, ann_file=ann_file, **kwargs)

    def list_pairs(self) -> Iterable[dict]:
        """Pairs of the layout or of the list."""
        return self._listed_pairs() if self.ann_file else self._layout_pairs()

    def _layout_pairs(self) -> list[dict]:
        layout = f'Layout/{self.layout}/{self.split}.txt'
        folder = f'PairAnnotation/{self.split}'
        require(self.data_root, ('JPEGImages', folder, layout), self.REMEDY)
        self._metainfo['list'] = layout
        stems = Path(self.data_root, layout).read_text().split()
        return [
            {
                'pair_id': stem,
                'category': stem.rpartition(':')[2],
                'where': str(Path(self.data_root, folder, f'{stem}.json')),
            }
            for stem in stems
        ]

    def _listed_pairs(self) -> list[dict]:
        require(self.data_root, ('JPEGImages',), self.REMEDY)
        path = Path(self.ann_file)
        self._metainfo['list'] = path.name
        try:
            pairs = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f'{path}: cannot be read as a list of pairs ({error}). {self.REMEDY}') from error
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) and 'category' in pair for pair in pairs):
            raise ValueError(f'{path}: expected a list of pairs, each with source_path, target_path, category, ...')
        return [
            {
                'pair_id': f'{number:06d}',
                'category': pair['category'],
                'where': f'{path}, pair {number}',
                'annotation': pair,
            }
            for number, pair in enumerate(pairs)
        ]

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Read one pair annotation, of either kind."""
        if 'annotation' in raw_data_info:
            pair = raw_data_info['annotation']
            names, points, boxes = '{}_path', '{}_points', '{}_bounding_box'
            sides = ('source', 'target')
            entry = {}
        else:
            pair = json.loads(Path(raw_data_info['where']).read_text())
            names, points, boxes = '{}_imname', '{}_kps', '{}_bndbox'
            sides = ('src', 'trg')
            entry = self._keypoint_ids(pair)
            for view, side in enumerate(sides):
                width, height = pair[f'{side}_imsize'][:2]
                entry[f'ori_shape{view}'] = (height, width)
        for view, side in enumerate(sides):
            entry |= {
                f'img_path{view}': self._image_path(raw_data_info['category'], pair[names.format(side)]),
                f'keypoints{view}': pair[points.format(side)],
                f'bbox{view}': pair[boxes.format(side)],
            }
        return entry | {'variations': {name: pair[name] for name in _VARIATIONS if name in pair}}

    def _keypoint_ids(self, pair: dict) -> dict:
        return {'keypoint_ids': [int(number) for number in pair['kps_ids']]}

    def _image_path(self, category: str, name: str) -> str:
        path = Path(self.data_root, 'JPEGImages', category, name)
        flat = Path(self.data_root, 'JPEGImages', name)
        return str(flat if self.ann_file and flat.is_file() else path)


@DATASETS.register_module()
class SPairUDataset(SPairDataset):
    """SPair-U (Jamais Vu, arXiv 2506.08220): SPair-71k's test pairs with keypoints that SPair-71k does not have.

    ::

        SPair-U
        ├── JPEGImages              a link to SPair-71k's
        └── PairAnnotation
            └── test
                └── PAIR-SOURCE-TARGET:CATEGORY.json

    The annotations are read as SPair-71k's: names, sizes, boxes and keypoints of both images. The ids of the keypoints
    are not: which of them mirroring exchanges is not published.

    Args:
        data_root: the folder above.
        split: "test", the only split.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does, and on another split.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'SPair-U', 'box': 'object', 'swaps': {}}
    REMEDY: ClassVar[str] = (
        'Unpack SPair-U.zip, to which github.com/VICO-UoE/JamaisVu links, and link the images of SPair-71k into it: '
        'ln -s ../SPair-71k/JPEGImages SPair-U; tools/toy/make_data.py OUT --unseen N draws a toy set'
    )

    def __init__(self, data_root: str, split: Literal['test'] = 'test', **kwargs) -> None:
        if split != 'test':
            raise ValueError(f"split is {split!r}, SPair-U has only 'test'")
        super().__init__(data_root, split, **kwargs)

    def _layout_pairs(self) -> list[dict]:
        folder = f'PairAnnotation/{self.split}'
        require(self.data_root, ('JPEGImages', folder), self.REMEDY)
        self._metainfo['list'] = folder
        return [
            {'pair_id': path.stem, 'category': path.stem.rpartition(':')[2], 'where': str(path)}
            for path in sorted(Path(self.data_root, folder).glob('*.json'))
        ]

    def _keypoint_ids(self, pair: dict) -> dict:
        return {}


@DATASETS.register_module()
class ToyPairDataset(SPairDataset):
    """Pairs of toy quadrupeds, within or across species, in SPair-71k's layout.

    `tools/toy/make_data.py OUT --pairs N --across N` draws them into OUT/SPair-toy and OUT/SPair-toy-across. The
    categories are the species, across them "SOURCE_TARGET", e.g. "horse_giraffe". All animals are seen from the side
    and have the same fourteen keypoints, whose names (`diffseg.datasets.toy.KEYPOINTS`) distinguish near and far, not
    left and right: mirroring exchanges none.
    """

    METAINFO: ClassVar[dict] = {
        'dataset': 'SPair-toy',
        'box': 'object',
        'swaps': {'_'.join(dict.fromkeys((source, target))): () for source in SPECIES for target in SPECIES},
    }
    REMEDY: ClassVar[str] = 'Draw them with tools/toy/make_data.py OUT --pairs N --across N'

    def __init__(self, data_root: str, split: Literal['trn', 'val', 'test'], **kwargs) -> None:
        super().__init__(data_root, split, **kwargs)
        self._metainfo['dataset'] = Path(data_root).name
