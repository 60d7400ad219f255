"""Transfer of tensors to a device."""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to a device, and convert it, without synchronising with the device.

    Copies from a device to the host are synchronous, since the host must not read them earlier.
    """
    return x.to(device, dtype, non_blocking=x.device.type == 'cpu')
