"""tools/distill.py on a tiny UNet and a few pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader
from PIL import Image
from safetensors.torch import load_file

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image

ROOT = Path(__file__).parents[2]
LAYERS = {'mid-repeat1-res-out': 64, 'up-level1-repeat1-vit-out': 32}
CONFIG = """
_base_ = {base!r}

model = dict(
    backbone=dict(
        model={model!r}, layers={layers!r}, channels={channels!r}, cache_dir={cache!r}, gradient_checkpointing=True
    )
)
size = 32
steps = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
train = [steps[0], dict(type='RandomCrop', crop_size=(32, 32)), steps[1]]
val = [steps[0], dict(type='CenterCrop', crop_size=32), steps[1]]
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(loader, dataset=dict(held_out=2, pipeline=train))
val_dataloader = test_dataloader = dict(loader, dataset=dict(held_out=2, pipeline=val))
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
"""


@pytest.fixture
def distill(load_tool, monkeypatch):
    """The tool's main."""
    monkeypatch.syspath_prepend(ROOT / 'tools')  # of the module `train`
    return load_tool('distill').main


@pytest.fixture
def config(shallow_sd15, tmp_path):
    """A config; its pictures are in `pictures` beside it."""
    generator = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    for index in range(6):
        pixels = generator.integers(256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'pictures' / f'{index}.png')
    path = tmp_path / 'tiny.py'
    names, channels = list(LAYERS), list(LAYERS.values())
    configs = ROOT / 'configs'
    base = [str(configs / 'distillation' / '_base_.py'), str(configs / '_base_' / 'datasets' / 'images_512.py')]
    path.write_text(
        CONFIG.format(
            base=base, model=str(shallow_sd15), layers=names, channels=channels, cache=str(tmp_path / 'prompts')
        )
    )
    return path


def content(work_dir):
    """Everything that a run ends with, and the figures of its validations."""
    checkpoint = CheckpointLoader.load_checkpoint(str(work_dir / 'iter_4.pth'), map_location='cpu')
    moments = checkpoint['optimizer']['state']
    optimizer = {f'{i} {name}': x for i, state in moments.items() for name, x in state.items()}
    files = {
        (file, name): x for file in ('unet', 'heads') for name, x in load_file(work_dir / f'{file}.safetensors').items()
    }
    return {**checkpoint['state_dict'], **optimizer, **files}


def test_a_resumed_run_ends_in_the_same_bits(distill, config, tmp_path, shallow_sd15):
    arguments = str(config), '--images', str(tmp_path / 'pictures'), '--work-dir'
    distill([*arguments, str(tmp_path / 'whole')])
    distill([*arguments, str(tmp_path / 'parts'), '--cfg-options', 'train_cfg.max_iters=2'])
    early = load_file(tmp_path / 'parts' / 'unet.safetensors')
    distill([*arguments, str(tmp_path / 'parts'), '--resume'])
    whole, parts = content(tmp_path / 'whole'), content(tmp_path / 'parts')
    assert whole.keys() == parts.keys()
    assert [
        name for name, x in whole.items() if not torch.equal(torch.as_tensor(x), torch.as_tensor(parts[name]))
    ] == []
    assert any(not torch.equal(x, whole['unet', name]) for name, x in early.items())

    (log,) = (tmp_path / 'whole').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    curve = {line['step']: line for line in lines if 'cosine_plain' in line}
    assert list(curve) == [2, 4]
    assert curve[2]['cosine_frozen'] == curve[4]['cosine_frozen'] != curve[2]['cosine'] != curve[4]['cosine']

    weights = {'network_weights': tmp_path / 'whole' / 'unet.safetensors'}
    images = read_image(tmp_path / 'pictures' / '0.png')[None]
    distilled = DiffusionExtractor(shallow_sd15, list(LAYERS), [261], trajectory='clean', weights=weights)(images)
    frozen = DiffusionExtractor(shallow_sd15, list(LAYERS), [261], trajectory='clean')(images)
    assert not any(torch.equal(x, frozen[name]) for name, x in distilled.items())


def test_a_picture_without_caption_and_a_folder_that_is_none(distill, config, tmp_path):
    captions = tmp_path / 'captions.json'
    captions.write_text(json.dumps({f'{i}.png': f'a photo {i}' for i in range(5)}))
    arguments = [str(config), '--captions', str(captions), '--work-dir', str(tmp_path / 'work'), '--images']
    with pytest.raises(ValueError, match=r'no caption for the image .*5\.png'):
        distill([*arguments, str(tmp_path / 'pictures')])
    with pytest.raises(FileNotFoundError, match='none is no folder'):
        distill([*arguments, str(tmp_path / 'none')])


def test_memory_is_counted_without_weights(distill, config, capsys):
    smaller = 'backbone.layers=[mid-repeat1-res-out]', 'backbone.channels=[64]', 'heads.depth=1', 'heads.width=32'
    options = [f'model.{option}' for option in (*smaller, 'backbone.gradient_checkpointing=False')]
    distill([str(config), '--count-only', '--cfg-options', *options])
    rows = {}
    for line in capsys.readouterr().out.splitlines()[4:]:
        what, size = line.strip('| ').split(' | ')
        rows[what] = float(size)
    assert list(rows)[-1] == 'sum' and len(rows) == 5
