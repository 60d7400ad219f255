"""Tests for diffseg.models.backbones.frozen."""

import torch
from torch import nn

from diffseg.models.backbones.frozen import freeze, reached


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 2, 1, bias=False)))


def test_frozen_tensors_are_no_parameters_and_not_saved():
    network = make_network().eval()
    x = torch.randn(1, 3, 5, 5)
    before = network(x)
    freeze(network)
    assert torch.equal(network(x), before)
    assert not list(network.parameters()) and not network.state_dict()
    network.load_state_dict(network.state_dict(), strict=True)


def test_frozen_tensors_follow_the_module():
    network = make_network()
    freeze(network)
    network.to(torch.float64)
    assert {buffer.dtype for name, buffer in network.named_buffers() if 'num_batches' not in name} == {torch.float64}


def test_chosen_parameters_stay():
    network = make_network()
    kept = network[2][0].weight
    freeze(network, trainable={'2.0.weight', '0.bias'})
    assert [name for name, _ in network.named_parameters()] == list(network.state_dict()) == ['0.bias', '2.0.weight']
    assert network[2][0].weight is kept


def test_gradients_pass_through_frozen_layers():
    network = make_network()
    freeze(network, trainable={'0.bias'})
    network(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert network[0].bias.grad.abs().sum() > 0


def test_reached_leaves_are_those_with_a_gradient():
    first, second, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    outputs = [first * 2, (first * second).sum() + unused.detach().sum(), torch.ones(1)]
    assert reached(outputs) == {first, second}
