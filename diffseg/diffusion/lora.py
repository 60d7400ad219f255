"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a UNet, through diffusers and peft: layers to train."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from diffusers import UNet2DConditionModel
from torch import nn

TARGET_MODULES = ('to_q', 'to_k', 'to_v', 'to_out.0')  # the projections of attention, as in diffusers' training scripts


def require_peft() -> None:
    """Raise an ImportError that says how to get peft, if it is not installed."""
    if find_spec('peft') is None:
        raise ImportError("LoRA needs peft: pip install 'diffseg[lora]'")


def add_lora(
    unet: UNet2DConditionModel,
    modules: Collection[str],
    *,
    r: int = 8,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
) -> list[str]:
    """Put trainable layers of low rank beside linear layers and convolutions; they change nothing as yet.

    Their weights are in float32, also beside a UNet in half precision.

    Args:
        unet: The network; changed in place.
        modules: Names of the modules to choose from.
        r: Rank.
        lora_alpha: The layers' output is multiplied by this over `r`; None is `r`.
        target_modules: Ends of module names, such as 'to_q' or 'up_blocks.1.*.to_q', with `fnmatch`'s wildcards.

    Returns:
        Names of the new parameters.

    Raises:
        ImportError: peft is not installed.
        ValueError: A rank below 1, or a target that is no module to choose from.
    """
    require_peft()
    from peft import LoraConfig

    if r < 1:
        raise ValueError(f'the rank r of LoRA is {r}; it is 1 or more')
    candidates = [name for name in modules if isinstance(unet.get_submodule(name), nn.Linear | nn.Conv2d)]
    chosen = {end: [name for name in candidates if fnmatchcase(f'.{name}', f'*.{end}')] for end in target_modules}
    if void := [end for end, names in chosen.items() if not names]:
        raise ValueError(
            f'target_modules {void} of LoRA name no linear layer or convolution of the UNet that the chosen layers '
            f'depend on; such are {", ".join(candidates[:3])}, ...'
        )
    names = sorted({name for found in chosen.values() for name in found})
    # peft takes them for ends of names; none is that of another
    unet.add_adapter(LoraConfig(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, target_modules=names))
    added = {name: parameter for name, parameter in unet.named_parameters() if '.lora_' in name}
    for parameter in added.values():
        parameter.data = parameter.data.to(torch.float32)
    return list(added)
