import gc
import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import sites

# one of each kind, the first and the last one executed far apart
NAMES = [
    'up-level1-repeat0-vit-block0-cross-map',
    'down-level0-repeat0-res-increment',
    'unet-in',
    'mid-vit-out',
    'up-level1-repeat0-vit-block0-self-k',
    'down-level1-downsampler-out',
    'up-level1-repeat1-vit-block0-ffn-inner',
]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def hooks(unet: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


class Reference:
    def __init__(self, folder: Path) -> None:
        self.network = UNet2DConditionModel.from_pretrained(folder / 'unet')
        self.inputs = load_file(folder / 'inputs.safetensors')
        if 'time_ids' in self.inputs:
            self.inputs['added_cond_kwargs'] = {key: self.inputs.pop(key) for key in ('text_embeds', 'time_ids')}
        self.activations = load_file(folder / 'activations.safetensors')
        with safe_open(folder / 'activations.safetensors', 'pt') as file:
            self.order = json.loads(file.metadata()['order'])

    def error(self, name: str, ours: Tensor) -> float:
        theirs = self.activations[name]
        if name.endswith('-map'):
            theirs = theirs.mean(1).transpose(1, 2).unflatten(2, ours.shape[-2:])  # (B,heads,hw,keys) -> (B,keys,h,w)
        assert ours.shape == theirs.shape, name
        return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(('name', 'count'), [('sd15', 197), ('sdxl', 612)])
@torch.no_grad()
def test_agrees_with_the_published_code(reference, name, count):
    published = Reference(reference(name))
    names = [name for name in published.order if name != 'unet-sample']
    assert list(sites(published.network)) == names  # all of them, in order of execution
    assert len(names) == count
    read = ActivationRecorder(published.network, names)(**published.inputs)
    assert list(read) == names
    errors = {name: published.error(name, value) for name, value in read.items()}
    assert max(errors.values()) < 1e-5, errors
    assert published.error('unet-sample', read['unet-out']) < 1e-5


@torch.no_grad()
def test_aggregated_attention_agrees_with_the_published_code(reference):
    published = Reference(reference('sd15-attention'))
    recorder = ActivationRecorder(published.network, ['unet-out'], attention=['down_cross', 'up_cross'])
    read = recorder(**published.inputs)
    assert list(read) == ['unet-out', 'attn']
    assert published.error('attn', read['attn']) < 1e-5


def test_tokens_fold_by_the_true_height_and_width(tiny_unet):
    unet = tiny_unet()
    given = tiny.inputs(unet, 1, 6, 10)
    stored = []
    path = sites(unet)['down-level0-repeat0-vit-block0-out'].path
    unet.get_submodule(path).register_forward_hook(lambda module, args, output: stored.append(output))
    read = ActivationRecorder(unet, ['down-level0-repeat0-vit-block0-out'])(**given)
    assert torch.equal(read['down-level0-repeat0-vit-block0-out'][0, :, 4, 7], stored[0][0, 4 * 10 + 7])


@pytest.mark.parametrize(
    ('make', 'names'), [(tiny.unet, NAMES), (tiny.pixel_unet, ['up-level0-upsampler-out', 'mid-vit-out', 'unet-in'])]
)
@torch.no_grad()
def test_stops_early_with_the_same_values(make, names):
    unet = make()
    given = tiny.inputs(unet, 2)
    executed = []
    unet.up_blocks[1].resnets[2].register_forward_hook(lambda *_: executed.append('after'))
    early = ActivationRecorder(unet, names)(**given)
    assert executed == []
    full = ActivationRecorder(unet, names, stop_early=False)(**given)
    assert executed == ['after']
    assert list(early) == names
    for name in names:
        assert torch.equal(early[name], full[name])


@pytest.mark.parametrize('make', [tiny.unet, tiny.pixel_unet])
@torch.no_grad()
def test_output_of_the_unet(make):
    unet = make()
    given = tiny.inputs(unet)
    read = ActivationRecorder(unet, ['unet-out'])(**given)
    assert torch.equal(read['unet-out'], unet(given.pop('x_t'), **given).sample)


@torch.no_grad()
def test_nothing_else_is_kept(tiny_unet):
    """What the interrupted forward pass computed is freed at once, without the garbage collector."""
    unet = tiny_unet()
    others = []
    unet.down_blocks[0].register_forward_hook(lambda module, args, output: others.append(weakref.ref(output[0])))
    recorder = ActivationRecorder(unet, ['mid-vit-out', 'mid-vit-block0-self-map'])
    given = tiny.inputs(unet)
    gc.disable()
    try:
        recorder(**given)
        assert [other() for other in others] == [None]
    finally:
        gc.enable()


@torch.no_grad()
def test_hooks_are_gone_after_every_end(tiny_unet):
    unet = tiny_unet()
    recorder = ActivationRecorder(unet, NAMES, attention=['up_cross'])
    recorder(**tiny.inputs(unet))
    assert hooks(unet) == 0
    with pytest.raises(RuntimeError):
        recorder(**{**tiny.inputs(unet), 'encoder_hidden_states': torch.zeros(1, 5, 7)})
    assert hooks(unet) == 0


@torch.no_grad()
def test_recorders_do_not_disturb_each_other(tiny_unet):
    unet = tiny_unet()
    given = tiny.inputs(unet)
    first, second = ['down-level0-repeat0-res-out', 'unet-in'], ['mid-vit-out', 'down-level0-repeat0-res-out']
    alone = ActivationRecorder(unet, first)(**given), ActivationRecorder(unet, second)(**given)
    a, b = ActivationRecorder(unet, first), ActivationRecorder(unet, second)
    b_read, a_read = b(**given), a(**given)
    assert_equal(a_read, alone[0])
    assert_equal(b_read, alone[1])
    assert_equal(b(**given), b_read)


@pytest.mark.parametrize('processor', [AttnProcessor, lambda: SlicedAttnProcessor(2)])
@torch.no_grad()
def test_any_attention_processor(tiny_unet, processor):
    unet = tiny_unet()
    given = tiny.inputs(unet)
    recorder = ActivationRecorder(unet, NAMES, attention=['up_self'])
    expected = recorder(**given)
    unet.set_attn_processor(processor())
    chosen = unet.attn_processors
    assert_equal(recorder(**given), expected)
    assert unet.attn_processors == chosen


@torch.no_grad()
def test_maps_are_the_probabilities_that_the_network_uses(tiny_unet):
    """With the values set to one key's indicator, attention returns that key's probabilities."""
    unet = tiny_unet()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attended = []
    attention.to_v.register_forward_hook(lambda m, a, output: torch.eye(5)[3][None, :, None].expand_as(output))
    attention.to_out[0].register_forward_pre_hook(lambda m, args: attended.append(args[0]))  # (B, hw, heads * d)
    name = 'down-level0-repeat0-vit-block0-cross-map'
    read = ActivationRecorder(unet, [name], stop_early=False)(**tiny.inputs(unet))
    probability = read[name][:, 3].flatten(1)  # (B, hw)
    torch.testing.assert_close(probability, attended[0].mean(-1))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients(tiny_unet, checkpointing):
    unet = tiny_unet().train()
    given = tiny.inputs(unet)
    names = [*NAMES, 'up-level3-repeat2-vit-block0-self-map']

    def gradients(**options) -> dict[str, Tensor]:
        unet.zero_grad()
        read = ActivationRecorder(unet, names, attention=['up_cross'], **options)(**given)
        sum(value.square().mean() for value in read.values()).backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    expected = gradients(stop_early=False)
    assert 'conv_in.weight' in expected
    if checkpointing:
        unet.enable_gradient_checkpointing()
    ours = gradients()
    assert_equal(ours, expected)


def test_checkpointed_modules_run_to_their_end(tiny_unet):
    unet = tiny_unet().train()
    unet.enable_gradient_checkpointing()
    executed = []
    unet.conv_out.register_forward_hook(lambda *_: executed.append('conv_out'))
    recorder = ActivationRecorder(unet, ['mid-vit-out'])
    recorder(**tiny.inputs(unet))
    assert executed == ['conv_out']
    with torch.no_grad():
        recorder(**tiny.inputs(unet))
    assert executed == ['conv_out']


def test_gradients_reach_the_input_of_a_frozen_network(tiny_unet):
    unet = tiny_unet().requires_grad_(False)
    given = tiny.inputs(unet)
    given['encoder_hidden_states'].requires_grad_()
    ActivationRecorder(unet, ['mid-vit-out'])(**given)['mid-vit-out'].sum().backward()
    assert given['encoder_hidden_states'].grad.abs().sum() > 0


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@torch.no_grad()
def test_half_precision(tiny_unet, dtype, tolerance):
    unet = tiny_unet()
    given = tiny.inputs(unet)
    recorder = ActivationRecorder(unet, NAMES, attention=['up_cross'])
    expected = recorder(**given)
    unet.to(dtype)
    read = recorder(**{key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in given.items()})
    for name, value in read.items():
        assert value.dtype == dtype
        assert (value.float() - expected[name]).norm() < tolerance * expected[name].norm(), name


def test_masks_and_hidden_modules_are_refused(tiny_unet):
    unet = tiny_unet()
    recorder = ActivationRecorder(unet, ['mid-vit-block0-cross-map'])
    with pytest.raises(ValueError, match='mask'):
        recorder(**tiny.inputs(unet), encoder_attention_mask=torch.ones(1, 5))
    unet.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r'did not execute mid_block\.attentions\.0\.transformer_blocks\.0\.attn2'):
        recorder(**tiny.inputs(unet))
