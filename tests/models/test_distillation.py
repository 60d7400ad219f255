"""CleanDIFT on a tiny UNet."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from mmseg.registry import MODELS
from safetensors import safe_open

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.timestep_heads import TimestepHeads
from diffseg.models.distillation import stratified_timesteps

LAYERS = ['mid-repeat1-res-out', 'up-level0-upsampler-out', 'up-level1-repeat1-vit-out']
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture
def build(shallow_sd15, tmp_path):
    """`build(backbone={...}, **options)` makes a distiller, in training mode."""

    def make(backbone=None, **options):
        init_default_scope('mmseg')
        torch.manual_seed(0)
        student = {
            'type': 'DiffusionBackbone',
            'model': str(shallow_sd15),
            'layers': LAYERS,
            'cache_dir': str(tmp_path),
        }
        config = {'backbone': {**student, **(backbone or {'frozen': False})}, 'heads': {'depth': 2, 'width': 16}}
        return MODELS.build({'type': 'CleanDistiller', **config, **options}).train()

    return make


def tensors(module):
    return {name: x.clone() for name, x in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize('backbone', [{'frozen': False}, {'lora': {'r': 2}}], ids=['all', 'lora'])
def test_all_that_is_trained_moves_and_is_exported_and_the_teacher_stays(build, backbone, shallow_sd15, tmp_path):
    model = build(backbone)
    teacher, before = tensors(model.teacher), tensors(model)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-5)
    for _ in range(4):  # of heads and LoRA the last layers move first, as the others wait for these to leave zero
        optimizer.zero_grad()
        model(IMAGES, mode='loss')['loss'].backward()
        optimizer.step()
    assert {name for name, x in trained.items() if torch.equal(x, before[name])} == set()
    assert all(torch.equal(x, teacher[name]) for name, x in tensors(model.teacher).items())

    model.eval()
    with torch.no_grad():
        model.learned_timestep.fill_(0.2573)
    maps = model(IMAGES)
    model.export(tmp_path)
    with safe_open(tmp_path / 'unet.safetensors', 'pt') as file:
        metadata = file.metadata()
    assert (metadata['timestep'], metadata['learned_timestep']) == ('261', '257.3000')
    weights = {'network_weights': tmp_path / 'unet.safetensors'}
    extractor = DiffusionExtractor(shallow_sd15, LAYERS, [261], trajectory='clean', weights=weights)
    activations = extractor(IMAGES)
    frozen = DiffusionExtractor(shallow_sd15, LAYERS, [261], trajectory='clean')(IMAGES)
    for name, x in maps.items():
        torch.testing.assert_close(activations[name][:, 0], x, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(frozen[name], activations[name], rtol=1e-4, atol=1e-5)
    features = TimestepHeads.load(tmp_path / 'heads.safetensors').at(activations, [500])
    expected = model.heads(maps, torch.tensor([500, 500]))
    for name, x in expected.items():
        torch.testing.assert_close(features[name][:, 0], x, rtol=1e-4, atol=1e-5)


def test_the_loss_of_known_maps(build, monkeypatch):
    model = build(heads=None, timesteps_per_image=2)
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    student = torch.stack([x, y], dim=1)[None, :, None]  # (1, 2, 1, 2): two cells
    same, swapped, opposite = student * 5, student.flip(-1), torch.stack([x, -y], dim=1)[None, :, None]
    targets = {'a': torch.cat([same, swapped]), 'b': torch.cat([same, opposite])}  # two timesteps
    monkeypatch.setattr(model, 'student_maps', lambda *_: {'a': student, 'b': student})
    monkeypatch.setattr(model, 'teacher_maps', lambda *_: targets)
    losses = model.loss(torch.zeros(1, 4, 8, 8), None)
    assert losses['loss'].item() == pytest.approx(-((1 + 0) / 2 + (1 + 0) / 2))
    assert losses['cosine'].item() == pytest.approx(0.5)


def test_the_teacher_sees_noise_of_each_timestep(build):
    model = build()
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([[1, 400, 900], [300, 600, 998]])
    maps = model.teacher_maps(latents, timesteps, noise, None)
    alpha_bar = model.schedule.alphas_cumprod[900].float()
    x_t = alpha_bar.sqrt() * latents[:1] + (1 - alpha_bar).sqrt() * noise[:1, 2]
    one = model.teacher.extractor.read_latents(x_t, torch.tensor([900]))
    for name, x in one.items():
        torch.testing.assert_close(maps[name][2:3], x)


def test_one_timestep_is_drawn_in_each_part():
    torch.manual_seed(0)
    timesteps = stratified_timesteps(2000, 3, 1, 999, 'cpu')
    assert timesteps.amin(0).tolist() == [1, 333, 666]
    assert timesteps.amax(0).tolist() == [333, 666, 998]


def test_agreement_is_that_of_the_frozen_network_before_training_whatever_the_batch(build):
    model = build().eval()
    samples = model(IMAGES, [BaseDataElement(), BaseDataElement()], mode='predict')
    (alone,) = model(IMAGES[1:], [BaseDataElement()], mode='predict')
    measured = ('cosine', 'cosine_plain', 'cosine_frozen')
    assert all(alone.get(name) == pytest.approx(samples[1].get(name), rel=1e-5) for name in measured)
    assert alone.cosine == alone.cosine_plain == alone.cosine_frozen


def test_gradient_checkpointing_changes_no_gradient(build):
    gradients = []
    for checkpointing in (False, True):
        model = build({'frozen': False, 'gradient_checkpointing': checkpointing})
        torch.manual_seed(1)
        model(IMAGES, mode='loss')['loss'].backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, x in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], x, rtol=1e-4, atol=1e-6)


def test_errors(build, tmp_path):
    with pytest.raises(ValueError, match='nothing of the backbone is trained'):
        build({'frozen': True})
    with pytest.raises(ValueError, match=r'timestep_range is \(1, 2000\).*within 0 to 1000'):
        build(timestep_range=(1, 2000))
    captions = tmp_path / 'captions.json'
    captions.write_text('{"a.png": "a photo"}')
    model = build({'frozen': False, 'prompt': {'type': 'captions', 'file': str(captions)}})
    with pytest.raises(ValueError, match='end the pipeline with LoadCaption'):
        model(IMAGES, [BaseDataElement(), BaseDataElement()], mode='loss')
