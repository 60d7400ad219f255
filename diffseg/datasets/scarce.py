"""Part segmentation from a few dozen labelled pictures, in the folder layout of DatasetDDPM (arXiv 2112.03126)."""

from pathlib import Path
from typing import ClassVar

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from .toy import PALETTE, PARTS

_HORSE_21 = (
    'background', 'person', 'back', 'barrel', 'bridle', 'chest', 'ear', 'eye', 'forelock', 'head', 'hoof', 'leg',
    'mane', 'muzzle', 'neck', 'nostril', 'tail', 'thigh', 'saddle', 'shoulder', 'leg protection',
)  # fmt: skip
_HORSE_21_PALETTE = (
    (255, 255, 255), (255, 74, 70), (0, 137, 65), (0, 111, 166), (163, 0, 89), (255, 219, 229), (122, 73, 0),
    (0, 0, 166), (99, 255, 172), (183, 151, 98), (0, 77, 67), (143, 176, 255), (241, 38, 110), (27, 210, 105),
    (128, 150, 147), (228, 230, 158), (160, 136, 106), (79, 198, 1), (59, 93, 255), (115, 214, 209), (255, 47, 128),
)  # fmt: skip


@DATASETS.register_module()
class ScarceDataset(BaseSegDataset):
    """One category of DatasetDDPM's annotated pictures, or toy quadrupeds in the same layout.

    ::

        horse_21
        └── real
            ├── train
            │   ├── NAME.png    picture
            │   └── NAME.npy    class of every pixel (H, W), integers
            └── test

    `LoadLabelArray` reads the labels in the pipeline.

    Args:
        category: key of `CATEGORIES`, gives class names and palette.
        data_root: folder of the category, e.g. "data/horse_21".
        split: folder below `data_root` that holds pictures and labels, e.g. "real/train".
        **kwargs: what `BaseSegDataset` takes.

    Raises:
        ValueError: on an unknown category, a folder without pictures, or pictures without labels.
    """

    CATEGORIES: ClassVar[dict[str, dict]] = {
        'horse_21': {'classes': _HORSE_21, 'palette': _HORSE_21_PALETTE},
        'toy': {'classes': PARTS, 'palette': PALETTE},
    }

    def __init__(self, category: str, data_root: str, split: str, **kwargs) -> None:
        if category not in self.CATEGORIES:
            raise ValueError(f'category {category!r} is unknown, choose from {", ".join(self.CATEGORIES)}')
        super().__init__(
            img_suffix='.png',
            seg_map_suffix='.npy',
            metainfo=self.CATEGORIES[category],
            data_root=data_root,
            data_prefix={'img_path': split, 'seg_map_path': split},
            reduce_zero_label=False,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """Paths of the pictures, sorted, and of their labels."""
        folder = Path(self.data_prefix['img_path'])
        data_list = super().load_data_list() if folder.is_dir() else []
        if not data_list:
            raise ValueError(
                f'no .png pictures in {folder}; tools/make_toy_data.py draws toy ones, DatasetDDPM has the real ones'
            )
        missing = [item['seg_map_path'] for item in data_list if not Path(item['seg_map_path']).is_file()]
        if missing:
            raise ValueError(f'{len(missing)} pictures in {folder} have no label, the first one misses {missing[0]}')
        return data_list


@TRANSFORMS.register_module()
class LoadLabelArray(BaseTransform):
    """Read `seg_map_path`, an .npy file of integer class indices (H, W), into `gt_seg_map`, uint8.

    Raises:
        ValueError: when the array is not two-dimensional and integer, or holds values outside 0..255.
    """

    def transform(self, results: dict) -> dict:
        """Add `gt_seg_map` to `results`."""
        labels = np.load(results['seg_map_path'], allow_pickle=False)
        if labels.ndim != 2 or labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() > 255:
            raise ValueError(
                f'{results["seg_map_path"]} holds {labels.dtype} of shape {labels.shape}; expected class indices '
                '(H, W), integers in 0..255'
            )
        results['gt_seg_map'] = labels.astype(np.uint8)
        results.setdefault('seg_fields', []).append('gt_seg_map')
        return results
