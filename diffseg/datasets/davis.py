"""DAVIS-2017 (arXiv 1704.00675), semi-supervised: propagate the first frame's masks of objects."""

from pathlib import Path
from typing import ClassVar, Literal

from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS

from .pairs import require
from .video import list_frames


@DATASETS.register_module()
class DAVISDataset(BaseDataset):
    """DAVIS-2017 at 480p: 60 training and 30 validation videos, one sample for each.

    ::

        DAVIS
        ├── JPEGImages/480p
        │   └── VIDEO
        │       └── 00000.jpg, 00001.jpg, ...
        ├── Annotations/480p
        │   └── VIDEO
        │       └── 00000.png, 00001.png, ...     indexed: 0 background, 1, 2, ... the objects
        └── ImageSets/2017
            ├── train.txt                         names of videos
            └── val.txt

    Args:
        data_root: the folder above.
        split: "train" or "val".
        **kwargs: see `BaseDataset`; the pipeline is `LoadVideo`.

    Raises:
        ValueError: on another split, an empty list, or a folder with another layout: frames or annotations are missing,
            or do not belong to each other.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'DAVIS-2017'}
    REMEDY: ClassVar[str] = (
        'Unpack DAVIS-2017-trainval-480p.zip from davischallenge.org and point data_root to its folder DAVIS; '
        'tools/toy/make_davis.py OUT draws a toy set'
    )

    def __init__(self, data_root: str, split: Literal['train', 'val'] = 'val', **kwargs) -> None:
        if split not in ('train', 'val'):
            raise ValueError(f"split is {split!r}, choose 'train' or 'val'")
        self.split = split
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """An entry for each video: `video_id`, `frame_paths` and `annotation_paths`."""
        listed = f'ImageSets/2017/{self.split}.txt'
        require(self.data_root, ('JPEGImages/480p', 'Annotations/480p', listed), self.REMEDY)
        names = Path(self.data_root, listed).read_text().split()
        if not names:
            raise ValueError(f'{Path(self.data_root, listed)}: lists no video. {self.REMEDY}')
        self._metainfo['split'] = self.split
        return [self._video(name) for name in names]

    def _video(self, name: str) -> dict:
        frames, annotations = (
            {Path(path).stem: path for path in list_frames(Path(self.data_root, kind, '480p', name), self.REMEDY)}
            for kind in ('JPEGImages', 'Annotations')
        )
        for kind, present, expected in (('Annotations', annotations, frames), ('JPEGImages', frames, annotations)):
            if missing := sorted(expected.keys() - present.keys()):
                raise ValueError(
                    f'{Path(self.data_root, kind, "480p", name)}: has no {missing[0]}, but there is '
                    f'{expected[missing[0]]}; every frame needs an annotation and every annotation a frame '
                    f'({len(missing)} are missing). {self.REMEDY}'
                )
        return {
            'video_id': name,
            'frame_paths': list(frames.values()),
            'annotation_paths': [annotations[stem] for stem in frames],
        }
