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
    """Join what several backbones have for each map: level by level, and within a level backbone by backbone.

    Args:
        members: for each backbone, one item per map.
        levels: for each backbone, how many of its maps belong to each level; they add up to the number of its maps.
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

    Each member has its own input size, prompt, timesteps, dtype and cache; `AggregationNeck` and `ConcatNeck` take
    another number of timesteps for each map. A published use is Ours-XL-t of Generic Diffusion Feature, of SDXL and
    Playground v2.

    Args:
        backbones: configs of the members, each with the additional key `levels`: how many of its maps belong to each
            level, fine -> coarse; 0 is allowed. Without it, all its maps belong to one level.
        offload: 'sequential' keeps the members' frozen tensors where they are built (on the CPU, page-locked where
            there is an accelerator) and has one member at a time on the images' device, while it runs. The largest
            member decides how much memory is needed, unless gradients flow through a member: its tensors then stay
            until the backward pass. A member whose maps come from its cache is not moved.
        devices: for each member the device on which it lives, with all its parameters; maps go to the images' device.

    Attributes:
        members: the backbones.
        levels: for each member, how many of its maps belong to each level.

    Raises:
        ValueError: contradictory options, levels that differ in number, or what a member raises, with its position.
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
            raise ValueError('offload and devices exclude each other: with devices, every member stays on its own')
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
                maps = len(member.channels)
                levels = [maps] if levels is None else list(levels)
                if sum(levels) != maps or any(count < 0 for count in levels):
                    raise ValueError(f'levels={levels} do not add up to the {maps} maps that there are')
                if offload is not None:
                    member.offload()
                member.label = name
                self.members.append(member)
                self.levels.append(levels)
        numbers = [len(counts) for counts in self.levels]
        if len(set(numbers)) > 1:
            raise ValueError(
                f'the backbones have {numbers} levels; give each as many, with 0 where it has no map: {self.levels}'
            )
        if self.devices is not None:
            for member, device in zip(self.members, self.devices, strict=True):
                member.to(device)

    @property
    def channels(self) -> list[int | None]:
        """Channels C of each map, in the order of the maps; None for those known at run time only."""
        return join_levels([member.channels for member in self.members], self.levels)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The members' fingerprints, which checkpoints hold one by one, and how their maps are joined."""
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
        found = []
        for i, member in enumerate(self.members):
            with _named(self._names[i]):
                images = x[:, :3] if captioned and member.captions is None else x
                images = images if self.devices is None else images.to(self.devices[i])
                takes_prompts = prompts is not None and isinstance(member, DiffusionBackbone)
                maps = member(images, prompts) if takes_prompts else member(images)
            found.append([y.to(x.device) for y in maps])
        return tuple(join_levels(found, self.levels))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'EnsembleBackbone':
        """What `.to()`, `.half()` and so on do; members with a device of their own stay there."""
        return super()._apply(fn if self.devices is None else keep_device(fn), recurse)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in the errors that users may cause which member they come from."""
    try:
        yield
    except (ValueError, KeyError, OSError, FloatingPointError) as error:
        raise _prefixed(error, name) from error


def _prefixed(error: Exception, name: str) -> Exception:
    """An error of the same type, or, where a message alone does not make one (JSONDecodeError), of its nearest base."""
    for kind in type(error).__mro__:
        try:
            return kind(f'{name}: {error}')
        except TypeError:
            continue
    return error
