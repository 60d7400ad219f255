"""Tests for diffseg.diffusion.controlnet and for ControlNets in an extractor and a backbone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from mmseg.registry import MODELS
from tiny_mmseg import backbone_config
from torch import Tensor, nn

import diffseg.diffusion.controlnet
import diffseg.models
from diffseg.diffusion.controlnet import Control, canny, load_control, residual_kwargs
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.options import group_options

DOWN, UP = 'down-level1-repeat0-res-out', 'up-level2-repeat1-vit-out'


def make_net(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet whose last convolutions are not zero."""
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    for parameter in (
        *net.controlnet_cond_embedding.conv_out.parameters(),
        *net.controlnet_down_blocks.parameters(),
        *net.controlnet_mid_block.parameters(),
    ):
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp('controlnet')
    make_net(tiny.unet()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tiny_pipeline: Path, folder: str) -> Callable[..., DiffusionExtractor]:
    def build(**options) -> DiffusionExtractor:
        options = {'timesteps': [50], 'controlnet': {'model': folder}, **options}
        return DiffusionExtractor(tiny_pipeline, [DOWN, UP], **group_options(options))

    return build


def make_images(batch: int = 2) -> Tensor:
    """Random rectangles, which have edges."""
    images = torch.zeros(batch, 3, 64, 96)
    for i in range(batch):
        images[i, :, 8 + 3 * i : 40, 16 : 80 - 5 * i] = 1
    return images * 2 - 1


# ---- views and residuals


def test_edges_are_where_the_picture_changes():
    edges = canny(make_images())
    assert edges.shape == (2, 3, 64, 96) and set(edges.unique().tolist()) == {0, 1}
    assert edges[0, :, 7:9, 20:70].amax(1).min() == 1 and edges[0, :, 12:36, 20:70].max() == 0
    assert canny(torch.ones(1, 3, 64, 64)).max() == 0


def test_residuals_reach_the_unet(make: Callable, folder: str):
    """Activations are those of the UNet called with the ControlNet's residuals, as diffusers' pipelines do."""
    images, latents, found = make_images(), torch.randn(2, 4, 8, 12), {}
    extractor = make(controlnet={'model': folder, 'image': 'image', 'scale': 0.7}, trajectory='clean')
    activations = extractor.extract_latents(latents, images=images)
    net, unet = ControlNetModel.from_pretrained(folder), extractor.network
    embeds = extractor.prompt_encoder(['']).embeds.expand(2, -1, -1)
    with torch.no_grad():
        down, middle = net(latents, 50, embeds, images / 2 + 0.5, 0.7, return_dict=False)
        handle = unet.up_blocks[2].attentions[1].register_forward_hook(lambda *x: found.update(up=x[2][0]))
        unet(latents, 50, embeds, down_block_additional_residuals=down, mid_block_additional_residual=middle)
        handle.remove()
    torch.testing.assert_close(activations[UP][:, 0], found['up'], rtol=1e-4, atol=1e-5)


def test_only_what_comes_after_the_middle_changes(make: Callable):
    images = make_images()
    with_control, without = make()(images), make(controlnet=())(images)
    assert torch.equal(with_control[DOWN], without[DOWN])
    assert (with_control[UP] - without[UP]).abs().max() > 0.01


def test_several_add_up(make: Callable, folder: str):
    half, images = {'model': folder, 'scale': 0.5}, make_images()
    torch.testing.assert_close(make(controlnet=[half, half])(images)[UP], make()(images)[UP], rtol=1e-4, atol=1e-5)


def test_folding_of_timesteps_members_and_images(make: Callable):
    images = make_images(2)
    together = make(timesteps=[50, 400], ensemble=2, micro_batch=3)(images)[UP]
    for j, t in enumerate((50, 400)):
        single = make(timesteps=[t], ensemble=2)
        alone = [single(images[i : i + 1])[UP][0, 0] for i in range(2)]
        torch.testing.assert_close(together[:, j], torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('trajectory', 'timestep'), [({'type': 'inversion', 'steps': 20}, 50), ({'type': 'generation', 'steps': 20}, 901)]
)
def test_every_pass_of_a_trajectory_is_steered(make: Callable, trajectory: dict, timestep: int):
    """The latent that the last pass is over, which the encoder's activation tells, differs too."""
    options, images = {'trajectory': trajectory, 'timesteps': [timestep]}, make_images(1)
    with_control, without = make(**options)(images), make(**options, controlnet=())(images)
    assert (with_control[DOWN] - without[DOWN]).abs().max() > 1e-3


def test_any_size_and_dtype(make: Callable):
    images = make_images()[..., :61, :75]
    assert make()(images)[UP].shape[-2:] == (4, 5)
    extractor = make(dtype='bfloat16')
    assert {x.dtype for x in extractor.controls.parameters()} == {torch.bfloat16}
    assert extractor(images)[UP].dtype == torch.bfloat16


def test_sdxl(tiny_sdxl_pipeline: Path, tmp_path: Path):
    make_net(tiny.sdxl_unet()).save_pretrained(tmp_path)
    layer = 'up-level1-repeat0-vit-out'
    found = [
        DiffusionExtractor(tiny_sdxl_pipeline, [layer], [50], weights={'controlnet': x})(make_images())[layer]
        for x in ((), {'model': str(tmp_path)})
    ]
    assert (found[0] - found[1]).abs().max() > 0.01


# ---- in a backbone


def test_it_is_frozen_and_in_no_checkpoint(tiny_pipeline: Path, folder: str):
    def build(**options) -> nn.Module:
        return MODELS.build(backbone_config(tiny_pipeline, timesteps=[50], **options))

    backbone, other = build(controlnet={'model': folder}), build(controlnet={'model': folder, 'scale': 2})
    assert list(backbone.state_dict()) == ['_extra_state'] and not list(backbone.parameters())
    with pytest.raises(ValueError, match='controlnet was'):
        other.load_state_dict(backbone.state_dict())
    trained = build(controlnet={'model': folder}, frozen=False, trainable=['up_blocks.1.*'])
    assert {name.split('.')[2] for name, _ in trained.named_parameters()} == {'up_blocks'}
    sum(x.square().mean() for x in trained.train()(make_images())).backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


# ---- errors


def test_another_unet(folder: str):
    with pytest.raises(ValueError, match=r'made for another UNet: block_out_channels is \(32, 32, 64, 64\), not'):
        load_control(tiny.unet(block_out_channels=(32, 64, 64, 64)), folder)


def test_what_is_no_controlnet(tiny_pipeline: Path, folder: str, tmp_path: Path):
    with pytest.raises((OSError, ValueError), match=r'not a ControlNet|cannot read the ControlNet'):
        load_control(tiny.unet(), str(tiny_pipeline / 'unet'))
    with pytest.raises(OSError, match='cannot read the ControlNet'):
        load_control(tiny.unet(), str(tmp_path / 'absent'))
    shutil.copytree(folder, tmp_path / 'cut')
    weights = next((tmp_path / 'cut').glob('*.safetensors'))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match='cannot read the ControlNet'):
        load_control(tiny.unet(), str(tmp_path / 'cut'))


def test_options_that_cannot_be(folder: str, make: Callable, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="image of a ControlNet is 'depth'; it is 'canny' or 'image'"):
        load_control(tiny.unet(), folder, image='depth')
    with pytest.raises(ValueError, match='look at images'):
        make().extract_latents(torch.zeros(1, 4, 8, 8))
    monkeypatch.setattr(diffseg.diffusion.controlnet, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install opencv-python'):
        Control(make_net(tiny.unet()))


def test_residuals_of_one_are_its_own():
    residuals = [torch.randn(2), torch.randn(3), torch.randn(4)]
    kwargs = residual_kwargs([residuals])
    assert [x is y for x, y in zip(kwargs['down_block_additional_residuals'], residuals[:2], strict=True)] == [True] * 2
    assert kwargs['mid_block_additional_residual'] is residuals[2]
