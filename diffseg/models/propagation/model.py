"""Video label propagation as a model that mmengine tests."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from mmseg.registry import MODELS
from torch import Tensor

from diffseg.structures import VideoFrames, VideoSample

from ..descriptors import DescriptorEncoder
from .labels import Size, decode_joints, decode_mask, encode_joints, encode_mask
from .windowed import propagate_labels

FIELDS = {'mask': 'first_mask', 'joints': 'first_joints'}  # of a sample, by kind of labels


@MODELS.register_module()
class LabelPropagator(DescriptorEncoder):
    """Propagate the first frame's labels through a video by descriptors: DIFT (arXiv 2306.03881), section 4.4.

    ```text
    frames (3, H, W) -> backbone -> maps -> neck -> one map (B, C, h, w) -> head -> descriptors (B, C', h, w)
    labels of the first frame -> cells (K, h, w)
    for each frame: context = first frame + previous frames, with soft labels -> `propagate_labels` -> (K, h, w)
    soft labels -> masks or joints at the original size
    ```

    Each frame is encoded once. Only the descriptors of the first frame and of `previous_frames` others are kept, so
    that memory does not grow with the length of the video.

    Args:
        backbone: config of any backbone whose images are in [-1, 1], RGB.
        neck: config of a neck with one level, see `DescriptorEncoder`.
        head: config of a `DescriptorHead`.
        labels: what to propagate, a 'mask' of objects or 'joints'.
        topk: number of context cells that are averaged for a cell's label, see `propagate_labels`.
        radius: of the window that contains them, in cells.
        temperature: of their weights.
        previous_frames: number of context frames in addition to the first one.
        batch_size: number of frames that are encoded together.
        context_device: device for the descriptors of the context, such as 'cpu' to save GPU memory; None keeps them
            where they were computed.
        data_preprocessor: config.
        init_cfg: see mmengine's `BaseModule`.

    Raises:
        ValueError: unknown `labels`, or a number is out of range.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        *,
        labels: Literal['mask', 'joints'] = 'mask',
        topk: int,
        radius: int,
        temperature: float,
        previous_frames: int,
        batch_size: int = 1,
        context_device: str | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, neck, head, data_preprocessor, init_cfg)
        if labels not in FIELDS:
            raise ValueError(f"labels is {labels!r}; it is 'mask' or 'joints'")
        if previous_frames < 0 or batch_size < 1:
            raise ValueError(
                f'previous_frames is {previous_frames}, batch_size is {batch_size}; at least 0 and at least 1'
            )
        self.labels = labels
        self.topk = topk
        self.radius = radius
        self.temperature = temperature
        self.previous_frames = previous_frames
        self.batch_size = batch_size
        self.context_device = context_device

    def forward(
        self,
        inputs: Mapping[str, Sequence[VideoFrames]],
        data_samples: Sequence[VideoSample],
        mode: Literal['predict'] = 'predict',
    ) -> list[VideoSample]:
        """Entry point of mmengine.

        Args:
            inputs: the 'frames' of all videos.
            data_samples: of all videos.
            mode: 'predict'.

        Raises:
            ValueError: another mode; the model cannot be trained.
        """
        if mode != 'predict':
            raise ValueError(f"mode is {mode!r}; it is 'predict', since LabelPropagator is not trained")
        return self.predict(inputs, data_samples)

    @torch.no_grad()
    def predict(
        self, inputs: Mapping[str, Sequence[VideoFrames]], data_samples: Sequence[VideoSample]
    ) -> list[VideoSample]:
        """Propagate.

        Returns:
            The samples, each with `pred_masks` (T, H, W) or `pred_joints` (T, J, 2), on the CPU. Those of the first
            frame are its annotation.

        Raises:
            ValueError: a sample lacks the annotation for `labels`.
        """
        for frames, sample in zip(inputs['frames'], data_samples, strict=True):
            if FIELDS[self.labels] not in sample:
                raise ValueError(
                    f'video {sample.video_id}: has no {FIELDS[self.labels]}, but labels={self.labels!r} is to be '
                    f'propagated; choose the labels that the data set has'
                )
            if self.labels == 'mask':
                sample.pred_masks = self.propagate_mask(frames, sample)
            else:
                sample.pred_joints = self.propagate_joints(frames, sample)
        return list(data_samples)

    def propagate_mask(self, frames: VideoFrames, sample: VideoSample) -> Tensor:
        """Masks of one video, see `predict`."""
        soft = self.propagate(frames, lambda cells: encode_mask(sample.first_mask, cells))
        masks = (decode_mask(labels, sample.img_shape, sample.ori_shape) for labels in soft)
        return torch.stack([sample.first_mask.cpu(), *masks])

    def propagate_joints(self, frames: VideoFrames, sample: VideoSample) -> Tensor:
        """Joints of one video, see `predict`."""
        soft = self.propagate(frames, lambda cells: encode_joints(sample.first_joints, sample.ori_shape, cells))
        joints = (decode_joints(labels, sample.ori_shape).cpu() for labels in soft)
        return torch.stack([sample.first_joints.cpu(), *joints])

    def propagate(self, frames: VideoFrames, encode_labels: Callable[[Size], Tensor]) -> Iterator[Tensor]:
        """Soft labels (K, h, w) of all frames but the first, one after the other.

        Args:
            frames: of a video.
            encode_labels: returns the labels (K, h, w) of the first frame for the height and width of the maps.
        """
        described = self.encode_frames(frames)
        descriptors = next(described)
        labels = encode_labels(tuple(descriptors.shape[1:])).to(descriptors.device)
        first = descriptors.to(self.context_device), labels
        previous: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.previous_frames)
        for descriptors in described:
            context = zip(first, *previous, strict=True)  # all descriptors, all labels
            labels = propagate_labels(descriptors, *context, self.topk, self.radius, self.temperature)
            previous.append((descriptors.to(self.context_device), labels))
            yield labels

    def encode_frames(self, frames: VideoFrames) -> Iterator[Tensor]:
        """Descriptors (C', h, w) of each frame, channels last in memory; batches are read lazily."""
        for start in range(0, len(frames), self.batch_size):
            batch = [frames[i] for i in range(start, min(start + self.batch_size, len(frames)))]
            images = torch.stack(batch).to(self.data_preprocessor.device).float() / 127.5 - 1  # (B, 3, H, W)
            yield from self.encode(images).to(memory_format=torch.channels_last)
