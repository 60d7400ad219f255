"""TSS's layout: pixels of the foreground and where a flow leads them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

from diffseg.datasets import TSSDataset
from diffseg.datasets.tss import read_flow, write_flow

ROOT = Path(__file__).resolve().parents[2]
SIZES = {1: (30, 20), 2: (24, 28)}  # (width, height)


@pytest.fixture
def folder(tmp_path):
    for group in ('FG3DCar', 'JODS', 'PASCAL'):
        pair = tmp_path / group / 'a'
        pair.mkdir(parents=True)
        for number, (width, height) in SIZES.items():
            Image.new('RGB', (width, height), 'red').save(pair / f'image{number}.png')
            mask = np.zeros((height, width), np.uint8)
            mask[4:9, 2:12] = 255
            Image.fromarray(mask).save(pair / f'mask{number}.png')
            flow = np.full((height, width, 2), (number + 0.5, -2.0))
            flow[4] = 1e10  # foreground without a counterpart
            write_flow(pair / f'flow{number}.flo', flow)
        (pair / 'flip_gt.txt').write_text('1\n')
    return tmp_path


def build(folder, **options):
    init_default_scope('mmseg')
    pipeline = [{'type': 'LoadPair'}, {'type': 'PackPair'}]
    return TSSDataset(str(folder), pipeline=pipeline, test_mode=True, **options)


def test_foreground_is_matched_both_ways(folder):
    dataset = build(folder, step=1, strict=True)
    assert len(dataset) == 6 and dataset.metainfo['protocol'] == 'all pixels'
    for index, source in ((0, 1), (1, 2)):
        sample = dataset[index]['data_samples']
        assert sample.category == 'FG3DCar' and sample.variations == {'mirror': 1}
        assert sample.img_path0 == str(folder / f'FG3DCar/a/image{source}.png')
        assert sample.img_path1 == str(folder / f'FG3DCar/a/image{3 - source}.png')
        expected = [[x, y] for y in range(5, 9) for x in range(2, 12)]
        assert sample.keypoints0.tolist() == expected and sample.visible.all()
        assert sample.keypoints1.tolist() == [[x + source + 0.5, y - 2] for x, y in expected]
        assert sample.bbox0.tolist() == [2, 5, 12, 9]
    sample = build(folder, step=4)[0]['data_samples']
    assert sample.keypoints0.tolist() == [[4, 8], [8, 8]]


def test_damaged(folder):
    with pytest.raises(ValueError, match="split is 'val', TSS has only 'test'"):
        build(folder, split='val')
    with pytest.raises(ValueError, match='step is 0'):
        build(folder, step=0)
    pair = folder / 'JODS/a'
    (pair / 'flow1.flo').write_bytes((pair / 'flow1.flo').read_bytes()[:-4])
    (pair / 'flow2.flo').write_bytes(b'PIEH')
    Image.new('L', (5, 5)).save(folder / 'PASCAL/a/mask1.png')
    Image.new('L', SIZES[2]).save(folder / 'PASCAL/a/mask2.png')
    dataset = build(folder, step=2)
    for message, text in zip(
        dataset.damaged,
        (
            'flow1.flo has 4808 bytes, expected 4812',
            'flow2.flo is no .flo file',
            'mask1.png has height',
            'have 0 pixels',
        ),
        strict=True,
    ):
        assert text in message
    (pair / 'image1.png').unlink()
    (folder / 'FG3DCar').rename(folder / 'cars')
    with pytest.raises(ValueError, match=r'FG3DCar is missing; .*TSS_CVPR2016\.zip'):
        build(folder)


def test_toy_flows_lead_to_the_same_colours(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/toy'))
    arguments = [str(tmp_path), '--train', '0', '--test', '0', '--tss', '2']
    runpy.run_path(str(ROOT / 'tools/toy/make_data.py'))['main'](arguments)
    dataset = build(tmp_path / 'TSS-toy', step=1, strict=True)
    assert len(dataset) == 12
    for index in (0, 1):
        item = dataset[index]
        sample = item['data_samples']
        source, target = (item['inputs'][f'image{view}'].float() for view in (0, 1))
        (x0, y0), (x1, y1) = sample.keypoints0.long().T, sample.keypoints1.round().long().T
        difference = (source[:, y0, x0] - target[:, y1, x1]).abs().mean(0)
        assert difference.median() < 12 and read_flow(Path(sample.img_path0).with_name('flow1.flo')).shape == (
            64,
            64,
            2,
        )
