"""On a cluster: all that can be used is there once, whatever is damaged or killed on the way."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.feature_files import find_images
from diffseg.feature_shards import SHARDS, list_features, list_files, read_features

ray = pytest.importorskip('ray', reason='ray is missing: make test-ray')
import pyarrow  # noqa: E402
from pyarrow import parquet  # noqa: E402

from diffseg import ray_engine  # noqa: E402

LAYERS = ['up-level1-repeat1-vit-block0-cross-q', 'up-level2-repeat0-res-out']


def png(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, 'png')
    return data.getvalue()


def save_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, 'w') as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in a folder, in tar files and in Parquet files, some damaged."""
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'a').mkdir()
    (folder / 'a/0.png').write_bytes(png(0))
    (folder / 'a/1.png').write_bytes(png(1, (72, 64)))
    (folder / 'a/half.png').write_bytes(png(2)[:500])
    (folder / 'labels.json').write_bytes(b'{}')
    save_tar(folder / 's0.tar', {'3.png': png(3), '3.json': b'{}', '4.png': png(4)[:500], '5.png': png(5)})
    save_tar(folder / 's1.tar', {'6.png': png(6), '7.png': png(7)})
    (folder / 's1.tar').write_bytes((folder / 's1.tar').read_bytes()[: len(png(6)) + 4000])
    rows = pyarrow.table({'image': [{'bytes': png(8), 'path': None}, {'bytes': None, 'path': 'x'}], 'label': [0, 1]})
    parquet.write_table(rows, folder / 'p0.parquet', row_group_size=1)
    (folder / 'p1.parquet').write_bytes((folder / 'p0.parquet').read_bytes()[:-20])
    return folder


GOOD = ['a/0.png', 'a/1.png', 'p0.parquet/0', 's0.tar/3.png', 's0.tar/5.png', 's1.tar/6.png']
BAD = ['a/half.png', 'p0.parquet/1', 'p1.parquet', 's0.tar/4.png', 's1.tar']


SETTINGS = ['--layers', *LAYERS, '--timesteps', '50', '300', '--dtype', 'float32', '--device', 'cpu']


@pytest.fixture(scope='module')
def tool(load_tool):
    idle = {'num_workers_soft_limit': 4}  # processes that wait for another task, as each imports for seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        ray.init('local', num_cpus=2, object_store_memory=2**27, include_dashboard=False, _system_config=idle)
        yield load_tool('extract_features')
        ray.shutdown()


@pytest.fixture
def run(tool, photos, tiny_pipeline, tmp_path, capfd):
    def run(*options):
        capfd.readouterr()
        arguments = [photos, '--engine', 'ray', '--model', tiny_pipeline, '--out', tmp_path, '--actors', 1, *options]
        status = tool.main([*map(str, arguments), *SETTINGS])
        return status, *capfd.readouterr()

    return run


def test_all_that_can_be_used_is_there_once_and_a_second_run_goes_on(run, photos, tiny_pipeline, tmp_path):
    status, out, err = run('--batch', '2')
    assert status == 1 and '6 written, 0 already there, 5 failed' in out and 'skipping 1 .json' in out
    failures = [line.split(': ')[1] for line in err.splitlines() if line.startswith('failed: ')]
    assert failures == BAD
    assert sorted(list_features(tmp_path)) == GOOD

    extractor = DiffusionExtractor(tiny_pipeline, LAYERS, [50, 300])
    images = {'a/1.png': photos / 'a/1.png', 's0.tar/3.png': io.BytesIO(png(3)), 'p0.parquet/0': io.BytesIO(png(8))}
    written = {name: rest for name, *rest in read_features(tmp_path)}
    assert sorted(written) == GOOD
    for name, image in images.items():
        activations, metadata = written[name]
        with torch.inference_mode():
            expected = extractor(read_image(image)[None])
        assert activations.keys() == expected.keys()
        for layer, values in expected.items():
            torch.testing.assert_close(activations[layer].float(), values[0], atol=2e-3, rtol=2e-3)
        assert metadata['source'] == name and metadata['input_size'] == ('72x64' if name == 'a/1.png' else '64x64')
        assert json.loads(metadata['timesteps']) == [50, 300]

    shards = sorted(tmp_path.glob('*.tar'))
    with tarfile.open(shards[0]) as archive:
        lost = len(archive.getnames()) - 1
    shards[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in shards[1:]}
    status, out, err = run()
    assert status == 1 and f'{lost} written, {6 - lost} already there, 5 failed' in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(list_features(tmp_path)) == GOOD


def test_a_killed_actor_changes_nothing(tool, photos, tiny_pipeline, tmp_path):
    def make(device):
        def kill_once(module, arguments):
            if not (tmp_path / 'killed').exists():
                (tmp_path / 'killed').touch()
                os.kill(os.getpid(), signal.SIGKILL)

        extractor = DiffusionExtractor(tiny_pipeline, LAYERS[:1], [50], dtype='float32')
        extractor.register_forward_pre_hook(kill_once)
        return extractor

    items, *_ = find_images(photos, suffixes=SHARDS)
    settings = ray_engine.Settings(make, 'cpu', 1, 0, torch.float32, 1)
    fingerprint = DiffusionExtractor(tiny_pipeline, LAYERS[:1], [50]).fingerprint
    stored = {'size': (64, 64)}
    sink = ray_engine.FeatureSink(str(tmp_path / 'out'), '.parquet')
    ray_engine.extract_files(list_files(items, {})[0], items[0].fs, sink, settings, fingerprint, stored, 1)
    assert (tmp_path / 'killed').exists() and sink.written == 4 == len(list_features(tmp_path / 'out'))
    assert sorted(name for name, _ in sink.failures) == BAD[1:]
    name, activations, metadata = next(read_features(tmp_path / 'out'))
    assert name == metadata['source'] and activations[LAYERS[0]].dtype == torch.float32


def test_nodes_that_compute_otherwise_are_refused(tiny_pipeline):
    def make(device):
        return DiffusionExtractor(tiny_pipeline, LAYERS, [50], dtype='bfloat16')

    settings = ray_engine.Settings(make, 'cpu', 1, 0, torch.float16, 1)
    fingerprint = DiffusionExtractor(tiny_pipeline, LAYERS, [50]).fingerprint
    with pytest.raises(ValueError, match=r'differ in .*dtype'):
        ray_engine.Extraction(settings, fingerprint, {})


def test_nothing_to_read(tmp_path):
    sink = ray_engine.FeatureSink(str(tmp_path), '.tar')
    settings = ray_engine.Settings(None, 'cpu', 1, 0, torch.float16, 1)
    ray_engine.extract_files([], None, sink, settings, {}, {'size': None}, 1)
    assert sink.written == 0
