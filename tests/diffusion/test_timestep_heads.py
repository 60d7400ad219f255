import pytest
import torch
from safetensors.torch import save_file

from diffseg.diffusion.timestep_heads import TimestepHeads

CHANNELS = {'mid-repeat1-res-out': 8, 'up-level3-repeat2-vit-out': 4}


def maps(n):
    generator = torch.Generator().manual_seed(n)
    return {name: torch.randn(n, c, 2, 3, generator=generator) for name, c in CHANNELS.items()}


def trained():
    """Heads whose layers that begin with zeros have other weights."""
    torch.manual_seed(0)
    heads = TimestepHeads(CHANNELS, depth=2, width=16)
    for parameter in heads.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.eval()


def test_heads_are_the_identity_at_first():
    x = maps(2)
    applied = TimestepHeads(CHANNELS)(x, torch.tensor([1, 998]))
    assert all(torch.equal(applied[name], x[name]) for name in x)


def test_a_cell_depends_on_itself_and_the_timestep_alone():
    heads, x = trained(), maps(1)
    before, later = heads(x, torch.tensor([100])), heads(x, torch.tensor([500]))
    changed = {name: map_.clone() for name, map_ in x.items()}
    for map_ in changed.values():
        map_[:, :, 1, 2] += 1
    after = heads(changed, torch.tensor([100]))
    for name in CHANNELS:
        same = torch.isclose(before[name], after[name]).all(1)[0]
        assert not torch.isclose(before[name], later[name]).any()
        assert same.tolist() == [[True, True, True], [True, True, False]]


def test_a_file_of_heads_gives_features_of_any_timestep(tmp_path):
    heads, x = trained(), maps(2)
    heads.save(tmp_path / 'heads.safetensors')
    features = TimestepHeads.load(tmp_path / 'heads.safetensors').at(
        {name: map_.unsqueeze(1) for name, map_ in x.items()}, [50, 261, 999]
    )
    for t, timestep in enumerate((50, 261, 999)):
        one = heads(x, torch.full((2,), timestep))
        for name, map_ in one.items():
            assert features[name].shape == (2, 3, *map_.shape[1:])
            torch.testing.assert_close(features[name][:, t], map_)


def test_errors(tmp_path):
    heads = TimestepHeads(CHANNELS)
    with pytest.raises(ValueError, match=r'no heads for unet-out; there are for mid-repeat1-res-out'):
        heads({'unet-out': torch.zeros(1, 4, 2, 2)}, torch.tensor([1]))
    with pytest.raises(ValueError, match='several timesteps'):
        heads.at({'mid-repeat1-res-out': torch.zeros(1, 2, 8, 2, 2)}, [50])
    save_file({'x': torch.zeros(1)}, tmp_path / 'unet.safetensors')
    with pytest.raises(ValueError, match='holds no heads'):
        TimestepHeads.load(tmp_path / 'unet.safetensors')
    with pytest.raises(FileNotFoundError, match='no heads at'):
        TimestepHeads.load(tmp_path / 'none.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes(b'1234')
    with pytest.raises(OSError, match='cannot read'):
        TimestepHeads.load(tmp_path / 'cut.safetensors')
