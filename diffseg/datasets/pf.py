"""Proposal Flow's data sets (arXiv 1703.07144): PF-Willow and PF-Pascal."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from mmseg.registry import DATASETS
from scipy.io import loadmat

from .pairs import VIEWS, PairDataset, require

_VOC = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip


@DATASETS.register_module()
class PFWillowDataset(PairDataset):
    """PF-Willow: 900 test pairs of four objects, in ten categories by view, with ten keypoints each.

    ::

        PF-WILLOW
        ├── car(G), car(M), car(S), duck(S), motorbike(G), ..., winebottle(woC)
        │   └── IMAGE.png
        └── test_pairs.csv      imageA, imageB, XA1..10, YA1..10, XB1..10, YB1..10

    The first component of the image paths in the table is the folder's name, which is dropped.

    There are no annotated boxes. `bbox0` and `bbox1` are the extent of the ten keypoints, so that PCK-bbox has the
    threshold of DHPF and its successors: a fraction of the longer side of the target keypoints' extent. Unlike DHPF,
    whose code takes the extent after padding the keypoints with (-1, -1), which makes it too large and scores higher.

    Args:
        data_root: the folder above.
        split: "test", the only split.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'PF-Willow', 'box': 'keypoints', 'swaps': {}}
    REMEDY: ClassVar[str] = (
        "Get PF-dataset.zip from www.di.ens.fr/willow/research/proposalflow, and test_pairs.csv as DHPF's and SFNet's "
        'download scripts do'
    )

    def __init__(self, data_root: str, split: Literal['test'] = 'test', **kwargs) -> None:
        if split != 'test':
            raise ValueError(f"split is {split!r}, PF-Willow has only 'test'")
        super().__init__(data_root, split, **kwargs)

    def list_pairs(self) -> Iterable[dict]:
        """Rows of test_pairs.csv."""
        require(self.data_root, ('test_pairs.csv',), self.REMEDY)
        return [
            {'category': Path(row[0]).parent.name, **pair}
            for row, pair in _rows(Path(self.data_root, 'test_pairs.csv'), 42, self.REMEDY)
        ]

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Coordinates of one row."""
        row = raw_data_info['row']
        points = np.array([float(value) for value in row[2:42]]).reshape(2, 2, 10).swapaxes(1, 2)  # (view, point, xy)
        entry = {}
        for view in VIEWS:
            entry |= {
                f'img_path{view}': str(Path(self.data_root, *Path(row[view]).parts[1:])),
                f'keypoints{view}': points[view],
                f'bbox{view}': [*points[view].min(axis=0), *points[view].max(axis=0)],
            }
        return entry | {'keypoint_ids': list(range(10))}


@DATASETS.register_module()
class PFPascalDataset(PairDataset):
    """PF-Pascal: pairs of PASCAL VOC objects of the same view, in 20 categories.

    ::

        PF-dataset-PASCAL
        ├── JPEGImages
        │   └── IMAGE.jpg
        ├── Annotations
        │   └── CATEGORY
        │       └── IMAGE.mat               kps (up to 20, 2), NaN where missing, and bbox (1, 4)
        ├── trn_pairs_pf_pascal.csv         source, target, class 1..20, ...
        ├── val_pairs_pf_pascal.csv
        └── test_pairs_pf_pascal.csv

    The tables may also be named "train_pairs_pf_pascal.csv" and as DHPF's "trn_pairs.csv", "val_pairs.csv", ...
    Keypoints and boxes come from the annotations, in every split. A keypoint is visible where both images have it. PCK
    is usually stated with the image as base.

    Args:
        data_root: the folder above.
        split: "trn", "val" or "test". Rows of the training table whose column "flip" is 1, for a mirrored pair, are
            left out: `RandomFlipPair` mirrors pairs. Unlike DHPF.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does, and on another split.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'PF-Pascal', 'box': 'object', 'swaps': {}}
    REMEDY: ClassVar[str] = (
        "Get PF-dataset-PASCAL.zip from www.di.ens.fr/willow/research/proposalflow, and the tables of pairs as DHPF's "
        "and NC-Net's download scripts do"
    )

    def __init__(self, data_root: str, split: Literal['trn', 'val', 'test'], **kwargs) -> None:
        if split not in ('trn', 'val', 'test'):
            raise ValueError(f'split is {split!r}, choose from trn, val, test')
        super().__init__(data_root, split, **kwargs)

    def list_pairs(self) -> Iterable[dict]:
        """Rows of the split's table."""
        names = [f'{self.split}_pairs_pf_pascal.csv', f'{self.split}_pairs.csv']
        if self.split == 'trn':
            names += ['train_pairs_pf_pascal.csv', 'train_pairs.csv']
        table = next((name for name in names if Path(self.data_root, name).is_file()), names[0])
        require(self.data_root, ('JPEGImages', 'Annotations', table), self.REMEDY)
        rows = _rows(Path(self.data_root, table), 3, self.REMEDY)
        if self.split == 'trn':
            rows = [(row, pair) for row, pair in rows if row[3:4] != ['1']]
        return [{'category': _voc_name(row), **pair} for row, pair in rows]

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Annotations of both images."""
        category, row = raw_data_info['category'], raw_data_info['row']
        names = [Path(row[view]).name for view in VIEWS]
        points, boxes = zip(
            *(
                _read_annotation(Path(self.data_root, 'Annotations', category, name).with_suffix('.mat'))
                for name in names
            ),
            strict=True,
        )
        count = min(map(len, points))  # the longer list has further keypoints without a counterpart
        visible = ~np.isnan(points[0][:count]).any(axis=1) & ~np.isnan(points[1][:count]).any(axis=1)
        entry = {'visible': visible, 'keypoint_ids': list(range(count))}
        for view in VIEWS:
            entry |= {
                f'img_path{view}': str(Path(self.data_root, 'JPEGImages', names[view])),
                f'keypoints{view}': np.nan_to_num(points[view][:count]),
                f'bbox{view}': boxes[view],
            }
        return entry


def _rows(path: Path, columns: int, remedy: str) -> list[tuple[list[str], dict]]:
    """Rows of a table below its header, each with the entries of `list_pairs` except the category."""
    try:
        with path.open(newline='') as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row][1:]
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as a table ({error}). {remedy}') from error
    if not rows or len(rows[0][1]) < columns:
        raise ValueError(f'{path}: expected rows of at least {columns} columns below a header. {remedy}')
    return [
        (row, {'pair_id': f'{number:06d}', 'where': f'{path}, line {line}', 'row': row})
        for number, (line, row) in enumerate(rows)
    ]


def _voc_name(row: list[str]) -> str:
    """Name of the class in a row, which has its number, from 1."""
    number = row[2] if len(row) > 2 and row[2].isdecimal() else '0'
    return _VOC[int(number) - 1] if 0 < int(number) <= len(_VOC) else 'unknown'


def _read_annotation(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (N, 2), NaN where missing, and box (4,) of one image."""
    try:
        annotation = loadmat(path)
        return annotation['kps'].astype(np.float64).reshape(-1, 2), annotation['bbox'].astype(np.float64).reshape(4)
    except Exception as error:  # scipy's reader raises many types on damaged files
        raise ValueError(f'{path} cannot be read as an annotation with kps and bbox ({error!r})') from error
