"""TSS (Taniai, Sinha and Sato, CVPR 2016): pairs of images with dense correspondence of the foreground."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from mmseg.registry import DATASETS
from PIL import Image

from .pairs import PairDataset, require

_GROUPS = ('FG3DCar', 'JODS', 'PASCAL')
_MAGIC = np.float32(202021.25)  # first value of a .flo file
_UNKNOWN = 1e9  # displacements from this on mean that there is none


@DATASETS.register_module()
class TSSDataset(PairDataset):
    """400 pairs of images in three groups, each matched both ways, with a flow over the foreground.

    ::

        TSS_CVPR2016
        ├── FG3DCar
        ├── JODS
        └── PASCAL
            └── PAIR
                ├── image1.png, image2.png
                ├── flow1.flo, flow2.flo    displacement of each pixel of an image into the other
                ├── mask1.png, mask2.png    foreground of each image
                └── flip_gt.txt             1 if the objects face opposite ways

    The keypoints of a pair are pixels of the foreground of its source and where the flow leads them in its target. The
    category is the group. PCK is usually stated with the image as base and a threshold of 0.05, as the mean over pairs
    of each group. There are no annotated boxes: `bbox0` and `bbox1` are the extent of the keypoints' pixels.

    Images are taken as they are, as by the reader of DenseMatching (github.com/PruneTruong/DenseMatching);
    flip_gt.txt is passed on as the variation "mirror".

    Args:
        data_root: the folder above.
        split: "test", the only split.
        step: take every `step`-th pixel of every `step`-th row. Published figures are over all pixels (1), of which a
            test keeps the predictions.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does, on another split, or a step below 1.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'TSS', 'box': 'keypoints', 'swaps': {}}
    REMEDY: ClassVar[str] = (
        'Unpack TSS_CVPR2016.zip from taniai.space/projects/cvpr16_dccs and point data_root to the folder '
        'TSS_CVPR2016; tools/toy/make_data.py OUT --tss N draws a toy set'
    )

    def __init__(self, data_root: str, split: Literal['test'] = 'test', step: int = 4, **kwargs) -> None:
        if split != 'test':
            raise ValueError(f"split is {split!r}, TSS has only 'test'")
        if step < 1:
            raise ValueError(f'step is {step}, expected 1 or more pixels')
        self.step = step
        super().__init__(data_root, split, **kwargs)
        self._metainfo['protocol'] = f'every {step}th pixel' if step > 1 else 'all pixels'

    def list_pairs(self) -> Iterable[dict]:
        """All folders of the three groups, both ways."""
        require(self.data_root, _GROUPS, self.REMEDY)
        return [
            {'pair_id': f'{group}-{folder.name}-{source}', 'category': group, 'where': str(folder), 'source': source}
            for group in _GROUPS
            for folder in sorted(Path(self.data_root, group).iterdir())
            if folder.is_dir()
            for source in (1, 2)
        ]

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Pixels of the foreground of one image and their places in the other."""
        folder, source = Path(raw_data_info['where']), raw_data_info['source']
        flow = read_flow(folder / f'flow{source}.flo')  # (H, W, 2)
        with Image.open(folder / f'mask{source}.png') as image:
            mask = np.asarray(image.convert('L')) > 127
        if mask.shape != flow.shape[:2]:
            raise ValueError(f'mask{source}.png has height and width {mask.shape}, flow{source}.flo {flow.shape[:2]}')
        mask = mask & (np.abs(flow) < _UNKNOWN).all(axis=2)
        rows, columns = np.nonzero(mask[:: self.step, :: self.step])
        points = self.step * np.stack([columns, rows], axis=1)
        matches = points + flow[points[:, 1], points[:, 0]]
        entry = {'variations': {'mirror': int((folder / 'flip_gt.txt').read_text())}, 'ori_shape0': mask.shape}
        for view, (number, places) in enumerate(((source, points), (3 - source, matches))):
            if len(places) < 2:
                raise ValueError(f'flow{source}.flo and mask{source}.png have {len(places)} pixels in common')
            entry |= {
                f'img_path{view}': str(folder / f'image{number}.png'),
                f'keypoints{view}': places,
                f'bbox{view}': [*places.min(axis=0), *(places.max(axis=0) + 1)],
            }
        return entry


def read_flow(path: Path) -> np.ndarray:
    """Displacements (x, y) with shape (H, W, 2), float32, of a .flo file (Middlebury).

    Raises:
        ValueError: the file is none.
    """
    content = path.read_bytes()
    if len(content) < 12 or np.frombuffer(content, '<f4', 1)[0] != _MAGIC:
        raise ValueError(f'{path.name} is no .flo file, which begins with the number 202021.25')
    width, height = np.frombuffer(content, '<i4', 2, 4)
    if len(content) != 12 + 8 * width * height:
        raise ValueError(f'{path.name} has {len(content)} bytes, expected {12 + 8 * width * height} for its size')
    return np.frombuffer(content, '<f4', offset=12).reshape(height, width, 2)


def write_flow(path: Path, flow: np.ndarray) -> None:
    """Write what `read_flow` reads."""
    height, width = flow.shape[:2]
    size = np.array([width, height], '<i4')
    path.write_bytes(_MAGIC.astype('<f4').tobytes() + size.tobytes() + flow.astype('<f4').tobytes())
