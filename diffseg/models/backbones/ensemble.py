"""Several backbones as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .diffusion import DiffusionBackbone
from .frozen import FrozenBackbone, keep_device

T = TypeVar('T')


def join_levels(members: Sequence[Sequence[T]], levels: Sequence[Sequence[int]]) -> list[T]:
    """Join per-map items of several backbones: level by level, and within a level backbone by backbone.

    Args:
        members: for each backbone, one item per map.
        levels: for each backbone, the number of its maps in each level; the sum is the number of its maps.
    """
    remaining = [iter(items) for items in members]
    return [
        next(items)
        for counts in zip(*levels, strict=True)
        for items, count in zip(remaining, counts, strict=True)
        for _ in range(count)
    ]


@MODELS.register_module()
class EnsembleBackbone(BaseModule):
    """Several frozen backbones that see the same images, their maps joined level by level.

    ```text
                                    +-> backbones[0] -> 3 maps, levels [2, 1]: a0 a1 | a2 -+
    image (B, 3, H, W) in [-1, 1] --+                                                      +-> a0 a1 b0 | a2 b1 b2
                                    +-> backbones[1] -> 3 maps, levels [1, 2]: b0 | b1 b2 -+
    ```

    Each member has its own input size, prompt, timesteps, dtype and cache; `AggregationNeck` and `ConcatNeck` support a
    different number of timesteps for each map. A published use is Ours-XL-t of Generic Diffusion Feature, of SDXL and
    Playground v2.

    Args:
        backbones: configs of the members, each with the additional key `levels`: the number of its maps in each level,
            fine -> coarse; 0 is allowed. Without it, all its maps belong to one level.
        offload: 'sequential' keeps the members' frozen tensors where they are built (on the CPU, page-locked if there
            is an accelerator) and copies one member at a time to the images' device, while it runs. Memory is needed
            for the largest member, unless gradients flow through a member: its tensors then stay until the backward
            pass. A member whose maps come from its cache is not copied.
        devices: for each member the device of all its parameters; maps are copied to the images' device.

    Attributes:
        members: the backbones.
        levels: for each member, the number of its maps in each level.

    Raises:
        ValueError: contradictory options, different numbers of levels, or an error of a member, with its position.
    """

    def __init__(
        self,
        backbones: Sequence[Mapping[str, Any]],
        *,
        offload: Literal['sequential'] | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not backbones:
            raise ValueError('backbones is empty; give at least one')
        if offload not in (None, 'sequential'):
            raise ValueError(f"offload is {offload!r}; it is 'sequential' or None")
        if devices is not None and offload is not None:
            raise ValueError('offload and devices exclude each other: with devices, every member stays on its device')
        if devices is not None and len(devices) != len(backbones):
            raise ValueError(f'devices={list(devices)} for {len(backbones)} backbones; give one for each')
        self.devices = None if devices is None else [torch.device(device) for device in devices]
        kinds = [getattr(config['type'], '__name__', config['type']) for config in backbones]
        self._names = [f'backbones[{i}] ({kind})' for i, kind in enumerate(kinds)]
        self.members = nn.ModuleList()
        self.levels: list[list[int]] = []
        for name, config in zip(self._names, backbones, strict=True):
            with _named(name):
                config = dict(config)
                levels = config.pop('levels', None)
                member = MODELS.build(config)
                if not isinstance(member, FrozenBackbone):
                    raise ValueError('only the backbones of this package can be joined')
                if getattr(member, 'output_image', False):
                    raise ValueError('output_image is not for members of an ensemble, whose maps alone are joined')
                maps = len(member.channels)
                levels = [maps] if levels is None else list(levels)
                if sum(levels) != maps or any(count < 0 for count in levels):
                    raise ValueError(f'levels={levels} do not add up to the {maps} maps of the backbone')
                if offload is not None:
                    member.offload()
                member.label = name
                self.members.append(member)
                self.levels.append(levels)
        numbers = [len(counts) for counts in self.levels]
        if len(set(numbers)) > 1:
            raise ValueError(
                f'the backbones have {numbers} levels; give all the same number, with 0 for none: {self.levels}'
            )
        if self.devices is not None:
            for member, device in zip(self.members, self.devices, strict=True):
                member.to(device)

    @property
    def channels(self) -> list[int | None]:
        """Channels C of each map, in the order of the maps; None if known only at run time."""
        return join_levels([member.channels for member in self.members], self.levels)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprints of the members, which checkpoints store separately, and the levels of their maps."""
        return {'members': [member.fingerprint for member in self.members], 'levels': self.levels}

    def forward(self, x: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, ...]:
        """Extract.

        Args:
            x: images with shape (B, 3, H, W) in [-1, 1], RGB; with captions (B, 4, H, W), whose fourth channel goes to
                the members that have captions.
            prompts: one for each image, for the diffusion models among the members; None takes the configured ones.

        Returns:
            Maps with shapes (B, T*C, h, w), level by level, on the device of the images.

        Raises:
            ValueError: a member cannot take the images.
        """
        captioned = any(member.captions is not None for member in self.members)
        member_maps = []
        for i, member in enumerate(self.members):
            with _named(self._names[i]):
                images = x[:, :3] if captioned and member.captions is None else x
                images = images if self.devices is None else images.to(self.devices[i])
                takes_prompts = prompts is not None and isinstance(member, DiffusionBackbone)
                maps = member(images, prompts) if takes_prompts else member(images)
            member_maps.append([y.to(x.device) for y in maps])
        return tuple(join_levels(member_maps, self.levels))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'EnsembleBackbone':
        """Implement `.to()`, `.half()` and so on; members with a configured device stay there."""
        return super()._apply(fn if self.devices is None else keep_device(fn), recurse)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix errors that users may cause with the name of the member."""
    try:
        yield
    except (ValueError, KeyError, OSError, FloatingPointError) as error:
        raise _prefixed(error, name) from error


def _prefixed(error: Exception, name: str) -> Exception:
    """An error of the same type, or of its nearest base if a message alone does not suffice (JSONDecodeError)."""
    for kind in type(error).__mro__:
        try:
            return kind(f'{name}: {error}')
        except TypeError:
            continue
    return error
