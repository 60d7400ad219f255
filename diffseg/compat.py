"""The gaps between the installed mm packages and current torch, each filled only where it exists.

mmsegmentation 1.2.2 imports a few names from `mmcv.ops`, for which mmcv-lite has no compiled code. mmengine 0.10.7
writes checkpoints that `torch.load` refuses since torch 2.6. Its configs inherit those of packages that it knows by
name only, and the onedl fork does not know its own mmsegmentation. Warnings that ask nothing of the user are hidden.
Nothing else is touched.
"""

import pickle
import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from importlib.util import find_spec, module_from_spec
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from torch import Tensor

STATISTICS = {name: getattr(HistoryBuffer, name) for name in ('min', 'max', 'current', 'mean')}


HARMLESS = {
    '``build_loss`` would be deprecated soon': 'mmseg calls it, not the user',
    'pkg_resources is deprecated as an API': 'mmengine calls it to find `mmseg::...`, not the user',
    'The draw is False, it means that the hook for visualization will not take effect': 'as meant without --show-dir',
}  # the beginnings of warnings, and why the user need not see them
WITHOUT_OPS = 'Fail to import ``MultiScaleDeformableAttention``'  # heads that need it say so when they are built


def apply() -> None:
    """Fill the gaps that exist; calling it again changes nothing."""
    provide_ops()
    allow_checkpoints()
    name_fork()
    hide_warnings()
    MODULE2PACKAGE.setdefault('diffseg', 'diffseg')  # configs inherit `diffseg::...`


def provide_ops() -> None:
    """Stand in for `mmcv.ops` where mmcv has no compiled code.

    Delete when mmsegmentation imports under mmcv-lite by itself.
    """
    if 'mmcv.ops' in sys.modules or find_spec('mmcv._ext') is not None:
        return
    ops = module_from_spec(ModuleSpec('mmcv.ops', loader=None, origin=__name__))
    ops.point_sample = point_sample
    ops.sigmoid_focal_loss = sigmoid_focal_loss
    ops.CrissCrossAttention = ops.PSAMask = None  # the heads that need them say so when they are built
    sys.modules['mmcv.ops'] = ops


def hide_warnings() -> None:
    """Hide warnings that every start would print and that ask nothing of the user; a user's filters come first."""
    without_ops = [WITHOUT_OPS] if find_spec('mmcv._ext') is None else []
    for message in (*HARMLESS, *without_ops):
        warnings.filterwarnings('ignore', re.escape(message), append=True)


def point_sample(input: Tensor, points: Tensor, align_corners: bool = False, **kwargs) -> Tensor:
    """Values of a map at points.

    Args:
        input: Map with shape (N, C, H, W).
        points: (x, y) in [0, 1] x [0, 1] with shape (N, P, 2) or (N, Hg, Wg, 2).
        align_corners: Whether 0 and 1 are the centres of the outermost cells, instead of their outer edges.
        kwargs: `mode` and `padding_mode` of `torch.nn.functional.grid_sample`.

    Returns:
        Values with shape (N, C, P) or (N, C, Hg, Wg).
    """
    grid = 2 * points - 1
    if points.ndim == 4:
        return F.grid_sample(input, grid, align_corners=align_corners, **kwargs)
    return F.grid_sample(input, grid[:, :, None], align_corners=align_corners, **kwargs)[..., 0]  # (N, C, P)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: Literal['none', 'mean', 'sum'] = 'mean',
) -> Tensor:
    """Focal loss of one binary classifier per class (Lin et al. 2017, eq. 5).

    Args:
        input: Logits with shape (N, C).
        target: Class indices with shape (N,); a sample of another index, such as C, is negative for every class.
        gamma: Exponent that weakens well classified samples.
        alpha: Weight of positives; negatives have 1 - alpha.
        weight: Weight of a sample by its target class, with shape (C,).
        reduction: 'mean' divides the sum by N, as mmcv does.

    Returns:
        Loss with shape (N, C) for 'none', else ().
    """
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)  # (N, C)
    signed = torch.where(positive, input, -input)  # p_t = sigmoid(signed)
    alpha_t = torch.where(positive, alpha, 1 - alpha)
    loss = -alpha_t * torch.sigmoid(-signed) ** gamma * F.logsigmoid(signed)
    if weight is not None:
        loss = loss * weight[target, None]
    return loss if reduction == 'none' else loss.sum() / (len(input) if reduction == 'mean' else 1)


def allow_checkpoints() -> None:
    """Let `torch.load(weights_only=True)` read the training log in mmengine's checkpoints, and nothing that runs code.

    The log holds `HistoryBuffer`s: numpy arrays and their statistics, pickled as `getattr(HistoryBuffer, 'mean')`.
    `getattr` itself could reach anything from there, so its name is bound to `restricted_getattr`.

    Delete when mmengine allows its own classes.
    """
    if HistoryBuffer in torch.serialization.get_safe_globals():
        return
    rebuild = [np.zeros(1).__reduce__()[0], np.float64().__reduce__()[0]]  # an array, a number
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (restricted_getattr, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in ('bool', 'int32', 'int64', 'float32', 'float64')),
            *((f, f'numpy.core.multiarray.{f.__name__}') for f in rebuild),  # written under numpy 1
            *((f, f'numpy._core.multiarray.{f.__name__}') for f in rebuild),
        ]
    )


def restricted_getattr(owner: object, name: str) -> Callable:
    """`getattr` for `HistoryBuffer`'s four statistics.

    Raises:
        pickle.UnpicklingError: Anything else was asked for.
    """
    if owner is not HistoryBuffer or type(name) is not str or name not in STATISTICS:
        raise pickle.UnpicklingError(f'a checkpoint may look up {", ".join(STATISTICS)} of HistoryBuffer, nothing else')
    return STATISTICS[name]


def name_fork() -> None:
    """Let configs inherit `mmseg::...` from the onedl fork of mmsegmentation, which is installed under another name.

    Delete when onedl-mmengine looks for it under that name.
    """
    fork = 'onedl-mmsegmentation'
    if any(distributions(name=fork)) and not any(distributions(name='mmsegmentation')):
        MODULE2PACKAGE['mmseg'] = fork
