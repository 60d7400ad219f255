"""Captions for the backbone: rows in a fourth image channel, which survives padding, cropping and flipping."""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor


def append_rows(images: Tensor, rows: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) with one more channel, which is constant: the row of each image's caption."""
    channel = images.new_tensor(rows).view(-1, 1, 1, 1).expand(-1, 1, *images.shape[-2:])
    return torch.cat([images, channel], dim=1)


def split_rows(images: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Invert `append_rows`.

    Args:
        images: shape (B, 4, H, W).
        count: number of captions.

    Returns:
        Images with shape (B, 3, H, W), and their rows.

    Raises:
        ValueError: the channel is missing, its dtype cannot represent rows, or its values are not rows.
    """
    if images.ndim != 4 or images.shape[1] != 4:
        raise ValueError(
            f'images have shape {tuple(images.shape)}; captions need (B, 4, H, W), the last channel made by the data '
            f'preprocessor CaptionPreProcessor'
        )
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f'images are {images.dtype}, which cannot represent the rows of captions; keep them in float32'
        )
    low, high = torch.stack(images[:, 3].flatten(1).aminmax(dim=1)).tolist()
    if low != high or not all(row.is_integer() and 0 <= row < count for row in low):
        raise ValueError(
            f'the fourth channel of images has values {low} to {high}; expected is, in each image, one of the rows '
            f'0 to {count - 1} of the captions. Do the backbone and LoadCaption name the same file?'
        )
    return images[:, :3], [int(row) for row in low]


@MODELS.register_module()
class CaptionPreProcessor(SegDataPreProcessor):
    """`SegDataPreProcessor` that appends the row of each image's caption as a fourth channel.

    The pipeline must end with `LoadCaption`, and the backbone have `prompt=dict(type='captions', file=...)` with the
    same file.
    """

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Preprocess as `SegDataPreProcessor`, and append the channel.

        Raises:
            ValueError: a sample has no `caption_row`.
        """
        data = super().forward(data, training)
        samples = data.get('data_samples') or []
        rows = [sample.get('caption_row') for sample in samples]
        if len(rows) != len(data['inputs']) or None in rows:
            raise ValueError(
                f'{len(data["inputs"])} images have captions in rows {rows}; end the pipeline with LoadCaption'
            )
        return {**data, 'inputs': append_rows(data['inputs'], rows)}
