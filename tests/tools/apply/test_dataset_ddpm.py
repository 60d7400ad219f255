"""Data sets of generated images: what is generated, labelled and left out, and that a segmentor trains on it."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from safetensors.torch import save_file

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.loading import load_parts
from diffseg.diffusion.options import Weights

ROOT = Path(__file__).resolve().parents[3]
SEGMENTORS = sorted(ROOT.glob('configs/scarce/*_1xb8-20e_dataset-ddpm-*.py'))


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('apply/dataset_ddpm')


@pytest.mark.parametrize(
    ('count', 'drop', 'certain', 'kept'),
    [
        (50000, 0.1, 30, slice(30, -4970)),
        (300, 0.1, 30, slice(30, 300)),
        (10, 0.2, 1, slice(1, 9)),
        (5, 0, 0, slice(5)),
    ],
)
def test_what_is_kept_is_what_is_published(tool, count, drop, certain, kept):
    images = list(range(count))
    assert images[tool.kept_range(count, drop, certain)] == images[kept]


@pytest.mark.parametrize(('count', 'drop', 'certain'), [(299, 0.1, 30), (10, 1.0, 0), (10, 0.1, -1)])
def test_more_is_left_out_than_there_is(tool, count, drop, certain):
    with pytest.raises(ValueError, match='--drop'):
        tool.kept_range(count, drop, certain)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A config of pixel classifiers on a tiny model of pixel space, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp('trained')
    cfg = Config.fromfile(ROOT / 'configs/scarce/tiny-sd-t50_pixel-classifier_1xb64-100e_toy-64x64.py')
    model = tiny.save_pixel(folder / 'adm')
    cfg.model.backbone = dict(
        type='DiffusionBackbone', model=str(model), layers=['adm-5', 'adm-7'], timesteps=[50, 150]
    )
    cfg.model.decode_head.update(in_channels=[32, 32], num_members=3, hidden=(8, 6))
    cfg.model.data_preprocessor.size = (16, 16)
    cfg.dump(folder / 'config.py')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    segmentor = MODELS.build(cfg.model)
    for linear in segmentor.decode_head.ensemble.linears:
        linear.weight.data *= 50  # classifiers that disagree
    torch.save({'state_dict': segmentor.state_dict()}, folder / 'checkpoint.pth')
    return folder / 'config.py', folder / 'checkpoint.pth'


@pytest.fixture
def run(tool: ModuleType, trained: tuple[Path, Path]) -> Callable[..., int]:
    """`run(out, *options)` makes a data set of five images."""
    few = ['--count', '5', '--steps', '2', '--drop', '0.4', '--drop-certain', '1']
    return lambda out, *options, files=trained: tool.main([*map(str, files), '--out', str(out), *few, *options])


def test_generates_labels_and_filters(run, tmp_path):
    assert run(tmp_path) == 0
    with (tmp_path / 'uncertainty.csv').open() as file:
        rows = list(csv.DictReader(file))
    values = [float(row['uncertainty']) for row in rows]
    assert values == sorted(values) and len(set(values)) == 5
    assert [row['kept'] for row in rows] == ['0', '1', '1', '1', '0']
    kept = {row['name'] for row in rows if row['kept'] == '1'}
    assert {path.name for path in (tmp_path / 'kept').glob('*.png')} == kept
    for name in kept:
        image, labels = Image.open(tmp_path / 'kept' / name), np.load(tmp_path / f'kept/{name[:-4]}.npy')
        assert (labels.dtype, labels.shape) == (np.uint8, image.size[::-1]) and labels.max() < 8
    assert (
        len(np.unique(np.stack([Image.open(path) for path in (tmp_path / 'all').iterdir() if path.suffix == '.png'])))
        > 2
    )
    assert Image.open(tmp_path / 'overview.png').width > 5 * 192


def test_goes_on_where_it_was_and_takes_images_that_are_given(run, tmp_path):
    assert run(tmp_path / 'a') == run(tmp_path / 'b') == 0
    (tmp_path / 'b/all/000002.png').unlink()
    untouched = (tmp_path / 'b/all/000001.png').stat().st_mtime_ns
    assert run(tmp_path / 'b') == 0
    assert (tmp_path / 'b/all/000001.png').stat().st_mtime_ns == untouched
    files = sorted(path.relative_to(tmp_path / 'a') for path in (tmp_path / 'a').rglob('*') if path.is_file())
    assert len(files) == 5 + 1 + 2 * 3 + 2
    assert all((tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes() for file in files)

    assert run(tmp_path / 'c', '--images', str(tmp_path / 'a/all')) == 0
    assert (tmp_path / 'c/uncertainty.csv').read_text() == (tmp_path / 'a/uncertainty.csv').read_text()


def test_images_are_generated_by_the_network_that_reads_them(tool, tiny_pipeline, tiny_taesd, tmp_path, monkeypatch):
    """Weights, adapters, revision and dtype are the config's, also those of the decoder."""
    seen = []

    def record(function):
        def call(*args, **kwargs):
            seen.append(kwargs)
            return function(*args, **kwargs)

        return call

    for name in ('meta_network', 'DiffusionExtractor', 'load_vae'):
        monkeypatch.setattr(tool, name, record(getattr(tool, name)))
    weights = tmp_path / 'unet.safetensors'
    unet = load_parts(tiny_pipeline, vae=False).network
    save_file({name: 2 * x for name, x in unet.state_dict().items()}, weights)
    read = dict(revision='main', network_weights=str(weights), vae=str(tiny_taesd), dtype='bfloat16')
    options = Config(
        {'model': str(tiny_pipeline), 'layers': ['dift-1'], 'timesteps': [50], 'prompt': 'a horse', **read}
    )
    args = tool.parse_args(['', '', '--out', str(tmp_path), '--count', '1', '--steps', '2', '--size', '64'])
    (path,) = tool.generate(options, args)
    assert Image.open(path).size == (64, 64)
    network, extractor, decoder = seen
    assert network == {'revision': 'main'}
    assert extractor['weights'] == Weights(revision='main', network_weights=str(weights), vae=str(tiny_taesd))
    assert extractor['dtype'] == 'bfloat16' and extractor['prompt'] == ['']
    assert decoder == {'revision': 'main', 'vae': str(tiny_taesd), 'dtype': torch.bfloat16}


def test_ancestral_samples_are_those_of_the_learned_variance(tool, tmp_path):
    extractor = DiffusionExtractor(str(tiny.save_pixel(tmp_path)), ['adm-5'], [50])
    pipeline = tool.ancestral_pipeline(extractor, 16)
    steps, betas = [666, 333, 0], torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    for i, t in enumerate(steps):
        after = abar[steps[i + 1]] if t else torch.tensor(1.0)
        alpha = abar[t] / after
        with torch.no_grad():
            epsilon, v = extractor.network(x, t).sample.chunk(2, dim=1)
        clean = ((x - (1 - abar[t]).sqrt() * epsilon) / abar[t].sqrt()).clamp(-1, 1)
        x = (after.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - after) * x) / (1 - abar[t])  # DDPM, equation 7
        if t:  # improved DDPM, equation 15
            smallest = (1 - after) / (1 - abar[t]) * (1 - alpha)
            share = (v + 1) / 2
            variance = (share * (1 - alpha).log() + (1 - share) * smallest.log()).exp()
            x = x + variance.sqrt() * torch.randn(1, 3, 16, 16, generator=generator)
        x = x.float()
    found = pipeline(1, [torch.Generator().manual_seed(3)], num_inference_steps=3, output_type='np').images
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_ancestral_images_do_not_depend_on_the_batch(run, tmp_path):
    assert run(tmp_path / 'a', '--sampler', 'ancestral') == 0
    assert run(tmp_path / 'b', '--sampler', 'ancestral', '--batch-size', '3') == 0
    pairs = [[np.array(Image.open(tmp_path / f'{out}/all/{i:06d}.png')).astype(int) for out in 'ab'] for i in range(5)]
    assert max(np.abs(a - b).max() for a, b in pairs) <= 1 and np.ptp([a for a, _ in pairs], axis=0).max() > 2
    assert run(tmp_path / 'a') == 2, 'the sampler is another one'


def test_what_it_cannot_do(run, trained, tmp_path, capsys):
    assert run(tmp_path, '--drop-certain', '3') == 2
    assert 'take more images' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(tmp_path, '--cfg-options', 'model.decode_head.num_members=2') == 2
    assert 'size mismatch' in capsys.readouterr().err
    assert run(tmp_path, '--cfg-options', 'model.decode_head.type=FCNHead') == 2
    assert 'PixelClassifierHead' in capsys.readouterr().err
    assert run(tmp_path, '--cfg-options', 'model.backbone.type=EnsembleBackbone') == 2
    assert 'has a EnsembleBackbone; images are generated by' in capsys.readouterr().err
    assert run(tmp_path, files=(trained[0], tmp_path / 'none.pth')) == 2
    assert 'none.pth' in capsys.readouterr().err
    assert run(tmp_path / 'size', '--sampler', 'ancestral', '--size', '32') == 2
    assert 'draws images of 16 pixels' in capsys.readouterr().err
    assert run(tmp_path / 'two') == 0
    assert run(tmp_path / 'two', '--steps', '4') == 2
    assert 'another configuration' in capsys.readouterr().err


@pytest.mark.parametrize('path', SEGMENTORS, ids=lambda path: path.stem)
def test_a_segmentor_on_generated_images(path):
    assert len(SEGMENTORS) == 2
    cfg = Config.fromfile(path)
    splits = [loader.dataset.split for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)]
    assert splits == ['generated/kept', 'real/train', 'real/test']
    init_default_scope('mmseg')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        maps = model.backbone(torch.empty(2, 3, 64, 64))
        logits = model.decode_head(maps)
    assert logits.shape[1] == {'horse_21': 21, 'toy': 8}[cfg.train_dataloader.dataset.category]
    assert not model.with_auxiliary_head


def test_the_published_segmentor():
    cfg = Config.fromfile(next(path for path in SEGMENTORS if 'deeplabv3' in path.stem))
    head = cfg.model.decode_head
    assert (head.type, head.channels, head.dropout_ratio) == ('ASPPHead', 256, 0.5)
    assert (cfg.train_dataloader.batch_size, cfg.train_dataloader.drop_last) == (8, True)
    assert cfg.optim_wrapper.optimizer == {'type': 'Adam', 'lr': 1e-3}
