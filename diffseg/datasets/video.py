"""Loading of videos whose first frame is annotated."""

from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from diffseg.diffusion.images import image_size
from diffseg.masks import VOID, read_mask
from diffseg.structures import VideoFrames, VideoSample

FRAME_SUFFIXES = ('.jpg', '.jpeg', '.png')


def list_frames(folder: Path, remedy: str) -> list[str]:
    """Paths of a video's frames, sorted by the numbers in their names.

    Raises:
        ValueError: the folder is missing or has no frame, or a number is missing.
    """
    frames = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in FRAME_SUFFIXES and path.stem.isdigit():
            frames[int(path.stem)] = path
    if not frames:
        raise ValueError(f'{folder}: has no frames, expected images named by number such as 00000.jpg. {remedy}')
    numbers = range(min(frames), max(frames) + 1)
    if missing := [number for number in numbers if number not in frames]:
        names = ', '.join(f'{number:0{len(frames[numbers[0]].stem)}d}' for number in missing[:8])
        more = ', ...' if len(missing) > 8 else ''
        raise ValueError(
            f'{folder}: frame {names}{more} is missing between {frames[numbers[0]].name} and '
            f'{frames[numbers[-1]].name}, {len(missing)} in total. {remedy}'
        )
    return [str(frames[number]) for number in numbers]


@TRANSFORMS.register_module()
class LoadVideo(BaseTransform):
    """Convert an entry of a video data set into a sample whose frames are read and resized on access.

    Args:
        short_side: resize frames so that the shorter side has this many pixels, and the longer one, by the same factor,
            is rounded down to a multiple of `divisor`: DIFT's and DINO's protocol for DAVIS.
        long_side: resize frames by one factor so that the longer side has this many pixels, and round both sides to
            multiples of `divisor`: DiTF's.
        divisor: see `short_side` and `long_side`.
        size: (height, width) to resize frames to instead, regardless of their aspect ratio, as for JHMDB.

    Raises:
        ValueError: not exactly one of `short_side`, `long_side` and `size` is given; or the first mask of a video
            cannot be used.
    """

    def __init__(
        self,
        short_side: int | None = None,
        divisor: int = 32,
        size: tuple[int, int] | None = None,
        long_side: int | None = None,
    ) -> None:
        given = {'short_side': short_side, 'long_side': long_side, 'size': size}
        if sum(value is not None for value in given.values()) != 1:
            listed = ', '.join(f'{name} is {value}' for name, value in given.items())
            raise ValueError(f'{listed}; give one of them')
        self.short_side = short_side
        self.long_side = long_side
        self.divisor = divisor
        self.size = size

    def transform(self, results: dict) -> dict:
        """Read the first frame's size and, where there are masks, the first mask."""
        paths = results['frame_paths']
        ori_shape = image_size(paths[0])
        shape = self._resized(*ori_shape) if self.size is None else tuple(self.size)
        sample = VideoSample(
            metainfo={
                'video_id': results['video_id'],
                'ori_shape': ori_shape,
                'img_shape': shape,
                'num_frames': len(paths),
                'frame_names': [Path(path).stem for path in paths],
            }
        )
        if 'annotation_paths' in results:
            sample.set_metainfo({'annotation_paths': results['annotation_paths']})
            sample.first_mask = torch.from_numpy(_first_mask(results['annotation_paths'][0], ori_shape))
        if 'joints' in results:
            sample.joints = torch.from_numpy(results['joints'].astype(np.float32))
            sample.first_joints = sample.joints[0]
        return {'inputs': {'frames': VideoFrames(paths, ori_shape, shape)}, 'data_samples': sample}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.long_side is not None:
            factor = self.long_side / max(height, width) / self.divisor
            return max(1, round(height * factor)) * self.divisor, max(1, round(width * factor)) * self.divisor
        shape = [side * self.short_side / min(height, width) for side in (height, width)]
        longer = int(height <= width)
        shape[1 - longer] = self.short_side
        shape[longer] = int(shape[longer] // self.divisor) * self.divisor
        return tuple(shape)


def _first_mask(path: str, shape: tuple[int, int]) -> np.ndarray:
    mask = read_mask(path, shape)
    if not ((mask > 0) & (mask != VOID)).any():
        raise ValueError(f'{path}: has no object, so there is nothing to propagate; objects have the values 1, 2, ...')
    return mask
