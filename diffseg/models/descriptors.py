"""Encoder of images to descriptors, for models that match them."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModel
from mmseg.registry import MODELS
from torch import Tensor


class DescriptorEncoder(BaseModel):
    """Backbone, neck and head that map an image to descriptors.

    ```text
    images (B, 3, H, W) -> backbone -> maps -> neck -> one map (B, C, h, w) -> head -> descriptors (B, C', h, w)
    ```

    Args:
        backbone: config of any backbone whose images are in [-1, 1], RGB.
        neck: config of a neck with one level, such as `AggregationNeck` or `ConcatNeck`. Not needed for a backbone with
            one map.
        head: config of a `DescriptorHead`.
        data_preprocessor: config.
        init_cfg: see mmengine's `BaseModule`.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.neck = None if neck is None else MODELS.build(neck)
        self.head = MODELS.build(head or {'type': 'DescriptorHead'})

    def encode(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Descriptors of images.

        Args:
            images: with shape (B, 3, H, W), in [-1, 1].
            prompts: of each image; None uses that of the backbone.

        Returns:
            Shape (B, C', h, w).

        Raises:
            ValueError: the number of maps is not one.
        """
        return self.describe(self.backbone(images) if prompts is None else self.backbone(images, prompts))

    def describe(self, maps: Sequence[Tensor]) -> Tensor:
        """The second half of `encode`: descriptors (B, C', h, w) from the backbone's maps (B, C, h, w)."""
        if self.neck is not None:
            maps = self.neck(maps)
        if len(maps) != 1:
            raise ValueError(
                f'the {"backbone" if self.neck is None else "neck"} returns {len(maps)} maps, but matching takes one; '
                f"join them with a neck, such as dict(type='ConcatNeck', levels=[[...]], output_sizes=[64])"
            )
        return self.head(maps[0])
