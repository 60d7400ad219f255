import json
from pathlib import Path

import adm
import pytest
import tiny
import torch
from diffusers import DDPMPipeline
from safetensors.torch import save_file

from diffseg.diffusion.loading import load_parts


@pytest.fixture(scope='module')
def main(load_tool):
    return load_tool('convert/adm').main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    unet = tiny.pixel_unet(block_out_channels=(32, 32, 64), norm_num_groups=32, attn_norm_num_groups=32)
    torch.save(adm.unet_state(unet), tmp_path / 'model.pt')
    return tmp_path / 'model.pt'


def test_a_folder_that_diffusers_and_diffseg_read(main, checkpoint, tmp_path, capsys):
    out = tmp_path / 'out'
    (tmp_path / 'flags.json').write_text(json.dumps({'image_size': 16, 'num_head_channels': 64}))
    assert main([str(checkpoint), str(out), '--config', str(tmp_path / 'flags.json'), '--head-channels', '8']) == 0
    assert '16 x 16' in capsys.readouterr().out
    parts = load_parts(out)
    expected = tiny.pixel_unet(block_out_channels=(32, 32, 64), norm_num_groups=32, attn_norm_num_groups=32)
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in parts.network.state_dict().items())
    betas = torch.linspace(0.0001, 0.02, 1000)
    torch.testing.assert_close(parts.schedule.alphas_cumprod, (1 - betas).cumprod(0).double())
    assert DDPMPipeline.from_pretrained(out)(num_inference_steps=1, output_type='np').images.shape == (1, 16, 16, 3)
    assert main([str(checkpoint), str(out)]) == 2 and 'not empty' in capsys.readouterr().err
    save_file(torch.load(checkpoint), tmp_path / 'model.safetensors')
    again = tmp_path / 'again'
    assert main([str(tmp_path / 'model.safetensors'), str(again), '--head-channels', '8', '--image-size', '16']) == 0
    assert load_parts(again).fingerprint == parts.fingerprint


def test_errors(main, checkpoint, tmp_path, capsys):
    flags = tmp_path / 'flags.json'
    for text, message in (('{', 'no valid JSON'), ('[]', 'holds a list'), ('{"num_channels": 7}', 'num_channels is 7')):
        flags.write_text(text)
        assert main([str(checkpoint), str(tmp_path / 'out'), '--config', str(flags)]) == 2
        assert message in capsys.readouterr().err
    torch.save({'weight': torch.zeros(1)}, checkpoint)
    assert main([str(checkpoint), str(tmp_path / 'out')]) == 2
    assert 'found are: weight' in capsys.readouterr().err
    checkpoint.write_bytes(b'no')
    assert main([str(checkpoint), str(tmp_path / 'out')]) == 2
    assert 'cannot read' in capsys.readouterr().err and not (tmp_path / 'out').exists()
