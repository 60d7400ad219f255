"""Matches of given points: printed, drawn, and from activations that lie on disk."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from safetensors.torch import load_file

from diffseg.models.correspondence import match_points
from diffseg.visualization import CORRECT, WRONG

LAYERS = 'up-level3-repeat0-vit-block0-self-k', 'up-level2-repeat0-res-out'  # strides 8 and 16, 32 channels each
ZERO_SHOT = '--layers', *LAYERS, '--timesteps', '50', '261'


@pytest.fixture(scope='module')
def tool(load_tool: Callable) -> ModuleType:
    return load_tool('apply/match')


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png and its mirror image b.png, of 96 x 64 pixels."""
    folder = tmp_path_factory.mktemp('images')
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)
    image.save(folder / 'a.png')
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / 'b.png')
    return folder


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A model with an aggregation network for two inverted timesteps."""
    neck = {'type': 'AggregationNeck', 'levels': [[32, 32]], 'timesteps': 2, 'out_channels': 32, 'num_groups': 4}
    backbone = {'type': 'DiffusionBackbone', 'model': str(tiny_pipeline), 'layers': list(LAYERS)}
    backbone |= {'timesteps': [-1, 200], 'trajectory': {'type': 'inversion', 'steps': 5}}
    model = {'type': 'CorrespondenceModel', 'backbone': backbone, 'neck': neck, 'prompt': 'a photo of a {category}'}
    pipeline = [{'type': 'LoadPair'}, {'type': 'ResizePair', 'size': 64}, {'type': 'PackPair'}]
    Config({'model': model, 'test_dataloader': {'dataset': {'pipeline': pipeline}}}).dump(tmp_path / 'config.py')
    torch.manual_seed(0)
    init_default_scope('mmseg')
    torch.save({'state_dict': MODELS.build(model).state_dict()}, tmp_path / 'model.pth')
    return tmp_path / 'config.py'


@pytest.fixture
def run(tool: ModuleType, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`run(*options)` matches a.png with itself, or other `files`; what is printed, or the error."""

    def run(*options: object, files: tuple[str, str] = ('a.png', 'a.png'), status: int = 0) -> str:
        paths = [str(images / name) for name in files]
        fixed = ['--out', str(tmp_path / 'out' / 'matches.png'), '--device', 'cpu']
        assert tool.main([*paths, *fixed, *map(str, options)]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def table(printed: str) -> np.ndarray:
    rows = list(csv.DictReader(io.StringIO(printed)))
    return np.array([[float(value) for value in row.values()] for row in rows])


@pytest.mark.parametrize('options', [(), ('--size', 64), ('--trajectory', 'clean', '--ensemble', 2, '--prompt', 'x')])
def test_an_image_matches_itself(run: Callable, tiny_pipeline: Path, tmp_path: Path, options: tuple):
    points = [(0, 0), (80, 50), (40, 20.25), (7, 50)]
    text = [f'{x},{y}' for x, y in points]
    heat = tmp_path / 'heat' / 'map.png'
    printed = run('--points', *text, '--model', tiny_pipeline, *ZERO_SHOT, '--heatmap', heat, *options)
    assert printed.splitlines()[0] == 'source_x,source_y,target_x,target_y,similarity'
    found = table(printed)
    assert np.allclose(found[:, :2], points) and np.allclose(found[:, 2:4], np.round(points))
    assert np.allclose(found[:, 4], 1)
    pictures = [Image.open(path) for path in (tmp_path / 'out' / 'matches.png', heat)]
    assert pictures[0].size == (2 * 576 + 8, 384)
    assert pictures[1].height > 4 * 150 and all(np.asarray(picture).std() > 20 for picture in pictures)


def test_similarities_are_those_of_the_vae_that_is_given(run: Callable, tiny_pipeline: Path, tiny_taesd: Path):
    options = '--points', '3,4', '50.5,60', '--model', tiny_pipeline, *ZERO_SHOT
    printed = [run(*options, *vae, files=('a.png', 'b.png')) for vae in ((), ('--vae', tiny_taesd))]
    assert not np.allclose(*(table(text)[:, 4] for text in printed))


def test_cycle_errors_are_printed_and_drawn(run: Callable, tiny_pipeline: Path, tmp_path: Path):
    options = '--points', '3,4', '50.5,60', '40,20', '--model', tiny_pipeline, *ZERO_SHOT, '--cycle-error'
    printed = run(*options)
    assert printed.splitlines()[0].endswith(',similarity,cycle_error')
    assert np.allclose(table(printed)[2, 5], 0)
    other = json.loads(run(*options, '--format', 'json', files=('a.png', 'b.png')))
    errors = [row['cycle_error'] for row in other]
    assert max(errors) > 0
    picture = Image.open(tmp_path / 'out' / 'matches.png')
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    for error in errors:  # red from a tenth of 96 pixels on
        share = max(0.0, 1 - error / 9.6)
        assert tuple(round(w + share * (c - w)) for c, w in zip(CORRECT, WRONG, strict=True)) in colours


def test_points_from_files_and_json(run: Callable, tiny_pipeline: Path, tmp_path: Path):
    (tmp_path / 'points.csv').write_text('3,4\n\n50.5 60\n')
    (tmp_path / 'points.json').write_text('[[3, 4], [50.5, 60]]')
    results = [
        json.loads(run('--points', points, '--model', tiny_pipeline, *ZERO_SHOT, '--format', 'json', files=pair))
        for points in (tmp_path / 'points.csv', tmp_path / 'points.json')
        for pair in [('a.png', 'b.png')]
    ]
    assert results[0] == results[1] and [row['source_x'] for row in results[0]] == [3, 50.5]
    assert all(-1 <= row['similarity'] <= 1 and 0 <= row['target_x'] <= 95 for row in results[0])


def test_a_config_may_concatenate_its_data_sets(run: Callable, config: Path):
    options = '--config', config, '--category', 'dog', '--points', '3,4', '50,60'
    alone = run(*options)
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset = {'type': 'ConcatDataset', 'datasets': [cfg.test_dataloader.dataset] * 2}
    cfg.dump(config)
    assert run(*options) == alone


def test_what_was_trained_on_inverted_images_matches_generated_ones(
    run: Callable, load_tool: Callable, config: Path, tiny_pipeline: Path, images: Path, tmp_path: Path, capsys
):
    folder = tmp_path / 'generated'
    generate = [str(tiny_pipeline), '--prompt', 'a dog', '--seed', '0', '1', '--steps', '5', '--out', str(folder)]
    generate += ['--layers', *LAYERS, '--timesteps', '0', '400', '--save-dtype', 'float32', '--device', 'cpu']
    generate += ['--spacing', 'leading', '--steps-offset', '0']  # the published ones
    assert load_tool('apply/generate').main(generate) == 0
    capsys.readouterr()
    model = '--config', config, '--checkpoint', tmp_path / 'model.pth', '--category', 'dog'
    points, size = ('--points', '0,0', '30,40', '60,60'), (64, 64)
    files = str(folder / 'a-dog-0.png'), str(folder / 'a-dog-1.png')
    same = table(run(*points, *model, '--features', folder, files=(files[0], files[0])))
    assert np.allclose(same[:, :2], same[:, 2:4])
    recorded = table(run(*points, *model, '--features', folder, files=files))
    inverted = table(run(*points, *model, files=files))
    assert not np.allclose(recorded[:, 4], inverted[:, 4], atol=1e-3)  # other trajectories, other descriptors
    table(run(*points, *model, '--features', folder, files=(files[0], str(images / 'b.png'))))  # has no file there

    network = MODELS.build(Config.fromfile(config).model.neck)
    state = torch.load(tmp_path / 'model.pth')['state_dict']
    network.load_state_dict({k.removeprefix('neck.'): v for k, v in state.items() if k.startswith('neck.')})
    with torch.no_grad():
        stored = [load_file(f'{path}.safetensors') for path in files]
        source, target = (network([each[layer].flatten(0, 1)[None] for layer in LAYERS])[0][0] for each in stored)
        expected = match_points(source, target, torch.tensor([[0, 0], [30, 40], [60, 60]]), size, size)
    assert np.array_equal(recorded[:, 2:4], expected.numpy())
    one_of_both = '--layers', LAYERS[0], '--timesteps', '400'
    assert run(*points, '--model', tiny_pipeline, *one_of_both, '--features', folder, files=files)


def test_errors(run: Callable, tool: ModuleType, config: Path, tiny_pipeline: Path, images: Path, tmp_path: Path):
    model = '--model', tiny_pipeline, *ZERO_SHOT
    assert 'are not all inside' in run('--points', '96,3', *model, status=2)
    assert 'which has 96 x 64 pixels' in run('--points=-1,3', *model, status=2)
    for points in (['1,2', '3'], ['1,x'], ['1,2,3']):
        assert 'are not points' in run('--points', *points, *model, status=2)
    assert 'no-such-file' in run('--points', 'no-such-file', *model, status=2)
    (images / 'broken.png').write_bytes((images / 'a.png').read_bytes()[:200])
    broken = run('--points', '1,1', *model, files=('broken.png', 'a.png'), status=2)
    assert 'broken.png: cannot be read as an image' in broken
    assert 'give --category' in run('--points', '1,1', '--config', config, status=2)
    torch.save({'state_dict': {}}, tmp_path / 'empty.pth')
    options = '--config', config, '--category', 'dog', '--checkpoint', tmp_path / 'empty.pth'
    assert 'empty.pth does not fit' in run('--points', '1,1', *options, status=2)
    with pytest.raises(SystemExit):
        tool.main(['a', 'b', '--points', '1,1', '--out', 'x', '--model', 'm', '--config', 'c'])
