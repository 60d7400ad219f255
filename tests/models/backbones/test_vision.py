"""Tests for diffseg.models.backbones.vision."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_vision
import torch
from mmseg.registry import MODELS
from tiny_vision import DEPTH, KINDS, MEAN, PATCH, STD, WIDTH

from diffseg.diffusion.images import extend_images
from diffseg.geometry import fit_to_image
from diffseg.models.backbones.vision import PRESETS, VisionBackbone

IMAGE_SIZE = 3 * PATCH, 5 * PATCH


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_vision.save(tmp_path_factory.mktemp('vision') / kind, kind) for kind in KINDS}


@pytest.fixture
def make(folders: dict[str, Path]) -> Callable[..., VisionBackbone]:
    """Make a backbone of a tiny DINOv2: `make(**options)`."""

    def build(model: str | Path = folders['dinov2'], layers: list = (1, 3), **options) -> VisionBackbone:
        return MODELS.build({'type': 'VisionBackbone', 'model': model, 'layers': layers, **options})

    return build


def make_images(batch: int = 2, height: int = IMAGE_SIZE[0], width: int = IMAGE_SIZE[1]) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


# Maps


@torch.no_grad()
@pytest.mark.parametrize('layernorm', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_maps_are_the_hidden_states_of_the_whole_model(
    make: Callable, folders: dict[str, Path], kind: str, layernorm: bool
):
    x = make_images()
    pixels = ((x + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model, options = tiny_vision.model(kind), {}
    if kind == 'clip':
        model, options = model.vision_model, {'interpolate_pos_encoding': True}
    if kind == 'vit':
        options = {'interpolate_pos_encoding': True}
    if kind == 'vit_mae':
        model, options = model.vit, {'interpolate_pos_encoding': True, 'noise': torch.arange(15.0).expand(2, -1)}
        model.config.mask_ratio = model.embeddings.config.mask_ratio = 0.0
    states = model(pixels, output_hidden_states=True, **options).hidden_states
    norm = next(m for name in ('layernorm', 'norm', 'post_layernorm') if (m := getattr(model, name, None)) is not None)

    maps = make(folders[kind], [2, 'stem', -1], layernorm=layernorm)(x)
    for n, found in zip([2, 0, 3], maps, strict=True):
        normed = layernorm or (kind == 'dinov3_vit' and n == DEPTH)
        tokens = (norm(states[n]) if normed else states[n])[:, -15:]  # without class and register tokens
        torch.testing.assert_close(found, tokens.transpose(1, 2).unflatten(2, (3, 5)))


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_cells_are_where_their_patches_are(make: Callable, folders: dict[str, Path], kind: str):
    backbone = make(folders[kind], ['stem'])
    x = make_images(1)
    before = backbone(x)[0]
    x[..., 2 * PATCH + 1, 3 * PATCH + 2] *= -1
    changed = (backbone(x)[0] != before).any(1)[0]  # (h, w)
    assert changed.nonzero().tolist() == [[2, 3]]


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [(20, 33), (8, 8), (9, 70)])
def test_sizes_that_are_no_multiple_of_the_patch(make: Callable, folders: dict[str, Path], kind: str, size: tuple):
    backbone, image = make(folders[kind]), make_images(1, *size)
    maps = backbone(image)
    assert [tuple(x.shape) for x in maps] == [(1, WIDTH, -(-size[0] // PATCH), -(-size[1] // PATCH))] * 2
    for x, whole in zip(maps, backbone(extend_images(image, PATCH)), strict=True):
        assert torch.equal(x, fit_to_image(whole, PATCH, size))


@torch.no_grad()
def test_same_values_in_any_batch_and_mode(make: Callable, folders: dict[str, Path]):
    for kind in KINDS:
        backbone = make(folders[kind]).train()
        together = backbone(make_images(3))
        for i, x in enumerate(make_images(3)):
            for one, all_ in zip(backbone.eval()(x[None]), together, strict=True):
                torch.testing.assert_close(one[0], all_[i])


@torch.no_grad()
def test_input_size_resizes_bilinearly(make: Callable):
    x = make_images()
    resized = torch.nn.functional.interpolate(x, (32, 40), mode='bilinear')
    for found, expected in zip(make(input_size=(32, 40))(x), make()(resized), strict=True):
        assert torch.equal(found, expected)
    assert make(input_size=24)(x)[0].shape[-2:] == (3, 3)


def test_maps_have_the_dtype_of_the_image_and_no_graph(make: Callable):
    x = make_images()
    exact = make()(x)
    for dtype in ('bfloat16', 'float32'):
        maps = make(dtype=dtype)(x)
        assert all(y.dtype == torch.float32 and not y.requires_grad for y in maps)
        torch.testing.assert_close(maps, exact, atol=0.2, rtol=0.1)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(make()(x), exact, atol=0.2, rtol=0.1)


SMALLER = [name for name in PRESETS if name == 'mae-l8-ffhq' or '-l' not in name]


@pytest.mark.parametrize('name', SMALLER)
def test_presets_describe_their_maps(name: str):
    with torch.device('meta'):
        backbone = VisionBackbone(name, [0, 5, -1], random=True)
        maps = backbone(torch.empty(1, 3, 50, 70))
    patch = backbone.patch_size
    assert [tuple(x.shape[1:]) for x in maps] == [(c, -(-50 // patch), -(-70 // patch)) for c in backbone.channels]
    assert 'clip' in name or backbone.normalization['mean'] == [0.485, 0.456, 0.406]
    # the papers' figures
    billions = {'s': 0.022, 'b': 0.0865, 'l': 0.304, 'h': 0.632, 'g': 1.137}[name.split('-')[1][0]]
    assert sum(x.numel() for x in backbone.network.buffers()) / 1e9 == pytest.approx(billions, rel=0.03)


def test_random_weights_are_the_same_each_time(make: Callable):
    before = torch.get_rng_state()
    first, second = make(random=True), make(random=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == second.fingerprint != make().fingerprint


# Errors


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'layers': [4]}, ValueError, r"no layers \[4\].*'stage3' or 3"),
        ({'layers': [-5]}, ValueError, r'no layers \[-5\]'),
        ({'layers': ['stage4']}, ValueError, r"no layers \['stage4'\]"),
        ({'layers': [3, -1]}, ValueError, 'lists a layer twice'),
        ({'channels': [32, 31]}, ValueError, r'stage3 has 32, not 31.*\[32, 32\]'),
        ({'channels': [32]}, ValueError, '1 entries for 2 layers'),
        ({'dtype': 'float23'}, ValueError, 'unknown dtype'),
        ({'model': 'dinov2-h'}, ValueError, 'did you mean dinov2-'),
        ({'model': './nowhere'}, FileNotFoundError, 'no model at ./nowhere'),
    ],
)
def test_options_that_cannot_be(make: Callable, options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        make(**options)


def test_models_of_other_types(make: Callable, tmp_path: Path):
    (tmp_path / 'config.json').write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match='is a resnet; supported are dinov2'):
        make(tmp_path)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('preprocessor_config.json', None, 'give a folder with config.json, preprocessor_config.json'),
        ('model.safetensors', None, 'cannot load'),
        ('model.safetensors', b'\x00' * 100, 'cannot load'),
    ],
)
def test_missing_and_damaged_files(make: Callable, tmp_path: Path, name: str, content: bytes | None, message: str):
    folder = tiny_vision.save(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=message):
        make(folder)


def test_missing_weights(make: Callable, tmp_path: Path):
    model = tiny_vision.model('dinov2')
    state = {name: x for name, x in model.state_dict().items() if name != 'layernorm.bias'}
    tiny_vision.save(tmp_path)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(OSError, match=r'lacks weights: layernorm\.bias'):
        make(tmp_path)


@pytest.mark.parametrize(
    ('x', 'message'),
    [
        (torch.zeros(3, 16, 16), r'expected \(B, 3, H, W\)'),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 'expected floating point'),
        (torch.full((1, 3, 16, 16), 200.0), r'expected \[-1, 1\]'),
        (torch.zeros(1, 3, 7, 16), 'smaller than one cell'),
    ],
)
def test_images_that_cannot_be(make: Callable, x: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        make()(x)


# A frozen network in a trained model


def test_state_dict_is_the_fingerprint_and_loads_strictly(make: Callable):
    backbone = make()
    state = backbone.state_dict()
    assert list(state) == ['_extra_state'] and not list(backbone.parameters())
    make().load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    'options', [{'layers': [1, 2]}, {'layernorm': False}, {'random': True}, {'dtype': 'bfloat16'}], ids=str
)
def test_another_fingerprint_is_refused(make: Callable, options: dict):
    with pytest.raises(ValueError, match='belongs to another backbone'):
        make(**options).load_state_dict(make().state_dict())
    make(**options, check_fingerprint='warn').load_state_dict(make().state_dict())


@torch.no_grad()
def test_a_copy_shares_the_network_and_gives_the_same_maps(make: Callable, folders: dict[str, Path]):
    for kind in KINDS:
        backbone = make(folders[kind])
        clone = copy.deepcopy(backbone)
        pairs = zip(backbone.network.buffers(), clone.network.buffers(), strict=True)
        assert all(ours is theirs for ours, theirs in pairs)
        for ours, theirs in zip(backbone(make_images()), clone(make_images()), strict=True):
            assert torch.equal(ours, theirs)


def test_train_and_init_weights_leave_the_network(make: Callable):
    backbone = make().train()
    before = {name: x.clone() for name, x in backbone.named_buffers()}
    backbone.init_weights()
    assert backbone.training and not any(module.training for module in backbone.network.modules())
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_buffers())


@torch.no_grad()
def test_cached_maps(make: Callable, tmp_path: Path):
    x = make_images()
    cold = make(cache={'path': tmp_path, 'dtype': 'float32'})(x)
    warm = make(cache={'path': tmp_path, 'dtype': 'float32'})
    warm.network.forward = None  # not to be run again
    for ours, theirs, plain in zip(warm(x), cold, make()(x), strict=True):
        assert torch.equal(ours, theirs) and torch.equal(ours, plain)
    with pytest.raises(TypeError):
        warm(-x)
