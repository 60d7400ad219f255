"""Options of an extractor, in groups: which weights are loaded, and how the network is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from diffseg.diffusion.quantization import Quantization

Group = TypeVar('Group')
LoraSource = str | Path | tuple[str | Path, float]  # alone or with its scale


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights are loaded for a model, beside its name.

    Attributes:
        revision: Of a hub model.
        variant: Of a model's weight files, such as 'fp16'.
        config: Preset or folder that describes a single checkpoint file, see `load_parts`.
        random: Parts ('unet', 'vae') that are initialised at random instead of loaded.
        network_weights: File with other weights for the UNet, see `load_parts`.
        vae: An `AutoencoderTiny` (TAESD) in place of the model's VAE, with a small part of its operations: a hub id
            such as 'madebyollin/taesd', a folder or a file, see `load_parts`.
        lora_weights: Ready-made weights of low rank to add to those of the network and, for Stable Diffusion's prompts,
            of the text encoders: files, folders or hub ids, see `read_lora`, each alone or with a scale, as
            `('file.safetensors', 0.8)`.
        quantization: Keep the weights of the network's linear layers in fewer bits, to save memory: 'int8', 'fp8' or
            'nf4', see `quantize`. It needs torchao, and is not for parts that are trained; `lora` may be.
        controlnet: A ControlNet, or several whose effects add up, that condition the UNet: `dict(model=...)` with a
            diffusers folder or hub id and, if wanted, `image`, `scale` (see `Control`), `revision`, `variant`.
        textual_inversion: Files of learned tokens, which prompts may hold, see `read_inversion`.
    """

    revision: str | None = None
    variant: str | None = None
    config: str | Path | None = None
    random: Sequence[str] = ()
    network_weights: str | Path | None = None
    vae: str | Path | None = None
    lora_weights: Sequence[LoraSource] = ()
    quantization: Quantization | None = None
    controlnet: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ()
    textual_inversion: Sequence[str | Path] = ()


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a network is run: speed and memory. Of these, tiles alone change values by more than rounding.

    Attributes:
        attention: Implementation of attention: 'auto', 'sdpa', 'xformers' or 'eager'.
        device: Where the network will run, which decides what 'auto' is for dtype and memory format; None is the
            accelerator, or the CPU where there is none. The extractor is made on the CPU, whatever it is.
        memory_format: Of the convolutions: 'contiguous', 'channels_last', or 'auto' for the faster one, see
            `fast_memory_format`.
        compile: Compile the transformer blocks in which nothing is read; a dict gives `torch.compile` options.
        micro_batch: The largest number of latents in one call of the UNet.
        vae_slicing: Encode one image at a time, to save memory.
        vae_tiling: Encode large images in tiles, to save memory.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        check_finite: Raise `FloatingPointError` for activations with NaN or infinity, and `ValueError` for images whose
            values are out of range. For this each call waits for its device, once.
        cache_dir: Where encoded prompts are kept, see `PromptEncoder`.
    """

    attention: str = 'auto'
    device: str | None = None
    memory_format: str = 'auto'
    compile: bool | Mapping[str, Any] = False
    micro_batch: int | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    gradient_checkpointing: bool = False
    check_finite: bool = True
    cache_dir: str | Path | None = None


GROUPS = {'weights': Weights, 'runtime': Runtime}


def group_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sort flat options, as a config of a backbone has them, into the groups that `DiffusionExtractor` takes.

    Args:
        options: `DiffusionExtractor`'s own, and fields of `Weights` and `Runtime`.

    Returns:
        The extractor's own options as they are, and the others as 'weights' and 'runtime'.
    """
    grouped = dict(options)
    for name, group in GROUPS.items():
        members = {field.name for field in fields(group)} & grouped.keys()
        if members:
            grouped[name] = group(**{member: grouped.pop(member) for member in members})
    return grouped


def as_group(group: type[Group], options: Group | Mapping[str, Any]) -> Group:
    """Options as an instance of their group.

    Raises:
        ValueError: There is no such option.
    """
    if isinstance(options, group):
        return options
    allowed = [field.name for field in fields(group)]
    if unknown := sorted(options.keys() - allowed):
        raise ValueError(f'unknown {group.__name__.lower()} {", ".join(unknown)}; there are: {", ".join(allowed)}')
    return group(**options)
