"""A model's parts from a preset, a hub id, a diffusers folder or a single checkpoint file.

Weights are read from safetensors, or with `weights_only=True` if there is nothing else; no code of a model is executed.
Only the network (a UNet or a transformer) and the encoder of the VAE are loaded. Text encoders are loaded by
`conditioning` and `pipeline_prompts`.

A model whose UNet is a `UNet2DModel` works on pixels and has only a UNet and a scheduler.
"""

import hashlib
import inspect
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from diffseg.devices import choose_dtype
from diffseg.diffusion.adm import convert_adm_unet, is_adm_checkpoint
from diffseg.diffusion.latents import DECODER_PARTS, VAE, VAES, latent_space, vae_scale_factor
from diffseg.diffusion.network_call import transformer_call
from diffseg.diffusion.presets import PRESETS, Preset, get_preset, preset_of_repo
from diffseg.diffusion.schedules import FlowSchedule, NoiseSchedule, build_schedule
from diffseg.diffusion.sites import KINDS, Network
from diffseg.diffusion.taesd import (
    convert_decoder,
    convert_encoder,
    decoder_of,
    find_encoder,
    has_published_names,
    latent_channels,
)

CHECKPOINT_SUFFIXES = ('.safetensors', '.ckpt', '.pt', '.pth', '.bin')
FOLDER_LAYOUT = (
    'a folder in the diffusers layout (unet/ or transformer/, vae/, scheduler/, text_encoder/, tokenizer/; or, of '
    'pixel space, unet/ and scheduler/)'
)
# diffusers' name of the architecture of a single-file checkpoint -> presets that describe it. SD 2.x files do not tell
# whether their UNet predicts noise or velocity.
SINGLE_FILE_PRESETS = {
    'v1': ('sd15',),
    'v2': ('sd21', 'sd21-base'),
    'xl_base': ('sdxl',),
    'sd3': ('sd3-medium',),
    'sd35_medium': ('sd35-medium',),
    'sd35_large': ('sd35-large',),
    'flux-dev': ('flux-dev',),
    'flux-schnell': ('flux-schnell',),
}
TINY_REPLACES = (AutoencoderKL.__name__, AutoencoderTiny.__name__)  # VAEs that an AutoencoderTiny can replace
FINGERPRINT_SAMPLES = 64
REFUSED_CLASS = re.compile(r'unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)', re.IGNORECASE)  # in torch's errors
VARIANT = re.compile(r'\w+\.(?P<variant>[\w-]+?)(-\d+-of-\d+)?\.(safetensors|bin)')  # of a file of weights

NETWORK_PARTS = ('unet', 'transformer')  # the folder of the network
# The first one is the default.
_CLASSES: dict[str, tuple[type, ...]] = {
    'unet': tuple(kind.network for kind in KINDS if kind.part == 'unet'),
    'transformer': tuple(kind.network for kind in KINDS if kind.part == 'transformer'),
    'vae': VAES,
    'scheduler': (DDIMScheduler,),
}
# `Transformer2DModel` was the class of DiT and PixArt, whose repositories still name it; `norm_type` tells them apart.
_TRANSFORMERS_OF_NORMS = {'ada_norm_zero': 'DiTTransformer2DModel', 'ada_norm_single': 'PixArtTransformer2DModel'}
_CONVERTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    'unet': lambda state, config: convert_ldm_unet_checkpoint(state, config, extract_ema=True),
    'vae': convert_ldm_vae_checkpoint,
}
_PREFIXES = {'unet': ('model.diffusion_model.',), 'vae': ('first_stage_model.', 'vae.')}


@dataclass(frozen=True)
class ModelSource:
    """Source of a model.

    Attributes:
        kind: 'hub', 'folder' or 'file'.
        location: Hub id, folder or file.
        revision: Commit, tag or branch of a hub id; None is the newest.
        variant: Variant of the weight files, such as 'fp16'.
        preset: Preset of the model, if there is one.
        config: Preset or diffusers folder that describes a single file.
    """

    kind: str
    location: str
    revision: str | None = None
    variant: str | None = None
    preset: Preset | None = None
    config: str | None = None


class ModelConfig(NamedTuple):
    """Configurations, complete with the defaults of diffusers' classes; None for parts that a folder lacks."""

    network: dict[str, Any]
    vae: dict[str, Any] | None
    scheduler: dict[str, Any] | None

    @property
    def part(self) -> str:
        """The network's part: 'unet' or 'transformer'."""
        return _part_of_network(self.network)

    @property
    def pixel_space(self) -> bool:
        """Whether the UNet works on images themselves."""
        return _class_of(self.part, self.network) is UNet2DModel

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent cell; 1 in pixel space."""
        return vae_scale_factor(self.vae)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; those of the image in pixel space."""
        return self.network['in_channels'] if self.vae is None else latent_space(self.vae).channels(self.vae)

    def part_config(self, part: str) -> dict[str, Any] | None:
        """The configuration of a part: 'unet' or 'transformer', 'vae' or 'scheduler'."""
        return self.network if part == self.part else getattr(self, part)


@dataclass
class DiffusionParts:
    """Parts of a model that read activations of images.

    Attributes:
        network: In evaluation mode.
        vae: Without decoder, in evaluation mode; None if not requested, or in pixel space.
        vae_config: Configuration of the VAE, also if it is not loaded; None in pixel space.
        scheduler_config: Of the noise schedule.
        source: Source of the parts.
        fingerprint: Identifies the weights, see `fingerprint`.
    """

    network: Network
    vae: VAE | None
    vae_config: Mapping[str, Any] | None
    scheduler_config: Mapping[str, Any]
    source: ModelSource
    fingerprint: str

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent cell; 1 in pixel space."""
        return vae_scale_factor(self.vae_config)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; those of the image in pixel space."""
        if self.vae_config is None:
            return self.network.config.in_channels
        return latent_space(self.vae_config).channels(self.vae_config)

    @property
    def schedule(self) -> NoiseSchedule | FlowSchedule:
        """The noise schedule. Raises a ValueError if its kind is not supported, see `build_schedule`."""
        call = transformer_call(self.network)
        return build_schedule(self.scheduler_config, self.source.location, call is None or call.even_steps)


def find_source(
    model: str | Path, *, revision: str | None = None, variant: str | None = None, config: str | Path | None = None
) -> ModelSource:
    """Find the kind of source of `model`.

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        revision: Commit, tag or branch of a hub id; None is that of the preset, else the newest.
        variant: Variant of the weight files; None is that of the preset, else none.
        config: Preset or diffusers folder that describes a single file.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: Neither a path, a preset nor a hub id.
    """
    config = None if config is None else str(config)
    text, path = str(model), Path(model).expanduser()
    if isinstance(model, str) and model in PRESETS:
        preset = PRESETS[model]
        revision, variant = revision or preset.revision, variant or preset.variant
        return ModelSource('hub', preset.repo_id or preset.name, revision, variant, preset, config)
    if path.is_dir():
        return ModelSource('folder', str(path), variant=variant, config=config)
    if path.is_file():
        if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
            raise ValueError(f'{path} is not a checkpoint; files may end in {", ".join(CHECKPOINT_SUFFIXES)}')
        return ModelSource('file', str(path), config=config)
    is_path = isinstance(model, Path) or text.count('/') > 1 or text[:1] in './~'
    if is_path or path.suffix.lower() in CHECKPOINT_SUFFIXES:
        demo = '; demo/ comes with the repository, not with the installed package' if 'demo' in path.parts else ''
        raise FileNotFoundError(
            f'no model at {path}; give {FOLDER_LAYOUT}, a checkpoint file, a hub id or a preset{demo}'
        )
    if '/' not in text:
        try:
            get_preset(text)
        except KeyError as error:
            raise ValueError(f'{error.args[0]}; a model may also be a hub id, a folder or a checkpoint file') from None
    return ModelSource('hub', text, revision, variant, preset_of_repo(text), config)


def load_config(model: str | Path, *, revision: str | None = None, config: str | Path | None = None) -> ModelConfig:
    """Configurations of a model's parts, without its weights.

    Presets and their hub ids need no network.

    Raises:
        OSError: The model does not exist, or has no UNet.
        ValueError: The UNet or VAE has an unsupported class, a UNet of pixels has a VAE, or the architecture of a
            single file is ambiguous.
    """
    return _load_config(find_source(model, revision=revision, config=config))


def meta_network(model: str | Path, *, revision: str | None = None, config: str | Path | None = None) -> Network:
    """The UNet or transformer on the meta device: all modules, no weights. Raises what `load_config` does."""
    configs = load_config(model, revision=revision, config=config)
    return _on_meta(configs.part, configs.network)


def load_parts(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    network_weights: str | Path | None = None,
    dtype: str | torch.dtype = 'auto',
    device: str | None = None,
    attention: str = 'auto',
    vae: bool | str | Path = True,
    random: Sequence[str] = (),
    seed: int = 0,
) -> DiffusionParts:
    """Load a model's UNet or transformer, VAE encoder (if it has one) and noise schedule, on the CPU.

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        revision: Commit, tag or branch of a hub id; None is that of the preset, else the newest.
        variant: Variant of the weight files, such as 'fp16'; None is that of the preset, else none.
        config: Preset or diffusers folder that describes a single file; None infers it from its keys.
        network_weights: File of the network's state dict in diffusers' names, or of a Flux or SD3 transformer in the
            names of its authors, that is read, strictly, instead of the model's weights. None is that of the preset
            (CleanDIFT has one), else none.
        dtype: Of the parts, or 'auto', see `choose_dtype`. The VAE stays in float32 if this is float16 and its config
            has `force_upcast`, since it would overflow.
        device: Where the parts will run, for the choice of 'auto'; None is the accelerator, or the CPU.
        attention: 'sdpa' (torch's fused attention), 'eager' (plain matrix products), 'xformers' (needs a GPU), or
            'auto', which is 'sdpa'.
        vae: Whether the VAE is loaded, if there is one; or the hub id, folder or file of an `AutoencoderTiny` to load
            in its place, in the names of diffusers or of its authors, see `taesd`. It must have as many latent channels
            and the same factor as the model's VAE, which must be an `AutoencoderKL`.
        random: Parts ('unet', 'transformer', 'vae') with random weights; those of the model are not read.
        seed: Of the random weights.

    Raises:
        OSError: Weights are missing, truncated or unreachable.
        ValueError: Invalid arguments, or weights that do not match the architecture.
        ImportError: xformers is requested and not installed.
    """
    if dtype != 'auto' and not (dtype := choose_dtype(dtype)).is_floating_point:
        raise ValueError(f'dtype is {dtype}; it is one of float32, float16, bfloat16, float64')
    source = find_source(model, revision=revision, variant=variant, config=config)
    checkpoint = read_checkpoint(source.location) if source.kind == 'file' else None
    configs = _load_config(source, checkpoint)
    for part in ('scheduler',) if configs.pixel_space else ('vae', 'scheduler'):
        if getattr(configs, part) is None:
            raise FileNotFoundError(f'{source.location} has no {part}/ with a configuration; expected {FOLDER_LAYOUT}')
    if unknown := set(random) - {configs.part, 'vae'}:
        raise ValueError(
            f'random names {", ".join(map(repr, sorted(unknown)))}; the parts of {source.location} are '
            f'{configs.part}, vae'
        )
    if network_weights is None and source.preset is not None and source.preset.network_weights is not None:
        network_weights = None if configs.part in random else _download(*source.preset.network_weights)

    if dtype == 'auto':
        dtype = choose_dtype(dtype, device, _number_of_parameters(configs.part, json.dumps(configs.network)))

    def load(part: str, dtype: torch.dtype) -> ModelMixin:
        part_config = configs.part_config(part)
        if part in random:
            return _initialise(part, part_config, seed, dtype)
        if part == configs.part and network_weights is not None:
            weights = read_checkpoint(network_weights)
            weights = _from_published_names(part, part_config, weights, str(network_weights))
            return _fill(part, part_config, weights, str(network_weights), dtype)
        return _load(part, part_config, source, checkpoint, dtype)

    encoder, vae_config = None, configs.vae
    if not isinstance(vae, bool):
        encoder = _load_tiny(vae, configs, source, dtype, decoder=False, seed=seed if 'vae' in random else None)
        _remove_decoder(encoder)
        vae_config = {**encoder.config, '_class_name': AutoencoderTiny.__name__}
    network = load(configs.part, dtype)
    if vae is True and not configs.pixel_space:
        overflows = dtype == torch.float16 and configs.vae.get('force_upcast', False)
        encoder = load('vae', torch.float32 if overflows else dtype)
        _remove_decoder(encoder)
    parts = {configs.part: network} if encoder is None else {configs.part: network, 'vae': encoder}
    for part in parts.values():
        set_attention(part, attention)
    return DiffusionParts(
        network=network,
        vae=encoder,
        vae_config=vae_config,
        scheduler_config=configs.scheduler,
        source=source,
        fingerprint='+'.join(f'{name}-{fingerprint(part.state_dict())}' for name, part in parts.items()),
    )


@contextmanager
def without_progress_bar(location: str | Path) -> Iterator[None]:
    """Context in which transformers reads a folder without its progress bar, which downloads keep."""
    if not Path(location).expanduser().is_dir() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def load_vae(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """Load a model's whole VAE, or an `AutoencoderTiny` in its place, with the decoder that `load_parts` leaves out.

    Arguments and errors are those of `load_parts`; `vae` is None for the VAE of the model.
    """
    source = find_source(model, revision=revision, variant=variant, config=config)
    checkpoint = read_checkpoint(source.location) if source.kind == 'file' else None
    configs = _load_config(source, checkpoint)
    if configs.vae is None:
        raise FileNotFoundError(f'{source.location} has no vae/ with a configuration; expected {FOLDER_LAYOUT}')
    if vae is not None:
        return _load_tiny(vae, configs, source, dtype, decoder=True)
    return _load('vae', configs.vae, source, checkpoint, dtype)


def _load_tiny(
    location: str | Path,
    configs: ModelConfig,
    source: ModelSource,
    dtype: torch.dtype,
    *,
    decoder: bool,
    seed: int | None = None,
) -> AutoencoderTiny:
    """An `AutoencoderTiny` in place of a model's VAE, see `load_parts`.

    Args:
        location: Hub id, folder or file.
        configs: Of the model.
        source: Of the model.
        dtype: Of the weights.
        decoder: Whether the weights of the decoder are needed.
        seed: Of random weights in place of those of a location, whose configuration is read if it is a folder's.
    """
    if configs.vae is None:
        raise ValueError(f'{source.location} works on pixels, without VAE; leave out vae={str(location)!r}')
    if (kind := configs.vae.get('_class_name', AutoencoderKL.__name__)) not in TINY_REPLACES:
        raise ValueError(
            f'the VAE of {source.location} is of class {kind}; an AutoencoderTiny replaces only '
            f'{" or ".join(TINY_REPLACES)}. Leave out vae={str(location)!r}'
        )
    vae = _read_tiny(location, configs.vae['latent_channels'], dtype, decoder, seed)
    expected, theirs = (
        {'latent channels': space.channels(config), 'image pixels per latent cell': space.factor(config)}
        for space, config in ((latent_space(configs.vae), configs.vae), (latent_space(vae), vae.config))
    )
    if expected != theirs:
        has, needs = (' and '.join(f'{n} {what}' for what, n in x.items()) for x in (theirs, expected))
        raise ValueError(
            f'the AutoencoderTiny {location} has {has}; {source.location} needs {needs}. TAESD (madebyollin/taesd) is '
            'for Stable Diffusion 1 and 2, taesdxl for SDXL, taesd3 for SD3, taef1 for Flux'
        )
    return vae


def _read_tiny(
    location: str | Path, channels: int, dtype: torch.dtype, decoder: bool, seed: int | None
) -> AutoencoderTiny:
    """An `AutoencoderTiny` of any number of latent channels; those of a random one are `channels`."""
    name = AutoencoderTiny.__name__
    path = Path(location).expanduser()
    has_config = (path / 'config.json').is_file()
    if not path.exists() and (str(location).count('/') != 1 or path.suffix.lower() in CHECKPOINT_SUFFIXES):
        raise FileNotFoundError(f'no {name} at {path}; give a hub id such as madebyollin/taesd, a folder or a file')
    if seed is not None and not has_config:
        return _initialise('vae', _complete('vae', {'_class_name': name, 'latent_channels': channels}), seed, dtype)
    if path.exists() and not has_config:
        return _read_tiny_file(find_encoder(path) if path.is_dir() else path, dtype, decoder)
    text = str(path) if has_config else str(location)
    try:
        config = AutoencoderTiny.load_config(text)
        if config.get('_class_name') != name:
            raise ValueError(f'{location} is of class {config.get("_class_name")}, not an {name}')
        if seed is not None:
            return _initialise('vae', _complete('vae', config), seed, dtype)
        return _read_pretrained(AutoencoderTiny, 'vae', text, text, dtype)
    except (OSError, HFValidationError) as error:
        raise OSError(
            f'cannot read the {name} {location}: {reason_of(error)}. Without network, give a folder (config.json and '
            'weights, or taesd_encoder.safetensors) or a file'
        ) from error


def _read_tiny_file(path: Path, dtype: torch.dtype, decoder: bool) -> AutoencoderTiny:
    """An `AutoencoderTiny` of the published sizes, in diffusers' names or as the file of an encoder of its authors."""
    state = read_checkpoint(path)
    if has_published_names(state):
        try:
            state = convert_encoder(state)
        except ValueError as error:
            raise ValueError(f'{path} is not the encoder of an AutoencoderTiny: {error}') from error
        if decoder:
            state |= convert_decoder(read_checkpoint(decoder_of(path)))
    config = {'_class_name': AutoencoderTiny.__name__, 'latent_channels': latent_channels(state)}
    if not decoder:
        state = {name: x for name, x in state.items() if not name.startswith('decoder.')}
    return _fill('vae', _complete('vae', config), state, str(path), dtype, decoder=decoder)


def _remove_decoder(vae: VAE) -> None:
    for name in DECODER_PARTS:
        setattr(vae, name, nn.Identity())  # some VAEs look for it when they encode


@torch.no_grad()
def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that identify weights, at little cost.

    They depend on every tensor's name, shape and up to 64 evenly spaced values (all values of a smaller tensor), read
    as float32. So they do not depend on the source of the weights and the device, and change if training, merging or
    rounding to another dtype changes a sampled value; a change of single other values is not detected. On the meta
    device, only names and shapes are used.

    Args:
        state: Tensors of any shape and device, by name.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach()
        digest.update(f'{name} {tuple(values.shape)}'.encode())
        if values.is_meta:
            continue
        if values.numel() > FINGERPRINT_SAMPLES:
            values = values.take(_evenly_spaced(values.numel(), FINGERPRINT_SAMPLES).to(values.device))
        digest.update(values.to('cpu', torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


@lru_cache
def _evenly_spaced(length: int, n: int) -> Tensor:
    """Indices of n of the values 0 to length - 1, with the first and the last."""
    return torch.arange(n, device='cpu') * (length - 1) // (n - 1)


def explain(source: ModelSource, part: str, error: Exception) -> OSError:
    """Error for a part that cannot be read, with location, reason and remedy."""
    reason = reason_of(error)
    if source.kind == 'file':
        return OSError(f'cannot read {part} from {source.location}: {reason}')
    if source.kind == 'folder':
        folder = Path(source.location, part)
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        variant = f' (variant {source.variant!r})' if source.variant else ''
        remedy = f'Copy or download it again; expected {FOLDER_LAYOUT}'
        matches = [VARIANT.fullmatch(name) for name in names if name.endswith(('.safetensors', '.bin'))]
        if source.variant is None and 'config.json' in names and matches and all(matches):
            variants = sorted({match['variant'] for match in matches})
            remedy = f'Its weights are of a variant: pass {" or ".join(f"variant={name!r}" for name in variants)}'
        return OSError(
            f'cannot read {folder}{variant}: {reason}. The folder holds: {", ".join(names) or "nothing"}. {remedy}'
        )
    preset = source.preset
    gone = preset.gone if preset else ()
    where = f'{source.location}@{source.revision}' if source.revision else source.location
    parts = [f'cannot get {part} of {where} from the Hugging Face hub: {reason}.']
    if source.location in gone:
        parts.append('This repository was removed from the hub.')
    if preset and (others := [i for i in (preset.repo_id, *preset.mirrors) if i not in (source.location, *gone)]):
        parts.append(f'Mirrors of the same weights: {", ".join(others)}.')
    if (preset and preset.gated) or any(isinstance(cause, GatedRepoError) for cause in _causes(error)):
        licence = f' ({preset.license})' if preset else ''
        parts.append(
            f'The repository is gated: accept its licence{licence} at https://huggingface.co/{source.location}, and '
            'log in with an access token (hf auth login, or HF_TOKEN in the environment).'
        )
    parts.append(f'Without network, or to use a copy, give {FOLDER_LAYOUT} or a checkpoint file as the model.')
    return OSError(' '.join(parts))


def reason_of(error: BaseException) -> str:
    """The first line of an error, or its cause if that is a hub that cannot be reached or an object of a class."""
    for cause in _causes(error):
        if isinstance(cause, LocalEntryNotFoundError):
            return 'the hub cannot be reached, and the file has not been downloaded before'
        if isinstance(cause, pickle.UnpicklingError) and (match := REFUSED_CLASS.search(str(cause))):
            return f'it holds an object of the class {match[1].rstrip(".")}, and only tensors are loaded'
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _load_config(source: ModelSource, checkpoint: Mapping[str, Tensor] | None = None) -> ModelConfig:
    if source.kind == 'file':
        return _load_config(describe_file(source, checkpoint))
    if source.preset is not None:
        preset = source.preset
        vae = None if preset.vae_config is None else _complete('vae', preset.vae_config)
        network = _complete(_part_of_network(preset.network_config), preset.network_config)
        return ModelConfig(network, vae, dict(preset.scheduler_config))
    configs = ModelConfig(_read_config(source, _find_network_part(source)), None, None)
    if source.kind == 'hub':
        there = {'vae': not configs.pixel_space, 'scheduler': True}
    else:
        names = {'vae': 'config.json', 'scheduler': 'scheduler_config.json'}
        there = {part: Path(source.location, part, name).is_file() for part, name in names.items()}
    configs = configs._replace(**{part: _read_config(source, part) for part, exists in there.items() if exists})
    if configs.pixel_space:
        _check_pixel_space(configs, source.location)
    return configs


def _find_network_part(source: ModelSource) -> str:
    """The folder of the network in a folder or on the hub; 'unet' if there is neither."""
    if source.kind == 'folder':
        return 'transformer' if Path(source.location, 'transformer', 'config.json').is_file() else 'unet'
    try:
        index = DiffusionPipeline.load_config(source.location, revision=source.revision)
    except (OSError, ValueError, HFValidationError):
        return 'unet'  # whose own error is to the point
    return 'transformer' if 'transformer' in index else 'unet'


def _part_of_network(config: Mapping[str, Any]) -> str:
    names = [cls.__name__ for cls in _CLASSES['transformer']]
    return 'transformer' if config.get('_class_name') in names else 'unet'


def _check_pixel_space(configs: ModelConfig, location: str) -> None:
    """Raise a ValueError unless the images are the only input of the UNet."""
    unet, unsupported = configs.network, []
    if configs.vae is not None:
        unsupported.append('a VAE beside it')
    if unet['in_channels'] != 3:
        unsupported.append(f'{unet["in_channels"]} input channels')
    if unet['class_embed_type'] is not None or unet['num_class_embeds'] is not None:
        unsupported.append('classes to be conditioned on')
    if unsupported:
        raise ValueError(
            f'the UNet2DModel of {location} has {" and ".join(unsupported)}; supported are those of RGB pixels alone, '
            'without classes and VAE'
        )


def describe_file(source: ModelSource, checkpoint: Mapping[str, Tensor] | None = None) -> ModelSource:
    """The preset or folder that describes a single file's architecture.

    Args:
        source: Of kind 'file'.
        checkpoint: The file's tensors, if they are loaded.

    Raises:
        ValueError: The keys of the file are ambiguous, and `config` is not given.
    """
    if source.config is not None:
        return find_source(source.config)
    checkpoint = read_checkpoint(source.location) if checkpoint is None else checkpoint
    if is_adm_checkpoint(checkpoint):
        raise ValueError(
            f'{source.location} is a checkpoint of guided-diffusion; convert it with tools/convert/adm.py '
            f'{source.location} FOLDER and give the folder, or describe it with config=PRESET'
        )
    kind = infer_diffusers_model_type(checkpoint)
    presets = SINGLE_FILE_PRESETS.get(kind, ())
    if len(presets) != 1:
        kinds = f'fits {" and ".join(presets)}' if presets else f'is of an unsupported kind ({kind})'
        raise ValueError(
            f'{source.location} {kinds}; give the configuration that describes it with config=PRESET or config=FOLDER'
        )
    return find_source(presets[0])


def _read_config(source: ModelSource, part: str) -> dict[str, Any]:
    try:
        config = _CLASSES[part][0].load_config(source.location, subfolder=part, revision=source.revision)
    except (OSError, ValueError, HFValidationError) as error:
        raise explain(source, part, error) from error
    if config.get('_class_name') == 'Transformer2DModel' and config.get('norm_type') in _TRANSFORMERS_OF_NORMS:
        config['_class_name'] = _TRANSFORMERS_OF_NORMS[config['norm_type']]
        config = {
            name: value for name, value in config.items() if name in _parameters_of(part, config) or name[0] == '_'
        }
    supported = [cls.__name__ for cls in _CLASSES[part]]
    if part != 'scheduler' and (name := config.get('_class_name', supported[0])) not in supported:
        raise ValueError(f'the {part} of {source.location} is a {name}; supported: {", ".join(supported)}')
    return config if part == 'scheduler' else _complete(part, config)


def _class_of(part: str, config: Mapping[str, Any]) -> type:
    return next((cls for cls in _CLASSES[part] if cls.__name__ == config.get('_class_name')), _CLASSES[part][0])


def _parameters_of(part: str, config: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_class_of(part, config).__init__).parameters


def _complete(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of diffusers' class.

    A missing `force_upcast` is False, although the default of `AutoencoderKL` is True: files without the key are those
    of SD 1.x and 2.x, whose VAEs do not overflow in float16.
    """
    parameters = _parameters_of(part, config).values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **({'force_upcast': False} if part == 'vae' else {}), **config}


def _on_meta(part: str, config: Mapping[str, Any]) -> ModelMixin:
    with torch.device('meta'):
        return _class_of(part, config).from_config(dict(config)).eval()


@lru_cache(maxsize=64)
def _number_of_parameters(part: str, config: str) -> int:
    """Of a part, from its config in JSON."""
    return sum(parameter.numel() for parameter in _on_meta(part, json.loads(config)).parameters())


def _initialise(part: str, config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> ModelMixin:
    """Random weights that depend only on the seed; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _class_of(part, config).from_config(dict(config)).eval()
    return nn.Module.to(model, dtype)  # diffusers' own `to` warns of modules to be kept in float32; there are none


def _load(
    part: str,
    config: Mapping[str, Any],
    source: ModelSource,
    checkpoint: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> ModelMixin:
    """A part with the weights of the model; `checkpoint` are the tensors of a single file."""
    if checkpoint is not None:
        return _fill(part, config, _convert(part, config, checkpoint, source), source.location, dtype)
    if source.preset is not None and source.preset.checkpoint is not None:
        raise FileNotFoundError(
            f'{source.preset.name} is on no hub in the diffusers layout. Get {source.preset.checkpoint}, convert it '
            'with tools/convert/adm.py CHECKPOINT FOLDER, and give the folder as the model'
        )
    return _from_pretrained(_class_of(part, config), part, source, dtype)


def _from_pretrained(cls: type, part: str, source: ModelSource, dtype: torch.dtype) -> ModelMixin:
    where = {'subfolder': part, 'revision': source.revision, 'variant': source.variant}
    try:
        return _read_pretrained(cls, part, source.location, f'{source.location}/{part}', dtype, **where)
    except (OSError, HFValidationError) as error:
        raise explain(source, part, error) from error


def _read_pretrained(
    cls: type, part: str, location: str, path: str, dtype: torch.dtype, **where: str | None
) -> ModelMixin:
    """A model of diffusers, strictly. Raises an OSError or `HFValidationError` if it cannot be read."""
    try:
        model, info = cls.from_pretrained(location, torch_dtype=dtype, output_loading_info=True, **where)
    except HFValidationError:
        raise
    except (ValueError, RuntimeError) as error:  # different shapes
        raise _misfit(part, path, str(error).split('. If you want')[0]) from error
    _check_keys(part, path, info['missing_keys'], info['unexpected_keys'])
    return model.eval()


def _fill(
    part: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    path: str,
    dtype: torch.dtype,
    decoder: bool = True,
) -> ModelMixin:
    """Build a part with the weights of a state dict, strictly; without `decoder` a VAE has none."""
    model = _on_meta(part, config)
    if not decoder:
        _remove_decoder(model)
    expected = model.state_dict()
    _check_keys(part, path, expected.keys() - state.keys(), state.keys() - expected.keys())
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            shapes = f'{tuple(state[name].shape)}, not {tuple(tensor.shape)}'
            raise _misfit(part, path, f'{name} has shape {shapes}')
    # Copies, since tensors of a file are memory-mapped, and files may change.
    model.load_state_dict({name: state[name].to(dtype, copy=True) for name in expected}, assign=True)
    return model


def _check_keys(part: str, path: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    problems = [
        f'{len(names)} tensors {what}, such as {min(names)}'
        for what, names in (('are missing', missing), ('are not expected', unexpected))
        if names
    ]
    if problems:
        raise _misfit(part, path, '; '.join(problems))


def _misfit(part: str, path: str, reason: str) -> ValueError:
    return ValueError(
        f'the weights in {path} do not fit the {part} that its configuration describes: {reason}. Are they of another '
        'architecture? A single file is described with config=PRESET or config=FOLDER'
    )


def _convert(
    part: str, config: Mapping[str, Any], checkpoint: Mapping[str, Tensor], source: ModelSource
) -> Mapping[str, Tensor]:
    """One part of a single file: in the original names, or a UNet alone in diffusers' names."""
    if part == 'unet' and _class_of(part, config) is UNet2DModel and is_adm_checkpoint(checkpoint):
        return convert_adm_unet(checkpoint, config)
    if part == 'transformer':
        return _from_published_names(part, config, checkpoint, source.location)
    if any(key.startswith(_PREFIXES[part]) for key in checkpoint):
        try:
            return _CONVERTERS[part](checkpoint, config)
        except (KeyError, AttributeError) as error:  # tensors that the converter needs
            raise _misfit(part, source.location, f'no {error}') from error
    if part == 'unet' and 'conv_in.weight' in checkpoint:
        return checkpoint
    remedy = ''
    if part == 'vae':
        remedy = (
            '. To use its other weights, give a model with a VAE (folder, hub id or preset), and this file as '
            'network_weights'
        )
    raise ValueError(f'{source.location} has no {part}: no key begins with {" or ".join(_PREFIXES[part])}{remedy}')


def _from_published_names(
    part: str, config: Mapping[str, Any], state: Mapping[str, Tensor], path: str
) -> Mapping[str, Tensor]:
    """A transformer's tensors in diffusers' names, converted by diffusers if they are in those of its authors."""
    cls = _class_of(part, config)
    convert = SINGLE_FILE_LOADABLE_CLASSES.get(cls.__name__, {}).get('checkpoint_mapping_fn')
    if part != 'transformer' or convert is None or _on_meta(part, config).state_dict().keys() & state.keys():
        return state
    try:
        return convert(checkpoint=dict(state), config=dict(config))
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:  # tensors that it needs
        raise _misfit(part, path, f'diffusers cannot convert its names ({reason_of(error)})') from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file, by name; those of safetensors files are read when they are used.

    Raises:
        OSError: The file does not exist, is truncated or holds other objects than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no checkpoint file at {path}')
    try:
        safe = Path(path).suffix.lower() == '.safetensors'
        return load_file(path) if safe else load_single_file_checkpoint(str(path))
    except Exception as error:  # diffusers and safetensors raise many kinds
        reason = reason_of(error)
        remedy = 'It is truncated or not a checkpoint; get it again, as .safetensors'
        if 'an object of the class' in reason:
            remedy = (
                'Get the weights as .safetensors; or, if you trust the file and the class is installed, write its '
                "tensors to another one: torch.save(torch.load(FILE, weights_only=False)['state_dict'], OTHER)"
            )
        raise OSError(f'cannot read {path}: {reason}. {remedy}') from error


def _download(repo_id: str, filename: str) -> str:
    try:
        return hf_hub_download(repo_id, filename)
    except (OSError, ValueError) as error:
        raise OSError(
            f'cannot get {filename} of {repo_id} from the Hugging Face hub: {reason_of(error)}. Without network, '
            'give the base model as a folder and the file as network_weights=PATH'
        ) from error


def set_attention(model: ModelMixin, attention: str) -> None:
    """Choose the implementation of a model's attention, see `load_parts`."""
    if type(model) in _CLASSES['transformer']:
        if attention not in ('auto', 'sdpa'):
            raise ValueError(
                f"attention is {attention!r}; a {type(model).__name__} has processors of its own: use 'auto' or 'sdpa'"
            )
    elif attention in ('auto', 'sdpa', 'eager'):
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor() if attention == 'eager' else AttnProcessor2_0())
    elif attention == 'xformers':
        if find_spec('xformers') is None:
            raise ImportError("attention='xformers' needs xformers: pip install 'diffseg[xformers]', or use 'sdpa'")
        if not torch.cuda.is_available():
            raise ValueError("attention='xformers' runs on CUDA devices only; use 'sdpa'")
        model.enable_xformers_memory_efficient_attention()
    else:
        raise ValueError(f"attention is {attention!r}; it is one of 'auto', 'sdpa', 'xformers', 'eager'")
