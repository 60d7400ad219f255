"""AP-10K as pairs of animals (arXiv 2108.12617, paired by GeoAware-SC, arXiv 2311.17034)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
from mmseg.registry import DATASETS

from .pairs import VIEWS, PairDataset, require

Protocol = Literal['intra-species', 'cross-species', 'cross-family']
_SUFFIXES = {'intra-species': '', 'cross-species': '_cross_species', 'cross-family': '_cross_family'}
_IMAGES, _ANNOTATIONS = 'JPEGImages', 'ImageAnnotation'

# Pairs of keypoint ids, left and right: eyes; shoulders, elbows, front paws; hips, knees, back paws.
_SWAPS = ((0, 1), (5, 8), (6, 9), (7, 10), (11, 14), (12, 15), (13, 16))


@DATASETS.register_module()
class AP10KDataset(PairDataset):
    """Pairs of AP-10K's animals, of 54 species in 23 families, with seventeen keypoints.

    ::

        ap-10k
        ├── JPEGImages
        │   └── FAMILY
        │       └── SPECIES
        │           └── IMAGE.jpg
        ├── ImageAnnotation
        │   └── FAMILY
        │       └── SPECIES
        │           └── IMAGE.json      keypoints, bbox, width, height
        └── PairAnnotation
            ├── trn, val, test          pairs of a species
            ├── val_cross_species, test_cross_species
            └── val_cross_family, test_cross_family
                └── SOURCE-TARGET:CATEGORY.json

    The notebook prepare_ap10k.ipynb of GeoAware-SC makes this folder of the published one, or the script
    preprocess_ap10k.py of MARCO (arXiv 2604.18267). They draw the pairs at random without a seed, so every folder that
    they make has other pairs.

    Keypoints are seventeen triples x, y, v. Those with v > 0 in both images are visible. Boxes are (left, top, width,
    height), so that PCK-bbox has the threshold of GeoAware-SC. A pair names its two annotations by paths, which may be
    those of another computer: what counts is behind "ImageAnnotation".

    The category is the species of both animals, their family across species, and "cross-family" across families, where
    the files say "all".

    Args:
        data_root: the folder above.
        split: "trn", "val" or "test".
        protocol: what is paired, "intra-species", "cross-species" (two species of a family) or "cross-family"; of the
            training split only the first.
        **kwargs: see `PairDataset`.

    Raises:
        ValueError: as `PairDataset` does, and on another split or protocol.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'AP-10K', 'box': 'object'}
    REMEDY: ClassVar[str] = (
        'Get ap-10k.zip from github.com/AlexTheBad/AP-10K and prepare the pairs with prepare_ap10k.ipynb of '
        'github.com/Junyi42/GeoAware-SC or scripts/preprocess_ap10k.py of github.com/visinf/MARCO; '
        'tools/toy/make_data.py OUT --ap10k N draws a toy set'
    )
    SWAPS: ClassVar[tuple[tuple[int, int], ...]] = _SWAPS

    def __init__(
        self,
        data_root: str,
        split: Literal['trn', 'val', 'test'],
        protocol: Protocol = 'intra-species',
        **kwargs,
    ) -> None:
        for name, value, allowed in (
            ('split', split, ('trn', 'val', 'test')),
            ('protocol', protocol, get_args(Protocol)),
        ):
            if value not in allowed:
                raise ValueError(f'{name} is {value!r}, choose from {", ".join(allowed)}')
        if split == 'trn' and protocol != 'intra-species':
            raise ValueError(f"there are no training pairs {protocol}, take protocol='intra-species'")
        self.protocol = protocol
        super().__init__(data_root, split, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Annotations of all pairs; that of an image, which is in many pairs, is read once."""
        self._images: dict[Path, dict] = {}
        entries = super().load_data_list()
        self._images.clear()
        return entries

    def list_pairs(self) -> Iterable[dict]:
        """Files of the protocol's folder."""
        folder = f'PairAnnotation/{self.split}{_SUFFIXES[self.protocol]}'
        require(self.data_root, (_IMAGES, _ANNOTATIONS, folder), self.REMEDY)
        pairs = []
        for path in sorted(Path(self.data_root, folder).glob('*.json')):
            category = self.protocol if self.protocol == 'cross-family' else path.stem.rpartition(':')[2]
            pairs.append({'pair_id': path.stem, 'category': category, 'where': str(path)})
        self._metainfo.update(
            list=folder, protocol=self.protocol, swaps={pair['category']: self.SWAPS for pair in pairs}
        )
        return pairs

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Annotations of both images of one pair."""
        pair = json.loads(Path(raw_data_info['where']).read_text())
        entry, seen = {}, []
        for view, side in zip(VIEWS, ('src', 'trg'), strict=True):
            path = self._annotation_path(pair[f'{side}_json_path'])
            image = self._image(path)
            triples = np.asarray(image['keypoints'], dtype=np.float64).reshape(-1, 3)
            left, top, width, height = image['bbox']
            seen.append(triples[:, 2] > 0)
            entry |= {
                f'img_path{view}': str(Path(self.data_root, _IMAGES, *path.parts).with_suffix('.jpg')),
                f'keypoints{view}': triples[:, :2],
                f'bbox{view}': [left, top, left + width, top + height],
                f'ori_shape{view}': (image['height'], image['width']),
            }
        if len(seen[0]) == len(seen[1]):  # otherwise the base class says which counts differ
            entry['visible'] = seen[0] & seen[1]
        return entry | {'keypoint_ids': list(range(len(seen[0])))}

    def _annotation_path(self, path: str) -> Path:
        """FAMILY/SPECIES/IMAGE.json of a path in a pair annotation."""
        _, folder, tail = path.replace('\\', '/').rpartition(f'{_ANNOTATIONS}/')
        if not folder:
            raise ValueError(f'names the annotation {path!r}, expected .../{_ANNOTATIONS}/FAMILY/SPECIES/IMAGE.json')
        return Path(tail)

    def _image(self, path: Path) -> dict:
        if path not in self._images:
            self._images[path] = json.loads(Path(self.data_root, _ANNOTATIONS, path).read_text())
        return self._images[path]


@DATASETS.register_module()
class ToyAP10KDataset(AP10KDataset):
    """Pairs of toy quadrupeds in the layout of `AP10KDataset`, with the fourteen keypoints of `ToyPairDataset`.

    `tools/toy/make_data.py OUT --ap10k N` draws them into OUT/ap-10k-toy. The families are "long-legged" (horse and
    giraffe) and "short-legged" (dog and elephant). Mirroring exchanges no keypoints.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'AP-10K-toy', 'box': 'object'}
    REMEDY: ClassVar[str] = 'Draw them with tools/toy/make_data.py OUT --ap10k N'
    SWAPS: ClassVar[tuple[tuple[int, int], ...]] = ()
