"""Several necks, one after another."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule, ModuleList
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class NeckSequence(BaseModule):
    """Apply necks one after another.

    A segmentor has one neck. With this it can combine `ConcatNeck`, which forms levels, with a neck of mmseg that takes
    one map per level, such as `FPN`.

    Args:
        necks: configs of the necks.
    """

    def __init__(self, necks: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.necks = ModuleList(MODELS.build(neck) for neck in necks)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Apply all necks to the backbone's maps."""
        for neck in self.necks:
            inputs = neck(inputs)
        return tuple(inputs)
