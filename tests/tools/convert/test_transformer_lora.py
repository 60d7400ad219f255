"""LoRA of transformers, held against diffusers' pipelines that load the same files."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline
from mmseg.registry import MODELS
from safetensors.torch import load_file, save_file
from torch import nn

import diffseg.models  # noqa: F401
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.lora import FILE_NAME, TRANSFORMER_LORA

LAYERS = ['vit-block1-out']
KINDS = ('auraflow', 'flux', 'flux2', 'lumina2', 'qwen-image', 'sana', 'sd3', 'z-image')


def fused_by_pipeline(folder: Path, source: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of the transformer when the pipeline has loaded and fused a file."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(source)
    pipeline.fuse_lora(components=['transformer'], lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline.transformer.state_dict()


def extractor(folder: Path, *lora_weights) -> DiffusionExtractor:
    return DiffusionExtractor(folder, LAYERS, [260], prompt=None, weights={'lora_weights': lora_weights})


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-6)


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, x in a.items() if not torch.equal(x, b[name])}


@pytest.fixture
def export(load_tool: Callable[[str], ModuleType]) -> Callable[[nn.Module, Path], Path]:
    """Write the trained layers of a backbone as tools/convert/export_lora.py does: `export(backbone, folder)`."""
    tool = load_tool('convert/export_lora')

    def write(backbone: nn.Module, folder: Path) -> Path:
        state = {f'backbone.{name}': x for name, x in backbone.state_dict().items()}
        torch.save({'state_dict': state}, folder / 'iter_1.pth')
        assert tool.main([str(folder / 'iter_1.pth'), str(folder / 'lora')]) == 0
        return folder / 'lora'

    return write


def test_every_class_with_a_loader_is_tested(pipeline_folder: Callable):
    names = {type(extractor(pipeline_folder(kind)).network).__name__ for kind in KINDS}
    assert names == set(TRANSFORMER_LORA)


@pytest.mark.parametrize('kind', KINDS)
def test_what_was_trained_is_loaded_by_pipelines_and_extractors(kind: str, pipeline_folder, export, tmp_path: Path):
    folder = pipeline_folder(kind)
    backbone = MODELS.build(
        {
            'type': 'DiffusionBackbone',
            'model': str(folder),
            'layers': LAYERS,
            'timesteps': [260],
            'prompt': 'a horse',
            'lora': {'r': 2, 'lora_alpha': 3},
        }
    )
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    source = export(backbone, tmp_path)
    names = list(load_file(source / FILE_NAME))
    assert names and all(name.startswith('transformer.') for name in names)

    plain, ours = extractor(folder), extractor(folder, source)
    assert_equal(ours.network.state_dict(), fused_by_pipeline(folder, source))
    modules = {name.removeprefix('transformer.').split('.lora_')[0] for name in names}
    assert changed(plain.network.state_dict(), ours.network.state_dict()) == {f'{name}.weight' for name in modules}
    images = torch.rand(1, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        (trained,) = backbone(images)
        (loaded,) = ours(images, 'a horse').values()
    torch.testing.assert_close(loaded[:, 0], trained, rtol=1e-3, atol=1e-4)
    assert ours.fingerprint['lora_weights'] != plain.fingerprint['lora_weights'] == []


@pytest.mark.parametrize('alpha', [None, 3.0])
def test_scales_and_alphas(pipeline_folder: Callable, tmp_path: Path, alpha: float | None):
    folder, stem = pipeline_folder('flux'), 'transformer.transformer_blocks.0.attn.to_q'
    tensors = {f'{stem}.lora_A.weight': torch.randn(2, 32), f'{stem}.lora_B.weight': torch.randn(32, 2)}
    if alpha is not None:
        tensors[f'{stem}.alpha'] = torch.tensor(alpha)
    save_file(tensors, tmp_path / 'x.safetensors')
    ours = extractor(folder, (tmp_path / 'x.safetensors', 0.5)).network.state_dict()
    assert_equal(ours, fused_by_pipeline(folder, tmp_path / 'x.safetensors', 0.5))
    name = f'{stem.removeprefix("transformer.")}.weight'
    added = tensors[f'{stem}.lora_B.weight'] @ tensors[f'{stem}.lora_A.weight'] * 0.5 * (alpha or 2) / 2
    torch.testing.assert_close(ours[name], extractor(folder).network.state_dict()[name] + added)


def test_kohyas_files_of_flux(pipeline_folder: Callable, tmp_path: Path):
    """Their queries, keys and values are one matrix."""
    folder, tensors = pipeline_folder('flux'), {}
    for module, outputs in (('img_attn_qkv', 96), ('img_attn_proj', 32), ('txt_mlp_0', 128)):
        stem = f'lora_unet_double_blocks_0_{module}'
        tensors[f'{stem}.lora_down.weight'] = torch.randn(2, 32)
        tensors[f'{stem}.lora_up.weight'] = torch.randn(outputs, 2)
        tensors[f'{stem}.alpha'] = torch.tensor(1.0)
    save_file(tensors, tmp_path / 'kohya.safetensors')
    ours = extractor(folder, tmp_path / 'kohya.safetensors').network.state_dict()
    assert_equal(ours, fused_by_pipeline(folder, tmp_path / 'kohya.safetensors'))
    block = 'transformer_blocks.0'
    modules = ('attn.to_q', 'attn.to_k', 'attn.to_v', 'attn.to_out.0', 'ff_context.net.0.proj')
    assert changed(extractor(folder).network.state_dict(), ours) == {f'{block}.{name}.weight' for name in modules}


@pytest.mark.parametrize(
    ('kind', 'names', 'message'),
    [
        ('sd3', {'unet.conv_in.lora_A.weight': (2, 4)}, 'no LoRA weights for a transformer'),
        ('sd3', {'transformer.nothing.lora_A.weight': (2, 4), 'transformer.nothing.lora_B.weight': (4, 2)}, 'fit'),
        ('pixart-sigma', {'transformer.x.lora_A.weight': (2, 4)}, 'no LoRA weights for a PixArtTransformer2DModel'),
        (
            'flux',
            {
                'transformer.transformer_blocks.0.attn.to_q.lora_A.weight': (2, 32),
                'transformer.transformer_blocks.0.attn.to_q.lora_B.weight': (32, 2),
                'text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight': (2, 32),
            },
            'LoRA weights of text encoders',
        ),
    ],
)
def test_other_files(pipeline_folder: Callable, tmp_path: Path, kind: str, names: dict, message: str):
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / 'x.safetensors')
    with pytest.raises(ValueError, match=message):
        extractor(pipeline_folder(kind), tmp_path / 'x.safetensors')
