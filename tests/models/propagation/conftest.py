from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def drawn_mask() -> Callable[[int, int], Tensor]:
    """`drawn_mask(height, width)` has two discs, 1 and 2, on background 0."""

    def draw(height: int, width: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[(y - height / 2) ** 2 + (x - width / 4) ** 2 < (height / 4) ** 2] = 1
        mask[(y - height / 3) ** 2 + (x - width / 1.5) ** 2 < (height / 5) ** 2] = 2
        return mask

    return draw
