"""Train loops."""

from itertools import groupby
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop
from mmseg.registry import LOOPS
from torch import Tensor

from diffseg.models.decode_heads.pixel_classifier import PixelClassifierHead, member_losses
from diffseg.models.decode_heads.pixels import LabelledPixels, Resize


@LOOPS.register_module()
class PixelClassifierLoop(EpochBasedTrainLoop):
    """Train a `PixelClassifierHead` as published: on the pixels of all training pictures, each in each epoch.

    Backbone and neck run once over the data loader, in evaluation mode. Their maps are stored at their original
    resolution and interpolated only at the pixels of a mini-batch. In an epoch every member sees all labelled pixels,
    each in another order; a member stops early when `patience` mini-batches have passed without a smaller mini-batch
    loss. Training ends when all members have stopped.

    The order depends on the seed, the epoch and the member, and the state of early stopping is saved with the head. So
    a run that is resumed from a checkpoint, also within an epoch, gives the same result as an uninterrupted one.

    Hooks and validation see epochs and iterations over pixels; any optimizer can be used (published: Adam at 1e-3).
    Training runs in a single process.

    Args:
        runner: the runner.
        dataloader: training pictures, in a fixed order and without augmentation, all of one size.
        max_epochs: epochs over the pixels.
        patient_epochs: epochs before early stopping takes effect.
        patience: mini-batches without improvement before a member stops.
        dtype: of the stored maps.
        **kwargs: see `EpochBasedTrainLoop`.

    Raises:
        ValueError: the head is not a `PixelClassifierHead`, other parts are trainable, the sampler is infinite, or the
            training is distributed.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_epochs: int = 100,
        patient_epochs: int = 4,
        patience: int = 50,
        dtype: str = 'float16',
        **kwargs: Any,
    ) -> None:
        super().__init__(runner, dataloader, max_epochs, **kwargs)
        self.patient_epochs = patient_epochs
        self.patience = patience
        self.dtype = getattr(torch, dtype)

    def run(self) -> torch.nn.Module:
        """Extract all maps, then train."""
        self.check()
        maps, resize, labels = self.extract()
        head = self.head
        self.data = LabelledPixels(maps, labels, head.num_classes, head.ignore_index, resize)
        self.epoch_length = len(self.data) // head.num_pixels
        if not self.epoch_length:
            raise ValueError(f'{len(self.data)} labelled pixels are fewer than a mini-batch of {head.num_pixels}')
        self._max_iters = self._max_epochs * self.epoch_length
        self.runner.logger.info(
            f'{len(self.data)} labelled pixels of {len(labels)} pictures, {self.epoch_length} iterations an epoch; '
            f'maps take {sum(x.nbytes for x in maps) / 1e9:.2f} GB'
        )
        if head.early_stop.stopped.all():
            self._max_epochs, self._max_iters = self._epoch, self._iter
        return super().run()

    def check(self) -> None:
        """Check that this loop can train the model; not in `__init__`, since a loop is also built for tests."""
        if is_model_wrapper(self.runner.model):
            raise ValueError('PixelClassifierLoop trains in one process; start it without a launcher')
        self.head = self.runner.model.decode_head
        if not isinstance(self.head, PixelClassifierHead):
            raise ValueError(
                f'PixelClassifierLoop trains a PixelClassifierHead, not {type(self.head).__name__}; use '
                'IterBasedTrainLoop'
            )
        trained = [name for name, parameter in self.runner.model.named_parameters() if parameter.requires_grad]
        if others := [name for name in trained if not name.startswith('decode_head.')]:
            raise ValueError(
                f'PixelClassifierLoop trains the head alone, but {len(others)} other parameters would be trained, such '
                f'as {others[0]}; freeze them, use ConcatNeck or no neck, or IterBasedTrainLoop'
            )
        if isinstance(self.dataloader.sampler, InfiniteSampler):
            raise ValueError("InfiniteSampler has no end; use sampler=dict(type='DefaultSampler', shuffle=False)")

    @torch.no_grad()
    def extract(self) -> tuple[list[Tensor], list[Resize], Tensor]:
        """Maps of all training pictures, channels last (B, h, w, C), their `resize`, and labels (B, H, W).

        Consecutive maps of one size and `resize` are concatenated.

        Raises:
            ValueError: pictures have different sizes, or maps overflow the dtype.
        """
        model = self.runner.model.eval()
        batches = []
        for batch in self.dataloader:
            data = model.data_preprocessor(batch, training=True)
            maps = self.head.select(model.extract_feat(data['inputs']))
            labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data['data_samples']])
            runs = [
                (mode, torch.cat([x for x, _ in run], dim=1))
                for (_, mode), run in groupby(
                    zip(maps, self.head.resize, strict=True), lambda pair: (pair[0].shape[2:], pair[1])
                )
            ]
            resize = [mode for mode, _ in runs]
            batches.append([labels, *(x.permute(0, 2, 3, 1).to(self.dtype) for _, x in runs)])
        columns = list(zip(*batches, strict=True))
        sizes = [{tuple(x.shape[1:3]) for x in column} for column in columns]
        if any(len(distinct) > 1 for distinct in sizes):
            raise ValueError(f'labels or maps have several sizes (height, width): {sizes}; resize in the pipeline')
        labels, *maps = (torch.cat(column) for column in columns)
        if not all(x.isfinite().all() for x in maps):
            raise ValueError(f"maps overflow {self.dtype}; use dtype='bfloat16' or 'float32'")
        return maps, resize, labels

    def run_epoch(self) -> None:
        """One epoch over the pixels, or the rest of it after resuming."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        order = self.data.permutations(
            self.runner.seed, self._epoch, self.head.ensemble.members, self.head.num_pixels
        )  # (iterations, P, N)
        for index in range(self._iter - self._epoch * self.epoch_length, self.epoch_length):
            self.run_iter(index, order[index])
            if self.head.early_stop.stopped.all():
                self._max_epochs, self._max_iters = self._epoch + 1, self._iter
                break
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Tensor) -> None:
        """One mini-batch.

        Args:
            idx: its number in the epoch.
            data_batch: pixels of each member, shape (P, N).
        """
        runner, stopped = self.runner, self.head.early_stop.stopped
        runner.call_hook('before_train_iter', batch_idx=idx, data_batch=data_batch)
        features, labels = self.data.sample(data_batch)
        with self.head.ensemble.holding(stopped):
            with runner.optim_wrapper.optim_context(runner.model):
                losses = member_losses(self.head.ensemble(features), labels)  # (N,)
            runner.optim_wrapper.update_params(losses[~stopped].sum())
        outputs = {'loss': losses.detach()[~stopped].mean(), 'members': (~stopped).sum()}
        if self._epoch >= self.patient_epochs:
            self.head.early_stop.update(losses.detach(), self.patience)
        runner.call_hook('after_train_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1
