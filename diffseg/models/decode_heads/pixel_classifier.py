"""The classifier of single pixels of DatasetDDPM (arXiv 2112.03126): small networks that vote."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .pixels import Resize, Size, sample_pixels, spread_resize, upsample


def vote(logits: Tensor) -> Tensor:
    """Number of votes of the members for each class; its argmax is the most frequent class, in a tie the smallest.

    Args:
        logits: shape (..., N, n) of N members and n classes.

    Returns:
        Integers with shape (..., n), in the dtype of `logits`.
    """
    votes = torch.zeros_like(logits[..., 0, :])
    classes = torch.arange(logits.shape[-1], device=logits.device)
    for choice in logits.argmax(dim=-1).unbind(-1):  # one-hot votes of all members take 2 N times the memory of votes
        votes += choice[..., None] == classes
    return votes


def js_uncertainty(logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the members' predictions: entropy of the mean minus mean of the entropies.

    Args:
        logits: shape (..., N, n) of N members and n classes.

    Returns:
        Nats with shape (...); 0 where all members agree.
    """
    probabilities = logits.softmax(dim=-1)
    mean = torch.special.entr(probabilities.mean(dim=-2)).sum(dim=-1)
    return mean - torch.special.entr(probabilities).sum(dim=-1).mean(dim=-1)


def most_uncertain(uncertainty: Tensor) -> Tensor:
    """Uncertainty of a picture: the mean over the most uncertain tenth of its pixels.

    Args:
        uncertainty: shape (B, H, W).

    Returns:
        Shape (B,).
    """
    flat = uncertainty.flatten(1)
    return flat.topk(max(1, flat.shape[1] // 10), dim=1).values.mean(dim=1)


class EnsembleLinear(nn.Module):
    """Linear layers of N members side by side, weights from N(0, 0.02), bias 0."""

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(members, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(members, 1, out_features))

    def forward(self, x: Tensor, members: slice = slice(None)) -> Tensor:
        """(P, N, in_features) -> (P, N, out_features), for the N members of a slice."""
        return torch.baddbmm(self.bias[members], x.transpose(0, 1), self.weight[members]).transpose(0, 1)


class EnsembleBatchNorm(nn.Module):
    """Batch norms of N members side by side, each over the pixels of its member."""

    def __init__(self, members: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, features))
        self.bias = nn.Parameter(torch.zeros(members, features))
        self.register_buffer('running_mean', torch.zeros(members, features))
        self.register_buffer('running_var', torch.ones(members, features))

    def forward(self, x: Tensor, members: slice = slice(None)) -> Tensor:
        """(P, N, features) -> (P, N, features), for the N members of a slice."""
        statistics = [t[members].flatten() for t in (self.running_mean, self.running_var, self.weight, self.bias)]
        return F.batch_norm(x.flatten(1), *statistics, training=self.training).view(x.shape)


class MLPEnsemble(nn.Module):
    """N networks of two hidden layers, trained in parallel as one; in every layer linear -> ReLU -> batch norm.

    Args:
        members: N.
        in_channels: features of a pixel.
        hidden: widths of the hidden layers.
        num_classes: n.
    """

    def __init__(self, members: int, in_channels: int, hidden: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.members = members
        self.linears = nn.ModuleList(
            EnsembleLinear(members, *widths) for widths in pairwise([in_channels, *hidden, num_classes])
        )
        self.norms = nn.ModuleList(EnsembleBatchNorm(members, width) for width in hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Features (P, N, in_channels) of the pixels of each member -> logits (P, N, n)."""
        return self.after_first(self.linears[0](x))

    def after_first(self, x: Tensor, members: slice = slice(None)) -> Tensor:
        """Outputs of the first linear layers (P, N, hidden[0]) -> logits (P, N, n), for the N members of a slice."""
        for norm, linear in zip(self.norms, self.linears[1:], strict=True):
            x = linear(norm(x.relu(), members), members)
        return x

    @contextmanager
    def holding(self, members: Tensor) -> Iterator[None]:
        """Restore the tensors of some members on exit, after an optimizer step.

        Args:
            members: shape (N,), bool.
        """
        tensors = [*self.parameters(), *self.buffers()] if members.any() else []
        kept = [tensor.detach()[members] for tensor in tensors]
        yield
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.detach()[members] = values


class EarlyStop(nn.Module):
    """State of early stopping of each member; saved with the weights, so that training can be resumed.

    Attributes:
        best: smallest mini-batch loss so far, shape (N,).
        stale: mini-batches since then, shape (N,), int64.
        stopped: shape (N,), bool.
    """

    def __init__(self, members: int) -> None:
        super().__init__()
        self.register_buffer('best', torch.full((members,), torch.inf))
        self.register_buffer('stale', torch.zeros(members, dtype=torch.long))
        self.register_buffer('stopped', torch.zeros(members, dtype=torch.bool))

    def update(self, losses: Tensor, patience: int) -> None:
        """Update with the losses (N,) of a mini-batch: a member stops after more than `patience` without a new best."""
        better = losses < self.best
        self.best = torch.where(better, losses, self.best)
        self.stale = torch.where(better, 0, self.stale + 1)
        self.stopped |= self.stale > patience


@MODELS.register_module()
class PixelClassifierHead(BaseDecodeHead):
    """Ensemble of small networks that classify pixels by the values of the maps there (DatasetDDPM, section 4).

    ```text
    maps (B, C_l, h_l, w_l) -> upsampled and concatenated, at the drawn pixels only -> N networks -> votes (B, n, H, W)
    ```

    In any train loop, every step draws `num_pixels` labelled pixels of the batch for each member, and `loss_ce` is the
    sum of the members' losses, so that the members are trained independently. `PixelClassifierLoop` trains as
    published: over the pixels of all training pictures, with early stopping of each member.

    Predictions are numbers of votes, whose argmax is the published prediction: the mode over members, in a tie the
    smallest class. They have no gradient. They are computed without upsampling the maps, since interpolation and the
    first linear layer commute.

    Args:
        in_channels: channels of every map, T*C for those of a backbone.
        num_classes: n.
        in_index: the maps to use; by default all.
        num_members: N.
        hidden: widths of the two hidden layers; as published by default, (128, 32) below 30 classes, else (256, 128).
        num_pixels: size of a member's mini-batch.
        output_size: side or (height, width) at which pixels are classified, 256 in the published tables; by default
            the size of the picture.
        resize: 'bilinear' upsamples each map directly, as DatasetDDPM does; 'nearest' first enlarges each to the size
            of the finest by repeating cells, as GDF does. Or one of them for each map: GDF takes the finest of each
            model, so that the only map of a model is not repeated.
        ignore_index: label of pixels that are not trained.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        in_index: Sequence[int] | None = None,
        num_members: int = 10,
        hidden: Sequence[int] | None = None,
        num_pixels: int = 64,
        output_size: int | Sequence[int] | None = None,
        resize: Resize | Sequence[Resize] = 'bilinear',
        ignore_index: int = 255,
    ) -> None:
        hidden = hidden or ((128, 32) if num_classes < 30 else (256, 128))
        super().__init__(
            list(in_channels),
            hidden[0],
            num_classes=num_classes,
            in_index=list(range(len(in_channels)) if in_index is None else in_index),
            input_transform='multiple_select',
            dropout_ratio=0,
            ignore_index=ignore_index,
            init_cfg=None,
        )
        del self.conv_seg
        self.num_pixels = num_pixels
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else output_size
        self.resize = spread_resize(resize, len(in_channels))
        self.ensemble = MLPEnsemble(num_members, sum(in_channels), hidden, num_classes)
        self.early_stop = EarlyStop(num_members)

    def select(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The maps that the head uses, with shapes (B, C, h, w).

        Raises:
            ValueError: their channels are not `in_channels`.
        """
        if len(inputs) <= max(self.in_index):
            raise ValueError(f'in_index={self.in_index} needs more maps than the {len(inputs)} of the input')
        maps = self._transform_inputs(inputs)
        if (channels := [x.shape[1] for x in maps]) != self.in_channels:
            raise ValueError(f'in_channels is {self.in_channels}, but the maps have {channels}')
        return maps

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: list, train_cfg: dict) -> dict[str, Tensor]:
        """Loss of randomly drawn pixels.

        Args:
            inputs: maps with shapes (B, C, h, w).
            batch_data_samples: B `SegDataSample`s with labels (1, H, W).
            train_cfg: not used.

        Returns:
            `loss_ce`, the sum over members of their cross-entropies, and `acc_seg` in percent.
        """
        labels = self._stack_batch_gt(batch_data_samples)[:, 0]  # (B, H, W)
        labelled = (labels != self.ignore_index).flatten().nonzero()[:, 0]
        if not len(labelled):
            return {'loss_ce': 0 * sum(parameter.sum() for parameter in self.ensemble.parameters())}
        drawn = torch.randint(len(labelled), (self.num_pixels, self.ensemble.members), device=labelled.device)
        pixels = labelled[drawn]  # (P, N)
        maps = [x.permute(0, 2, 3, 1) for x in self.select(inputs)]  # (B, h, w, C)
        logits = self.ensemble(sample_pixels(maps, pixels, labels.shape[1:], self.resize))  # (P, N, n)
        targets = labels.flatten()[pixels]
        correct = (logits.argmax(dim=-1) == targets).float()
        return {'loss_ce': member_losses(logits, targets).sum(), 'acc_seg': 100 * correct.mean()}

    def forward(self, inputs: Sequence[Tensor], size: Size | None = None) -> Tensor:
        """Votes of the members.

        Args:
            inputs: maps with shapes (B, C, h, w).
            size: (H, W), unless the head has an `output_size`; by default that of the largest map.

        Returns:
            Shape (B, n, H, W).
        """
        votes = sum(vote(logits[..., None, :]) for logits in self.member_logits(inputs, size))  # (B, H, W, n)
        return votes.permute(0, 3, 1, 2)

    def predict(self, inputs: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: dict) -> Tensor:
        """Votes at the size of the picture, repeated (nearest) if the head has another `output_size`.

        Args:
            inputs: maps with shapes (B, C, h, w).
            batch_img_metas: mmseg's description of the pictures.
            test_cfg: not used.

        Returns:
            Shape (B, n, H, W).
        """
        meta = batch_img_metas[0]
        sliding = isinstance(meta['img_shape'], torch.Size)  # mmseg then gives the shape of the crop
        size = meta['img_shape'] if sliding else meta.get('pad_shape', meta['img_shape'])[:2]
        votes = self.forward(inputs, tuple(size))
        return votes if votes.shape[2:] == tuple(size) else F.interpolate(votes, tuple(size), mode='nearest')

    def uncertainty(self, inputs: Sequence[Tensor], size: Size | None = None) -> Tensor:
        """Disagreement of the members on each picture: `most_uncertain` of `js_uncertainty`, shape (B,)."""
        return most_uncertain(js_uncertainty(self.pixel_logits(inputs, size)))

    def pixel_logits(self, inputs: Sequence[Tensor], size: Size | None = None) -> Tensor:
        """Logits of all members at every pixel.

        Args:
            inputs: maps with shapes (B, C, h, w).
            size: (H, W), unless the head has an `output_size`; by default that of the largest map.

        Returns:
            Shape (B, H, W, N, n).
        """
        return torch.stack(list(self.member_logits(inputs, size)), dim=-2)

    def member_logits(self, inputs: Sequence[Tensor], size: Size | None = None) -> Iterator[Tensor]:
        """Logits (B, H, W, n) of one member after the other, with the arguments of `pixel_logits`.

        So memory holds one hidden layer at full size, and one member's logits if each is consumed at once.
        """
        maps = self.select(inputs)
        finest = tuple(max(x.shape[dim] for x in maps) for dim in (2, 3))
        size = self.output_size or size or finest
        first = self.ensemble.linears[0]
        sums: dict[tuple[Size, Resize], Tensor | float] = defaultdict(float)
        for x, weight, resize in zip(maps, first.weight.split(self.in_channels, dim=1), self.resize, strict=True):
            sums[x.shape[2:], resize] += torch.einsum('bchw,nco->bnohw', x, weight)
        for member in range(self.ensemble.members):
            hidden = sum(upsample(x[:, member], size, finest, mode) for (_, mode), x in sums.items())  # (B, o, H, W)
            hidden = hidden.permute(0, 2, 3, 1).flatten(0, 2) + first.bias[member]  # (B*H*W, o)
            logits = self.ensemble.after_first(hidden[:, None], slice(member, member + 1))  # (B*H*W, 1, n)
            yield logits[:, 0].unflatten(0, (-1, *size))


def member_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each member.

    Args:
        logits: shape (P, N, n) of P pixels, N members and n classes.
        labels: shape (P, N).

    Returns:
        Means over the pixels, shape (N,).
    """
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='none').view(labels.shape).mean(dim=0)
