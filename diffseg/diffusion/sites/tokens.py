"""Where the tokens of the image lie among all tokens of a transformer."""

from typing import Literal

import torch
from torch import Tensor

# The tokens, in order. Where text comes first and is padded at the very end, it has another length in each row; where
# the image comes first, it is padded to a multiple of IMAGE_MULTIPLE.
TokenOrder = Literal['image', 'text-image', 'image-text', 'text-image-padding']
IMAGE_MULTIPLE = 32


def image_tokens(tokens: Tensor, order: TokenOrder, cells: int, text_lengths: Tensor | None = None) -> Tensor:
    """Take the tokens of the image out of all of them.

    Args:
        tokens: Shape (B, N, C).
        order: What they are.
        cells: Of the grid, h*w.
        text_lengths: Number of text tokens in each row, shape (B,), for 'text-image-padding'.

    Returns:
        A tensor with shape (B, h*w, C), a view where it can be.
    """
    if order == 'image':
        return tokens
    if order == 'text-image-padding':
        index, _ = key_positions(tokens, order, 'image', cells, text_lengths)
        return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
    start = tokens.shape[1] - cells if order == 'text-image' else 0
    return tokens[:, start : start + cells]


def key_positions(
    tokens: Tensor, order: TokenOrder, part: Literal['text', 'image'], cells: int, text_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Find the positions of text or image among all tokens.

    Args:
        tokens: Shape (B, N, C).
        order: What they are.
        part: Which of them are wanted.
        cells: Of the grid, h*w.
        text_lengths: Number of text tokens in each row, shape (B,), for 'text-image-padding'.

    Returns:
        Positions with shape (B, K), and which of them exist, with the same shape; None if all do.
    """
    rows, total, _ = tokens.shape
    start = {
        ('image', 'image'): 0,
        ('text-image', 'text'): 0,
        ('text-image', 'image'): total - cells,
        ('image-text', 'image'): 0,
        ('image-text', 'text'): -(-cells // IMAGE_MULTIPLE) * IMAGE_MULTIPLE,
        ('text-image-padding', 'text'): 0,
        ('text-image-padding', 'image'): 0,
    }[order, part]
    stop = start + cells if part == 'image' else total if order == 'image-text' else total - cells
    index = torch.arange(start, stop, device=tokens.device).expand(rows, -1)
    if order != 'text-image-padding':
        return index, None
    lengths = text_lengths[:, None]
    return (index + lengths, None) if part == 'image' else (index, index < lengths)
