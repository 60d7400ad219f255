import gc
import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffseg.diffusion import ActivationRecorder, Site, resolve, sites
from diffseg.diffusion.activations import UNet, aggregates

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
SIMPLE_CROSS = {  # DeepFloyd IF's blocks: attention without transformers, residual samplers
    'down_block_types': ('ResnetDownsampleBlock2D', 'SimpleCrossAttnDownBlock2D'),
    'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn',
    'up_block_types': ('SimpleCrossAttnUpBlock2D', 'ResnetUpsampleBlock2D'),
    'block_out_channels': (32, 64),
    'resnet_time_scale_shift': 'scale_shift',
}
TOPOLOGIES = {
    'sd15': {},
    'sd21': {'use_linear_projection': True, 'attention_head_dim': [2, 4, 8, 8], 'upcast_attention': True},
    'first-block-without-attention': {'down_block_types': ('DownBlock2D', *('CrossAttnDownBlock2D',) * 3)},
    'middle-without-attention': {'mid_block_type': 'UNetMidBlock2D'},
    'no-middle': {'mid_block_type': None},
    'x4-upscaler': {'only_cross_attention': (True, True, True, False), 'in_channels': 7},
    'floyd': SIMPLE_CROSS,
}
PIXEL_TOPOLOGIES = {
    'adm': {},
    'strided-convolutions': {
        'down_block_types': ('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
        'up_block_types': ('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        'downsample_type': 'conv',
        'upsample_type': 'conv',
        'resnet_time_scale_shift': 'default',
    },
    'middle-without-attention': {'add_attention': False},
}


def inputs(unet: UNet, batch: int = 1, height: int = 16, width: int = 24) -> dict:
    config = unet.config
    values = {'x_t': torch.randn(batch, config.in_channels, height, width), 'timestep': 50}
    if isinstance(unet, UNet2DModel):
        return values
    values['encoder_hidden_states'] = torch.randn(batch, 5, config.cross_attention_dim)
    if config.addition_embed_type == 'text_time':
        values['added_cond_kwargs'] = {'text_embeds': torch.randn(batch, 32), 'time_ids': torch.rand(batch, 6)}
    return values


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def hooks(unet: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


class Reference:
    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / 'unet')
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
    assert list(sites(published.unet)) == names  # all of them, in order of execution
    assert len(names) == count
    read = ActivationRecorder(published.unet, names)(**published.inputs)
    assert list(read) == names
    errors = {name: published.error(name, value) for name, value in read.items()}
    assert max(errors.values()) < 1e-5, errors
    assert published.error('unet-sample', read['unet-out']) < 1e-5


@torch.no_grad()
def test_aggregated_attention_agrees_with_the_published_code(reference):
    published = Reference(reference('sd15-attention'))
    recorder = ActivationRecorder(published.unet, ['unet-out'], attention=['down_cross', 'up_cross'])
    read = recorder(**published.inputs)
    assert list(read) == ['unet-out', 'attn']
    assert published.error('attn', read['attn']) < 1e-5


def number_of_keys(unet: UNet2DConditionModel, site: Site, cells: int) -> int:
    block, _, attention = site.path.rpartition('.')
    return 5 if attention == 'attn2' or unet.get_submodule(block).only_cross_attention else cells


def assert_as_described(unet: UNet, height: int, width: int) -> None:
    """Every site's real shape, for a latent of `height` x `width`, is what its description says."""
    factor = 1 if isinstance(unet, UNet2DModel) else 8
    read = ActivationRecorder(unet, list(sites(unet)))(**inputs(unet, 2, height, width))
    for site in sites(unet).values():
        h, w = site.size(factor * height, factor * width)
        channels = site.channels or number_of_keys(unet, site, h * w)
        assert read[site.name].shape == (2, channels, h, w), site
        if site.kind == 'map':
            torch.testing.assert_close(read[site.name].sum(1), torch.ones(2, h, w))


@pytest.mark.parametrize('topology', TOPOLOGIES)
@torch.no_grad()
def test_every_site_is_as_described(tiny_unet, topology):
    assert_as_described(tiny_unet(**TOPOLOGIES[topology]), 16, 24)


@pytest.mark.parametrize('config', PIXEL_TOPOLOGIES.values(), ids=PIXEL_TOPOLOGIES)
@torch.no_grad()
def test_every_site_of_a_pixel_network_is_as_described(config):
    assert_as_described(tiny.pixel_unet(**config), 12, 20)


@pytest.mark.parametrize('make', ['tiny_unet', 'tiny_sdxl_unet'])
@pytest.mark.parametrize(('height', 'width'), [(24, 8), (11, 13)])
@torch.no_grad()
def test_every_site_is_as_described_whatever_the_size(request, make, height, width):
    assert_as_described(request.getfixturevalue(make)(), height, width)


def test_described_on_the_meta_device(tiny_unet):
    with torch.device('meta'):
        unet = tiny_unet()
    assert sites(unet) == sites(tiny_unet())
    site = sites(unet, vae_scale_factor=4)['mid-vit-out']
    assert site == Site('mid-vit-out', 'mid_block.attentions.0', 64, 32, 'spatial')


def test_tokens_fold_by_the_true_height_and_width(tiny_unet):
    unet = tiny_unet()
    given = inputs(unet, 1, 6, 10)
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
    given = inputs(unet, 2)
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
    given = inputs(unet)
    read = ActivationRecorder(unet, ['unet-out'])(**given)
    assert torch.equal(read['unet-out'], unet(given.pop('x_t'), **given).sample)


@torch.no_grad()
def test_nothing_else_is_kept(tiny_unet):
    """What the interrupted forward pass computed is freed at once, without the garbage collector."""
    unet = tiny_unet()
    others = []
    unet.down_blocks[0].register_forward_hook(lambda module, args, output: others.append(weakref.ref(output[0])))
    recorder = ActivationRecorder(unet, ['mid-vit-out', 'mid-vit-block0-self-map'])
    given = inputs(unet)
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
    recorder(**inputs(unet))
    assert hooks(unet) == 0
    with pytest.raises(RuntimeError):
        recorder(**{**inputs(unet), 'encoder_hidden_states': torch.zeros(1, 5, 7)})
    assert hooks(unet) == 0


@torch.no_grad()
def test_recorders_do_not_disturb_each_other(tiny_unet):
    unet = tiny_unet()
    given = inputs(unet)
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
    given = inputs(unet)
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
    read = ActivationRecorder(unet, [name], stop_early=False)(**inputs(unet))
    probability = read[name][:, 3].flatten(1)  # (B, hw)
    torch.testing.assert_close(probability, attended[0].mean(-1))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients(tiny_unet, checkpointing):
    unet = tiny_unet().train()
    given = inputs(unet)
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
    recorder(**inputs(unet))
    assert executed == ['conv_out']
    with torch.no_grad():
        recorder(**inputs(unet))
    assert executed == ['conv_out']


def test_gradients_reach_the_input_of_a_frozen_network(tiny_unet):
    unet = tiny_unet().requires_grad_(False)
    given = inputs(unet)
    given['encoder_hidden_states'].requires_grad_()
    ActivationRecorder(unet, ['mid-vit-out'])(**given)['mid-vit-out'].sum().backward()
    assert given['encoder_hidden_states'].grad.abs().sum() > 0


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@torch.no_grad()
def test_half_precision(tiny_unet, dtype, tolerance):
    unet = tiny_unet()
    given = inputs(unet)
    recorder = ActivationRecorder(unet, NAMES, attention=['up_cross'])
    expected = recorder(**given)
    unet.to(dtype)
    read = recorder(**{key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in given.items()})
    for name, value in read.items():
        assert value.dtype == dtype
        assert (value.float() - expected[name]).norm() < tolerance * expected[name].norm(), name


@torch.no_grad()
def test_aggregated_attention_of_any_shape(tiny_unet):
    unet = tiny_unet()
    given = inputs(unet, 2, 11, 14)
    recorder = ActivationRecorder(unet, [], attention=['up_cross', 'down_self'])
    read = recorder(**given)
    keys = 6 * 7 + 3 * 4  # of the self-attention at 1/2 and 1/4 of the latent
    assert list(read) == ['attn']
    assert read['attn'].shape == (2, 2 * 5 + keys, 11, 14)
    maps = [f'up-level1-repeat{repeat}-vit-block0-cross-map' for repeat in range(3)]
    by_layer = ActivationRecorder(unet, maps)(**given)
    quarter = torch.stack([by_layer[name] for name in maps]).mean(0)  # (B, 5, 3, 4)
    torch.testing.assert_close(read['attn'][:, :5], nn.functional.interpolate(quarter, size=(11, 14)))


@torch.no_grad()
def test_averaged_attention_is_one_map_for_each_size(tiny_unet):
    unet = tiny_unet()
    given = inputs(unet, 2, 12, 16)
    recorder = ActivationRecorder(unet, ['unet-out'], attention=['up_cross', 'down_cross'], attention_mode='average')
    read = recorder(**given)
    assert list(read) == ['unet-out', 'attn-16', 'attn-32']  # fine first, and not 64, where there is but the middle's
    assert [tuple(x.shape) for x in read.values()][1:] == [(2, 5, 6, 8), (2, 5, 3, 4)]
    for stride, levels in ((16, ('down-level1', 'up-level2')), (32, ('down-level2', 'up-level1'))):
        maps = [name for name in sites(unet) if name.startswith(levels) and name.endswith('cross-map')]
        assert len(maps) == 5  # two of the encoder, three of the decoder, all of one weight
        by_layer = torch.stack(list(ActivationRecorder(unet, maps)(**given).values()))
        torch.testing.assert_close(read[f'attn-{stride}'], by_layer.mean(0))
        torch.testing.assert_close(read[f'attn-{stride}'].sum(1), torch.ones(2, *by_layer.shape[-2:]))


def test_strides_of_averaged_attention_are_in_image_pixels(tiny_unet, tiny_sdxl_unet):
    def names(unet: UNet2DConditionModel, factor: int, *categories: str) -> list[str]:
        return [site.name for site, _ in aggregates(sites(unet, factor), categories, 'average')]

    assert names(tiny_unet(), 8, 'mid_cross', 'up_cross') == ['attn-16', 'attn-32', 'attn-64']
    assert names(tiny_unet(), 4, 'up_cross') == ['attn-8', 'attn-16']
    assert names(tiny_sdxl_unet(), 8, 'up_self', 'down_self') == ['attn-16', 'attn-32']


def test_channels_of_aggregated_attention(tiny_unet):
    available = sites(tiny_unet())
    ((attn, groups),) = aggregates(available, ['down_cross', 'up_cross'], 'concat', tokens=77)
    assert (attn.name, attn.channels, attn.stride, len(groups)) == ('attn', 308, 8, 4)
    fine, coarse = aggregates(available, ['down_cross', 'up_cross'], 'average', tokens=150)
    assert fine.site == Site('attn-16', '', 150, 16, 'map') and coarse.site == Site('attn-32', '', 150, 32, 'map')
    assert aggregates(available, ['up_self'], 'average', tokens=77)[0].site.channels is None


def test_aliases(tiny_unet, tiny_sdxl_unet):
    sd15, sdxl = sites(tiny_unet()), sites(tiny_sdxl_unet())
    assert resolve(['dift-1', 'dift-0', 'dift-3', 'dhf-2-1'], sd15) == [
        'up-level1-upsampler-out',
        'up-level0-upsampler-out',
        'up-level3-repeat2-vit-out',
        'up-level2-repeat1-res-increment',
    ]
    assert resolve(['dift-2', 'unet-in'], sdxl) == ['up-level2-repeat2-res-out', 'unet-in']


@torch.no_grad()
def test_dift_alias_is_the_output_of_the_block(tiny_sdxl_unet):
    unet = tiny_sdxl_unet()
    outputs = []
    for block in unet.up_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    read = ActivationRecorder(unet, ['dift-0', 'dift-1', 'dift-2'], stop_early=False)(**inputs(unet))
    for ours, theirs in zip(read.values(), outputs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('config', PIXEL_TOPOLOGIES.values(), ids=PIXEL_TOPOLOGIES)
def test_aliases_of_a_pixel_network_count_residual_blocks(config):
    available = sites(tiny.pixel_unet(**config))
    attention = [int(kind.startswith('Attn')) for kind in config.get('up_block_types', ('Attn', 'Attn', ''))]
    expected = []
    for level, last in enumerate(['upsampler-out', 'upsampler-out', None]):
        out = 'vit-out' if attention[level] else 'res-out'
        blocks = [f'up-level{level}-repeat{repeat}-{out}' for repeat in range(3)]
        expected += [*blocks[:2], f'up-level{level}-{last}' if last else blocks[2]]
    assert resolve([f'adm-{i}' for i in range(9)], available) == expected
    assert resolve([f'dift-{i}' for i in range(9)], available) == expected
    with pytest.raises(ValueError, match="unknown activation 'adm-9'"):
        resolve(['adm-9'], available)


@pytest.mark.parametrize(
    ('name', 'nearest'),
    [
        ('adm-3', ''),
        ('up-level1-repeat1-vit-block1-cross-q', 'up-level1-repeat1-vit-block0-cross-q'),
        ('up_level1-repeat1-res-out', 'up-level1-repeat1-res-out'),
        ('dift-4', ''),
        ('dhf-4-0', 'up-level3-repeat0-res-increment'),
        ('', ''),
    ],
)
def test_unknown_names(tiny_unet, name, nearest):
    with pytest.raises(ValueError, match=f"unknown activation '{name}'; the nearest of .*{nearest}"):
        ActivationRecorder(tiny_unet(), ['unet-in', name])


def test_a_site_asked_for_twice(tiny_unet):
    with pytest.raises(ValueError, match="'up-level1-upsampler-out' is asked for twice"):
        ActivationRecorder(tiny_unet(), ['dift-1', 'up-level1-upsampler-out'])


def test_unknown_and_empty_attention(tiny_unet):
    with pytest.raises(ValueError, match='down_cross, down_self'):
        ActivationRecorder(tiny_unet(), [], attention=['cross'])
    with pytest.raises(ValueError, match="'mid_cross' is empty"):
        ActivationRecorder(tiny_unet(), [], attention=['mid_cross'])
    with pytest.raises(ValueError, match="'mean'; it is 'concat' or 'average'"):
        ActivationRecorder(tiny_unet(), [], attention=['up_cross'], attention_mode='mean')
    with pytest.raises(ValueError, match='cannot be averaged'):
        ActivationRecorder(tiny_unet(), [], attention=['up_cross', 'up_self'], attention_mode='average')


def test_masks_and_hidden_modules_are_refused(tiny_unet):
    unet = tiny_unet()
    recorder = ActivationRecorder(unet, ['mid-vit-block0-cross-map'])
    with pytest.raises(ValueError, match='mask'):
        recorder(**inputs(unet), encoder_attention_mask=torch.ones(1, 5))
    unet.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r'did not execute mid_block\.attentions\.0\.transformer_blocks\.0\.attn2'):
        recorder(**inputs(unet))
