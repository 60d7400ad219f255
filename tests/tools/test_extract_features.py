"""Features on disk: all of them, once, whole, of one configuration."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file

from diffseg import feature_extraction
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.files import write_bytes

DEMO = Path(__file__).resolve().parents[2] / 'demo/tiny-sd'
LAYERS = ['up-level1-repeat1-vit-block0-cross-q', 'up-level2-repeat0-res-out']


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('extract_features')


@pytest.fixture
def photos(tmp_path):
    """Five images in two folders with meeting stems, labels beside them, and a hidden file."""
    folder = tmp_path / 'photos'
    generator = np.random.default_rng(0)
    for name in ('a/x.png', 'a/x.jpg', 'a/y.png', 'b/x.png', 'b/deep/x.png'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    np.save(folder / 'a' / 'x.npy', np.zeros(3))
    (folder / '.hidden.png').write_bytes(b'')
    return folder


@pytest.fixture
def run(tool, photos, tiny_pipeline, tmp_path):
    def run(*options, source=photos, out=tmp_path / 'out', layers=LAYERS, timesteps=('50', '300')):
        arguments = [source, '--model', tiny_pipeline, '--out', out, '--device', 'cpu', *options]
        return tool.main([*map(str, arguments), '--layers', *layers, '--timesteps', *timesteps])

    return run


def outputs(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


NAMES = ['a/x.jpg', 'a/x.png', 'a/y.png', 'b/deep/x.png', 'b/x.png']
WHOLE = sorted(['config.json', *(f'{name}.safetensors' for name in NAMES)])


def test_every_image_has_its_own_file_with_the_extractors_values(run, photos, tmp_path, tiny_pipeline, capsys):
    assert run('--save-dtype', 'float32', '--batch', '2') == 0
    assert outputs(tmp_path / 'out') == WHOLE
    extractor = DiffusionExtractor(tiny_pipeline, LAYERS, [50, 300])
    with torch.inference_mode():
        expected = extractor(read_image(photos / 'b/x.png')[None])
    with safe_open(tmp_path / 'out/b/x.png.safetensors', 'pt') as file:
        assert set(file.keys()) == set(LAYERS)
        metadata = file.metadata()
        for name in LAYERS:
            torch.testing.assert_close(file.get_tensor(name), expected[name][0], atol=1e-4, rtol=1e-4)
    assert metadata['source'] == 'b/x.png' and metadata['input_size'] == '64x64'
    assert json.loads(metadata['timesteps']) == [50, 300]
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert config['layers'] == LAYERS and config['save_dtype'] == 'float32'
    captured = capsys.readouterr()
    assert 'skipping 1 .npy' in captured.out and '5 written, 0 already there, 0 failed' in captured.out


def test_the_estimate_is_what_is_written(run, tool, tmp_path, capsys):
    assert run('--size', '72', '104', '--dry-run') == 0
    assert not (tmp_path / 'out').exists()
    assert run('--size', '72', '104') == 0
    tensors = [load_file(path) for path in (tmp_path / 'out').rglob('*.safetensors')]
    written = sum(value.nbytes for each in tensors for value in each.values())
    dry, wet = (line for line in capsys.readouterr().out.splitlines() if 'to write' in line)
    assert tool._bytes(written) in dry and tool._bytes(written) in wet


def test_the_estimate_knows_the_vae(tool, photos, tmp_path, capsys):
    """The VAE of the demo's model has a factor of 4, and Stable Diffusion's one of 8."""
    options = '--layers up-level2-repeat0-res-out --timesteps 50 --dry-run --device cpu'
    assert tool.main([str(photos), '--model', str(DEMO), '--out', str(tmp_path / 'out'), *options.split()]) == 0
    channels, cells, images = 64, 8 * 8, 5  # of 64 x 64 pixels at a stride of 8
    assert f'{tool._bytes(images * channels * cells * 2)} in float16' in capsys.readouterr().out


def test_the_device_need_not_be_given(tool, photos, tiny_pipeline, tmp_path):
    paths = [photos, '--model', tiny_pipeline, '--out', tmp_path / 'out']
    assert tool.main([*map(str, paths), '--layers', LAYERS[0], '--timesteps', '50']) == 0
    assert outputs(tmp_path / 'out') == WHOLE


def test_resumes_and_ignores_halves(run, tmp_path, capsys):
    assert run() == 0
    out = tmp_path / 'out'
    lost, half, whole = (out / f'{name}.safetensors' for name in NAMES[:3])
    reference = {path: load(path.read_bytes()) for path in (lost, half)}
    time = whole.stat().st_mtime_ns
    lost.unlink()
    half.write_bytes(half.read_bytes()[:-10])
    assert run('--batch', '3') == 0
    assert '2 written, 3 already there' in capsys.readouterr().out
    assert whole.stat().st_mtime_ns == time
    for path, tensors in reference.items():
        torch.testing.assert_close(load_file(path), tensors, atol=2e-3, rtol=2e-3)
    assert outputs(out) == WHOLE


def test_nothing_is_seen_of_an_interrupted_write(run, tool, tmp_path, monkeypatch, capsys):
    write_whole = Path.write_bytes

    def interrupted(path, data):
        if not path.is_relative_to(tmp_path / 'out'):  # encoded prompts, say
            return write_whole(path, data)
        path.open('wb').write(data[:99])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', interrupted)
        assert run() == 130
    assert 'the same command goes on from there' in capsys.readouterr().err
    assert outputs(tmp_path / 'out') == ['config.json']
    assert run() == 0
    assert outputs(tmp_path / 'out') == WHOLE


def test_a_run_that_is_ended_finishes_its_files(run, tmp_path, monkeypatch, capsys):
    def write(fs, path, data):
        os.kill(os.getpid(), signal.SIGTERM)
        write_bytes(fs, path, data)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='143'):
        patch.setattr(feature_extraction, 'write_bytes', write)
        run()
    written = len(outputs(tmp_path / 'out')) - 1
    assert 1 <= written < 5 and run() == 0
    assert f'{5 - written} written, {written} already there' in capsys.readouterr().out
    assert outputs(tmp_path / 'out') == WHOLE


def test_archives_and_stores(run, photos, tmp_path, capsys):
    archive = shutil.make_archive(tmp_path / 'photos', 'zip', photos)
    store = MemoryFileSystem()
    for expected in ('5 written, 0 already there', '0 written, 5 already there'):
        assert run(source=f'zip://::{archive}', out='memory://features/a') == 0
        assert expected in capsys.readouterr().out
    assert run() == 0
    for name in NAMES:
        stored = load(store.cat_file(f'/features/a/{name}.safetensors'))
        torch.testing.assert_close(stored, load_file(tmp_path / f'out/{name}.safetensors'), rtol=0, atol=0)
    store.rm('/features', recursive=True)


def test_a_replaced_image_is_extracted_again(run, photos, tmp_path, capsys):
    assert run() == 0
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photos / 'b/x.png')
    assert run() == 0
    assert '1 written, 4 already there' in capsys.readouterr().out


def test_configurations_are_not_mixed(run, tmp_path, capsys):
    assert run() == 0
    before = outputs(tmp_path / 'out')
    assert run('--size', '32', '--prompt', 'a horse', timesteps=['50']) == 2
    message = capsys.readouterr().err
    assert all(key in message for key in ('timesteps', 'size', 'prompt')) and 'save_dtype' not in message
    assert outputs(tmp_path / 'out') == before


def test_another_text_encoder_is_another_configuration(run, tiny_pipeline, tmp_path, capsys):
    other = tiny.change_text_encoder(Path(shutil.copytree(tiny_pipeline, tmp_path / 'other')))
    assert run() == 0
    assert run('--model', other) == 2
    assert 'another configuration (text_encoder: ' in capsys.readouterr().err


def test_a_tiny_vae_in_place_of_the_models(run, photos, tiny_pipeline, tiny_taesd, tmp_path, capsys):
    assert run('--vae', tiny_taesd, '--save-dtype', 'float32') == 0
    extractor = DiffusionExtractor(tiny_pipeline, LAYERS, [50, 300], weights={'vae': tiny_taesd})
    with torch.no_grad():
        expected = extractor(read_image(photos / 'b/x.png')[None])
    stored = load_file(tmp_path / 'out' / 'b/x.png.safetensors')
    assert all(torch.equal(stored[name], x[0]) for name, x in expected.items())
    assert run('--save-dtype', 'float32') == 2
    assert 'another configuration (weights: ' in capsys.readouterr().err


def test_options_of_transformers(run, photos, pipeline_folder, tmp_path, capsys):
    flux, layer = pipeline_folder('flux'), 'vit-block1-mod'
    options = '--model', flux, '--save-dtype', 'float32', '--discard', '3', '5', '--embedded-guidance', '2'
    assert run(*options, source=photos / 'b/x.png', layers=[layer], timesteps=['0.26']) == 0
    extractor = DiffusionExtractor(flux, [layer], [0.26], discard=[3, 5], embedded_guidance=2.0)
    with torch.inference_mode():
        expected = extractor(read_image(photos / 'b/x.png')[None])[layer][0]
    stored = load_file(tmp_path / 'out/x.png.safetensors')[layer]
    torch.testing.assert_close(stored, expected, atol=1e-5, rtol=1e-5)
    assert run(*options[:-1], '3', source=photos / 'b/x.png', layers=[layer], timesteps=['0.26']) == 2
    assert 'another configuration (embedded_guidance: ' in capsys.readouterr().err


def test_shards_share_the_work(run, tmp_path):
    for shard, count in (('0/3', 2), ('2/3', 3), ('1/3', 5)):
        assert run('--shard', shard) == 0
        assert len(list((tmp_path / 'out').rglob('*.safetensors'))) == count
    assert outputs(tmp_path / 'out') == WHOLE


@pytest.mark.parametrize('shard', ['3/3', '-1/3', 'half', '0/0'])
def test_wrong_shards(run, shard, capsys):
    with pytest.raises(SystemExit, match='2'):
        run(f'--shard={shard}')
    assert '--shard' in capsys.readouterr().err


def test_bad_images_are_reported_and_the_rest_is_done(run, photos, tmp_path, capsys):
    (photos / 'a/y.png').write_bytes((photos / 'a/y.png').read_bytes()[:2000])
    (photos / 'b/text.png').write_text('no image')
    Image.new('RGB', (4, 4)).save(photos / 'b/tiny.png')
    assert run('--batch', '4') == 1
    captured = capsys.readouterr()
    failed = [line for line in captured.err.splitlines() if line.startswith('failed')]
    assert sorted(line.split(': ')[1] for line in failed) == ['a/y.png', 'b/text.png', 'b/tiny.png']
    assert '4 written, 0 already there, 3 failed' in captured.out
    assert outputs(tmp_path / 'out') == [name for name in WHOLE if 'y.png' not in name]


def test_list_files(run, photos, tmp_path, capsys):
    (photos / 'list.txt').write_text('b/x.png\n\na/x.jpg\nb/x.png\na/none.png\n')
    assert run(source=photos / 'list.txt') == 1
    assert 'failed: a/none.png' in capsys.readouterr().err
    assert outputs(tmp_path / 'out') == ['a/x.jpg.safetensors', 'b/x.png.safetensors', 'config.json']
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/list.txt').write_text(f'{photos}/b/x.png\n')
    assert run(source=tmp_path / 'other/list.txt') == 2
    assert '--root' in capsys.readouterr().err
    assert run('--root', photos, source=tmp_path / 'other/list.txt') == 0
    assert '0 written, 1 already there' in capsys.readouterr().out


def test_lack_of_space_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert run() == 2
    assert 'not enough space' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_user_errors(run, photos, tmp_path, capsys):
    assert run(layers=['up-level1-repeat1-vit-block0-crossq']) == 2
    assert 'cross-q' in capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    assert run(source=tmp_path / 'empty') == 2
    assert 'no images' in capsys.readouterr().err


def test_models_of_pixel_space(tool, photos, tiny_pixel_pipeline, tmp_path, capsys):
    options = f'--model {tiny_pixel_pipeline} --layers adm-4 --timesteps 50 --out {tmp_path}/out --device cpu'.split()
    assert tool.main([str(photos), *options]) == 0
    assert '1 layers' in capsys.readouterr().out
    assert load_file(tmp_path / 'out/a/y.png.safetensors')['up-level1-repeat1-vit-out'].shape == (1, 16, 32, 32)
    assert tool.main([str(photos), *options, '--prompt', 'a horse']) == 2
    assert "leave out 'a horse'" in capsys.readouterr().err


def test_another_engine_names_what_it_needs(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert run('--engine', 'ray') == 2
    assert "--engine ray needs ray: pip install 'diffseg[ray]'" in capsys.readouterr().err


def test_options_that_an_engine_does_not_have_are_refused(run, capsys):
    for options, named in (('--engine ray --shard 0/2', '--shard'), ('--actors 2', '--actors')):
        with pytest.raises(SystemExit):
            run(*options.split())
        assert f'{named} is an option of --engine' in capsys.readouterr().err
