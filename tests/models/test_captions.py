"""Captions from a file, through mmseg's pipelines, into the backbone."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from tiny_mmseg import CLASSES, LAYERS, backbone_config, build_segmentor, segmentor_config

from diffseg.diffusion import conditioning
from diffseg.models.captions import append_rows, split_rows

CAPTIONS = {'a.png': 'a horse in the snow', 'b.png': 'two dogs', 'c.png': 'nothing at all'}
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, their labels and captions."""
    random = np.random.default_rng(0)
    for kind, shape in (('images', (64, 96, 3)), ('labels', (64, 96))):
        (tmp_path / kind).mkdir()
        for name in CAPTIONS:
            pixels = random.integers(CLASSES if kind == 'labels' else 256, size=shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / name)
    (tmp_path / 'captions.json').write_text(json.dumps(CAPTIONS))
    return tmp_path


def dataset(folder: Path, pipeline: list[dict]) -> Sequence[dict]:
    init_default_scope('mmseg')
    config = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        metainfo=dict(classes=[str(i) for i in range(CLASSES)]),
        pipeline=pipeline,
    )
    return DATASETS.build(config)


def load_caption(folder: Path) -> dict:
    return dict(type='LoadCaption', file=str(folder / 'captions.json'))


def segmentor(model: Path, prompt: str | dict, **options):
    """A segmentor with all weights the same whatever the prompt is."""
    preprocessor = segmentor_config(model)['data_preprocessor']
    if isinstance(prompt, dict):
        preprocessor['type'] = 'CaptionPreProcessor'
    options = {'test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32)), **options}
    return build_segmentor(model, backbone={'prompt': prompt}, data_preprocessor=preprocessor, **options)


def predict(model, samples: list[dict]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x.seg_logits.data for x in model.eval().test_step(pseudo_collate(samples))]


def test_an_image_is_seen_with_its_own_caption(tiny_pipeline, folder):
    samples = list(dataset(folder, [*PIPELINE, load_caption(folder)]))
    model = segmentor(tiny_pipeline, dict(type='captions', file=str(folder / 'captions.json')))
    together = predict(model, [samples[i] for i in (2, 0, 1)])
    expected = [
        predict(segmentor(tiny_pipeline, prompt), [sample])[0]
        for prompt, sample in zip(CAPTIONS.values(), samples, strict=True)
    ]
    for i, found in zip((2, 0, 1), together, strict=True):
        torch.testing.assert_close(found, expected[i], rtol=1e-4, atol=1e-5)
    other = predict(segmentor(tiny_pipeline, 'two dogs'), samples[:1])[0]
    assert (other - expected[0]).abs().max() > 10 * (together[1] - expected[0]).abs().max()


def test_captions_survive_test_time_augmentation(tiny_pipeline, folder):
    augment = dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(96, 64)), dict(type='Resize', scale=(48, 32))],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0, direction='horizontal')],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
            [load_caption(folder)],
        ],
    )
    samples = list(dataset(folder, [PIPELINE[0], augment]))[:2]
    assert [x.caption_row for x in samples[1]['data_samples']] == [1] * 4
    options = {'test_cfg': dict(mode='whole')}
    model = segmentor(tiny_pipeline, dict(type='captions', file=str(folder / 'captions.json')), **options)
    plain = segmentor(tiny_pipeline, 'two dogs', **options)
    with torch.no_grad():
        ours, theirs = (
            MODELS.build(dict(type='SegTTAModel', module=each.eval())).test_step(pseudo_collate(samples[1:]))
            for each in (model, plain)
        )
    assert torch.equal(ours[0].pred_sem_seg.data, theirs[0].pred_sem_seg.data)


def test_it_trains(tiny_pipeline, folder):
    samples = list(dataset(folder, [*PIPELINE, load_caption(folder)]))
    model = segmentor(tiny_pipeline, dict(type='captions', file=str(folder / 'captions.json'))).train()
    data = model.data_preprocessor(pseudo_collate(samples), training=True)
    assert data['inputs'].shape == (3, 4, 64, 96) and data['inputs'][:, 3].unique().tolist() == [0, 1, 2]
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_text_encoders_are_loaded_once_and_not_at_all_the_next_time(tiny_pipeline, folder, monkeypatch):
    monkeypatch.setenv('DIFFSEG_CACHE', str(folder / 'cache'))
    loaded, load = [], conditioning._load
    monkeypatch.setattr(conditioning, '_load', lambda *args: loaded.append(args) or load(*args))
    config = backbone_config(
        tiny_pipeline,
        layers=LAYERS[:1],
        timesteps=[50],
        prompt=dict(type='captions', file=str(folder / 'captions.json')),
    )
    images = append_rows(torch.zeros(2, 3, 64, 64), [2, 0])
    first = MODELS.build(config)
    maps = [first(images)[0] for _ in range(2)]
    assert len(loaded) == 1
    assert torch.equal(MODELS.build(config)(images)[0], maps[1]) and len(loaded) == 1
    assert first.fingerprint['prompt'] == 'captions'  # so that a head can be tested with captions of other images


def test_captions_and_the_cache_of_maps(tiny_pipeline, folder):
    file = folder / 'captions.json'
    config = backbone_config(
        tiny_pipeline, layers=LAYERS[:1], timesteps=[50], prompt=dict(type='captions', file=str(file))
    )
    cached = MODELS.build({**config, 'cache': dict(path=str(folder / 'maps'), dtype='float32')})
    images = append_rows(torch.zeros(2, 3, 64, 64), [0, 1])
    plain = MODELS.build(config)(images)[0]
    assert not torch.equal(plain[0], plain[1])
    for _ in range(2):
        torch.testing.assert_close(cached(images)[0], plain)
    file.write_text(json.dumps({'z.png': 'another', **CAPTIONS}))  # the same captions in other rows
    moved = MODELS.build({**config, 'cache': dict(path=str(folder / 'maps'), dtype='float32')})
    torch.testing.assert_close(moved(append_rows(torch.zeros(2, 3, 64, 64), [1, 2]))[0], plain)


def test_captions_of_another_text_encoder(tiny_pipeline, folder):
    other = tiny.change_text_encoder(Path(shutil.copytree(tiny_pipeline, folder / 'other')))
    captions = dict(type='captions', file=str(folder / 'captions.json'))
    options = {'layers': LAYERS[:1], 'timesteps': [50], 'prompt': captions, 'cache': str(folder / 'maps')}
    ours, theirs = (MODELS.build(backbone_config(model, **options)) for model in (tiny_pipeline, other))
    with pytest.raises(ValueError, match='another backbone: text_encoder was'):
        theirs.load_state_dict(ours.state_dict())
    images = append_rows(torch.zeros(2, 3, 64, 64), [0, 1])
    assert not torch.equal(ours(images)[0], theirs(images)[0])
    assert theirs.cache.counts.hits == 0


def test_long_captions_are_refused_or_cut_off(tiny_pipeline, folder):
    (folder / 'captions.json').write_text(json.dumps({**CAPTIONS, 'd.png': 'a very long caption ' * 20}))
    config = backbone_config(
        tiny_pipeline,
        layers=LAYERS[:1],
        timesteps=[50],
        prompt=dict(type='captions', file=str(folder / 'captions.json')),
    )
    with pytest.raises(ValueError, match=r'different numbers of tokens.*truncate'):
        MODELS.build(config)
    backbone = MODELS.build({**config, 'truncate_prompts': True})
    assert len(backbone(append_rows(torch.zeros(2, 3, 64, 64), [0, 3]))[0]) == 2


# ---- errors


def test_an_image_without_a_caption_is_named(folder):
    captions = folder / 'captions.json'
    captions.write_text(json.dumps({'a.png': 'a horse'}))
    samples = dataset(folder, [*PIPELINE, load_caption(folder)])
    assert samples[0]['data_samples'].caption_row == 0
    with pytest.raises(ValueError, match=r"no caption for the image '.*b\.png' in .*captions\.json"):
        samples[1]


def test_the_transform_comes_last(folder):
    with pytest.raises(ValueError, match='LoadCaption must come after PackSegInputs'):
        dataset(folder, [PIPELINE[0], load_caption(folder), *PIPELINE[1:]])[0]


def test_a_pipeline_without_the_transform(tiny_pipeline, folder):
    model = segmentor(tiny_pipeline, dict(type='captions', file=str(folder / 'captions.json')))
    with pytest.raises(ValueError, match=r'2 images have captions in rows \[None, None\]; end the pipeline'):
        predict(model, list(dataset(folder, PIPELINE))[:2])


def test_rows_survive_what_is_done_to_images():
    images = torch.rand(3, 3, 8, 6)
    whole, rows = split_rows(append_rows(images, [20000, 0, 7]), 20001)
    assert torch.equal(whole, images) and rows == [20000, 0, 7]
    _, rows = split_rows(append_rows(images, [20000, 0, 7]).flip(-1)[:1, :, 2:5, 1:2], 20001)
    assert rows == [20000]


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (torch.zeros(2, 3, 8, 8), r'\(2, 3, 8, 8\); captions need \(B, 4, H, W\).*CaptionPreProcessor'),
        (append_rows(torch.zeros(2, 3, 8, 8), [0, 3]), 'rows 0 to 2 of the captions'),
        (append_rows(torch.zeros(1, 3, 8, 8), [-1]), 'the same file'),
        (torch.rand(1, 4, 8, 8), 'fourth channel'),
        (append_rows(torch.zeros(1, 3, 8, 8), [1]).half(), 'float16, which cannot represent'),
    ],
)
def test_images_that_say_no_row(images, message):
    with pytest.raises(ValueError, match=message):
        split_rows(images, 3)
