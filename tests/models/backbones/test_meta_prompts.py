"""Tests for diffseg.models.backbones.meta_prompts."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from mmseg.registry import MODELS
from torch.nn import functional as F

from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.models.backbones.meta_prompts import LAYERS, MetaPromptsBackbone


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., MetaPromptsBackbone]:
    """Build a backbone of six prompts and two passes."""

    def build(**options) -> MetaPromptsBackbone:
        defaults = {'type': 'MetaPromptsBackbone', 'model': str(tiny_pipeline), 'num_prompts': 6, 'refine_steps': 2}
        return MODELS.build({**defaults, **options})

    return build


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 128, 64) * 2 - 1


def test_maps_are_fine_to_coarse_with_a_channel_for_each_prompt(make, images):
    backbone = make()
    assert backbone.channels == [6] * 4
    assert [tuple(x.shape) for x in backbone(images)] == [(2, 6, 128 // s, 64 // s) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize('refine_steps', [1, 3])
@torch.no_grad()
def test_the_procedure_written_out(make, tiny_pipeline, images, refine_steps):
    backbone = make(refine_steps=refine_steps).eval()
    prompts, times = backbone.conditioner.embeds, backbone.conditioner.times
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder='unet')
    latent = AutoencoderKL.from_pretrained(tiny_pipeline, subfolder='vae').encode(images).latent_dist.mode()
    text = prompts.expand(2, -1, -1)
    for step in range(refine_steps):
        handle = unet.time_embedding.register_forward_hook(lambda *_, step=step: times[step].expand(2, -1))
        found = ActivationRecorder(unet, [*LAYERS, 'unet-out'])(latent, 999, text)
        latent = found.pop('unet-out')
        handle.remove()
    for ours, x, (_, conv, norm, _) in zip(backbone(images), found.values(), backbone.projections, strict=True):
        x = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
        expected = torch.einsum('bchw,bnc->bnhw', norm(conv(x)).relu(), text)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('frozen', [True, False])
def test_everything_learns(make, images, frozen):
    backbone = make(frozen=frozen).train()
    before = copy.deepcopy(dict(backbone.named_parameters()))
    kept = {name: buffer.clone() for name, buffer in backbone.extractor.named_buffers()}
    sum(x.square().mean() for x in backbone(images)).backward()
    torch.optim.SGD(backbone.parameters(), lr=1e-3).step()
    assert not [name for name, parameter in backbone.named_parameters() if torch.equal(parameter, before[name])]
    assert all(torch.equal(buffer, kept[name]) for name, buffer in backbone.extractor.named_buffers())
    of_unet = {name.split('.')[2] for name in before if name.startswith('extractor.')}
    # the UNet's own output is the second pass's input, and its embedding of timesteps is not used
    assert of_unet == (
        set() if frozen else {'conv_in', 'down_blocks', 'mid_block', 'up_blocks', 'conv_norm_out', 'conv_out'}
    )


def test_one_pass_does_not_train_the_output(make):
    names = [name for name, _ in make(refine_steps=1, frozen=False).named_parameters()]
    assert not any('conv_out' in name or 'time_embedding' in name for name in names)


def test_checkpoints_hold_what_is_trained(make, images):
    first, second = make(), make()
    state = first.state_dict()
    assert {name.split('.')[0] for name in state} == {'_extra_state', 'conditioner', 'projections'}
    second.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(first(images), second(images), strict=True))
    with pytest.raises(ValueError, match='timesteps was'):
        make(refine_steps=3).load_state_dict(state, strict=False)


def test_it_works_with_two_text_encoders_model(tiny_sdxl_pipeline):
    layers = ['up-level2-repeat2-res-out', 'up-level1-repeat2-vit-out', 'up-level0-repeat2-vit-out']
    backbone = MetaPromptsBackbone(str(tiny_sdxl_pipeline), 5, 2, layers)
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [(5, 16, 16), (5, 8, 8), (5, 4, 4)]
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_it_needs_a_pass(make):
    with pytest.raises(ValueError, match='refine_steps is 0'):
        make(refine_steps=0)


def test_it_needs_a_model_that_reads_prompts(make, tiny_pixel_pipeline):
    with pytest.raises(ValueError, match='works on pixels and reads no prompt'):
        make(model=str(tiny_pixel_pipeline))
