"""Counted costs are those of a real extraction."""

import pytest
import torch

from diffseg.benchmarking import executed
from diffseg.costs import SETTINGS, Setting, build, cost
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import sites


@pytest.mark.parametrize('ensemble', [1, 3])
def test_operations_and_values_are_those_of_an_extraction(tiny_pipeline, ensemble):
    setting = Setting(tiny_pipeline, 64, ('dift-1', 'up-level2-repeat0-res-out'), (50, 261), ensemble)
    extractor, one = build(setting), cost(setting)
    image = torch.zeros(1, 3, 64, 64)
    activations = extractor(image)
    assert one.values == sum(x.numel() for x in activations.values())
    assert {x.shape[1] for x in activations.values()} == {2}
    assert one.flop == executed(lambda: extractor(image))


def test_a_tiny_vae_costs_less_and_stores_the_same(tiny_pipeline, tiny_taesd):
    setting = Setting(tiny_pipeline, 64, ('dift-1',))
    own, tiny = cost(setting), cost(setting, vae=tiny_taesd)
    assert tiny.flop != own.flop and tiny.values == own.values


def test_pixel_models_have_no_vae(tiny_pixel_pipeline):
    assert cost(Setting(tiny_pixel_pipeline, 32, ('adm-1',))).flop > 0


@pytest.mark.parametrize('name', SETTINGS)
def test_settings_have_their_layers(name):
    setting = SETTINGS[name]
    assert expand(setting.layers, sites(meta_network(setting.model)))
