"""Descriptors at points, and SparseMatcher."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from scenes import draw_homography, draw_scene, scene_size, view

from diffseg.evaluation import corner_error, estimate_homography
from diffseg.keypoints import sift_keypoints
from diffseg.models import CorrespondenceModel, SparseMatcher
from diffseg.structures import HomographySample

DEMO = Path(__file__).resolve().parents[3] / 'demo/tiny-sd'
LAYER = 'up-level3-repeat0-vit-block0-self-k'  # of the tiny pipeline: 32 channels, stride 8


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., SparseMatcher]:
    def build(backbone: dict | None = None, **options) -> SparseMatcher:
        init_default_scope('mmseg')
        defaults = {'type': 'DiffusionBackbone', 'model': str(tiny_pipeline), 'layers': [LAYER], 'timesteps': [50]}
        return MODELS.build({'type': 'SparseMatcher', 'backbone': {**defaults, **(backbone or {})}, **options}).eval()

    return build


def make_sample(images: tuple[str, str], points: list[torch.Tensor], size: tuple[int, int]) -> HomographySample:
    meta = {'pair_id': '-'.join(images), 'sequence': 'v_x'}
    for number, image in enumerate(images):
        meta |= {f'img_path{number}': image, f'ori_shape{number}': size, f'img_shape{number}': size}
    return HomographySample(metainfo=meta, keypoints0=points[0], keypoints1=points[1])


# ---- the model


def test_what_it_does_not_take(make):
    for options, problem in [
        ({'metric': 'dot'}, "metric is 'dot'; it is 'cosine' or 'l2'"),
        ({'convention': 'dift'}, 'convention'),
        ({'prompt': 'a photo'}, 'give it to the backbone'),
    ]:
        with pytest.raises(ValueError, match=problem):
            make(**options)
    with pytest.raises(NotImplementedError, match='SparseMatcher cannot be trained'):
        make()({'image0': [], 'image1': []}, [], 'loss')


@pytest.mark.parametrize('options', [{}, {'metric': 'l2', 'convention': 'published', 'store_dtype': 'float16'}])
def test_an_image_matches_itself_and_is_encoded_once(make, options, monkeypatch):
    model = make(**options)
    encoded = []
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, 'forward', lambda images: (encoded.append(len(images)), forward(images))[1])
    image = torch.randint(0, 256, (3, 8, 10), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    points = torch.tensor([[9.0, 8], [60, 33], [41.5, 55], [22, 40]])
    sample = make_sample(('a', 'a'), [points, points.flip(0)], (64, 80))
    batch = {'inputs': {'image0': [image] * 2, 'image1': [image, image.flip(1)]}, 'data_samples': [sample]}
    batch['data_samples'].append(make_sample(('a', 'b'), [points, points[:0]], (64, 80)))
    with torch.no_grad():
        first, second = model.test_step(batch)
        model.test_step({'inputs': {k: v[:1] for k, v in batch['inputs'].items()}, 'data_samples': [sample]})
    assert first.pred_matches.tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert second.pred_matches.shape == (0, 2)
    assert sum(encoded) == 2  # a and b
    settings = {'metric': 'cosine', 'convention': 'centres', 'store_dtype': 'float32'} | options
    assert settings.items() <= first.protocol.items()


def test_a_checkpoint_of_a_correspondence_model_fits(make, tiny_pipeline):
    neck = {'type': 'AggregationNeck', 'levels': [[32]], 'timesteps': 1, 'out_channels': 16, 'num_groups': 4}
    sparse = make(neck=neck)
    backbone = {'type': 'DiffusionBackbone', 'model': str(tiny_pipeline), 'layers': [LAYER], 'timesteps': [50]}
    trained = CorrespondenceModel(backbone, neck)
    assert sparse.protocol['weights'] != trained.protocol['weights']
    sparse.load_state_dict(trained.state_dict())
    assert sparse.protocol['weights'] == trained.protocol['weights']


@pytest.fixture(scope='module')
def views() -> tuple[list[np.ndarray], np.ndarray]:
    """Two views of a drawn scene, 96 x 128 pixels, and the homography between them."""
    rng, size = np.random.default_rng(3), (96, 128)
    scene = draw_scene(rng, scene_size(size))
    homography = draw_homography(rng, size, 0.25)
    return [view(scene, each, size) for each in (np.eye(3), homography)], homography


@pytest.mark.parametrize('convention', ['centres', 'published'])
def test_a_known_homography_is_found_by_real_descriptors(make, views, convention):
    images, truth = views
    layer = {'model': str(DEMO), 'layers': ['up-level3-repeat0-res-out'], 'timesteps': [50]}
    model = make(layer, convention=convention)
    points = [torch.from_numpy(sift_keypoints(Image.fromarray(image), 200)) for image in images]
    sample = make_sample(('a', 'b'), points, images[0].shape[:2])
    inputs = {f'image{i}': [torch.from_numpy(image).permute(2, 0, 1)] for i, image in enumerate(images)}
    with torch.no_grad():
        (sample,) = model.test_step({'inputs': inputs, 'data_samples': [sample]})
    rows = sample.pred_matches
    assert len(rows) > 30
    homography, inliers = estimate_homography(*(points[i][rows[:, i]].numpy() for i in (0, 1)))
    assert inliers.mean() > 0.5
    assert corner_error(homography, truth, images[0].shape[:2]) < 1
