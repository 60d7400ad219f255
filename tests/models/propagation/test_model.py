import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from simulated_device import simulated_device
from tiny_mmseg import backbone_config
from torch import Tensor, nn

from diffseg.models import LabelPropagator
from diffseg.structures import VideoSample

SETTINGS = {'topk': 5, 'radius': 4, 'temperature': 0.1, 'previous_frames': 3}
SIZE = 64, 96


@MODELS.register_module()
class PixelBackbone(nn.Module):
    """Descriptors of 4 x 4 pixels that are these pixels; keeps the images that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.seen.append(x)
        return (nn.functional.pixel_unshuffle(x, 4),)


def build(**options) -> LabelPropagator:
    init_default_scope('mmseg')
    return MODELS.build({'type': 'LabelPropagator', 'backbone': {'type': 'PixelBackbone'}, **SETTINGS, **options})


def frames_of(*shifts: int) -> Tensor:
    """A random picture that moves to the right, uint8 with shape (T, 3, H, W)."""
    picture = torch.randint(256, (3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.stack([picture.roll(shift, 2) for shift in shifts])


def sample_of(frames: Tensor, ori_shape: tuple[int, int] = SIZE, **fields: Tensor) -> VideoSample:
    meta = {'video_id': 'walk', 'ori_shape': ori_shape, 'img_shape': SIZE, 'num_frames': len(frames)}
    sample = VideoSample(metainfo=meta)
    sample.update(VideoSample(**fields))
    return sample


def predict(model: LabelPropagator, frames: Tensor, sample: VideoSample) -> VideoSample:
    batch = model.data_preprocessor({'inputs': {'frames': [frames]}, 'data_samples': [sample]})
    (found,) = model(**batch, mode='predict')
    return found


def test_the_same_frame_again_and_again_keeps_the_mask(drawn_mask):
    frames = frames_of(*[0] * 8)
    mask = nn.functional.interpolate(drawn_mask(16, 24)[None, None], SIZE)[0, 0]  # whole cells
    samples = predict(build(topk=1), frames, sample_of(frames, first_mask=mask)).pred_masks
    assert samples.shape == (8, *SIZE) and samples.dtype == torch.uint8
    assert torch.equal(samples[0], mask)
    for later in samples[1:]:
        assert torch.equal(later, samples[1])
        assert (later != mask).float().mean() < 0.05  # corners of cells, by the bilinear upsampling


def test_masks_and_joints_follow_what_moves(drawn_mask):
    frames = frames_of(0, 4, 8, 12)
    mask, joints = drawn_mask(*SIZE), torch.tensor([[20.0, 30.0], [60.0, 12.0]])
    masks = predict(build(topk=1), frames, sample_of(frames, first_mask=mask)).pred_masks
    assert (masks[3] != mask.roll(12, 1)).float().mean() < 0.06
    samples = predict(build(topk=1, labels='joints'), frames, sample_of(frames, first_joints=joints)).pred_joints
    assert samples.shape == (4, 2, 2) and torch.equal(samples[0], joints)
    assert ((samples[3] - joints - torch.tensor([12.0, 0])).abs() < 2).all()


def test_predictions_have_the_size_of_the_original_frames(drawn_mask):
    frames, original = frames_of(0, 4), (50, 130)
    samples = predict(build(), frames, sample_of(frames, original, first_mask=drawn_mask(*original))).pred_masks
    assert samples.shape == (2, *original)
    joints = torch.tensor([[100.0, 40.0]])
    sample = sample_of(frames, original, first_joints=joints)
    samples = predict(build(topk=1, labels='joints'), frames, sample).pred_joints
    cell = torch.tensor([4 * 130 / 96, 4 * 50 / 64])
    assert ((samples[1, 0] - joints[0]) / cell - torch.tensor([1, 0])).abs().max() < 0.75


@pytest.mark.parametrize('batch_size', [1, 3, 20])
def test_frames_are_encoded_once_and_batches_change_nothing(batch_size, drawn_mask):
    frames = frames_of(0, 4, 4, 8, 12, 16, 20)
    model, sample = build(batch_size=batch_size), sample_of(frames, first_mask=drawn_mask(*SIZE))
    samples = predict(model, frames, sample).pred_masks
    seen = torch.cat(model.backbone.seen)
    assert all(len(images) <= batch_size for images in model.backbone.seen)
    torch.testing.assert_close(seen, frames / 127.5 - 1)
    reference = predict(build(), frames, sample_of(frames, first_mask=drawn_mask(*SIZE))).pred_masks
    assert torch.equal(samples, reference)


def test_frames_are_read_when_they_are_due():
    frames = frames_of(0, 4, 8, 12)
    model = build(batch_size=2)
    described = model.encode_frames(frames)
    next(described)
    assert len(model.backbone.seen) == 1
    first = model.backbone.seen[0]
    assert first.shape == (2, 3, *SIZE)


def test_context_is_the_first_frame_and_some_previous_ones(monkeypatch, drawn_mask):
    frames = frames_of(0, 4, 8, 12, 16, 20)
    contexts = []

    def spy(target, context, labels, *settings):
        assert settings == (5, 4, 0.1)
        contexts.append([next(i for i in range(6) if torch.equal(each, descriptors[i])) for each in context])
        return torch.full_like(labels[0], len(contexts))

    model = build(previous_frames=2, context_device='cpu')
    descriptors = list(model.encode_frames(frames))
    monkeypatch.setattr('diffseg.models.propagation.model.propagate_labels', spy)
    predict(model, frames, sample_of(frames, first_mask=drawn_mask(*SIZE)))
    assert contexts == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_on_an_accelerator(drawn_mask):
    """Where the data preprocessor brings the annotations to the device as well."""
    frames = frames_of(0, 4, 8)
    fields = {'mask': {'first_mask': drawn_mask(*SIZE)}, 'joints': {'first_joints': torch.tensor([[20.0, 30.0]])}}
    for labels, first in fields.items():
        model = build(labels=labels)
        expected = predict(model, frames, sample_of(frames, **first))
        with simulated_device() as device:
            samples = predict(model.to(device), frames, sample_of(frames, **first))
            name = 'pred_masks' if labels == 'mask' else 'pred_joints'
            assert torch.equal(samples.get(name), expected.get(name))


def test_a_diffusion_model_propagates(tiny_pipeline, drawn_mask):
    backbone = backbone_config(tiny_pipeline, layers=['dift-2'], timesteps=[51], ensemble=2)
    model = build(backbone=backbone, batch_size=2).eval()
    frames = frames_of(0, 0, 0)
    samples = predict(model, frames, sample_of(frames, first_mask=drawn_mask(*SIZE))).pred_masks
    assert (samples[2] == samples[0]).float().mean() > 0.7


def test_weights_that_are_trained_on_pairs_fit():
    parts = {
        'backbone': {'type': 'PixelBackbone'},
        'neck': {'type': 'AggregationNeck', 'levels': [[48]], 'timesteps': 1, 'out_channels': 128},
        'head': {'type': 'ConvDescriptorHead', 'in_channels': 128},
    }
    model = build(**parts)
    trained = MODELS.build({'type': 'CorrespondenceModel', **parts})
    model.load_state_dict(trained.state_dict())
    images = torch.rand(1, 3, *SIZE)
    torch.testing.assert_close(model.encode(images), trained.encode(images, [None]))


def test_bad_input_is_refused(drawn_mask):
    frames = frames_of(0, 4)
    with pytest.raises(ValueError, match="labels is 'boxes'"):
        build(labels='boxes')
    with pytest.raises(ValueError, match='previous_frames is -1'):
        build(previous_frames=-1)
    with pytest.raises(ValueError, match='batch_size is 0'):
        build(batch_size=0)
    with pytest.raises(ValueError, match="video walk: has no first_joints, but labels='joints'"):
        predict(build(labels='joints'), frames, sample_of(frames, first_mask=drawn_mask(*SIZE)))
    with pytest.raises(ValueError, match="mode is 'loss'"):
        build()({'frames': [frames]}, [sample_of(frames)], mode='loss')
    layers = ['dift-1', 'dift-2']
    with pytest.raises(ValueError, match='takes one'):
        build().describe([torch.zeros(1, 3, 4, 4)] * len(layers))
