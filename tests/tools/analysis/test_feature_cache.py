"""The tool around feature caches: its estimate is what entries take, and it finds and deletes nothing else."""

import re
from pathlib import Path

import pytest
import torch
from cache_worker import compute, make_images
from mmseg.registry import MODELS
from PIL import Image
from tiny_mmseg import backbone_config, segmentor_config

from diffseg.cache import FeatureCache, format_size, parse_size

ROOT = Path(__file__).resolve().parents[3]

CONFIG = """
model = {model!r}
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler'),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(
        type='BaseSegDataset',
        data_root={data_root!r},
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        metainfo=dict(classes=['a'], palette=[[0, 0, 0]]),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')],
    ),
)
"""


@pytest.fixture(scope='module')
def main(load_tool):
    return load_tool('analysis/feature_cache').main


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """A cache of three entries."""
    cache = FeatureCache(tmp_path / 'cache')
    cache.fetch(make_images(3), {}, compute)
    return cache


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path) -> str:
    """A config of the tiny segmentor and three training images of 64 x 96 pixels."""
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new('RGB' if folder == 'images' else 'L', (96, 64), i).save(tmp_path / folder / f'{i}.png')
    model = segmentor_config(tiny_pipeline, {'cache': {'path': 'x', 'dtype': 'int8', 'max_size': '1MB'}})
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(model=model.to_dict(), data_root=str(tmp_path)))
    return str(path)


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_estimate_is_what_entries_take(main, config, tiny_pipeline, capsys, tmp_path, dtype):
    assert main(['estimate', config, '--images', '30', '--size', '128x160']) == 0
    out = capsys.readouterr().out
    cache = FeatureCache(tmp_path / 'cache', dtype)
    maps = cache.fetch(torch.zeros(1, 3, 128, 160), {}, MODELS.build(backbone_config(tiny_pipeline)))
    assert f'4 maps: {", ".join("x".join(map(str, x.shape[1:])) for x in maps)}' in out
    one, all_ = re.search(rf'\| {dtype} \| (.*) \| (.*) \|', out).groups()
    assert parse_size(one) == pytest.approx(cache.size(), rel=0.01)
    assert parse_size(all_) == pytest.approx(30 * cache.size(), rel=0.01)
    assert 'max_size=1 MB has room for 20 images in int8' in out


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('sd15-t50_agg-upernet_1xb2-80k_ade20k-512x512', '5.24 MB'),
        ('sdxl-t50_agg-upernet_1xb2-80k_ade20k-512x512', '15.7 MB'),
    ],
)
def test_estimate_of_shipped_configs(main, capsys, name, size):
    assert main(['estimate', str(ROOT / 'configs' / 'segmentation' / f'{name}.py'), '--images', '20210']) == 0
    assert f'| float16 | {size} |' in capsys.readouterr().out


def test_estimate_says_what_it_cannot(main, config, capsys):
    text = Path(config).read_text()
    Path(config).write_text(text.replace("'layers': [", "'attention_maps': ['up_cross'], 'layers': ["))
    assert main(['estimate', config, '--images', '1']) == 2
    assert 'channels of attention maps' in capsys.readouterr().err


def test_statistics_and_deleting(main, cache, capsys):
    foreign = cache.path / 'notes.txt'
    foreign.write_text('not an entry')
    size = cache.size()
    assert main(['stats', str(cache.path)]) == 0
    assert f'3 entries, {format_size(size)}' in capsys.readouterr().out
    assert main(['prune', str(cache.path), '--max-size', str(size - 1)]) == 0
    assert '1 entries deleted' in capsys.readouterr().out
    assert len(list(cache.entries())) == 2
    assert main(['clear', str(cache.path)]) == 0
    assert '2 entries deleted, 0 B left' in capsys.readouterr().out
    assert foreign.exists() and cache.size() == 0


def test_verify_finds_what_is_damaged(main, cache, capsys):
    assert main(['verify', str(cache.path)]) == 0
    assert capsys.readouterr().out == '3 entries, 0 damaged\n'
    damaged, *whole = sorted(cache.entries())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(['verify', str(cache.path)]) == 1
    assert str(damaged) in capsys.readouterr().out and damaged.exists()
    assert main(['verify', str(cache.path), '--delete']) == 1
    assert sorted(cache.entries()) == whole


def test_a_folder_that_is_not_there(main, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['stats', str(tmp_path / 'absent')])
    assert f'no folder {tmp_path / "absent"}' in capsys.readouterr().err


@pytest.mark.parametrize('source', ['config', 'folder'])
def test_benchmark_reads_all_in_the_warm_epoch(main, config, tmp_path, capsys, source):
    options = ['--images', str(tmp_path / 'images'), '--size', '64', '--random'] if source == 'folder' else []
    assert main(['benchmark', config, '--repeat', '2', '--device', 'cpu', *options]) == 0
    out = capsys.readouterr().out
    hits, misses = map(int, re.search(r'(\d+) hits, (\d+) misses', out).groups())
    assert hits + misses == (9 if source == 'folder' else 12)  # 3 epochs of 3 images, or of 2 batches of 2
    assert misses <= (hits + misses) // 3
    assert re.findall(r'^\| (\w+) \|', out, re.M) == ['epoch', 'without', 'cold', 'warm']
