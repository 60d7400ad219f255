"""Low-rank adaptation (LoRA, arXiv 2106.09685), with diffusers and peft: trainable layers, and pretrained weights."""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import (
    AuraFlowLoraLoaderMixin,
    Flux2LoraLoaderMixin,
    FluxLoraLoaderMixin,
    Lumina2LoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    SanaLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    ZImageLoraLoaderMixin,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffseg.diffusion.loading import read_checkpoint, reason_of
from diffseg.diffusion.sites import Network, kind_of

FILE_NAME = 'pytorch_lora_weights.safetensors'  # diffusers'
DOWN, UP = r'(lora_A|lora_down|\w+\.down)', r'(lora_B|lora_up|\w+\.up)'  # the two matrices of a module
UNSUPPORTED = {'.dora_scale': 'DoRA', '.hada_': 'LoHa', '.lokr_': 'LoKr'}  # parts of tensor names of other methods
TARGET_MODULES = ('to_q', 'to_k', 'to_v', 'to_out.0')  # the projections of attention, as in diffusers' training scripts


def require_peft() -> None:
    """Raise an ImportError that says how to get peft, if it is not installed."""
    if find_spec('peft') is None:
        raise ImportError("LoRA needs peft: pip install 'diffseg[lora]'")


def add_lora(
    network: Network,
    modules: Collection[str],
    *,
    r: int = 8,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
) -> list[str]:
    """Add trainable LoRA layers to linear layers and convolutions; initially they do not change the output.

    Their weights are in float32, also with a UNet in half precision.

    Args:
        network: The UNet or transformer; changed in place.
        modules: Names of the candidate modules.
        r: Rank.
        lora_alpha: The layers' output is multiplied by this over `r`; None is `r`.
        target_modules: Ends of module names, such as 'to_q' or 'up_blocks.1.*.to_q', with `fnmatch`'s wildcards.

    Returns:
        Names of the new parameters.

    Raises:
        ImportError: peft is not installed.
        ValueError: The rank is below 1, or a target matches no candidate.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    if r < 1:
        raise ValueError(f'the rank r of LoRA is {r}; it is 1 or more')
    candidates = [name for name in modules if isinstance(network.get_submodule(name), nn.Linear | nn.Conv2d)]
    chosen = {end: [name for name in candidates if fnmatchcase(f'.{name}', f'*.{end}')] for end in target_modules}
    if void := [end for end, names in chosen.items() if not names]:
        raise ValueError(
            f'target_modules {void} of LoRA name no linear layer or convolution of the network that the chosen layers '
            f'depend on; such are {", ".join(candidates[:3])}, ...'
        )
    names = sorted({name for matches in chosen.values() for name in matches})
    # peft matches them as ends of names; none is the end of another
    config = LoraConfig(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, target_modules=names)
    inject_adapter_in_model(config, network)
    added = {name: parameter for name, parameter in network.named_parameters() if '.lora_' in name}
    for parameter in added.values():
        parameter.data = parameter.data.to(torch.float32)
    return list(added)


@dataclass(frozen=True)
class LoraWeights:
    """Pretrained LoRA weights.

    Attributes:
        path: The file.
        scale: Factor of the change of the weights.
        digest: Of the file's content.
        state: Tensors in diffusers' names, those of the network after 'unet.' or 'transformer.', others after
            'text_encoder.' and so on.
        alphas: Alphas of the modules, in files of kohya's kind.
        metadata: The configuration of peft that diffusers writes into files.
    """

    path: str
    scale: float
    digest: str
    state: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors for 'unet', 'transformer', 'text_encoder' and so on."""
        return {key: tensor for key, tensor in self.state.items() if key.startswith(f'{name}.')}

    def without(self, name: str) -> 'LoraWeights':
        """The weights except for the tensors of one part, which no longer take memory when they are fused."""
        rest = {key: tensor for key, tensor in self.state.items() if not key.startswith(f'{name}.')}
        return replace(self, state=rest)


# How diffusers' pipelines of a transformer read LoRA weights: their own format, and others that they convert.
TRANSFORMER_LORA = {
    'AuraFlowTransformer2DModel': AuraFlowLoraLoaderMixin,
    'Flux2Transformer2DModel': Flux2LoraLoaderMixin,
    'FluxTransformer2DModel': FluxLoraLoaderMixin,
    'Lumina2Transformer2DModel': Lumina2LoraLoaderMixin,
    'QwenImageTransformer2DModel': QwenImageLoraLoaderMixin,
    'SanaTransformer2DModel': SanaLoraLoaderMixin,
    'SD3Transformer2DModel': SD3LoraLoaderMixin,
    'ZImageTransformer2DModel': ZImageLoraLoaderMixin,
}


def read_lora(source: str | Path, network: Network, scale: float = 1.0) -> LoraWeights:
    """Read weights in diffusers' format, or in another one that diffusers converts for this network.

    For UNets and Flux that is kohya's, among others.

    Args:
        source: A safetensors file; a folder with one, or with one of diffusers' name; or on the hub, as 'owner/name' or
            'owner/name/file.safetensors'.
        network: The UNet or transformer that they are for.
        scale: Factor of the change of the weights.

    Raises:
        ImportError: peft is not installed.
        OSError: The file does not exist or is damaged, or the hub cannot be reached.
        ValueError: The file has another format, or diffusers has no LoRA for this network.
    """
    require_peft()
    name = type(network).__name__
    loader = StableDiffusionXLLoraLoaderMixin if kind_of(network).part == 'unet' else TRANSFORMER_LORA.get(name)
    if loader is None:
        raise ValueError(
            f'diffusers reads no LoRA weights for a {name}, only for UNets and {", ".join(sorted(TRANSFORMER_LORA))}; '
            'leave out lora_weights'
        )
    path = _find(source)
    names = list(read_checkpoint(path))
    if kinds := {kind for part, kind in UNSUPPORTED.items() if any(part in name for name in names)}:
        raise ValueError(f'{path} holds {" and ".join(sorted(kinds))} weights; only LoRA is supported')
    if not any('lora' in name for name in names):
        raise ValueError(f'{path} holds no LoRA weights; its tensors have names such as {names[0]!r}')
    try:
        state, *alphas, metadata = loader.lora_state_dict(
            str(path),
            network_config=network.config,
            use_safetensors=True,
            return_alphas=True,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:  # names unknown to converters
        raise ValueError(f'{path} has LoRA weights in an unknown format: {reason_of(error)}') from error
    if any(name.endswith('.alpha') for name in state):
        state = _apply_alphas(state, metadata, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return LoraWeights(str(path), scale, digest, state, alphas[0] if alphas else None, metadata)


def _apply_alphas(state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, path: Path) -> dict[str, Tensor]:
    """Fold alphas among the tensors into the weights, so that alpha equals the rank, which is the default.

    Raises:
        ValueError: An alpha without matrices, or together with metadata, which have alphas as well.
    """
    if metadata:
        raise ValueError(f'{path} has alphas among its tensors and in its metadata; remove the metadata')
    scaled = {name: tensor for name, tensor in state.items() if not name.endswith('.alpha')}
    for name in state.keys() - scaled.keys():
        module = re.escape(name.removesuffix('.alpha'))
        down, up = (
            [key for key in scaled if re.fullmatch(rf'{module}\.{matrix}(\.default)?\.weight', key)]
            for matrix in (DOWN, UP)
        )
        if len(down) != 1 or len(up) != 1:
            raise ValueError(f'{path} has {name}, but not the two matrices of that module, as lora_A and lora_B')
        scaled[up[0]] = scaled[up[0]] * (state[name].item() / len(scaled[down[0]]))
    return scaled


def _find(source: str | Path) -> Path:
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        if path.suffix.lower() != '.safetensors':
            raise ValueError(f'{path} is no safetensors file; LoRA weights are read from such only')
        return path
    if path.is_dir():
        files = sorted(path.glob('*.safetensors'))
        named = [file for file in files if file.name == FILE_NAME] or files
        if len(named) != 1:
            names = ', '.join(file.name for file in files) or 'no safetensors files'
            raise ValueError(f'{path} holds {names}; name the file of the LoRA weights')
        return named[0]
    if isinstance(source, Path) or text[:1] in './~' or text.count('/') not in (1, 2):
        raise FileNotFoundError(f'no LoRA weights at {path}; give a safetensors file, a folder with one, or a hub id')
    owner, name, *file = text.split('/')
    try:
        return Path(hf_hub_download(f'{owner}/{name}', file[0] if file else FILE_NAME))
    except (OSError, ValueError) as error:
        raise OSError(
            f'cannot get LoRA weights {text} from the Hugging Face hub: {reason_of(error)}. A file there is named as '
            f'owner/name/file.safetensors; without network, give a file or a folder'
        ) from error


def fuse_lora(network: Network, weights: LoraWeights) -> None:
    """Add pretrained LoRA weights to those of a network, in place.

    Raises:
        ValueError: They do not match, or there are none for such a network.
    """
    part = kind_of(network).part
    if not weights.part(part):
        raise ValueError(f'{weights.path} holds no LoRA weights for a {"UNet" if part == "unet" else part}')
    with _all_fitting(network, part, weights):
        network.load_lora_adapter(
            dict(weights.state), prefix=part, network_alphas=weights.alphas, metadata=weights.metadata
        )
    network.fuse_lora(weights.scale)
    network.unload_lora()


def fuse_text_lora(encoder: PreTrainedModel, part: str, weights: LoraWeights) -> None:
    """Add pretrained LoRA weights to those of a text encoder, if there are any, in place.

    Args:
        encoder: The text encoder.
        part: 'text_encoder' or 'text_encoder_2'.
        weights: Weights of all parts.

    Raises:
        ValueError: They do not match.
    """
    if not weights.part(part):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    with _all_fitting(encoder, part, weights):
        StableDiffusionXLLoraLoaderMixin.load_lora_into_text_encoder(
            dict(weights.state),
            weights.alphas,
            encoder,
            prefix=part,
            lora_scale=weights.scale,
            adapter_name=part,
            metadata=weights.metadata,
        )
    for module in encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(encoder)
    encoder.delete_adapter(part)  # its layers are gone


@contextmanager
def _all_fitting(model: nn.Module, part: str, weights: LoraWeights) -> Iterator[None]:
    """Raise a ValueError unless all weights for a part are loaded into the model."""
    before, expected = sum(1 for _ in model.parameters()), len(weights.part(part))
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'the LoRA weights in {weights.path} do not fit this {part}: {reason[:300]}') from error
    loaded = sum(1 for _ in model.parameters()) - before
    if loaded != expected:
        raise ValueError(
            f'of {expected} LoRA weights in {weights.path} for the {part}, only {loaded} match this one; they were '
            f'made for another model'
        )
