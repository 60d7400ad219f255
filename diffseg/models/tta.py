"""Test-time augmentation of pixel classifiers."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor


@MODELS.register_module()
class VoteTTAModel(SegTTAModel):
    """Sum the votes of a `PixelClassifierHead` over all augmentations of an image.

    As over the members of the ensemble, the most frequent class is predicted, in a tie the smallest. mmseg's
    `SegTTAModel` would average the softmax of `seg_logits`: for numbers of votes, this is nearly the one-hot winner of
    each augmentation.

    Args:
        swapped_by_flip: pairs of classes that a horizontal flip exchanges, such as left and right eye.
        **kwargs: see `SegTTAModel`.
    """

    def __init__(self, swapped_by_flip: Sequence[tuple[int, int]] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.swapped_by_flip = swapped_by_flip

    def merge_preds(self, data_samples_list: Sequence[Sequence[SegDataSample]]) -> list[SegDataSample]:
        """One prediction for each image.

        Args:
            data_samples_list: for each image, the predictions of its augmentations, with votes `seg_logits` (n, H, W).

        Returns:
            Samples with the sums of votes as `seg_logits` and their argmax as `pred_sem_seg`.
        """
        for samples in data_samples_list:
            votes = torch.stack([self.votes(sample) for sample in samples]).sum(dim=0)  # (n, H, W)
            prediction = votes.argmax(dim=0, keepdim=True)
            samples[0].set_data({'seg_logits': PixelData(data=votes), 'pred_sem_seg': PixelData(data=prediction)})
        return [samples[0] for samples in data_samples_list]

    def votes(self, sample: SegDataSample) -> Tensor:
        """Votes (n, H, W) for the classes of the image before the flip."""
        votes = sample.seg_logits.data
        if sample.get('flip') and sample.flip_direction == 'horizontal':
            order = torch.arange(len(votes), device=votes.device)
            for first, second in self.swapped_by_flip:
                order[first], order[second] = second, first
            votes = votes[order]
        return votes
