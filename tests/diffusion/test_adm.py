import json
from typing import Any

import adm
import pytest
import tiny
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from diffseg.diffusion.adm import adm_config, convert_adm_unet
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.presets import PRESETS
from diffseg.diffusion.recorder import ActivationRecorder

WIDE = {'block_out_channels': (32, 32, 64), 'norm_num_groups': 32, 'attn_norm_num_groups': 32, 'sample_size': 32}
LAYOUTS = {
    'adm': {},
    'strided-convolutions': {
        'down_block_types': ('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
        'up_block_types': ('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        'downsample_type': 'conv',
        'upsample_type': 'conv',
        'resnet_time_scale_shift': 'default',
        'out_channels': 3,
    },
    'one-residual-block': {'layers_per_block': 1},
    'one-level': {
        'block_out_channels': (32,),
        'down_block_types': ('AttnDownBlock2D',),
        'up_block_types': ('AttnUpBlock2D',),
        'sample_size': 8,
    },
}
BLOCKS = [  # channels and stride of output_blocks.0, 1, ...: DIFT's index, and DDPM-seg's
    *[(1024, 32), (1024, 32), (1024, 16)],
    *[(1024, 16), (1024, 16), (1024, 8)],
    *[(512, 8), (512, 8), (512, 4)],
    *[(512, 4), (512, 4), (512, 2)],
    *[(256, 2), (256, 2), (256, 1)],
    *[(256, 1), (256, 1), (256, 1)],
]


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return adm.unet_state(tiny.pixel_unet(**WIDE))


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without private entries, and lists as tuples."""
    public = {key: value for key, value in config.items() if key[0] != '_'}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in public.items()}


@torch.no_grad()
def test_agrees_with_guided_diffusion(reference):
    folder = reference('adm')
    state = torch.load(folder / 'model.pt', weights_only=True)
    config = adm_config(state, json.loads((folder / 'config.json').read_text()))
    unet = UNet2DModel.from_config(config).eval()
    unet.load_state_dict(convert_adm_unet(state, config))
    expected = load_file(folder / 'activations.safetensors')
    names = {f'adm-{i}': f'output_blocks.{i}' for i in range(12)}
    names |= {'mid-repeat1-res-out': 'middle_block', 'unet-out': 'out'}
    assert set(names.values()) == set(expected)
    read = ActivationRecorder(unet, list(names))(**load_file(folder / 'inputs.safetensors'))
    for ours, name in zip(read.values(), names.values(), strict=True):
        assert (ours - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_tells_its_configuration_and_is_converted(layout):
    unet = tiny.pixel_unet(**{**WIDE, **layout})
    state = {name: tensor.half() for name, tensor in adm.unet_state(unet).items()}
    config = adm_config(state, {'num_head_channels': 8})
    with torch.device('meta'):
        assert plain(UNet2DModel.from_config(config).config) == plain(unet.config)
    converted, expected = convert_adm_unet(state, config), unet.state_dict()
    assert converted.keys() == expected.keys()
    for name in expected:
        assert torch.equal(converted[name], expected[name].half().float()), name


@pytest.mark.parametrize('name', ['adm-imagenet-256', 'ddpm-ffhq'])
def test_presets_are_what_their_checkpoints_tell(name):
    unet = meta_network(name)
    config = adm_config(adm.unet_state(unet), {'dropout': unet.config.dropout})
    assert plain(config) == {'dropout': 0.0, **plain(PRESETS[name].network_config)}
    blocks = ActivationRecorder(unet, [f'adm-{i}' for i in range(18)]).sites
    assert [(site.channels, site.stride) for site in blocks] == BLOCKS


def test_settings_are_taken_or_must_agree(state):
    flags = {
        'num_head_channels': 16,
        'image_size': 64,
        'dropout': 0.1,
        'num_channels': 32,
        'channel_mult': '1,1,2',
        'attention_resolutions': '32,16',
        'class_cond': False,
        'use_fp16': True,
    }
    config = adm_config(state, flags)
    assert (config['attention_head_dim'], config['sample_size'], config['dropout']) == (16, 64, 0.1)
    for more in ({'attention_ds': [2, 4, 8, 32]}, {'attention_ds': '32,4,2'}, {'attention_resolutions': '32,16,8'}):
        assert adm_config(state, flags | more) == config  # of a network with strides 1, 2 and 4
    for wrong in (
        {'num_res_blocks': 3},
        {'channel_mult': [1, 2, 2]},
        {'attention_ds': [2]},
        {'attention_ds': [1, 2, 4, 8]},
        {'attention_ds': ''},
        {'attention_resolutions': '64,32,16'},
        {'attention_ds': 'all'},
        {'channel_mult': 3},
        {'learn_sigma': False},
        {'noise_schedule': 'cosine'},
        {'use_new_attention_order': True},
    ):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=rf"{name} is '?{str(value).replace('[', '.')[:5]}.*the checkpoint has"):
            adm_config(state, flags | wrong)
    with pytest.raises(ValueError, match=r'\[32\] channels cannot have heads of 64'):
        adm_config(state)
    with pytest.raises(ValueError, match="num_head_channels is '64'; it is a whole number"):
        adm_config(state, {'num_head_channels': '64'})
    with pytest.raises(ValueError, match='num_head_channels, one width'):
        adm_config(state, {'num_heads': 4})


def test_other_checkpoints_are_refused(state):
    def refused(message: str, changes: dict[str, torch.Tensor], without: str = ' ') -> None:
        changed = {name: x for name, x in {**state, **changes}.items() if not name.startswith(without)}
        with pytest.raises(ValueError, match=message):
            convert_adm_unet(changed, adm_config(changed, {'num_head_channels': 8}))

    refused(r'no denoising network.*found are: .*, time_embed', {}, without='output_blocks')
    refused('transformer_blocks', {'input_blocks.1.1.transformer_blocks.0.norm1.weight': torch.zeros(32)})
    refused('1000 classes', {'label_emb.weight': torch.zeros(1000, 128)})
    refused('no output_blocks.3.0.out_layers.3.weight, where a level of 3', {}, without='output_blocks.3')
    refused('6 channels going in.*upsampler', {'input_blocks.0.0.weight': torch.zeros(32, 6, 3, 3)})
    one = r'UNet2DModel cannot express .*\[32, 32, 64\].*; 6 tensors are missing, such as output_blocks.1.1.norm'
    refused(one.replace('; ', ''), {}, without='output_blocks.1.1')  # attention behind some blocks of a level only
    refused(r'10 tensors are unexpected, such as middle_block.3', {
        name.replace('middle_block.2', 'middle_block.3'): x for name, x in state.items() if 'middle_block.2' in name
    })  # fmt: skip
    refused(r'time_embed.0.weight has shape \(128, 64\) instead of \(128, 32\)', {
        'time_embed.0.weight': torch.zeros(128, 64)
    })  # fmt: skip
