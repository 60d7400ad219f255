"""JHMDB (Jhuang et al., ICCV 2013): propagate the first frame's fifteen joints of a person."""

from pathlib import Path
from typing import ClassVar

import numpy as np
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS
from scipy.io import loadmat

from .video import list_frames

JOINTS = 15


@DATASETS.register_module()
class JHMDBDataset(BaseDataset):
    """Videos of one person with annotated joints, one sample for each; 268 in the test list of split 1.

    ::

        JHMDB
        ├── Rename_Images
        │   └── CLASS
        │       └── VIDEO
        │           └── 00001.png, 00002.png, ...
        ├── joint_positions
        │   └── CLASS
        │       └── VIDEO
        │           └── joint_positions.mat       `pos_img` (2, 15, T): x and y, counted from 1
        └── test.txt

    A line of the list has the paths of a video's frames and joints: `FRAMES_FOLDER JOINTS_FILE`, absolute or relative
    to `data_root`. It is the list that the released code of UVC and of Contrastive Random Walk reads.

    Frames after the last annotated one are left out: they are not scored, and labels are propagated forwards only.

    Args:
        data_root: the folder that relative paths refer to.
        ann_file: the list.
        **kwargs: see `BaseDataset`; the pipeline is `LoadVideo`.

    Raises:
        ValueError: the list is missing, empty or has another format; frames are missing; joints are missing or have
            another shape.
    """

    METAINFO: ClassVar[dict] = {'dataset': 'JHMDB'}
    REMEDY: ClassVar[str] = (
        'Unpack Rename_Images and joint_positions from jhmdb.is.tue.mpg.de and write a line FRAMES_FOLDER JOINTS_FILE '
        'for each video; tools/toy/make_davis.py OUT --jhmdb draws a toy set'
    )

    def __init__(self, data_root: str, ann_file: str, **kwargs) -> None:
        super().__init__(data_root=data_root, ann_file=ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """An entry for each video: `video_id` CLASS/VIDEO, `frame_paths`, and `joints` (T, 15, 2) as (x, y) from 0."""
        path = Path(self.ann_file)
        try:
            lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(f'{path}: cannot be read as a list of videos ({error}). {self.REMEDY}') from error
        if not lines:
            raise ValueError(f'{path}: lists no video. {self.REMEDY}')
        if wrong := [line for line in lines if len(line) != 2]:
            raise ValueError(f'{path}: expected FRAMES_FOLDER JOINTS_FILE, got {" ".join(wrong[0])!r}. {self.REMEDY}')
        self._metainfo['list'] = path.name
        return [self._video(*(Path(self.data_root, entry) for entry in line)) for line in lines]

    def _video(self, folder: Path, annotation: Path) -> dict:
        joints = read_joints(annotation)
        frames = list_frames(folder, self.REMEDY)
        if len(frames) < len(joints):
            raise ValueError(f'{folder}: has {len(frames)} frames, {annotation} annotates {len(joints)}. {self.REMEDY}')
        return {
            'video_id': f'{folder.parent.name}/{folder.name}',
            'frame_paths': frames[: len(joints)],
            'joints': joints,
        }


def read_joints(path: Path) -> np.ndarray:
    """Joints (T, 15, 2) as (x, y) in pixels counted from 0, float32.

    Raises:
        ValueError: the file cannot be read, or has other content.
    """
    try:
        positions = np.asarray(loadmat(path, variable_names=['pos_img'])['pos_img'], dtype=np.float32)
    except KeyError as error:
        raise ValueError(f'{path}: has no variable "pos_img", expected one with shape (2, {JOINTS}, T)') from error
    except Exception as error:  # scipy raises many types on damaged files
        raise ValueError(f'{path}: cannot be read as a MATLAB file of joints ({error}); copy it again') from error
    if positions.ndim != 3 or positions.shape[:2] != (2, JOINTS) or not positions.shape[2]:
        raise ValueError(f'{path}: pos_img has shape {positions.shape}, expected (2, {JOINTS}, number of frames)')
    if not np.isfinite(positions).all():
        raise ValueError(f'{path}: pos_img has values that are not finite; every joint of every frame needs a position')
    return positions.transpose(2, 1, 0) - 1
