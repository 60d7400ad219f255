"""A published segmentor segments as the test pipeline does; what does not fit is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_mmseg import CLASSES, segmentor_config

import diffseg
from diffseg import pretrained, publishing

ROOT = Path(__file__).parents[3]
NAMES = ['background', 'left', 'right']
SIZES = {'0.png': (64, 96), '1.png': (48, 80), '2.png': (64, 96)}


def training_config(model: dict, folder: Path) -> Config:
    """Two iterations on three pictures."""
    dataset = {
        'type': 'BaseSegDataset',
        'data_root': str(folder / 'data'),
        'data_prefix': {'img_path': 'images', 'seg_map_path': 'labels'},
        'img_suffix': '.png',
        'metainfo': {'classes': NAMES, 'palette': [[i, 9 * i, 255 - i] for i in range(CLASSES)]},
    }
    load, pack = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}], {'type': 'PackSegInputs'}
    loader = {'num_workers': 0, 'batch_size': 2, 'sampler': {'type': 'InfiniteSampler'}}
    test = {'num_workers': 0, 'batch_size': 1, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}}
    resize = {'type': 'Resize', 'scale': (96, 64), 'keep_ratio': True}  # mmcv refuses a list in place of the tuple
    return Config(
        {
            'model': {**model, 'auxiliary_head': {**model['decode_head'], 'channels': 8}},
            'train_dataloader': {**loader, 'dataset': {**dataset, 'pipeline': [*load, pack]}},
            'test_dataloader': {**test, 'dataset': {**dataset, 'pipeline': [load[0], resize, load[1], pack]}},
            'test_evaluator': {'type': 'IoUMetric'},
            'optim_wrapper': {'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1e-2}},
            'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': 2},
            'test_cfg': {'type': 'TestLoop'},
            'default_scope': 'mmseg',
            'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 2}},
            'work_dir': str(folder / 'work'),
        }
    )


@pytest.fixture(scope='module')
def trained(tiny_pipeline, tmp_path_factory, load_tool) -> SimpleNamespace:
    """A segmentor that was trained and tested with the tools: its checkpoint, pictures and predictions."""
    folder = tmp_path_factory.mktemp('publish')
    generator = np.random.default_rng(0)
    for kind, depth, values in (('images', [3], 256), ('labels', [], CLASSES)):
        (folder / 'data' / kind).mkdir(parents=True)
        for name, size in SIZES.items():
            pixels = generator.integers(values, size=[*size, *depth], dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'data' / kind / name)
    backbone = {'cache_dir': str(folder / 'prompts'), 'cache': {'path': str(folder / 'features'), 'dtype': 'float32'}}
    model = segmentor_config(tiny_pipeline, backbone=backbone).to_dict()
    model['train_cfg'] = {}
    training_config(model, folder).dump(folder / 'tiny.py')
    checkpoint = folder / 'work/iter_2.pth'
    load_tool('train').main([str(folder / 'tiny.py')])
    metrics = load_tool('test').main([str(folder / 'tiny.py'), str(checkpoint), '--out', str(folder / 'masks')])
    masks = {name: np.asarray(Image.open(folder / 'masks' / name)) for name in SIZES}
    paths = [folder / 'data/images' / name for name in SIZES]
    return SimpleNamespace(checkpoint=checkpoint, paths=paths, masks=list(masks.values()), metrics=metrics)


@pytest.fixture(scope='module')
def published(trained, tmp_path_factory, load_tool) -> Path:
    out = tmp_path_factory.mktemp('published') / 'head'
    assert load_tool('convert/publish').main([str(trained.checkpoint), str(out), '--license', 'apache-2.0']) == 0
    return out


@pytest.fixture
def copied(published, tmp_path) -> Path:
    """A copy that a test may damage."""
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_masks_are_those_of_the_test_pipeline(trained, published, tiny_pipeline):
    segmentor = diffseg.DiffusionSegmentor.from_pretrained(published, model=tiny_pipeline, device='cpu')
    assert segmentor.classes == tuple(NAMES) and segmentor.palette[1] == (1, 9, 254)
    assert len({mask.tobytes() for mask in trained.masks}) == len(trained.masks)
    for mask, expected in zip(segmentor.segment(trained.paths), trained.masks, strict=True):
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
    one = segmentor.segment(str(trained.paths[1]))
    assert one.shape == SIZES['1.png'] and np.array_equal(one, trained.masks[1])
    assert len({*segmentor.segment(trained.paths[0]).flat}) > 1


def test_images_may_be_of_any_kind_and_in_batches(trained, published, tiny_pipeline):
    segmentor = diffseg.DiffusionSegmentor.from_pretrained(str(published), model=[tiny_pipeline], device='cpu')
    pictures = [Image.open(path) for path in trained.paths]
    turned = pictures[0].transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back by 90 degrees
    images = [turned, np.asarray(pictures[1]), pictures[2].convert('RGBA')]
    for mask, expected in zip(segmentor.segment(images), trained.masks, strict=True):
        assert np.array_equal(mask, expected)
    together = segmentor.segment([trained.paths[0], trained.paths[2], trained.paths[1]], batch_size=2)
    for mask, index in zip(together, (0, 2, 1), strict=True):
        assert (mask != trained.masks[index]).mean() < 0.01  # rounding may differ between batch sizes
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), 3):
        with pytest.raises(ValueError, match=r'RGB array \(H, W, 3\) of uint8, not '):
            segmentor.segment(wrong)
    with pytest.raises(ValueError, match=r'absent\.png: cannot be read as an image'):
        segmentor.segment('absent.png')


def test_the_folder_holds_what_was_trained_and_a_card(trained, published, tiny_pipeline):
    tensors, config = load_file(published / 'model.safetensors'), json.loads((published / 'config.json').read_text())
    assert {key.split('.')[0] for key in tensors} == {'neck', 'decode_head'}
    state = torch.load(trained.checkpoint)['state_dict']
    assert all(torch.equal(x, state[key]) for key, x in tensors.items())
    assert config['model']['backbone']['model'] == './tiny-sd15'
    assert str(trained.checkpoint.parent.parent) not in (published / 'config.json').read_text()
    card = (published / 'README.md').read_text()
    assert card.startswith('---\n') and 'license: apache-2.0\n' in card and "model='path/to/tiny-sd15'" in card
    assert f'| mIoU | {trained.metrics["mIoU"]:.4g} |' in card
    assert '| training | 2 iterations, AdamW, lr 0.01, batch_size 2, seed ' in card
    assert '| training data | BaseSegDataset, ' in card and ', data_root data, ' in card
    assert config['fingerprints']['backbone._extra_state']['weights'] in card


def test_another_frozen_network_is_refused(published, tmp_path):
    other = tiny.save_sd15(tmp_path / 'other')
    tiny.unet(seed=1).save_pretrained(other / 'unet')
    with pytest.raises(ValueError, match=r"belongs to another backbone: weights was 'unet-.+' and is 'unet-"):
        diffseg.DiffusionSegmentor.from_pretrained(published, model=other)
    options = {'check_fingerprint': 'warn'}
    assert diffseg.DiffusionSegmentor.from_pretrained(published, model=other, backbone=options, device='cpu')


def test_the_local_network_has_to_be_given(published, tiny_pipeline):
    with pytest.raises(FileNotFoundError, match=r"was trained on a local model, 'tiny-sd15'; give .* model=PATH"):
        diffseg.DiffusionSegmentor.from_pretrained(published)
    with pytest.raises(ValueError, match='has 1 frozen networks; model names 2'):
        diffseg.DiffusionSegmentor.from_pretrained(published, model=[tiny_pipeline] * 2)


def test_tensors_that_do_not_fit_are_named(copied, tiny_pipeline):
    tensors = load_file(copied / 'model.safetensors')
    tensors['decode_head.renamed.weight'] = tensors.pop('decode_head.conv_seg.weight')
    tensors['decode_head.conv_seg.bias'] = torch.zeros(7)
    save_file(tensors, copied / 'model.safetensors')
    message = (
        r'without decode_head\.conv_seg\.weight; with unexpected decode_head\.renamed\.weight; '
        r'decode_head\.conv_seg\.bias of shape \(7,\), not \(3,\)'
    )
    with pytest.raises(ValueError, match=message):
        diffseg.DiffusionSegmentor.from_pretrained(copied, model=tiny_pipeline)


@pytest.mark.parametrize(
    ('name', 'content', 'error', 'message'),
    [
        ('model.safetensors', None, FileNotFoundError, r'has no model\.safetensors'),
        ('config.json', None, FileNotFoundError, r'has no config\.json'),
        ('model.safetensors', 'broken', OSError, 'is no safetensors file'),
        ('config.json', '{', ValueError, 'is no JSON'),
        ('config.json', '{"model_type": "bert"}', ValueError, 'is not the config of a diffseg segmentor'),
        ('config.json', '{"format": "diffseg segmentor", "version": 9}', ValueError, 'has version 9'),
    ],
)
def test_damaged_folders_are_refused(copied, tiny_pipeline, name, content, error, message):
    (copied / name).unlink() if content is None else (copied / name).write_text(content)
    with pytest.raises(error, match=message):
        diffseg.DiffusionSegmentor.from_pretrained(copied, model=tiny_pipeline)


def test_a_config_cannot_call_python(copied, tiny_pipeline, tmp_path):
    config = json.loads((copied / 'config.json').read_text())
    config['model']['neck'] = {'type': 'pathlib.Path.touch', 'self': str(tmp_path / 'touched')}
    (copied / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.neck: type is 'pathlib\.Path\.touch'; only"):
        diffseg.DiffusionSegmentor.from_pretrained(copied, model=tiny_pipeline)


def test_places_without_a_segmentor_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r'no folder .*absent; give a folder that'):
        diffseg.DiffusionSegmentor.from_pretrained(tmp_path / 'absent')

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError('no network')

    monkeypatch.setattr(pretrained, 'snapshot_download', offline)
    with pytest.raises(OSError, match=r'cannot get user/head .* hub: the hub cannot be reached.* give a folder'):
        diffseg.DiffusionSegmentor.from_pretrained('user/head')


def change_config(trained, path: Path, change) -> Path:
    """A checkpoint with another config."""
    content = torch.load(trained.checkpoint)
    cfg = Config.fromstring(content['meta']['cfg'], '.py')
    change(cfg, content)
    content['meta']['cfg'] = cfg.pretty_text
    torch.save(content, path)
    return path


def test_an_id_in_place_of_a_local_network(trained, tmp_path):
    publishing.publish(trained.checkpoint, tmp_path, base_model=['sd15'])
    assert json.loads((tmp_path / 'config.json').read_text())['model']['backbone']['model'] == 'sd15'
    assert 'base_model:\n- stable-diffusion-v1-5/stable-diffusion-v1-5\n' in (tmp_path / 'README.md').read_text()
    with pytest.raises(ValueError, match='more base models than the backbone has: sdxl'):
        publishing.publish(trained.checkpoint, tmp_path, base_model=['sd15', 'sdxl'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda cfg, _: cfg.model.pop('decode_head'), 'only segmentors are published'),
        (lambda _, content: content['meta']['dataset_meta'].pop('palette'), 'dataset_meta has no palette'),
        (lambda cfg, _: cfg.model.backbone.update(lora_weights=[__file__]), 'its model reads .*test_publish'),
        (lambda cfg, _: cfg.test_dataloader.dataset.pipeline.pop(0), 'does not begin with LoadImageFromFile'),
        (lambda _, content: content['state_dict'].pop('backbone._extra_state'), 'its backbone has no fingerprint'),
    ],
)
def test_checkpoints_that_cannot_be_published(trained, tmp_path, change, message):
    path = change_config(trained, tmp_path / 'changed.pth', change)
    with pytest.raises(ValueError, match=message):
        publishing.publish(path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_files_that_are_no_checkpoint(trained, tmp_path, load_tool, capsys):
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'bare.pth')
    (tmp_path / 'broken.pth').write_text('broken')
    (tmp_path / 'list.json').write_text('[]')
    main = load_tool('convert/publish').main
    for name, message in (('bare', 'holds no config'), ('broken', 'is no checkpoint'), ('absent', 'no checkpoint at')):
        assert main([str(tmp_path / f'{name}.pth'), str(tmp_path / 'out')]) == 2
        assert message in capsys.readouterr().err
    assert main([str(trained.checkpoint), str(tmp_path / 'out'), '--results', str(tmp_path / 'list.json')]) == 2
    assert 'has no figures' in capsys.readouterr().err
