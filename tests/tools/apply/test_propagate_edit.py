"""Edits of one image in others: composites, pictures of the matches, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from diffseg.visualization import CORRECT

LAYERS = 'up-level3-repeat0-vit-block0-self-k', 'up-level2-repeat0-res-out'
SIZE = 64, 96
MODES = 'homography', 'tps'
DEMO = Path(__file__).resolve().parents[3] / 'demo/tiny-sd'


@pytest.fixture(scope='module')
def tool(load_tool: Callable) -> ModuleType:
    return load_tool('apply/propagate_edit')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source.png, its sticker, the source moved to the right and made smaller, and files that are wrong."""
    folder = tmp_path_factory.mktemp('images')
    noise = np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(noise).resize((112, 64), Image.Resampling.BICUBIC))
    Image.fromarray(scene[:, 16:]).save(folder / 'source.png')
    Image.fromarray(scene[:, :96]).save(folder / 'moved.png')
    Image.fromarray(scene[:, 16:]).resize((89, 61)).save(folder / 'small.png')
    sticker = np.zeros((*SIZE, 4), np.uint8)
    sticker[20:52, 16:64] = 255, 0, 255, 255
    Image.fromarray(sticker).save(folder / 'sticker.png')
    Image.fromarray(sticker[..., :3]).save(folder / 'opaque.png')
    (folder / 'broken.png').write_bytes(b'no image')
    return folder


@pytest.fixture
def run(tool, folder, tiny_pipeline, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """`run(*targets, options=(), status=0)`: what is printed, or the errors; files go to tmp_path/out."""
    monkeypatch.chdir(folder)
    model = '--model', tiny_pipeline, '--layers', *LAYERS, '--timesteps', 50, '--size', *SIZE

    def run(*targets, options=(), model=model, sticker='sticker.png', status=0) -> str:
        fixed = '--out', tmp_path / 'out', '--device', 'cpu', '--samples', 400, '--threshold', 3
        assert tool.main([*map(str, ('source.png', sticker, *targets, *fixed, *model, *options))]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


@pytest.mark.parametrize('mode', MODES)
def test_an_image_gets_its_own_sticker_where_it_belongs(run, folder, tmp_path, mode):
    printed = run('source.png', options=('--mode', mode, '--overview', tmp_path / 'new' / 'sheet.png'))
    assert printed == f'source.png, {mode}: 400 of 400 matches used\n'
    edited = pixels(tmp_path / f'out/source_{mode}.png').astype(int)
    sticker = pixels(folder / 'sticker.png').astype(int)
    inside = sticker[..., 0] == 255
    inner = cv2.erode(inside.astype(np.uint8), np.ones((5, 5))) > 0
    near = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5))) > 0
    assert np.abs(edited - sticker)[inner].max() <= 1
    assert np.array_equal(edited[~near], pixels(folder / 'source.png')[~near])
    matches = pixels(tmp_path / f'out/source_{mode}_matches.png').astype(int)
    assert matches.shape == (384, 2 * 576 + 8, 3) and (np.abs(matches - CORRECT).max(axis=2) < 8).any()
    assert pixels(tmp_path / 'new/sheet.png').shape[1] > 2 * 192


def test_a_moved_image_gets_it_moved_with_any_model(run, tmp_path):
    backbone = {'type': 'DiffusionBackbone', 'model': str(DEMO), 'layers': [LAYERS[1].replace('out', 'increment')]}
    backbone |= {'timesteps': [0], 'trajectory': 'clean'}
    pipeline = [{'type': 'LoadPair'}, {'type': 'PackPair'}]
    config = {'model': {'type': 'CorrespondenceModel', 'backbone': backbone, 'prompt': 'a {category}'}}
    Config(config | {'test_dataloader': {'dataset': {'pipeline': pipeline}}}).dump(tmp_path / 'config.py')
    run('moved.png', 'source.png', model=('--config', tmp_path / 'config.py', '--category', 'dog'))
    edited = pixels(tmp_path / 'out/moved_homography.png').astype(int)
    pink = np.abs(edited - (255, 0, 255)).max(axis=2) < 2
    expected = np.zeros(SIZE, bool)
    expected[20:52, 32:80] = True
    assert (pink & expected).sum() / (pink | expected).sum() > 0.6


def test_one_bad_target_does_not_lose_the_others(run, tool, tmp_path, monkeypatch):
    fit = tool.fit_homography

    def refuse(points, matches, sticker, size, threshold):
        if size == (61, 89):
            raise ValueError('3 of 400 matches agree')
        return fit(points, matches, sticker, size, threshold)

    monkeypatch.setattr(tool, 'fit_homography', refuse)
    sheet = tmp_path / 'sheet.png'
    options = '--mode', *MODES, '--overview', sheet
    errors = run('broken.png', 'small.png', 'source.png', options=options, status=1)
    lines = [line for line in errors.splitlines() if line.startswith('error: ')]
    assert lines[0].startswith('error: broken.png: cannot be read as an image')
    assert lines[1:] == ['error: small.png, homography: 3 of 400 matches agree']
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        'source_homography.png', 'source_homography_matches.png', 'source_tps.png', 'source_tps_matches.png',
        'small_tps.png', 'small_tps_matches.png',
    }  # fmt: skip
    assert pixels(sheet).shape[1] > 3 * 192


def test_errors(run, tool, folder, tmp_path, capsys):
    assert 'opaque.png: has mode' in run('moved.png', sticker='opaque.png', status=2)
    assert not (tmp_path / 'out').exists()
    missing = '--model', 'missing', '--layers', 'dift-1', '--timesteps', 50
    assert 'error: ' in run('moved.png', model=missing, status=2)
    for given, message in (
        (['a/x.png', 'b/x.png'], 'several targets are named x'),
        (['x.png', '--samples', '0'], '--samples takes a number above 0'),
        (['x.png', '--threshold', '0'], '--threshold takes a number above 0'),
        (['x.png', '--config', 'c', '--model', 'm'], 'give either --config or --model'),
        (['x.png', '--config', 'c', '--vae', 'v'], '--vae goes with --model; a config has vae= in its backbone'),
        (['x.png', '--config', 'c', '--discard', '3'], '--discard goes with --model'),
        (['x.png', '--config', 'c', '--embedded-guidance', '2'], '--embedded-guidance goes with --model'),
    ):
        with pytest.raises(SystemExit):
            tool.main(['source.png', 'sticker.png', *given, '--out', str(tmp_path / 'out')])
        assert message in capsys.readouterr().err


def test_the_model_is_that_of_dift_by_default(tool):
    args = tool.parse_args(['s.png', 'e.png', 't.png', '--out', 'out'])
    assert (args.model, args.layers, args.timesteps, args.size) == ('sd21', ['dift'], [261], (768, 768))
    assert args.prompt == 'a photo of a cat' and args.ensemble == 1 and args.samples == 1000
