"""Part segmentation from a few dozen labelled pictures, in the folder layout of DatasetDDPM (arXiv 2112.03126)."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from .categories import CATEGORIES
from .toy import PALETTE, PARTS

IGNORED = 255  # the label that mmseg's losses and metrics ignore
SUFFIXES = ('.png', '.jpg', '.jpeg', '.gif')


@DATASETS.register_module()
class ScarceDataset(BaseSegDataset):
    """One category of DatasetDDPM's annotated pictures, or toy quadrupeds in the same layout.

    ::

        horse_21
        └── real
            ├── train
            │   ├── NAME.png    picture; also .jpg, .jpeg, .gif
            │   └── NAME.npy    class of every pixel (H, W), integers
            └── test

    `LoadLabelArray` reads the labels in the pipeline.

    The published tables are means over random splits. `resplit=SEED` draws such a split as GDF (arXiv 2410.03558) does:
    the sorted pictures of `train`, followed by those of `test`, are shuffled by `random.Random(SEED).shuffle`; the
    first ones are for training, as many as `train` has, the others for testing. So the training and the test set of one
    seed are disjoint and keep their sizes.

    Args:
        category: key of `CATEGORIES`, gives class names, palette and ignored label.
        data_root: folder of the category, e.g. "data/horse_21".
        split: folder below `data_root` that holds pictures and labels, e.g. "real/train".
        resplit: seed of a random split into training and test pictures; by default the split is that of the folders.
        ignore_label: label of pixels that are neither trained nor scored, loaded as 255. By default that of the
            category in DatasetDDPM, which is 0, the background, for bedroom_28. Unlike GDF, which trains and scores the
            background of bedroom_28: use `ignore_label=255` for that.
        **kwargs: see `BaseSegDataset`.

    Raises:
        ValueError: the category is unknown, the folder has no pictures, pictures have no labels, or `resplit` is set
            for a `split` other than train and test.
    """

    CATEGORIES: ClassVar[dict[str, dict]] = {
        **CATEGORIES,
        'toy': {'classes': PARTS, 'palette': PALETTE, 'ignore_label': IGNORED},
    }

    def __init__(
        self,
        category: str,
        data_root: str,
        split: str,
        resplit: int | None = None,
        ignore_label: int | None = None,
        **kwargs,
    ) -> None:
        if category not in self.CATEGORIES:
            raise ValueError(f'category {category!r} is unknown, choose from {", ".join(self.CATEGORIES)}')
        if resplit is not None and Path(split).name not in ('train', 'test'):
            raise ValueError(
                f'split {split!r} cannot be drawn again with resplit: its last folder must be train or test'
            )
        self.resplit = resplit
        metainfo = dict(self.CATEGORIES[category])
        if ignore_label is not None:
            metainfo['ignore_label'] = ignore_label
        super().__init__(
            seg_map_suffix='.npy',
            metainfo=metainfo,
            data_root=data_root,
            data_prefix={'img_path': split, 'seg_map_path': split},
            reduce_zero_label=False,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """Paths of the pictures and of their labels; sorted, unless the split is drawn."""
        folder = Path(self.data_prefix['img_path'])
        if self.resplit is None:
            pictures = find_pictures(folder)
        else:
            train, test = (find_pictures(folder.parent / name) for name in ('train', 'test'))
            pictures = redraw(train, test, self.resplit)[('train', 'test').index(folder.name)]
        labels = [picture.with_suffix(self.seg_map_suffix) for picture in pictures]
        if missing := [label for label in labels if not label.is_file()]:
            raise ValueError(
                f'{len(missing)} pictures in {folder} have no label; the first missing file is {missing[0]}'
            )
        return [
            {
                'img_path': str(picture),
                'seg_map_path': str(label),
                'ignore_label': self.metainfo['ignore_label'],
                'reduce_zero_label': False,
                'seg_fields': [],
            }
            for picture, label in zip(pictures, labels, strict=True)
        ]


def find_pictures(folder: Path) -> list[Path]:
    """Pictures in a folder and below it, sorted by path.

    Raises:
        ValueError: there are none.
    """
    pictures = sorted((path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES), key=str)
    if not pictures:
        raise ValueError(
            f'no pictures ({", ".join(SUFFIXES)}) in {folder}; tools/toy/make_data.py draws toy ones, DatasetDDPM has '
            'the real ones'
        )
    return pictures


def redraw(train: Sequence[Path], test: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Shuffle `train` and `test` together and split them again into the same sizes."""
    pooled = [*train, *test]
    random.Random(seed).shuffle(pooled)
    return pooled[: len(train)], pooled[len(train) :]


@TRANSFORMS.register_module()
class LoadLabelArray(BaseTransform):
    """Read `seg_map_path`, an .npy file of integer class indices (H, W), into `gt_seg_map`, uint8.

    The data set's `ignore_label` becomes 255. Images without `seg_map_path`, which mmseg's inference functions pass to
    the test pipeline, have no labels and are returned unchanged.

    Args:
        size: side or (height, width) to which labels are resized (nearest), whatever the size of the picture.
            Predictions are resized to the same size (`ori_shape`) before they are scored: 256 in the published tables.
            Those of an image without labels have the image's size.

    Raises:
        ValueError: when the array is not two-dimensional and integer, or holds values outside 0..255.
    """

    def __init__(self, size: int | Sequence[int] | None = None) -> None:
        self.size = (size, size) if isinstance(size, int) else size

    def transform(self, results: dict) -> dict:
        """Add `gt_seg_map` to `results`."""
        if 'seg_map_path' not in results:
            return results
        labels = np.load(results['seg_map_path'], allow_pickle=False)
        if labels.ndim != 2 or labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() > 255:
            raise ValueError(
                f'{results["seg_map_path"]} holds {labels.dtype} of shape {labels.shape}; expected class indices '
                '(H, W), integers in 0..255'
            )
        labels = labels.astype(np.uint8)
        labels[labels == results.get('ignore_label', IGNORED)] = IGNORED
        if self.size is not None:
            labels = mmcv.imresize(labels, self.size[::-1], interpolation='nearest')
            results['ori_shape'] = tuple(self.size)
        results['gt_seg_map'] = labels
        results.setdefault('seg_fields', []).append('gt_seg_map')
        return results


@TRANSFORMS.register_module()
class IgnoreSmallClasses(BaseTransform):
    """Set labels of classes with few pixels in a picture to 255; for training, as DatasetDDPM does.

    Args:
        min_pixels: a class is kept if the picture has at least this many pixels of it.
    """

    def __init__(self, min_pixels: int = 20) -> None:
        self.min_pixels = min_pixels

    def transform(self, results: dict) -> dict:
        """Change `gt_seg_map` of `results`."""
        labels = results['gt_seg_map']
        counts = np.bincount(labels.ravel(), minlength=256)
        results['gt_seg_map'] = np.where(counts[labels] < self.min_pixels, np.uint8(IGNORED), labels)
        return results
