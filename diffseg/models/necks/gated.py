"""Mixing of layers and timesteps by weights that depend on the position: from each activation alone, or in order."""

from collections.abc import Sequence

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffseg.geometry import resize

from .aggregation import AggregationNeck, LevelAggregation
from .levels import Size

MOMENTUM = 0.1  # of the average of mixing weights over training


class Gate(nn.Conv2d):
    """The logit of a projected activation at every position; zero until it is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 1, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, P, h, w) -> the same, and logits (B, T, h, w)."""
        return y, super().forward(y.flatten(0, 1)).squeeze(1).unflatten(0, y.shape[:2])


class RecurrentGate(nn.Module):
    """Logits of the projected timesteps of a layer, from the states of a GRU along them at every position.

    P channels are reduced to P / 4, and the GRU runs both ways with P / 8 each. Logits are zero until it is trained.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 4
        self.reduction = nn.Conv2d(channels, width, 1)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.logit = Gate(width)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, P, h, w) -> this followed by the states, (B, T, P + P/4, h, w), and logits (B, T, h, w)."""
        reduced = self.reduction(y.flatten(0, 1)).unflatten(0, y.shape[:2])  # (B, T, P/4, h, w)
        sequences = reduced.permute(0, 3, 4, 1, 2)  # (B, h, w, T, P/4)
        states, _ = self.gru(sequences.flatten(0, 2))  # (B*h*w, T, P/4)
        states, logit = self.logit(states.view(sequences.shape).permute(0, 3, 4, 1, 2))
        return torch.cat([y, states], dim=2), logit


class GatedLevel(LevelAggregation):
    """One level whose softmax over timesteps and layers is computed at every position.

    The logit of a pair is its mixing weight, as in `LevelAggregation`, plus the output of the layer's gate.

    Attributes:
        mean_weights: mixing weights (T, L), averaged over positions, images and the latest iterations of training.
    """

    def __init__(
        self,
        channels: Sequence[int],
        timesteps: Sequence[int],
        kept: Sequence[Sequence[int]],
        out_channels: int,
        num_groups: int,
    ) -> None:
        super().__init__(channels, timesteps, kept, out_channels, num_groups)
        self.add_gates(out_channels)
        self.register_buffer('mean_weights', self.weights().detach())

    def add_gates(self, out_channels: int) -> None:
        """Add what `gate` needs, for projections of P channels."""
        self.gates = nn.ModuleList(Gate(out_channels) for _ in self.kept)

    def gate(self, layer: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (B, T, P, h, w) of a layer -> the values to mix, and logits (B, T, h, w)."""
        return self.gates[layer](y)

    def average_weights(self) -> Tensor:
        """Mixing weights (T, L), averaged over positions, images and the latest iterations of training."""
        return self.mean_weights

    def forward(self, maps: Sequence[Tensor], size: Size, resize_first: bool) -> Tensor:
        """Mix; see `LevelAggregation.forward`. All projections are resized, since weights differ between positions."""
        bias = self.spread(self.mixing_weights)  # (T, L)
        values, logits = [], []
        for layer, y in enumerate(self.project(maps, size, resize_first)):
            y, logit = self.gate(layer, y)
            kept = self.get_buffer(f'kept{layer}')
            values.append(resize(y.flatten(0, 1), size).unflatten(0, y.shape[:2]))
            logits.append(resize(logit, size) + bias[:, layer].index_select(0, kept)[:, None, None])
        weights = torch.cat(logits, dim=1).softmax(1)  # (B, all pairs, H, W)
        parts = weights.split([len(steps) for steps in self.kept], dim=1)
        if self.training:
            self._average(parts)
        return sum(torch.einsum('bthw,btphw->bphw', w.to(y.dtype), y) for w, y in zip(parts, values, strict=True))

    @torch.no_grad()
    def _average(self, parts: Sequence[Tensor]) -> None:
        """Let the weights (B, T, H, W) of each layer take part in `mean_weights`."""
        current = torch.zeros_like(self.mean_weights)
        for layer, w in enumerate(parts):
            current[:, layer].index_copy_(0, self.get_buffer(f'kept{layer}'), w.mean((0, 2, 3)).to(current.dtype))
        self.mean_weights.lerp_(current, MOMENTUM)


class OrderedLevel(GatedLevel):
    """One level that reads the timesteps of each layer in their order, by a `RecurrentGate` that all layers share.

    The states of the gate are mixed as the projections are, and added to them by a 1 x 1 convolution.
    """

    def add_gates(self, out_channels: int) -> None:
        """Add the gate and the convolution, which begins with zeros."""
        self.recurrent_gate = RecurrentGate(out_channels)
        self.correction = nn.Conv2d(out_channels // 4, out_channels, 1, bias=False)
        nn.init.zeros_(self.correction.weight)

    def gate(self, layer: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (B, T, P, h, w) of a layer -> these and the states of the gate, and logits (B, T, h, w)."""
        return self.recurrent_gate(y)

    def forward(self, maps: Sequence[Tensor], size: Size, resize_first: bool) -> Tensor:
        """Mix and correct; see `GatedLevel.forward`."""
        mixed = super().forward(maps, size, resize_first)  # (B, P + P/4, H, W)
        channels = self.correction.out_channels
        return mixed[:, :channels] + self.correction(mixed[:, channels:])


@MODELS.register_module()
class GatedAggregationNeck(AggregationNeck):
    """`AggregationNeck` whose mixing weights depend on the position.

    Every projection has a logit at each position, from a 1 x 1 convolution for its layer, that is added to the mixing
    weight of its (timestep, layer) pair before the softmax. Convolutions begin with zeros, so that the neck begins as
    an `AggregationNeck`, whose state dicts can be loaded with `strict=False`.

    Unlike there, all T * L projections are held at the size of the level at once.

    `mixing_weights()` are averages over the positions of the pictures that it was last trained on.

    Args:
        *args: see `AggregationNeck`.
        **kwargs: see `AggregationNeck`.
    """

    level_class = GatedLevel


@MODELS.register_module()
class OrderedAggregationNeck(AggregationNeck):
    """`AggregationNeck` that reads the timesteps of a layer in their order.

    At every position a small recurrent network (GRU, arXiv 1406.1078) runs along the projected timesteps of each layer,
    both ways. Its states give the logits of the softmax over all pairs, as in `GatedAggregationNeck`, and, mixed with
    the same weights, a correction of the result, so that what changes from one timestep to the next can be expressed.
    Both begin with zero, so that the neck begins as an `AggregationNeck`. The layers of a level share the network.

    `mixing_weights()` are averages as in `GatedAggregationNeck`; they do not show the correction.

    Args:
        *args: see `AggregationNeck`.
        **kwargs: see `AggregationNeck`.
    """

    level_class = OrderedLevel
