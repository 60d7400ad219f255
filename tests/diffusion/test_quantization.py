"""Tests for diffseg.diffusion.quantization, of extractors and backbones."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import tiny_pipelines
import torch
from diffusers import PixArtTransformer2DModel
from mmseg.registry import MODELS
from tiny_transformers import KINDS as TRANSFORMERS
from torch import nn

import diffseg.diffusion.quantization
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.quantization import Quantization, quantize
from diffseg.models import DiffusionBackbone

pytest.importorskip('torchao', reason='torchao is missing: make test-quantization')

LAYERS = ['vit-block0-mod', 'vit-block1-cross-map', 'vit-block1-out']


@pytest.fixture(scope='module')
def folder(pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt of 128 channels, which 'nf4' needs, and four blocks."""
    folder = tmp_path_factory.mktemp('models') / 'wide'
    shutil.copytree(pipeline_folder('pixart-sigma'), folder)
    config = {**TRANSFORMERS['pixart'][1], **tiny_pipelines.KINDS['pixart-sigma'].config}
    wide = {'num_attention_heads': 4, 'attention_head_dim': 32, 'cross_attention_dim': 128, 'num_layers': 4}
    torch.manual_seed(0)
    PixArtTransformer2DModel(**{**config, **wide}).save_pretrained(folder / 'transformer')
    return folder


@pytest.fixture
def make(folder: Path) -> Callable[..., DiffusionBackbone]:
    def build(**options) -> DiffusionBackbone:
        defaults = {'model': str(folder), 'layers': LAYERS, 'timesteps': [260], 'prompt': 'a horse'}
        return MODELS.build({'type': 'DiffusionBackbone', **defaults, **options})

    return build


def images() -> torch.Tensor:
    return torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0).item()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Of the tensors inside."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [block.weight for block in network.transformer_blocks.modules() if isinstance(block, nn.Linear)]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('kind', 'bits'), [('int8', 8), ('fp8', 8), ('nf4', 4)])
def test_maps_are_near_those_of_all_bits(make: Callable, kind: str, bits: int, dtype: str):
    plain, quantized = make(dtype=dtype), make(dtype=dtype, quantization=kind)
    for exact, near in zip(plain(images()), quantized(images()), strict=True):
        assert near.dtype == exact.dtype and near.shape == exact.shape
        assert similarity(near, exact) > (0.97 if kind == 'nf4' else 0.999) and not torch.equal(near, exact)
    numbers = sum(weight.numel() for weight in weights(plain.extractor.network))
    stored = sum(map(stored_bytes, weights(quantized.extractor.network)))
    assert bits / 8 <= stored / numbers < bits / 8 * 1.15
    assert quantized.channels == plain.channels
    expected = {**plain.fingerprint, 'quantization': kind}
    assert quantized.fingerprint == expected and plain.fingerprint['dtype'] == dtype


@pytest.mark.parametrize('kind', get_args(Quantization))
def test_a_frozen_backbone(make: Callable, tmp_path: Path, kind: str):
    backbone = make(quantization=kind)
    assert list(backbone.parameters()) == [] and list(backbone.state_dict()) == ['_extra_state']
    maps, clone = backbone(images()), copy.deepcopy(backbone)
    assert all(map(torch.equal, clone(images()), maps))
    backbone.offload()
    assert all(map(torch.equal, backbone.to(torch.device('cpu'))(images()), maps))
    with pytest.raises(ValueError, match='quantization was None and is'):
        make(quantization=kind).load_state_dict(make().state_dict())


def test_a_cache_keeps_quantized_maps_apart(make: Callable, tmp_path: Path):
    cache = {'path': str(tmp_path), 'dtype': 'float32'}
    exact, near = (make(cache=cache, quantization=kind)(images())[2] for kind in (None, 'int8'))
    assert not torch.equal(exact, near)
    assert torch.equal(make(cache=cache, quantization='int8')(images())[2], near)


@pytest.mark.parametrize('kind', get_args(Quantization))
@pytest.mark.filterwarnings('ignore:TorchaoLoraLinear was instantiated')  # it cannot be merged, and is not
def test_layers_of_low_rank_train_beside_quantized_weights(make: Callable, kind: str):
    backbone = make(layers=['vit-block1-out'], quantization=kind, lora={'r': 2})
    assert torch.equal(backbone(images())[0], make(layers=['vit-block1-out'], quantization=kind)(images())[0])
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    backbone.train()(images())[0].square().mean().backward()
    assert all('.lora_' in name for name, _ in backbone.named_parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


def test_a_unet(tiny_pipeline: Path):
    layers = ['up-level1-repeat1-vit-block0-cross-q', 'unet-out']
    exact, near = (
        DiffusionExtractor(tiny_pipeline, layers, [50], weights={'quantization': kind})(images())
        for kind in (None, 'int8')
    )
    assert all(
        0.999 < similarity(near[name], exact[name]) and not torch.equal(near[name], exact[name]) for name in layers
    )


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'quantization': 'int4'}, "quantization is 'int4'; it is 'int8' or 'fp8' or 'nf4', or None"),
        ({'quantization': 'int8', 'frozen': False}, r'quantized weights \(int8\) cannot be trained; .* lora'),
    ],
)
def test_options_that_cannot_be(make: Callable, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_narrow_layers_and_a_missing_library(monkeypatch: pytest.MonkeyPatch):
    network, config = TRANSFORMERS['pixart']
    with pytest.raises(ValueError, match=r'no linear layer of this PixArt\w+ has a multiple of 64 x 256 weights; use'):
        quantize(network(**config), 'nf4')
    monkeypatch.setattr(diffseg.diffusion.quantization, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'diffseg\[quantization\]'"):
        quantize(network(**config), 'int8')
