"""Base class of the data sets of semantic correspondence: pairs of images, damaged files, wrong folders."""

import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from diffseg.structures import PairSample

VIEWS = (0, 1)  # source, target


class DamagedFile(ValueError):
    """An image or an annotation that cannot be used; the message begins with its path."""


class PairDataset(BaseDataset):
    """Pairs of images whose keypoints correspond row by row.

    Subclasses list the pairs (`list_pairs`) and read the annotation of one (`parse_data_info`). Entries of the data
    list, and the `results` that transforms work on, have a key for each view, 0 the source and 1 the target:
    `img_path0`, `keypoints0` (N, 2), `bbox0` (4,), `ori_shape0` if annotated, the same with 1, and `visible` (N,),
    `category`, `pair_id`, `variations`, `swaps`, `keypoint_ids` (N,) if annotated; see `PairSample` for what they mean.

    Pairs of one category follow one another, so that a model that caches descriptors needs to cache those of one
    category only.

    A pair whose annotation or image cannot be used is logged once and recorded in `damaged`. In training it is replaced
    by another pair. In test mode it becomes a `PairSample` marked `damaged`, so that a metric counts it.

    `metainfo` has `dataset`, `split`, `box` (what the boxes are), `num_pairs` and `swaps`: for every category the pairs
    of keypoint ids that are exchanged when an image is mirrored ("left eye" and "right eye").

    Args:
        data_root: folder of the data set.
        split: name of the split in the data set.
        categories: keep only pairs of these categories; None keeps all.
        strict: raise `DamagedFile` at the first damaged file.
        **kwargs: see `BaseDataset`; set `test_mode=True` for validation and test.

    Raises:
        ValueError: the folder has another layout, a category is unknown, or no pair can be used.
    """

    METAINFO: ClassVar[dict] = {'swaps': {}}
    REMEDY: ClassVar[str]

    def __init__(
        self,
        data_root: str,
        split: str,
        categories: Sequence[str] | None = None,
        strict: bool = False,
        **kwargs,
    ) -> None:
        self.split = split
        self.categories = categories
        self.strict = strict
        self.damaged: list[str] = []
        super().__init__(data_root=data_root, **kwargs)

    def list_pairs(self) -> Iterable[dict]:
        """All pairs of the split: `pair_id`, `category`, `where` (file and line of its annotation), ...

        Raises:
            ValueError: the folder has another layout.
        """
        raise NotImplementedError

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """The entry of one of `list_pairs` in the data list; may raise LookupError, OSError, TypeError, ValueError."""
        raise NotImplementedError

    def load_data_list(self) -> list[dict]:
        """Annotations of all pairs, sorted by category; in test mode including those that cannot be read."""
        pairs = sorted(self.list_pairs(), key=lambda pair: pair['category'])
        available = sorted({pair['category'] for pair in pairs})
        selected = available if self.categories is None else self.categories
        if unknown := set(selected) - set(available):
            raise ValueError(
                f'category {", ".join(sorted(unknown))} is not in {self.data_root}: {", ".join(available)}'
            )
        pairs = [pair for pair in pairs if pair['category'] in selected]

        is_file = cache(os.path.isfile)  # an image is in many pairs
        entries = []
        for pair in pairs:
            try:
                entry = self._entry(pair)
                for path in (entry['img_path0'], entry['img_path1']):
                    if not is_file(path):
                        raise DamagedFile(f'{path} is missing')
            except DamagedFile as error:
                entry = {'damaged': self._record(error)}
            entries.append({'pair_id': pair['pair_id'], 'category': pair['category'], **entry})

        usable = [entry for entry in entries if 'damaged' not in entry]
        if not usable:
            reason = f'the first problem: {self.damaged[0]}' if self.damaged else 'there is none'
            raise ValueError(f'none of the {len(pairs)} pairs in {self.data_root} can be used; {reason}. {self.REMEDY}')
        self._metainfo.update(split=self.split, num_pairs=len(entries))
        return entries if self.test_mode else usable

    def get_data_info(self, idx: int) -> dict:
        """Entry `idx` of the data list, with the category's `swaps`, None if they are unknown."""
        info = super().get_data_info(idx)
        return info | {'swaps': self._metainfo['swaps'].get(info['category'])}

    def prepare_data(self, idx: int) -> dict | None:
        """Sample `idx` after the pipeline; a damaged one is marked in test mode, and None in training."""
        info = self.get_data_info(idx)
        if 'damaged' not in info:
            try:
                return self.pipeline(info)
            except DamagedFile as error:
                info['damaged'] = self._record(error)
        if not self.test_mode:
            return None
        metainfo = {
            key: info[key] for key in ('pair_id', 'category', 'img_path0', 'img_path1', 'damaged') if key in info
        }
        return {'inputs': {'image0': None, 'image1': None}, 'data_samples': PairSample(metainfo=metainfo)}

    def _record(self, error: DamagedFile) -> str:
        if self.strict:
            raise error
        message = str(error)
        if message not in self.damaged:
            self.damaged.append(message)
            print_log(f'skipped: {message}', 'current', logging.WARNING)
        return message

    def _entry(self, pair: dict) -> dict:
        """Parse one pair and check its shapes."""
        try:
            entry = self.parse_data_info(pair)
            points = [np.asarray(entry[f'keypoints{view}'], dtype=np.float32).reshape(-1, 2) for view in VIEWS]
            boxes = [np.asarray(entry[f'bbox{view}'], dtype=np.float32).reshape(4) for view in VIEWS]
            ids = entry.get('keypoint_ids')
            for name, count in (('target keypoints', len(points[1])), ('ids', len(points[0] if ids is None else ids))):
                if count != len(points[0]):
                    raise ValueError(f'has {len(points[0])} source keypoints and {count} {name}')
            visible = np.asarray(entry.get('visible', np.ones(len(points[0]))), dtype=bool)
            for box in boxes:
                if not (box[2:] > box[:2]).all():
                    raise ValueError(f'has the box {box.tolist()}, expected x1 < x2 and y1 < y2')
            if not all(np.isfinite(keypoints[visible]).all() for keypoints in points):
                raise ValueError('has a keypoint that is not finite')
        except KeyError as error:
            raise DamagedFile(f'{pair["where"]}: has no {error}') from error
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise DamagedFile(f'{pair["where"]}: {error}') from error
        for view in VIEWS:
            entry |= {f'keypoints{view}': points[view], f'bbox{view}': boxes[view]}
        return entry | {'visible': visible, 'variations': entry.get('variations', {})}


def require(root: str | Path, expected: Sequence[str], remedy: str) -> None:
    """Check that all `expected` files and folders exist in the folder `root`.

    Raises:
        ValueError: names the first that is missing, all that are expected, the content of `root`, and `remedy`.
    """
    root = Path(root)
    for path in expected:
        if not (root / path).exists():
            names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
            content = ', '.join(names[:12]) + (', ...' if len(names) > 12 else '') or 'nothing'
            raise ValueError(
                f'{root / path} is missing; expected {", ".join(expected)} in {root}, found {content}. {remedy}'
            )
