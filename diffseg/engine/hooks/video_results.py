"""Files of predictions on videos: indexed masks, overlay videos and strips of frames."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from PIL import Image
from torch import Tensor

from diffseg.masks import VOID, davis_palette, read_mask, write_mask
from diffseg.structures import VideoFrames, VideoSample, to_array
from diffseg.visualization import colour_labels, grid, overlay

CELL = 240  # pixels, the longer side of a frame in a strip at most


def draw_mask(picture: Tensor, mask: Tensor) -> Tensor:
    """A picture (3, H, W) with its objects (H, W) in DAVIS's colours, void unchanged."""
    colours = colour_labels(mask, torch.from_numpy(davis_palette()))
    return overlay(picture, colours, alpha=0.6, mask=(mask > 0) & (mask != VOID))


def draw_joints(picture: Tensor, joints: Tensor) -> Tensor:
    """A picture (3, H, W) with joints (J, 2) as discs of different hues; those with negative x are left out."""
    canvas = np.ascontiguousarray(to_array((255 * picture).byte().permute(1, 2, 0)))  # (H, W, 3)
    radius = max(2, min(canvas.shape[:2]) // 60)
    colours = matplotlib.colormaps['hsv'](np.arange(len(joints)) / len(joints))[:, :3] * 255
    for (x, y), colour in zip(joints.tolist(), colours.tolist(), strict=True):
        if x >= 0:
            for size, paint in ((radius + 1, (255, 255, 255)), (radius, colour)):
                cv2.circle(canvas, (round(x), round(y)), size, paint, cv2.FILLED, cv2.LINE_AA)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255


def write_video(path: Path, pictures: Iterable[Tensor], fps: float) -> None:
    """Write pictures (3, H, W) of one size as an MPEG-4 video, without the last row or column if their number is odd.

    Raises:
        OSError: the file cannot be written.
    """
    writer = None
    for picture in pictures:
        frame = to_array((255 * picture).round().byte().permute(1, 2, 0))  # (H, W, 3), RGB
        if writer is None:
            size = frame.shape[1] // 2 * 2, frame.shape[0] // 2 * 2
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, size)
            if not writer.isOpened():
                raise OSError(f'{path}: cannot be written as an MPEG-4 video; is OpenCV built with FFmpeg?')
        writer.write(cv2.cvtColor(frame[: size[1], : size[0]], cv2.COLOR_RGB2BGR))
    if writer is not None:
        writer.release()


@HOOKS.register_module()
class VideoResultHook(Hook):
    """Write the predictions of a test on videos, at the size of the original frames.

    ::

        FOLDER
        ├── masks                     for DAVIS: the layout of its official tool and server
        │   └── VIDEO
        │       └── 00000.png, ...    indexed, with DAVIS's palette
        ├── overlays
        │   └── VIDEO.mp4             frames with masks or joints
        └── strips
            └── VIDEO.png             some frames, the annotation above the prediction

    Args:
        folder: to write to; a relative path is in the work dir.
        fps: of the overlay videos.
        strip: number of frames in a strip, evenly spaced from the first to the last.
    """

    def __init__(self, folder: str = 'videos', fps: float = 12, strip: int = 5) -> None:
        self.folder = folder
        self.fps = fps
        self.strip = strip

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Sequence[VideoSample] | None = None,
    ) -> None:
        """Write the files of each video."""
        folder = Path(runner.work_dir, self.folder)
        for frames, sample in zip(data_batch['inputs']['frames'], outputs, strict=True):
            frames = VideoFrames(frames.paths, frames.ori_shape)
            if 'pred_masks' in sample:
                self._write_masks(folder / 'masks' / sample.video_id, sample)
            overlays = (_draw(frames, sample, t) for t in range(len(frames)))
            write_video(_with_folder(folder / 'overlays' / f'{sample.video_id}.mp4'), overlays, self.fps)
            shown = np.linspace(0, len(frames) - 1, min(self.strip, len(frames))).round().astype(int).tolist()
            rows = [[_draw(frames, sample, t, truth) for t in shown] for truth in (True, False)]
            names = [f'frame {sample.frame_names[t]}' for t in shown]
            strip = grid(rows, ('annotated', 'propagated'), names, cell=min(max(sample.ori_shape), CELL))
            strip = strip.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # a quarter of the bytes
            strip.save(_with_folder(folder / 'strips' / f'{sample.video_id}.png'), optimize=True)

    def _write_masks(self, folder: Path, sample: VideoSample) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, mask in zip(sample.frame_names, to_array(sample.pred_masks), strict=True):
            write_mask(folder / f'{name}.png', mask)


def _draw(frames: VideoFrames, sample: VideoSample, t: int, truth: bool = False) -> Tensor:
    """Frame `t` with its prediction, or its annotation, as a picture."""
    picture = frames[t].float() / 255
    if 'pred_joints' in sample:
        return draw_joints(picture, (sample.joints if truth else sample.pred_joints)[t])
    mask = read_mask(sample.annotation_paths[t], sample.ori_shape) if truth else to_array(sample.pred_masks[t])
    return draw_mask(picture, torch.from_numpy(mask))


def _with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
