"""Samples, pairs of images or videos, that data sets, models and metrics exchange."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor


def to_array(field: Tensor | np.ndarray) -> np.ndarray:
    """A sample's field as an array, from any device."""
    return field.detach().cpu().numpy() if isinstance(field, Tensor) else np.asarray(field)


class PairSample(BaseDataElement):
    """Annotation of one pair; the suffix 0 is the source image and 1 the target image.

    A pipeline's output is `{'inputs': {'image0': image, 'image1': image}, 'data_samples': PairSample}` with images
    of shape (3, H, W), uint8, RGB; images of a batch differ in size, so `pseudo_collate` makes lists of them.

    Coordinates are (x, y) in pixels of the original image, flipped and cropped with the image, but never resized with
    it: multiply by `img_shape / ori_shape` for the position of a point in the model's input.

    Fields:
        keypoints0, keypoints1: float32 with shape (N, 2); equal rows are the same part of the object.
        visible: bool with shape (N,), whether a keypoint is annotated and inside the picture in both images. The
            coordinates of the others are undefined.
        keypoint_ids: which keypoint of the category each row is, int64 with shape (N,). Absent if the data set does not
            know.
        bbox0, bbox1: the object's box (x1, y1, x2, y2), float32 with shape (4,).
        mirror_rows: for every keypoint the row of the one that becomes it when the object is mirrored ("left eye" and
            "right eye"), its own row if mirroring does not change it, -1 if that one is not in the pair; int64 with
            shape (N,). Absent if the data set does not know.
        pred_keypoints1: predicted positions of the visible keypoints in the target, float64 with shape (V, 2).
        cycle_error: how far from their origin these are when they are matched back, in original pixels of the source,
            float64 with shape (V,), if the model predicts it.
        pred_keypoints1_aligned: as `pred_keypoints1`, with pose alignment, if the model predicts it.

    Meta information:
        img_path0, img_path1: the files; equal paths are equal images, unless augmented at random.
        category: name in the data set, e.g. "pottedplant".
        pair_id: unique within the split.
        ori_shape0, ori_shape1: (height, width) of the frame that coordinates refer to.
        img_shape0, img_shape1: (height, width) of the images in `inputs`, after resizing.
        variations: annotated differences between the two images, e.g. {"mirror": 1}; may be empty.
        damaged: only if an image or annotation could not be read: a message that names the file. Such a sample comes
            from data sets in test mode; it has no fields, both images are None, only `pair_id` and `category` of the
            meta information are guaranteed, and a metric counts it as not evaluated.
    """


class HomographySample(BaseDataElement):
    """Two images of a plane, or from one place, and the homography between them; suffixes 0 and 1 as in `PairSample`.

    Fields:
        keypoints0, keypoints1: points of interest, float32 with shapes (N, 2) and (M, 2), (x, y) in original pixels;
            detected in each image separately, so that their rows do not correspond.
        homography: maps homogeneous (x, y, 1) of image 0 to image 1, float64 with shape (3, 3).
        pred_matches: predicted pairs of rows of keypoints0 and keypoints1, int64 with shape (P, 2).

    Meta information:
        img_path0, ori_shape0, img_shape0, pair_id: as in `PairSample`, the first three also with 1.
        sequence: name of the pair's sequence, e.g. "v_wall"; pairs of a sequence have image 0 in common.
        keypoint_source: folder of the keypoint files, or the detector.
    """


class VideoFrames:
    """The frames of a video, read from their files on access.

    Only the paths are passed between processes. Not a `collections.abc.Sequence`, so that mmengine's `pseudo_collate`
    and data preprocessors pass it on as a whole: a batch is `{'frames': [VideoFrames, ...]}`.

    Args:
        paths: the files, in order.
        ori_shape: (height, width) that every file must have.
        shape: (height, width) to resize frames to, bilinearly, as DIFT does; None keeps their size.
    """

    def __init__(self, paths: Sequence[str], ori_shape: tuple[int, int], shape: tuple[int, int] | None = None) -> None:
        self.paths = tuple(paths)
        self.ori_shape = tuple(ori_shape)
        self.shape = self.ori_shape if shape is None else tuple(shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read one frame, RGB, with shape (3, h, w), uint8.

        Raises:
            ValueError: the file cannot be read, or has another size than `ori_shape`.
        """
        path = self.paths[index]
        image = cv2.imread(path, cv2.IMREAD_COLOR)  # (H, W, 3), BGR
        if image is None:
            raise ValueError(f'{path}: cannot be read as an image; copy the frame again')
        if image.shape[:2] != self.ori_shape:
            raise ValueError(
                f'{path}: has height and width {image.shape[:2]}, the first frame has {self.ori_shape}; all frames of '
                f'a video must have one size'
            )
        image = cv2.resize(image, self.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


class VideoSample(BaseDataElement):
    """Annotation of one video whose first frame's labels are propagated to all others.

    A pipeline's output is `{'inputs': {'frames': VideoFrames}, 'data_samples': VideoSample}`. Masks and (x, y) are in
    pixels of the original frames, not of the model's input.

    Fields:
        first_mask: objects of the first frame, with shape (H, W), uint8: 0 background, 1, 2, ... the objects, 255 void.
        first_joints: joints in the first frame, with shape (J, 2), float32.
        joints: those in all frames, with shape (T, J, 2), float32; the first row is `first_joints`.
        pred_masks: predicted masks, with shape (T, H, W), uint8; the first one is `first_mask`.
        pred_joints: predicted joints, with shape (T, J, 2), float; -1 where there is no prediction.

    Meta information:
        video_id: unique within the data set.
        ori_shape: (height, width) of the frames' files.
        img_shape: (height, width) of the frames in `inputs`.
        num_frames: T.
        frame_names: file names of the frames, without suffix.
        annotation_paths: files of the frames' masks, if there are masks.
    """
