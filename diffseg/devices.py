"""Tensors from the host to a device."""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to a device, and convert it, without waiting until the device has finished what it is at.

    A tensor of a device is copied to the host as ever, for the host must not read it earlier.
    """
    return x.to(device, dtype, non_blocking=x.device.type == 'cpu')
