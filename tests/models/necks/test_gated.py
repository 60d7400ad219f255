"""Tests for diffseg.models.necks.gated: mixing weights that depend on the position."""

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from diffseg.models.necks import AggregationNeck, GatedAggregationNeck, OrderedAggregationNeck

OPTIONS = {'levels': [[3, 16], [5]], 'timesteps': 3, 'out_channels': 16, 'num_groups': 2}
KEPT = [[[0, 2], [1]], [[0, 1, 2]]]
GATED = pytest.mark.parametrize('kind', [GatedAggregationNeck, OrderedAggregationNeck])


def make_maps() -> list[torch.Tensor]:
    return [torch.randn(2, 9, 6, 10), torch.randn(2, 48, 3, 5), torch.randn(2, 15, 3, 5)]


def randomize(neck: nn.Module) -> nn.Module:
    """Replace the zeros that gates begin with."""
    for name, parameter in neck.named_parameters():
        if 'gate' in name or 'correction' in name:
            nn.init.normal_(parameter)
    return neck


def reversed_in_time(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.unflatten(1, (3, -1)).flip(1).flatten(1, 2) for x in maps]


def difference(first: tuple, second: tuple) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


@GATED
@pytest.mark.parametrize('options', [{}, {'kept': KEPT, 'resize': 'before', 'output_sizes': [8, 4]}])
def test_begins_as_the_aggregation_neck_whose_weights_it_loads(kind, options):
    plain = AggregationNeck(**OPTIONS, **options)
    for level in plain.levels:
        nn.init.normal_(level.mixing_weights)
    neck = kind(**OPTIONS, **options)
    missing, unexpected = neck.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and not any('bottleneck' in name or name.endswith('mixing_weights') for name in missing)
    maps = make_maps()
    for ours, theirs in zip(neck(maps), plain(maps), strict=True):
        torch.testing.assert_close(ours, theirs)
    randomize(neck)
    assert difference(neck(maps), plain(maps)) > 0.01


def test_output_is_the_sum_weighted_by_the_softmax_at_every_position():
    neck, maps = randomize(GatedAggregationNeck(**OPTIONS)).eval(), make_maps()
    level = neck.levels[1]
    nn.init.normal_(level.mixing_weights)
    values = torch.stack([level.bottleneck_layers[0](x) for x in maps[2].chunk(3, dim=1)], dim=1)  # (B, T, P, h, w)
    logits = torch.einsum('p,btphw->bthw', level.gates[0].weight.flatten(), values)
    weights = (logits + level.mixing_weights[:, None, None]).softmax(1)
    assert weights.std((0, 2, 3)).min() > 0.05
    torch.testing.assert_close(neck(maps)[1], (weights[:, :, None] * values).sum(1))


def test_only_the_ordered_neck_sees_the_order_of_timesteps():
    maps = make_maps()
    for kind in (AggregationNeck, GatedAggregationNeck):
        neck = randomize(kind(**OPTIONS))
        assert difference(neck(maps), neck(reversed_in_time(maps))) < 1e-5
    ordered = randomize(OrderedAggregationNeck(**OPTIONS))
    assert difference(ordered(maps), ordered(reversed_in_time(maps))) > 0.1
    for logit in (level.recurrent_gate.logit for level in ordered.levels):
        nn.init.zeros_(logit.weight)  # by its correction alone
    assert difference(ordered(maps), ordered(reversed_in_time(maps))) > 0.01


@GATED
def test_every_parameter_moves_in_two_steps_and_the_table_follows(kind):
    neck = MODELS.build({'type': kind.__name__, **OPTIONS, 'kept': KEPT})
    before = {name: tensor.clone() for name, tensor in neck.state_dict().items()}
    optimizer = torch.optim.SGD(neck.parameters(), lr=0.1)
    for _ in range(2):  # in the first, nothing behind the zeros has a gradient
        optimizer.zero_grad()
        sum(x.square().mean() for x in neck(make_maps())).backward()
        optimizer.step()
    assert [name for name, tensor in neck.state_dict().items() if torch.equal(tensor, before[name])] == []
    for table, level in zip(neck.mixing_weights(), neck.levels, strict=True):
        torch.testing.assert_close(table.weights.sum(), torch.tensor(1.0))
        assert (table.weights > 0).equal(level.mixed)
    neck.eval()(make_maps())
    assert torch.equal(neck.mixing_weights()[0].weights, table_of(neck))
    again = kind(**OPTIONS, kept=KEPT)
    again.load_state_dict(neck.state_dict(), strict=True)
    assert torch.equal(table_of(again), table_of(neck))


def table_of(neck: AggregationNeck) -> torch.Tensor:
    return neck.levels[0].mean_weights


@GATED
def test_table_is_the_average_over_positions(kind):
    neck = randomize(kind(**{**OPTIONS, 'levels': [[3]], 'timesteps': 2}))
    level, seen, x = neck.levels[0], [], torch.randn(1, 6, 2, 2)
    average = level._average
    level._average = lambda parts: (seen.append(parts), average(parts))
    with torch.no_grad():
        for _ in range(100):
            neck([x])
    expected = seen[0][0].mean((0, 2, 3))
    assert (expected - 0.5).abs().max() > 0.001
    torch.testing.assert_close(neck.mixing_weights()[0].weights[:, 0], expected, rtol=0, atol=1e-4)
