import re
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_vision
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEModel

from diffseg.models.backbones import VisionBackbone

CONFIG = {**tiny_vision.CONFIG, 'hidden_size': 128, 'num_attention_heads': 2, 'layer_norm_eps': 1e-6, 'mask_ratio': 0.0}
THEIRS = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'layernorm_before': 'norm1',
    'layernorm_after': 'norm2',
    'layernorm': 'norm',
    'attention.o_proj': 'attn.proj',
}


@pytest.fixture(scope='module')
def main(load_tool):
    return load_tool('convert/mae').main


@pytest.fixture(scope='module')
def model() -> ViTMAEModel:
    torch.manual_seed(0)
    return ViTMAEModel(ViTMAEConfig(**CONFIG)).eval()


def released(model: ViTMAEModel) -> dict[str, Tensor]:
    """The encoder's tensors under the names of facebookresearch/mae."""
    state, merged = {}, model.state_dict()
    for name in list(merged):
        if found := re.match(r'(.+)\.attention\.q_proj\.(\w+)', name):
            parts = [merged.pop(f'{found[1]}.attention.{part}_proj.{found[2]}') for part in 'qkv']
            state[f'{found[1].replace("layers", "blocks")}.attn.qkv.{found[2]}'] = torch.cat(parts)
    for name, tensor in merged.items():
        ours = next((part for part in THEIRS if part in name), '')
        state[name.replace(ours, THEIRS.get(ours, '')).replace('layers.', 'blocks.')] = tensor
    return state


@torch.no_grad()
def test_the_folder_gives_the_outputs_of_blocks(main, model, tmp_path, capsys):
    state = {**released(model), 'mask_token': torch.zeros(1), 'decoder_blocks.0.norm1.weight': torch.zeros(1)}
    assert len(state) == 4 + 2 + 12 * 3 + 2, 'every block has twelve tensors'
    torch.save({'model': state, 'epoch': 1, 'args': Namespace(lr=1e-3)}, tmp_path / 'mae.pth')
    assert main([str(tmp_path / 'mae.pth'), str(tmp_path / 'out')]) == 0
    assert '3 blocks of 128 channels, patches of 8, images of 32 x 32' in capsys.readouterr().out
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    backbone = VisionBackbone(tmp_path / 'out', [2, 3], layernorm=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    hidden = model(pixels, noise=torch.arange(16.0).expand(2, -1), output_hidden_states=True).hidden_states
    for found, expected in zip(backbone(x), hidden[2:], strict=True):
        torch.testing.assert_close(found, expected[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    assert main([str(tmp_path / 'mae.pth'), str(tmp_path / 'out')]) == 2 and 'not empty' in capsys.readouterr().err


def test_errors(main, model, tmp_path: Path, capsys):
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'other.pth')
    assert main([str(tmp_path / 'other.pth'), str(tmp_path / 'out')]) == 2
    assert 'it has weight' in capsys.readouterr().err
    state = released(model)
    del state['blocks.1.norm2.bias']
    torch.save(state, tmp_path / 'partial.pth')
    assert main([str(tmp_path / 'partial.pth'), str(tmp_path / 'out')]) == 2
    assert 'layers.1.layernorm_after.bias' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    with pytest.raises(OSError, match=r'tools/convert/mae\.py and give the folder'):
        VisionBackbone('mae-l8-lsun-horse', [24])
