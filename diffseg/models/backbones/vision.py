"""Pretrained vision transformers (DINO, DINOv2, DINOv3, MAE, CLIP) as mmseg backbones."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from mmseg.registry import MODELS
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2WithRegistersBackbone,
    DINOv3ViTBackbone,
    PreTrainedConfig,
    PreTrainedModel,
    ViTMAEModel,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import BackboneOutput

from diffseg.cache import build_cache
from diffseg.devices import choose_dtype
from diffseg.diffusion.images import check_images, check_range, extend_images
from diffseg.diffusion.loading import fingerprint, without_progress_bar
from diffseg.diffusion.sites import refuse_string
from diffseg.geometry import fit_to_image

from .frozen import FrozenBackbone, freeze, verify_channels

# By `model_type` of configurations. The first three follow transformers' backbone API.
CLASSES: dict[str, type[PreTrainedModel]] = {
    'dinov2': Dinov2Backbone,
    'dinov2_with_registers': Dinov2WithRegistersBackbone,
    'dinov3_vit': DINOv3ViTBackbone,
    'vit': ViTModel,
    'vit_mae': ViTMAEModel,
    'clip_vision_model': CLIPVisionModel,
}
FOLDER_FILES = 'config.json, preprocessor_config.json and model.safetensors'
# for types without a backbone class
FINAL_NORMS = {'vit': 'layernorm', 'vit_mae': 'layernorm', 'clip_vision_model': 'post_layernorm'}

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = {
    's': {'hidden_size': 384, 'num_hidden_layers': 12, 'num_attention_heads': 6},
    'b': {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12},
    'l': {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16},
    'h': {'hidden_size': 1280, 'num_hidden_layers': 32, 'num_attention_heads': 16},
    'g': {'hidden_size': 1536, 'num_hidden_layers': 40, 'num_attention_heads': 24},
}


@dataclass(frozen=True)
class VisionPreset:
    """A published vision transformer.

    Attributes:
        repo_id: Repository on the Hugging Face hub; None if only a checkpoint is published.
        license: Licence of the weights.
        config: Type, and differences from the default configuration of this type.
        normalization: Mean and standard deviation of RGB in [0, 1].
        gated: Whether the licence must be accepted on the hub before download.
        remedy: How to get a folder if the model is not on the hub.
    """

    repo_id: str | None
    license: str
    config: Mapping[str, Any]
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    gated: bool = False
    remedy: str = ''


def _width(size: str) -> dict[str, int]:
    """Options of a size, for types whose MLP width is absolute, not a ratio."""
    return {**SIZES[size], 'intermediate_size': 4 * SIZES[size]['hidden_size']}


PRESETS: dict[str, VisionPreset] = {
    **{
        f'dinov2-{size}': VisionPreset(
            repo_id=f'facebook/dinov2-{name}',
            license='Apache-2.0',
            config={
                'model_type': 'dinov2',
                'image_size': 518,
                'patch_size': 14,
                'use_swiglu_ffn': size == 'g',
                **SIZES[size],
            },
        )
        for size, name in {'s': 'small', 'b': 'base', 'l': 'large', 'g': 'giant'}.items()
    },
    **{
        f'dinov3-{size}': VisionPreset(
            repo_id=f'facebook/dinov3-vit{size}16-pretrain-lvd1689m',
            license='DINOv3 License',
            config={'model_type': 'dinov3_vit', 'patch_size': 16, 'num_register_tokens': 4, **_width(size)},
            gated=True,
        )
        for size in 'sbl'
    },
    **{
        f'dino-{size}{patch}': VisionPreset(
            repo_id=f'facebook/dino-vit{size}{patch}',
            license='Apache-2.0',
            config={'model_type': 'vit', 'patch_size': patch, **_width(size)},
        )
        for size in 'sb'
        for patch in (8, 16)
    },
    **{
        f'mae-{size}': VisionPreset(
            repo_id=f'facebook/vit-mae-{name}',
            license='Apache-2.0',
            config={'model_type': 'vit_mae', 'patch_size': 16, **_width(size)},
        )
        for size, name in {'b': 'base', 'l': 'large'}.items()
    },
    **{
        f'clip-{size}{patch}': VisionPreset(
            repo_id=f'openai/clip-vit-{name}-patch{patch}',
            license='MIT',
            config={'model_type': 'clip_vision_model', 'patch_size': patch, **_width(size)},
            normalization=OPENAI_CLIP,
        )
        for size, name, patch in [('b', 'base', 16), ('l', 'large', 14)]
    },
    'openclip-h14': VisionPreset(
        repo_id='laion/CLIP-ViT-H-14-laion2B-s32B-b79K',
        license='MIT',
        config={'model_type': 'clip_vision_model', 'patch_size': 14, 'hidden_act': 'gelu', **_width('h')},
        normalization=OPENAI_CLIP,
    ),
    **{
        f'mae-l8-{name.replace("_", "-")}': VisionPreset(
            repo_id=None,
            license='MIT',
            config={
                'model_type': 'vit_mae',
                'image_size': 256,
                'patch_size': 8,
                'layer_norm_eps': 1e-6,
                **_width('l'),
            },
            remedy=f'convert mae_checkpoints/{name}.pth of yandex-research/ddpm-segmentation by tools/convert/mae.py '
            'and give the folder',
        )
        for name in ('lsun_bedroom', 'lsun_cat', 'lsun_horse', 'ffhq')
    },
}


class HiddenStates(nn.Module):
    """Backbone interface for a vision transformer without a backbone class in transformers.

    Args:
        model: returns hidden states with a class token before those of the patches.
        out_features: which of 'stem', 'stage1', ... to return, in this order.
        norm: applied to every map.
    """

    def __init__(self, model: PreTrainedModel, out_features: Sequence[str], norm: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.norm = norm
        self.out_features = list(out_features)
        stages = stage_names(model.config)
        self._indices = [stages.index(name) for name in out_features]

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Images (B, 3, H, W), whose sides are multiples of the patch, to maps (B, C, h, w)."""
        size = [side // self.model.config.patch_size for side in pixel_values.shape[-2:]]
        options = {}
        if hasattr(self.model.config, 'mask_ratio'):  # MAE sorts patches by this noise, even if it drops none
            options['noise'] = torch.arange(size[0] * size[1], device=pixel_values.device).expand(len(pixel_values), -1)
        outputs = self.model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True, **options)
        tokens = [outputs.hidden_states[i] for i in self._indices]  # (B, 1 + h*w, C)
        if self.norm is not None:
            tokens = [self.norm(x) for x in tokens]
        return BackboneOutput(feature_maps=tuple(x[:, 1:].transpose(1, 2).unflatten(2, size) for x in tokens))


def stage_names(config: PreTrainedConfig) -> list[str]:
    """Names of hidden states in transformers' backbones: 'stem' before the first block, 'stage{n}' after the n-th."""
    return ['stem', *(f'stage{n + 1}' for n in range(config.num_hidden_layers))]


def resolve_layers(layers: Sequence[int | str], stages: Sequence[str]) -> list[str]:
    """Names of hidden states.

    Args:
        layers: names, or positions in `stages`, from the end if negative.
        stages: all names.

    Raises:
        ValueError: unknown hidden state, or one is listed twice.
    """
    refuse_string('layers', layers)
    numbered = {**dict(enumerate(stages)), **{i - len(stages): name for i, name in enumerate(stages)}}
    by_layer = {**numbered, **{name: name for name in stages}}
    if unknown := [layer for layer in layers if layer not in by_layer]:
        raise ValueError(
            f'the model has no layers {unknown}; there are {stages[0]!r} or 0 to {stages[-1]!r} or {len(stages) - 1}'
        )
    names = [by_layer[layer] for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError(f'layers={list(layers)} lists a layer twice')
    return names


def find_preset(model: str | Path) -> VisionPreset | None:
    """The preset of a name or hub id; None for a folder and for another hub id.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: neither a preset, a hub id nor a folder.
    """
    text = str(model)
    if text in PRESETS:
        return PRESETS[text]
    if Path(text).expanduser().is_dir():
        return None
    if isinstance(model, Path) or text.count('/') > 1 or text[:1] in './~':
        raise FileNotFoundError(f'no model at {text}; give a folder with {FOLDER_FILES}, a hub id or a preset')
    if '/' not in text:
        near = difflib.get_close_matches(text, PRESETS, n=3)
        hint = f'did you mean {", ".join(near)}? ' if near else ''
        raise ValueError(
            f'no vision preset {text!r}; {hint}presets: {", ".join(PRESETS)}; or give a hub id or a folder'
        )
    return next((preset for preset in PRESETS.values() if preset.repo_id == text), None)


def load_vision_config(model: str | Path, revision: str | None = None, *, from_preset: bool = True) -> PreTrainedConfig:
    """A model's configuration, without its weights.

    Args:
        model: preset, hub id or folder.
        revision: of a hub model.
        from_preset: use the configuration in the preset, which needs no network, instead of that of the weights.

    Raises:
        ValueError: unknown model or unsupported type.
        OSError: the configuration cannot be read.
    """
    preset = find_preset(model)
    if preset is not None and (from_preset or preset.repo_id is None):
        options = dict(preset.config)
        config = CLASSES[options.pop('model_type')].config_class(**options)
    else:
        try:
            config = AutoConfig.from_pretrained(_location(model), revision=revision)
        except (OSError, ValueError) as error:
            raise _explain(model, error) from error
        config = getattr(config, 'vision_config', config)  # CLIP as a whole
    if config.model_type not in CLASSES:
        raise ValueError(f'{model} is a {config.model_type}; supported are {", ".join(CLASSES)}')
    if hasattr(config, 'mask_ratio'):  # MAE would drop patches
        config.mask_ratio = 0.0
    return config


def load_normalization(model: str | Path, revision: str | None = None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation, of RGB in [0, 1], that a model was trained with.

    Raises:
        OSError: the folder or repository does not define them.
    """
    if preset := find_preset(model):
        return preset.normalization
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(_location(model), revision=revision)
    except (OSError, ValueError) as error:
        raise _explain(model, error) from error
    return processor['image_mean'], processor['image_std']


def load_vision_model(
    model: str | Path,
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    *,
    random: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """The network in evaluation mode.

    Args:
        model: preset, hub id or folder.
        config: from `load_vision_config`.
        dtype: of the weights, see `choose_dtype`.
        random: initialise at random with a fixed seed instead of reading weights.
        revision: of a hub model.

    Raises:
        OSError: weights cannot be read, or some are missing.
        ValueError: there is no such dtype.
    """
    cls = CLASSES[config.model_type]
    options = {'add_pooling_layer': False} if cls is ViTModel else {}  # DINO has no pooling layer
    with torch.device('meta'):
        parameters = sum(parameter.numel() for parameter in cls(config, **options).parameters())
    dtype = choose_dtype(dtype, parameters=parameters)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return cls(config, **options).to(dtype).eval()
    preset = find_preset(model)
    if preset is not None and preset.repo_id is None:
        raise OSError(f'{model} is not on the hub; {preset.remedy}')
    try:
        with without_progress_bar(_location(model)):
            network, info = cls.from_pretrained(
                _location(model), config=config, revision=revision, dtype=dtype, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _explain(model, error) from error
    if info['missing_keys']:
        raise OSError(f'{model} lacks weights: {", ".join(sorted(info["missing_keys"]))}')
    return network.eval()


def _location(model: str | Path) -> str:
    """Hub id or folder."""
    path = Path(model).expanduser()
    return PRESETS[str(model)].repo_id if str(model) in PRESETS else str(path if path.is_dir() else model)


def _explain(model: str | Path, error: Exception) -> OSError:
    """Error for a model that cannot be loaded."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
    preset = find_preset(model)
    gated = f' Accept its licence at https://huggingface.co/{preset.repo_id} first.' if preset and preset.gated else ''
    return OSError(f'cannot load {model}: {reason}.{gated} Without network, give a folder with {FOLDER_FILES}')


@MODELS.register_module()
class VisionBackbone(FrozenBackbone):
    """Hidden states of a frozen vision transformer as plain feature maps.

    ```text
    image (B, 3, H, W) in [-1, 1] -> mean and std of the model -> transformer -> L maps (B, C, h, w)
    ```

    It takes the same images as `DiffusionBackbone` and is not saved in checkpoints either. All maps have the stride of
    the patch, h = ceil(H / patch), and their cells tile the image: sides that are not a multiple of it get reflection
    padding, and maps are then interpolated, see `fit_to_image`. Position embeddings are interpolated.

    Args:
        model: preset ('dinov2-b', 'dino-b8', 'mae-l', 'clip-b16', ..., see `PRESETS`), hub id, or folder.
        layers: hidden states, in the order of the maps: n or 'stage{n}' after the n-th block, 0 or 'stem' before the
            first, -1 after the last.
        channels: expected channels of each layer; verified if given.
        input_size: side or (height, width) to which images are resized (bilinear, aspect ratio not kept).
        layernorm: apply the model's final layer norm to every map, as the linear evaluations of DINOv2 do and as
            transformers' backbones do by default. DINOv3's last hidden state is always normalised.
        dtype: of the network; 'auto' is the fastest one of the device, and float32 for small networks, see
            `choose_dtype`.
        random: initialise at random instead of loading weights; the configuration of hub models without preset is still
            read.
        revision: commit, tag or branch of a hub model.
        cache: folder of cached maps, or options, see `FeatureCache`.
        check_fingerprint: 'error' or 'warn', see `FrozenBackbone`.
        check_finite: raise for NaN and infinity, and for images out of range; each call then synchronises with the
            device.

    Attributes:
        channels: channels C of each layer.

    Raises:
        ValueError: unknown model, type of model, layer or dtype, or `channels` that do not match the model.
        OSError: the model cannot be read, or weights are missing.
    """

    def __init__(
        self,
        model: str | Path,
        layers: Sequence[int | str],
        *,
        channels: Sequence[int] | None = None,
        input_size: int | Sequence[int] | None = None,
        layernorm: bool = True,
        dtype: str = 'auto',
        random: bool = False,
        revision: str | None = None,
        cache: str | Mapping[str, Any] | None = None,
        check_fingerprint: Literal['error', 'warn'] = 'error',
        check_finite: bool = True,
    ) -> None:
        super().__init__(check_fingerprint)
        config = load_vision_config(model, revision, from_preset=random)
        stages = stage_names(config)
        self.layers = resolve_layers(layers, stages)
        self.channels = [config.hidden_size] * len(self.layers)
        if channels is not None:
            verify_channels(self.layers, self.channels, channels)
        self.patch_size: int = config.patch_size
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.layernorm = layernorm
        self.cache = build_cache(cache)
        self.check_finite = check_finite

        mean, std = load_normalization(model, revision)
        self.normalization = {'mean': list(mean), 'std': list(std)}
        self.register_buffer('mean', 2 * torch.tensor(mean).view(1, 3, 1, 1) - 1, persistent=False)  # of [-1, 1]
        self.register_buffer('std', 2 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

        self._out_features = sorted(self.layers, key=stages.index)  # transformers has them in order of execution
        has_backbone = config.model_type not in FINAL_NORMS
        if has_backbone:
            config.out_features = self._out_features
            config.apply_layernorm = layernorm
        network = load_vision_model(model, config, dtype, random=random, revision=revision)
        self._weights = fingerprint(network.state_dict())
        if not has_backbone:
            norm = getattr(network, FINAL_NORMS[config.model_type]) if layernorm else None
            network = HiddenStates(network, self._out_features, norm)
        freeze(network)
        self.network = network
        self._config = json.loads(config.to_json_string())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return next(buffer.dtype for buffer in self.network.buffers() if buffer.is_floating_point())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract.

        Args:
            x: images with shape (B, 3, H, W) in [-1, 1], RGB.

        Returns:
            L maps with shapes (B, C, h, w), one for each layer.

        Raises:
            ValueError: images have a wrong shape or dtype, are smaller than a patch, or, if `check_finite`, out of
                range.
            FloatingPointError: NaN or infinity, if `check_finite`.
        """
        if self.cache is None:
            return self._extract(x)
        context = {**self.fingerprint, 'config': self._config, 'input_size': self.input_size}
        return self.cache.fetch(x, context, self._extract, self.layers)

    def _extract(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward` without the cache."""
        if self.input_size is not None:
            x = F.interpolate(x, self.input_size, mode='bilinear', align_corners=False)
        check_images(x, self.patch_size)
        pixels = (extend_images(x, self.patch_size) - self.mean) / self.std
        with self.resident(x.device):
            maps = self.network(pixels.to(self.dtype)).feature_maps
        self._check(x, maps)
        maps = [fit_to_image(y, self.patch_size, x.shape[-2:]) for y in maps]
        by_name = dict(zip(self._out_features, maps, strict=True))
        return tuple(by_name[name].to(x.dtype) for name in self.layers)

    def _check(self, images: Tensor, maps: Sequence[Tensor]) -> None:
        """Raise for images out of range and for maps with NaN or infinity, unless disabled."""
        if not self.check_finite or images.is_meta:
            return
        numbers = [*(x.detach() for x in images.aminmax()), *(x.isfinite().all() for x in maps)]
        low, high, *finite = torch.stack([x.float() for x in numbers]).tolist()
        check_range(low, high)
        if not all(finite):
            raise FloatingPointError(
                f"NaN or infinity in the maps, computed in {self.dtype}; use dtype 'float32', or the images are damaged"
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that a head trained on the maps depends on."""
        return {
            'weights': self._weights,
            'dtype': str(self.dtype).removeprefix('torch.'),
            'layers': self.layers,
            'layernorm': self.layernorm,
            'normalization': self.normalization,
        }
