"""The benchmark: what it counts is what runs, and the bounds hold in their order."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.recorder import ActivationRecorder

QUERY = 'up-level1-repeat1-vit-block0-cross-q'


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('benchmark')


@pytest.fixture
def case(tool, tiny_pipeline):
    def case(**changes):
        defaults = dict(size=64, layers=QUERY, timesteps=1, ensemble=1, dtype='float32', repeat=1)
        return tool.Case(**{'model': str(tiny_pipeline), **defaults, **changes})

    return case


def test_counts_are_exact_on_known_operations(tool):
    linear, conv = torch.nn.Linear(8, 16), torch.nn.Conv2d(4, 6, 3, padding=1, stride=2)
    assert tool.executed(lambda: linear(torch.randn(5, 8))) == 2 * 5 * 8 * 16
    assert tool.executed(lambda: conv(torch.randn(2, 4, 8, 8))) == 2 * 2 * 6 * 4 * 9 * 4 * 4
    query, key = torch.randn(2, 3, 64, 8), torch.randn(2, 3, 7, 8)
    attention = 2 * 2 * 2 * 3 * 64 * 7 * 8
    with torch.no_grad():
        assert tool.executed(lambda: F.scaled_dot_product_attention(query, key, key)) == attention
        with tool.Operations() as operations:
            F.scaled_dot_product_attention(query.to('meta'), key.to('meta'), key.to('meta'))
    assert operations.total() == attention


def test_needed_operations_are_those_with_a_path_to_the_wanted(tool):
    x, w = torch.empty(4, 8, device='meta'), torch.empty(8, 8, device='meta')
    with tool.Operations() as operations:
        a = x @ w
        b = a.view(2, 2, 8).transpose(0, 1).reshape(4, 8) @ w
        c = a @ w
        c.add_(b @ w)
    cost = 2 * 4 * 8 * 8
    assert operations.total() == 4 * cost
    assert operations.needed([a]) == cost
    assert operations.needed([b]) == 2 * cost
    assert operations.needed([c]) == 4 * cost
    assert operations.needed([a, b]) == 2 * cost


@pytest.mark.parametrize('stop_early', [True, False])
def test_meta_device_counts_what_the_cpu_executes(tool, tiny_unet, stop_early):
    unet = tiny_unet()
    inputs = torch.randn(1, 4, 16, 8), torch.tensor(5), torch.randn(1, 7, 32)
    counts = []
    for device in ('cpu', 'meta'):
        recorder = ActivationRecorder(unet.to(device), [QUERY], stop_early)
        with torch.no_grad():
            counts.append(tool.executed(lambda recorder=recorder, d=device: recorder(*(each.to(d) for each in inputs))))
            with tool.Operations() as operations:
                recorder(*(each.to(device) for each in inputs)) if device == 'meta' else None
    assert counts[0] == counts[1] == operations.total() > 0


def test_bounds(tool, case):
    counts = [tool.count(case(timesteps=t, ensemble=e)) for t, e in ((1, 1), (3, 1), (1, 3), (3, 4))]
    for flop in counts:
        assert 0 < flop['least'] <= flop['ours'] < flop['full'] <= flop['published']
    assert counts[0]['full'] == counts[0]['published']
    assert counts[1] == counts[2]
    assert counts[3]['published'] == 12 * counts[0]['published']
    assert counts[3]['ours'] == 12 * counts[0]['ours'] - 11 * counts[0]['encode']


def test_dead_ends_are_all_that_exceeds_the_least(tool, case):
    flop = tool.count(case(layers='up-level1-repeat1-vit-block0-self-k'))  # the queries are computed before the keys
    channels, cells = 64, 2 * 2
    assert flop['ours'] - flop['least'] == 2 * channels * channels * cells


def test_the_last_activation_needs_all_but_the_dead_ends(tool, case):
    flop = tool.count(case(layers='unet-out'))
    assert flop['ours'] == flop['full'] == flop['least']


def test_the_extractor_executes_what_is_counted(tool, case, request):
    sdxl, pixels = (str(request.getfixturevalue(f'tiny_{kind}_pipeline')) for kind in ('sdxl', 'pixel'))
    for each in (
        case(timesteps=2, ensemble=2),
        case(size=80),
        case(model=sdxl, layers='practical', random=True),
        case(model=pixels, layers='adm-1', random=True, ensemble=2),
    ):
        measured = tool.measure(each)
        counted = tool.count(each)
        assert measured['ours']['flop'] == counted['ours']
        if each.size == 64:  # of other sizes, published code takes what the UNet takes
            assert measured['published']['flop'] == counted['published']
        assert measured['ratio'] > 0 and measured['ours']['ms'] > 0


def test_published_procedure_gives_the_same_maps(tool, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, 'sample', lambda self, generator=None: self.mode())
    monkeypatch.setattr(torch, 'randn_like', torch.zeros_like)
    layers = [QUERY, 'mid-vit-out']
    condition = tool.conditioning(tool.meta_unet(tiny_pipeline))
    options = dict(prompt=condition, ensemble=2, vae_sample='mode', trajectory='clean')
    extractor = DiffusionExtractor(tiny_pipeline, layers, [0, 3], **options)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        ours, theirs = extractor(images), tool.published(extractor, images, condition)
    assert list(ours) == list(theirs) == layers
    for name in layers:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-2, rtol=1e-2)  # scaled by sqrt(alpha) of nearly 1


def test_main(tool, tiny_pipeline, tmp_path, capfd):
    options = f'--model {tiny_pipeline} --sizes 64 --random --repeat 1 --device cpu --json {tmp_path / "b.json"}'
    assert tool.main(options.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith('| size | layers | T | E | dtype | ms/image |')
    assert lines[4].startswith('| 64 | practical | 1 | 1 | float32 |') and lines[4].count('|') == lines[2].count('|')
    (row,) = json.loads((tmp_path / 'b.json').read_text())
    assert row['measured']['ours']['flop'] == row['flop']['ours']
    if sys.platform == 'linux':
        assert row['measured']['ours']['peak'] > 50e6


def test_published_matching_finds_the_same(tool):
    source, target = torch.randn(2, 16, 6, 6)
    points = torch.tensor([[0, 0], [10, 20], [39, 29]])
    ours = tool.match_points(source, target, points, (30, 40), (30, 40))
    theirs = tool.published_matches(source, target, points, (30, 40))
    similarity = F.normalize(F.interpolate(target[None], (30, 40), mode='bilinear')[0], dim=0)
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):  # at the borders, pixels of the same descriptor
        torch.testing.assert_close(similarity[:, a[1], a[0]], similarity[:, b[1], b[0]])


def test_matching(tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tool, 'in_subprocess', tool.measure_matching)
    options = f'--matching 6 8 --channels 16 --image-size 30 40 --repeat 1 --device cpu --json {tmp_path / "m.json"}'
    assert tool.main(options.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith('| cells | channels | image | keypoints | ms |')
    assert [line.split('|')[1:5] for line in lines[4:]] == [[f' {n} ', ' 16 ', ' 30 x 40 ', ' 10 '] for n in (6, 8)]
    for row in json.loads((tmp_path / 'm.json').read_text()):
        assert row['measured']['ratio'] > 0 and row['measured']['same'] <= 10


def test_published_propagation_finds_the_same(tool):
    target, context, labels = torch.randn(8, 6, 9), torch.randn(3, 8, 6, 9), torch.rand(3, 2, 6, 9)
    ours = tool.propagate_labels(target, context, labels, 5, 2, 0.2)
    torch.testing.assert_close(tool.masked_matrix(target, context, labels, 5, 2, 0.2), ours)


def test_propagation(tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tool, 'in_subprocess', tool.measure_propagation)
    options = f'--propagation 8 12 2 --channels 16 --repeat 1 --device cpu --json {tmp_path / "p.json"}'
    assert tool.main(options.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith('| cells | frames | channels | ms | published ms | ratio |')
    assert lines[4].split('|')[1:4] == [' 8 x 12 ', ' 2 + 1 ', ' 16 ']
    (row,) = json.loads((tmp_path / 'p.json').read_text())
    assert row['measured']['difference'] < 1e-5 and row['measured']['same'] == 1
    with pytest.raises(SystemExit):
        tool.main(['--propagation', '8', '12'])
    assert 'H W FRAMES' in capfd.readouterr().err


def test_count_only_and_errors(tool, capsys):
    assert tool.main(['--model', 'sd15', '--sizes', '512', '--layers', 'practical', 'dift', '--count-only']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('|')[-2].strip() for line in lines[4:]] == ['80%', '55%']  # of a UNet pass
    assert tool.main(['--model', 'sd15', '--layers', 'no-such-layer', '--count-only']) == 2
    assert 'no-such-layer' in capsys.readouterr().err


def test_architectures_are_the_published_ones(tool):
    """SD1.5 has 859.5M parameters, and at 512 pixels needs 1.12 TFLOP to encode and 0.80 for the UNet."""
    unet = tool.meta_unet('sd15')
    assert isinstance(unet, UNet2DConditionModel) and sum(p.numel() for p in unet.parameters()) == 859_520_964
    flop = tool.count(tool.Case('sd15', 512, 'unet-out', 1, 1, 'float32'))
    assert flop['unet'] / 1e12 == pytest.approx(0.80, abs=0.01)
    assert flop['encode'] / 1e12 == pytest.approx(1.12, abs=0.01)
