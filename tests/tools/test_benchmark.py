"""The benchmark: what it counts is what runs, and the bounds hold in their order."""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import asdict

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffseg.benchmarking import Operations, executed
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.placeholders import placeholder_conditioning
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


@pytest.mark.parametrize('stop_early', [True, False])
def test_meta_device_counts_what_the_cpu_executes(tool, tiny_unet, stop_early):
    unet = tiny_unet()
    inputs = torch.randn(1, 4, 16, 8), torch.tensor(5), torch.randn(1, 7, 32)
    counts = []
    for device in ('cpu', 'meta'):
        recorder = ActivationRecorder(unet.to(device), [QUERY], stop_early)
        with torch.no_grad():
            counts.append(executed(lambda recorder=recorder, d=device: recorder(*(each.to(d) for each in inputs))))
            with Operations() as operations:
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


@pytest.fixture
def shallow_sdxl(tiny_sdxl_pipeline, tmp_path):
    """Configurations of SDXL's kind with fewer transformer blocks, which counting passes one operation at a time."""
    folder = shutil.copytree(tiny_sdxl_pipeline, tmp_path / 'sdxl', ignore=shutil.ignore_patterns('*.safetensors'))
    path = folder / 'unet/config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'transformer_layers_per_block': [1, 1, 2]}))
    return folder


def test_the_extractor_executes_what_is_counted(tool, case, shallow_sdxl, tiny_pixel_pipeline):
    for each in (
        case(timesteps=2, ensemble=2),
        case(size=80),
        case(model=str(shallow_sdxl), layers='up-level1-repeat1-vit-block0-cross-q', random=True),
        case(model=str(tiny_pixel_pipeline), layers='adm-1', random=True, ensemble=2),
    ):
        measured = tool.measure(each)
        counted = tool.count(each)
        assert measured['ours']['flop'] == counted['ours']
        if each.size == 64:  # of other sizes, published code takes what the UNet takes
            assert measured['published']['flop'] == counted['published']
        assert measured['ratio'] > 0 and measured['ours']['ms'] > 0


@pytest.mark.parametrize(('kind', 'layer'), [('flux', 'vit-block1-mod'), ('pixart-sigma', 'vit-block1-self-q')])
def test_transformers_execute_what_is_counted(tool, case, pipeline_folder, kind, layer):
    each = case(model=str(pipeline_folder(kind)), layers=layer, random=True, ensemble=2)
    measured, counted = tool.measure(each), tool.count(each)
    for name in ('ours', 'published'):
        assert measured[name]['flop'] == counted[name] > 0
    assert 0 < counted['needed'] <= counted['stopped'] < counted['pass']


def test_published_procedure_gives_the_same_maps(tool, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, 'sample', lambda self, generator=None: self.mode())
    monkeypatch.setattr(torch, 'randn_like', torch.zeros_like)
    layers = [QUERY, 'mid-vit-out']
    condition = placeholder_conditioning(tool.load_config(tiny_pipeline).network)
    options = dict(prompt=condition, ensemble=2, vae_sample='mode', trajectory='clean')
    extractor = DiffusionExtractor(tiny_pipeline, layers, [0, 3], **options)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        ours, theirs = extractor(images), tool.published(extractor, images, condition)
    assert list(ours) == list(theirs) == layers
    for name in layers:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-2, rtol=1e-2)  # scaled by sqrt(alpha) of nearly 1


def test_main(tool, tiny_pipeline, tmp_path, capfd, monkeypatch):
    def in_this_process(script, case):
        assert script == tool.__file__
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert tool.main(['--case', json.dumps(asdict(case))]) == 0
        return json.loads(output.getvalue())

    monkeypatch.setattr(tool, 'in_subprocess', in_this_process)
    options = f'--model {tiny_pipeline} --sizes 64 --random --repeat 1 --device cpu --json {tmp_path / "b.json"}'
    assert tool.main(options.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith('| size | layers | T | E | dtype | ms/image |')
    assert lines[4].startswith('| 64 | practical | 1 | 1 | float32 |') and lines[4].count('|') == lines[2].count('|')
    (row,) = json.loads((tmp_path / 'b.json').read_text())
    assert row['measured']['ours']['flop'] == row['flop']['ours']
    if sys.platform == 'linux':
        assert row['measured']['ours']['peak'] > 50e6


def test_count_only_and_errors(tool, capsys):
    assert tool.main(['--model', 'sd15', '--sizes', '512', '--layers', 'practical', 'dift', '--count-only']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('|')[-2].strip() for line in lines[4:]] == ['80%', '55%']  # of a pass
    assert tool.main(['--model', 'sd15', '--layers', 'no-such-layer', '--count-only']) == 2
    assert 'no-such-layer' in capsys.readouterr().err


def test_a_gpu_report_needs_a_gpu_and_measures_each_case_in_a_process(tool, tiny_pipeline, tmp_path, capsys):
    assert tool.main(['--gpu-report', str(tmp_path), '--device', 'cpu']) == 2
    assert "error: --gpu-report needs a GPU: --device is 'cpu', and" in capsys.readouterr().err
    setting = tool.gpu_report.Setting(str(tiny_pipeline), 64, (QUERY,))
    case = tool.gpu_report.Case('tiny', setting, 'sdpa', False, 'cpu', profiled=True)
    assert tool.main(['--gpu-case', json.dumps(asdict(case))]) == 0
    kernels = json.loads(capsys.readouterr().out)['kernels']
    assert 'convolution' in ''.join(kernel['name'] for kernel in kernels)


def test_architectures_are_the_published_ones(tool):
    """SD1.5 has 859.5M parameters, and at 512 pixels needs 1.12 TFLOP to encode and 0.80 for the UNet."""
    unet = tool.meta_network('sd15')
    assert isinstance(unet, UNet2DConditionModel) and sum(p.numel() for p in unet.parameters()) == 859_520_964
    flop = tool.count(tool.Case('sd15', 512, 'unet-out', 1, 1, 'float32'))
    assert flop['pass'] / 1e12 == pytest.approx(0.80, abs=0.01)
    assert flop['encode'] / 1e12 == pytest.approx(1.12, abs=0.01)
