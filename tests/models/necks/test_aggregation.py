"""Tests for diffseg.models.necks.aggregation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner.checkpoint import load_state_dict
from mmseg.registry import MODELS
from safetensors.torch import load_file
from torch import nn

from diffseg.models.necks import AggregationNeck, ConcatNeck

DHF_DIMS = [48] * 6 + [32] * 3 + [16] * 3


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def small_neck(**options) -> AggregationNeck:
    """Two levels, two timesteps; the second layer's shortcut is the identity."""
    return AggregationNeck([[3, 16], [5]], timesteps=2, out_channels=16, num_groups=2, **options)


def small_maps() -> list[torch.Tensor]:
    return [torch.randn(2, 6, 6, 10), torch.randn(2, 32, 3, 5), torch.randn(2, 10, 3, 5)]


@pytest.mark.parametrize('resize', ['after', 'before'])
@pytest.mark.parametrize('strictly', [nn.Module.load_state_dict, load_state_dict], ids=['torch', 'mmengine'])
def test_dhf_checkpoint_loads_as_it_is_and_agrees(
    reference: Callable[[str], Path], resize: str, strictly: Callable
) -> None:
    folder = reference('hyperfeatures')
    expected = load_file(folder / 'expected.safetensors')
    neck = AggregationNeck([DHF_DIMS], timesteps=11, out_channels=32, num_groups=8, resize=resize)
    strictly(neck, load_file(folder / 'aggregation_network.safetensors'), strict=True)
    features = expected['inversion'].split(DHF_DIMS, dim=2)  # of (B, S, sum of dims, h, w)
    with torch.no_grad():
        (ours,) = neck([x.flatten(1, 2) for x in features])
    assert relative_error(ours, expected['hyperfeature']) < 1e-5


def test_dhf_checkpoint_loads_as_a_child(reference: Callable[[str], Path]) -> None:
    published = load_file(reference('hyperfeatures') / 'aggregation_network.safetensors')
    model = nn.ModuleDict({'neck': AggregationNeck([DHF_DIMS], timesteps=11, out_channels=32, num_groups=8)})
    model.load_state_dict({f'neck.{key}': value for key, value in published.items()}, strict=True)
    assert torch.equal(model['neck'].levels[0].mixing_weights, published['mixing_weights'])


def test_resize_before_is_the_bottleneck_of_the_resized_map():
    neck, maps = small_neck(resize='before'), small_maps()
    resized = [F.interpolate(x, (6, 10), mode='bilinear') for x in maps[:2]] + maps[2:]
    for ours, theirs in zip(neck(maps), neck(resized), strict=True):
        assert torch.equal(ours, theirs)


def test_output_is_the_weighted_sum_of_resized_projections():
    neck, maps = small_neck(), small_maps()
    nn.init.normal_(neck.levels[0].mixing_weights)
    weights = neck.levels[0].mixing_weights.softmax(0)
    expected = 0
    for timestep in range(2):
        for layer, channels in enumerate((3, 16)):
            x = maps[layer][:, timestep * channels : (timestep + 1) * channels]
            y = F.interpolate(neck.levels[0].bottleneck_layers[layer](x), (6, 10), mode='bilinear')
            expected = expected + weights[timestep * 2 + layer] * y
    assert relative_error(neck(maps)[0], expected) < 1e-6


def test_levels_go_fine_to_coarse():
    neck = MODELS.build({'type': 'AggregationNeck', 'levels': [[3], [4]], 'timesteps': 1, 'out_channels': 128})
    fine, coarse = torch.randn(1, 3, 8, 4), torch.randn(1, 4, 4, 2)
    assert [tuple(x.shape) for x in neck([fine, coarse])] == [(1, 128, 8, 4), (1, 128, 4, 2)]
    with pytest.raises(ValueError, match=r'from fine to coarse.*\(4, 2\), \(8, 4\)'):
        neck([F.avg_pool2d(fine, 2), coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)])


def test_output_sizes():
    assert [tuple(x.shape[-2:]) for x in small_neck(output_sizes=[12, (4, 3)])(small_maps())] == [(12, 12), (4, 3)]


def test_enlarge():
    assert [tuple(x.shape[-2:]) for x in small_neck(enlarge=[2, 1])(small_maps())] == [(12, 20), (3, 5)]


def test_every_parameter_moves_in_one_step():
    neck = small_neck()
    before = {name: parameter.detach().clone() for name, parameter in neck.named_parameters()}
    sum(x.square().mean() for x in neck(small_maps())).backward()
    torch.optim.SGD(neck.parameters(), lr=1.0).step()
    assert [name for name, parameter in neck.named_parameters() if torch.equal(parameter, before[name])] == []


def test_init_weights_keeps_the_initialisation():
    neck = small_neck()
    before = {key: value.clone() for key, value in neck.state_dict().items()}
    neck.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in neck.state_dict().items())
    assert all(bottleneck[0].conv3.norm.weight.eq(1).all() for bottleneck in neck.levels[0].bottleneck_layers)


def test_state_dict_round_trip():
    source, target = small_neck(), small_neck()
    target.load_state_dict(source.state_dict(), strict=True)
    maps = small_maps()
    assert all(torch.equal(a, b) for a, b in zip(source(maps), target(maps), strict=True))


def test_mixing_weights_are_a_labelled_table():
    neck = small_neck(layer_names=[['a', 'layer-b'], ['c']], timestep_names=[50, 261])
    neck.levels[0].mixing_weights.data = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    first, second = neck.mixing_weights()
    assert first.timesteps == second.timesteps == ('50', '261') and first.layers == ('a', 'layer-b')
    torch.testing.assert_close(first.weights, torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    assert str(first).splitlines() == [
        '             50     261',
        'a        0.1000  0.3000',
        'layer-b  0.2000  0.4000',
    ]


def test_result_does_not_depend_on_the_batch():
    neck, maps = small_neck(), small_maps()
    for together, alone in zip(neck(maps), neck([x[1:] for x in maps]), strict=True):
        assert relative_error(together[1:], alone) < 1e-6


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'out_channels': 24, 'num_groups': 4}, r'multiple of 4 \* num_groups = 16'),
        ({'resize': 'never'}, "'never'"),
        ({'layer_names': [['a']]}, 'must name every layer'),
        ({'timestep_names': [50]}, 'must name 2 timesteps'),
        ({'output_sizes': [64]}, 'one size per level'),
        ({'enlarge': [2]}, 'a factor for each of 2 levels'),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AggregationNeck(**{'levels': [[3, 16], [5]], 'timesteps': 2, 'out_channels': 16, 'num_groups': 2, **options})


def test_both_necks_refuse_the_same_inputs():
    for neck in (small_neck(), ConcatNeck([[3, 16], [5]], timesteps=2)):
        with pytest.raises(ValueError, match='map 2 has 8 channels'):
            neck([*small_maps()[:2], torch.randn(2, 8, 3, 5)])


def test_layers_may_have_different_numbers_of_timesteps():
    neck = AggregationNeck([[3, 16], [5]], timesteps=[[3, 1], [2]], out_channels=16, num_groups=2)
    maps = [torch.randn(2, 3 * 3, 8, 8), torch.randn(2, 16, 8, 8), torch.randn(2, 2 * 5, 4, 4)]
    level, coarse = neck.levels
    with torch.no_grad():
        level.mixing_weights.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        fine, _ = neck(maps)
        w = torch.tensor([0.0, 1.0, 2.0, 3.0]).softmax(0)  # of (step 0, layer 0), (step 0, layer 1), (1, 0), (2, 0)
        first, second = level.bottleneck_layers
        steps = [first(x) for x in maps[0].chunk(3, dim=1)]
        torch.testing.assert_close(fine, w[0] * steps[0] + w[1] * second(maps[1]) + w[2] * steps[1] + w[3] * steps[2])
    tables = neck.mixing_weights()
    torch.testing.assert_close(tables[0].weights, torch.tensor([[w[0], w[1]], [w[2], 0], [w[3], 0]]))
    assert [table.timesteps for table in tables] == [('step 0', 'step 1', 'step 2'), ('step 0', 'step 1')]
    sum(x.square().sum() for x in neck(maps)).backward()
    assert level.mixing_weights.grad.all() and coarse.mixing_weights.grad.all()


@pytest.mark.parametrize('timesteps', [[[3, 1]], [[3], [2]], [[3, 1], [2, 2]]])
def test_timesteps_that_are_nested_otherwise(timesteps: list[list[int]]):
    with pytest.raises(ValueError, match='one for every layer of levels='):
        AggregationNeck([[3, 16], [5]], timesteps=timesteps, out_channels=16, num_groups=2)


def test_pairs_that_are_not_kept_are_as_if_they_had_no_weight():
    full = AggregationNeck([[3, 16], [5]], timesteps=3, out_channels=16, num_groups=2)
    kept = [[[0, 2], [1]], [[1, 2]]]
    pruned = AggregationNeck([[3, 16], [5]], timesteps=3, out_channels=16, num_groups=2, kept=kept)
    maps = [torch.randn(2, 9, 6, 10), torch.randn(2, 48, 3, 5), torch.randn(2, 15, 3, 5)]
    state = full.state_dict()
    for level, rows in enumerate(([0, 3, 4], [1, 2])):  # s*L + l
        logits = state[f'levels.{level}.mixing_weights']
        logits.fill_(-torch.inf)
        logits[rows] = torch.randn(len(rows))
        full.levels[level].mixing_weights.data.copy_(logits)
        state[f'levels.{level}.mixing_weights'] = logits[rows]
    pruned.load_state_dict(state, strict=True)
    for ours, theirs in zip(pruned(maps), full(maps), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(pruned.mixing_weights(), full.mixing_weights(), strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights)
    runs = []
    pruned.levels[0].bottleneck_layers[1].register_forward_hook(lambda module, args, y: runs.append(len(y)))
    pruned(maps)
    assert runs == [2]  # one timestep of two images


@pytest.mark.parametrize('kept', [[[[0], []], [[1]]], [[[0], [2]], [[1]]], [[[1, 0], [0]], [[1]]], [[[0]], [[1]]]])
def test_kept_pairs_that_do_not_exist(kept: list):
    with pytest.raises(ValueError, match='kept'):
        small_neck(kept=kept)
