"""ControlNets (arXiv 2302.05543): additional conditioning on the image itself."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from diffseg.diffusion.loading import fingerprint, reason_of, set_attention

CANNY_THRESHOLDS = 100, 200  # GDF's


# Options that must be equal in a ControlNet and its UNet.
COMMON = ('in_channels', 'block_out_channels', 'down_block_types', 'layers_per_block', 'cross_attention_dim')


class Control(nn.Module):
    """A ControlNet and its conditioning image.

    Args:
        net: The ControlNet.
        image: Its conditioning image: 'canny' (edges) or 'image' (the image itself).
        scale: Factor of its residuals.

    Attributes:
        fingerprint: Identifies the weights.

    Raises:
        ImportError: cv2, which detects edges, is not installed.
        ValueError: Unknown `image`.
    """

    def __init__(self, net: ControlNetModel, image: str = 'canny', scale: float = 1.0):
        super().__init__()
        if image not in VIEWS:
            raise ValueError(f'image of a ControlNet is {image!r}; it is {" or ".join(map(repr, VIEWS))}')
        if image == 'canny' and find_spec('cv2') is None:
            raise ImportError("a ControlNet with image='canny' needs cv2: pip install opencv-python")
        self.net = net
        self.image = image
        self.scale = scale
        self.fingerprint = fingerprint(net.state_dict())

    def view(self, images: Tensor) -> Tensor:
        """Conditioning images in [0, 1] for images in [-1, 1], both with shape (B, 3, H, W)."""
        return VIEWS[self.image](images)

    def forward(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Any], view: Tensor) -> list[Tensor]:
        """Residuals for the UNet: one for each of its skip connections and, as the last, one for its middle.

        Args:
            x_t: Noised latents with shape (N, 4, h, w).
            timestep: Timesteps of the latents, with shape (N,).
            condition: The UNet's `encoder_hidden_states` and `added_cond_kwargs`.
            view: Conditioning images with shape (N, 3, 8h, 8w).
        """
        view = view.to(x_t.dtype)
        down, middle = self.net(
            x_t, timestep, controlnet_cond=view, conditioning_scale=self.scale, return_dict=False, **condition
        )
        return [*down, middle]


def load_control(
    unet: UNet2DConditionModel,
    model: str | Path,
    image: str = 'canny',
    scale: float = 1.0,
    *,
    revision: str | None = None,
    variant: str | None = None,
    attention: str = 'auto',
) -> Control:
    """Load a ControlNet, in the UNet's dtype and on the CPU.

    Args:
        unet: The UNet that it conditions.
        model: Folder of a diffusers `ControlNetModel`, or hub id.
        image: Its conditioning image, see `Control`.
        scale: Factor of its residuals.
        revision: Commit, tag or branch of a hub id.
        variant: Variant of the weight files, such as 'fp16'.
        attention: Implementation of attention, see `load_parts`.

    Raises:
        OSError: The model does not exist, is damaged or cannot be reached.
        ValueError: It was trained for another UNet, or an option is invalid.
    """
    try:
        net, info = ControlNetModel.from_pretrained(
            str(model),
            revision=revision,
            variant=variant,
            torch_dtype=unet.conv_in.weight.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise OSError(
            f'cannot read the ControlNet {model}: {reason_of(error)}. Give a folder with config.json and weights of a '
            f'ControlNetModel of diffusers, or a hub id'
        ) from error
    if strange := sorted((*info['missing_keys'], *info['unexpected_keys'])):
        raise ValueError(
            f'{model} is not a ControlNet: {len(strange)} tensors are missing or unexpected, such as {strange[0]}'
        )
    ours, theirs = (
        {name: tuple(x) if isinstance(x := config[name], list) else x for name in COMMON}
        for config in (unet.config, net.config)
    )
    if different := [f'{name} is {theirs[name]}, not {ours[name]}' for name in COMMON if theirs[name] != ours[name]]:
        raise ValueError(f'the ControlNet {model} was made for another UNet: {"; ".join(different)}')
    set_attention(net, attention)
    return Control(net.requires_grad_(False).eval(), image, scale)


def residual_kwargs(residuals: list[list[Tensor]]) -> dict[str, Any]:
    """Arguments of the UNet for the residuals of one or more ControlNets, which are added."""
    *down, middle = (sum(tensors[1:], tensors[0]) for tensors in zip(*residuals, strict=True))
    return {'down_block_additional_residuals': down, 'mid_block_additional_residual': middle}


def to_unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1] of images in [-1, 1]."""
    return (images / 2 + 0.5).clamp(0, 1)


def canny(images: Tensor) -> Tensor:
    """Edges, 0 or 1, of images in [-1, 1], both with shape (B, 3, H, W); found in 8 bit on the CPU, as in GDF."""
    import cv2

    pixels = (to_unit_range(images.detach().float()) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    edges = np.stack([cv2.Canny(np.ascontiguousarray(image), *CANNY_THRESHOLDS) for image in pixels])  # (B, H, W)
    return (torch.from_numpy(edges).to(images) / 255).unsqueeze(1).expand_as(images)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {'canny': canny, 'image': to_unit_range}
