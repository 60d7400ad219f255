"""Masks from names of classes: TextMaskSegmentor and its metric."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample

from diffseg.diffusion import pipeline_prompts
from diffseg.diffusion.concepts import ConceptRecorder
from diffseg.diffusion.network_call import NetworkCall
from diffseg.diffusion.pipeline_prompts import PipelinePromptEncoder
from diffseg.diffusion.trajectories import seeded_noise
from diffseg.evaluation import TextMaskIoUMetric

CLASSES = ['horse', 'grass', 'sky', 'dog']
PREPROCESSOR = {
    'type': 'SegDataPreProcessor',
    'mean': [127.5] * 3,
    'std': [127.5] * 3,
    'bgr_to_rgb': True,
    'pad_val': 0,
    'seg_pad_val': 255,
}
kinds = pytest.mark.parametrize('kind', ['flux', 'sd3', 'sd35-medium'])


@pytest.fixture
def build(pipeline_folder):
    """`build(kind, **options)` is a segmentor with a tiny network."""
    init_default_scope('mmseg')

    def make(kind='flux', **options):
        options = {
            'classes': CLASSES,
            'blocks': [0, 1],
            'timesteps': [0.5],
            'data_preprocessor': PREPROCESSOR,
        } | options
        return MODELS.build({'type': 'TextMaskSegmentor', 'model': str(pipeline_folder(kind)), **options}).eval()

    return make


@pytest.fixture
def images():
    return torch.rand(2, 3, 48, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- embeddings


@pytest.mark.parametrize('kind, encoder', [('flux', 'text_encoder_2'), ('sd3', 'text_encoder_3')])
def test_the_token_of_a_concept_is_the_first_of_t5(kind, encoder, pipeline_folder, tmp_path, monkeypatch):
    options = {'cache_dir': tmp_path, 'dtype': torch.float32, 'max_sequence_length': 20}
    texts = ['horse', 'a very green tree', 'horse']
    tokens = PipelinePromptEncoder(pipeline_folder(kind), **options).first_tokens(texts)
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(kind))
    words = getattr(pipeline, encoder.replace('text_encoder', 'tokenizer'))
    ids = words(texts, padding='max_length', max_length=20, truncation=True, return_tensors='pt').input_ids
    with torch.no_grad():
        torch.testing.assert_close(tokens, getattr(pipeline, encoder)(ids)[0][:, 0])
    assert tokens[0].equal(tokens[2]) and not tokens[0].equal(tokens[1])

    monkeypatch.setattr(pipeline_prompts, '_load_encoder', lambda *_: pytest.fail('a text encoder was loaded'))
    assert PipelinePromptEncoder(pipeline_folder(kind), **options).first_tokens(texts).equal(tokens)


@pytest.mark.parametrize(
    'kind, texts, message',
    [
        ('pixart-sigma', ['horse'], 'FluxPipeline and StableDiffusion3Pipeline; .* has a PixArtSigmaPipeline'),
        ('flux', 'horse', "texts is 'horse'; it is a sequence"),
        ('flux', [], r'texts is \[\]'),
    ],
)
def test_texts_that_have_no_first_token_of_t5(kind, texts, message, pipeline_folder):
    with pytest.raises(ValueError, match=message):
        PipelinePromptEncoder(pipeline_folder(kind), pipeline=None).first_tokens(texts)


# ---- maps


@kinds
@torch.no_grad()
def test_maps_are_those_of_the_noised_latent(kind, build):
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    model = build(kind, templates=['{}', '{} in a photo'], interaction=False, seed=3)
    extractor = model.extractor
    latent = extractor.encode(images)
    noise = seeded_noise(latent.shape[1:], 3, 'noise', 0)
    encoder = extractor.prompt_encoder
    concepts = [encoder.first_tokens([f'{name}{end}' for name in CLASSES]).float() for end in ('', ' in a photo')]
    recorder = ConceptRecorder(extractor.network, sum(concepts) / 2, [0, 1], interaction=False)
    prompt = encoder(['']).rows([0, 0], dtype=torch.float32)
    call = NetworkCall(extractor.network)
    expected = call(recorder, (latent + noise) / 2, torch.tensor([500.0, 500.0]), prompt)['concepts']
    assert expected.shape == (2, 4, 4, 6)
    torch.testing.assert_close(model.extract_feat(images), expected)


@torch.no_grad()
def test_maps_are_means_over_timesteps_and_draws(build, images):
    single = [build(timesteps=[t]).extract_feat(images) for t in (0.3, 0.5)]
    torch.testing.assert_close(build(timesteps=[0.3, 0.5]).extract_feat(images), sum(single) / 2)
    assert not build(ensemble=2).extract_feat(images).allclose(single[1])
    torch.testing.assert_close(
        build(ensemble=2, micro_batch=1).extract_feat(images), build(ensemble=2).extract_feat(images)
    )


@torch.no_grad()
def test_images_are_resized_and_maps_tile_them(build, images):
    assert build().extract_feat(images).shape == (2, 4, 3, 5)  # of 72 pixels continued to 80
    model = build(input_size=[32, 64])
    assert model.extract_feat(images).shape == (2, 4, 2, 4)
    scores = model.encode_decode(images)
    assert scores.shape == (2, 4, 48, 72)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 48, 72))
    assert model(images).equal(model.extract_feat(images))


@torch.no_grad()
def test_a_pooled_prompt_of_zeros_is_another_modulation(build, images):
    plain, zero = build(prompt='a photo'), build(prompt='a photo', zero_pooled=True)
    assert plain.extractor.conditioning.pooled.any() and not zero.extractor.conditioning.pooled.any()
    assert not plain.extract_feat(images).allclose(zero.extract_feat(images))


# ---- classes


@pytest.mark.parametrize(
    'background, names, shares, expected',
    [
        (None, CLASSES, [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
        ({'index': 1, 'threshold': 0.25}, ['horse', 'sky', 'dog'], [0.1, 0.3, 0.6], [0.1, 0.25, 0.3, 0.6]),
        (
            {'index': 0, 'concepts': ['background', 'floor']},
            ['grass', 'sky', 'dog', 'background', 'floor'],
            [0.1, 0.2, 0.15, 0.3, 0.25],
            [0.3, 0.1, 0.2, 0.15],
        ),
        (
            {'index': 3, 'concepts': ['floor'], 'threshold': 0.5},
            ['horse', 'grass', 'sky', 'floor'],
            [0.1, 0.2, 0.3, 0.4],
            [0.1, 0.2, 0.3, 0.5],
        ),
    ],
)
def test_the_background_gets_what_the_others_do_not(background, names, shares, expected, build):
    model = build(background=background)
    assert model.concepts == names and model.protocol['concepts'] == names
    scores = model.class_scores(torch.tensor(shares).view(1, -1, 1, 1).expand(1, -1, 2, 3))
    torch.testing.assert_close(scores, torch.tensor(expected).view(1, -1, 1, 1).expand(1, -1, 2, 3))


@pytest.mark.parametrize(
    'options, message',
    [
        ({'classes': ['horse']}, 'a softmax needs two or more'),
        ({'classes': 'NoSuchDataset'}, "there is no data set 'NoSuchDataset'"),
        ({'templates': ['a photo of a {}']}, "they begin with '{}'"),
        ({'test_cfg': {'mode': 'slide'}}, 'has no test_cfg; leave it out'),
        ({'templates': []}, "they begin with '{}'"),
        ({'background': {'index': 4, 'threshold': 0.5}}, 'classes are counted from 0 to 3'),
        ({'background': {'index': 0}}, 'no concepts and no threshold'),
        ({'background': {'index': 0, 'threshold': 1.5}}, 'shares lie between 0 and 1'),
        ({'background': {'index': 0, 'concepts': 'sky'}}, "is 'sky'; it is a list of names"),
        ({'classes': ['sky', 'dog'], 'background': {'index': 0, 'threshold': 0.5}}, 'one concept in all'),
        ({'blocks': [2]}, r'blocks is \[2\]; these are different numbers from 0 to 1'),
        ({'trajectory': 'inversion', 'timesteps': [-1]}, "on the inversion trajectory; use 'noise' or 'clean'"),
    ],
)
def test_what_cannot_be_is_said(options, message, build):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_colors_are_those_of_the_data_set_or_different_ones(build):
    palette = build(classes='LoveDADataset').dataset_meta['palette']
    assert palette == DATASETS.get('LoveDADataset').METAINFO['palette']
    assert len({tuple(color) for color in build().dataset_meta['palette']}) == len(CLASSES)


@pytest.mark.parametrize('kind, message', [('pixart-sigma', 'has a PixArtSigmaPipeline'), ('dit', 'Flux and SD3')])
def test_models_without_such_blocks(kind, message, build):
    with pytest.raises(ValueError, match=message):
        build(kind, timesteps=[50])


def test_a_unet_has_no_such_blocks(build, tiny_pipeline):
    with pytest.raises(ValueError, match='has a UNet2DConditionModel; masks are made from text'):
        build(model=str(tiny_pipeline), timesteps=[50])


# ---- mmseg


def sample(labels=None):
    meta = {'img_shape': (48, 72), 'ori_shape': (24, 36), 'flip': False}
    made = SegDataSample(metainfo=meta)
    if labels is not None:
        made.gt_sem_seg = PixelData(data=labels)
    return made


@torch.no_grad()
def test_labels_of_an_image_do_not_reach_the_model(build, images):
    model = build(input_size=32)
    plain = model.predict(images, [sample(), sample()])
    labelled = model.predict(images, [sample(torch.randint(4, (1, 24, 36))) for _ in range(2)])
    for one, other in zip(plain, labelled, strict=True):
        assert one.seg_logits.data.shape == (4, 24, 36)
        assert one.seg_logits.data.equal(other.seg_logits.data)
        assert one.pred_sem_seg.data[0].equal(one.seg_logits.data.argmax(0))
        assert one.metainfo['protocol'] == model.protocol == other.metainfo['protocol']
    fixed = {'classes': CLASSES, 'concepts': CLASSES, 'templates': ['{}'], 'prompt': '', 'method': 'ConceptAttention'}
    assert fixed.items() <= json.loads(json.dumps(model.protocol)).items()
    assert len(model.predict(images)) == 2


def test_nothing_is_trained_or_saved(build, images):
    model = build()
    assert not [*model.parameters()] and not model.state_dict()
    assert not any(module.training for module in model.train().extractor.modules())
    with pytest.raises(NotImplementedError, match='nothing to train'):
        model(images, [sample(), sample()], mode='loss')


# ---- metric


def evaluated(metric, classes=('horse', 'sky'), names=('horse', 'sky')):
    metric.dataset_meta = {'classes': list(classes)}
    labels = torch.tensor([[[0, 0], [1, 255]]]), torch.tensor([[[0, 1], [1, 1]]])
    protocol = {} if names is None else {'protocol': {'classes': list(names), 'prompt': 'x'}}
    metric.process({}, [{'gt_sem_seg': {'data': labels[0]}, 'pred_sem_seg': {'data': labels[1]}, **protocol}])
    return metric.evaluate(1)


def test_figures_are_written_with_the_protocol(tmp_path):
    figures = evaluated(TextMaskIoUMetric(out_file=str(tmp_path / 'x.json')))
    result = json.loads((tmp_path / 'x.json').read_text())
    assert result['iou'] == {'horse': 50, 'sky': 50} and result['figures']['mIoU'] == figures['mIoU'] == 50
    assert {'images': 1, 'classes': ['horse', 'sky'], 'prompt': 'x'}.items() <= result['protocol'].items()
    assert 'mmseg' in result['protocol']['versions']


def test_classes_that_are_nowhere_have_no_iou(tmp_path):
    evaluated(TextMaskIoUMetric(out_file=str(tmp_path / 'x.json')), *[('horse', 'sky', 'dog')] * 2)
    assert json.loads((tmp_path / 'x.json').read_text())['iou']['dog'] is None


@pytest.mark.parametrize(
    'names, message',
    [
        (('horse',), r'model has 1 classes \(horse\), but the data set has 2 \(horse, sky\)'),
        (('sky', 'horse'), 'in its order'),
        (None, 'have no protocol with its classes'),
    ],
)
def test_other_classes_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        evaluated(TextMaskIoUMetric(), names=names)


def test_a_test_on_no_pictures_is_refused():
    metric = TextMaskIoUMetric()
    metric.dataset_meta = {'classes': ['horse', 'sky']}
    with pytest.raises(ValueError, match='no picture'):
        metric.evaluate(0)
