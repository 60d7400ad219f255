"""A pretrained ResNet as an mmseg backbone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from diffseg.diffusion.images import check_images
from diffseg.diffusion.loading import fingerprint, read_checkpoint

from .frozen import FrozenBackbone, freeze, verify_channels
from .vision import IMAGENET

WIDTH = 64  # channels of the first convolution of a ResNet of width 1
# Other entries in checkpoints of SwAV and of classifiers; the counter of batches is unused when frozen.
UNUSED = ('projection_head.', 'prototypes.', 'fc.')
COUNTER = 'num_batches_tracked'


def torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to those of torchvision's ResNet, which mmseg shares.

    Args:
        state: of torchvision, or of facebookresearch/swav, with the prefix `module.`, a projection head and prototypes.
    """
    names = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in names.items() if not name.startswith(UNUSED) and COUNTER not in name}


@MODELS.register_module()
class ResNetBackbone(FrozenBackbone):
    """Inputs of the blocks of a frozen ResNet as plain feature maps.

    ```text
    image (B, 3, H, W) in [-1, 1] -> mean and std of ImageNet -> mmseg's ResNet -> L maps (B, C, h, w)
    ```

    It takes the same images as `DiffusionBackbone` and is not saved in checkpoints either. The networks of SwAV, also
    twice as wide, are baselines of "Label-Efficient Semantic Segmentation with Diffusion Models" (arXiv 2112.03126),
    which reads the inputs of every other block.

    Args:
        model: file of a checkpoint under the names of torchvision or SwAV.
        layers: blocks, such as 'layer3.4', in the order of the maps, each of which is the block's input.
        depth: 18, 34, 50, 101 or 152.
        width: multiple of the usual channels, 2 in SwAV's wide ResNet.
        channels: expected channels of each layer; verified if given.
        input_size: side or (height, width) to which images are resized (bilinear, aspect ratio not kept).
        random: initialise at random instead of reading the file.

    Attributes:
        channels: channels C of each layer.

    Raises:
        ValueError: unknown block or depth, a checkpoint of another network, or `channels` that do not match the model.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        layers: Sequence[str],
        *,
        depth: int = 50,
        width: int = 1,
        channels: Sequence[int] | None = None,
        input_size: int | Sequence[int] | None = None,
        random: bool = False,
    ) -> None:
        super().__init__()
        if depth not in ResNet.arch_settings:
            raise ValueError(f'depth is {depth}; it is one of {", ".join(map(str, ResNet.arch_settings))}')
        network = ResNet(depth, stem_channels=width * WIDTH, base_channels=width * WIDTH)
        blocks = {
            f'{stage}.{i}': block
            for stage in network.res_layers
            for i, block in enumerate(network.get_submodule(stage))
        }
        if unknown := [layer for layer in layers if layer not in blocks]:
            raise ValueError(f'a ResNet-{depth} has no blocks {unknown}; it has {", ".join(blocks)}')
        self.layers = list(layers)
        self.channels = [blocks[layer].conv1.in_channels for layer in self.layers]
        if channels is not None:
            verify_channels(self.layers, self.channels, channels)
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        if not random:
            self._load(network, model)
        self._weights = fingerprint(torchvision_names(network.state_dict()))
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
        self.register_buffer('mean', 2 * mean - 1, persistent=False)  # of [-1, 1]
        self.register_buffer('std', 2 * std, persistent=False)
        network.eval()
        freeze(network)
        self.network = network

    def _load(self, network: nn.Module, model: str | Path) -> None:
        """Read the weights.

        Raises:
            ValueError: they belong to another network.
        """
        state = torchvision_names(read_checkpoint(model))
        expected = torchvision_names(network.state_dict())
        wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
        if wrong := [*wrong, *(name for name in state if name not in expected)]:
            raise ValueError(
                f'{model} is no ResNet of this depth and width: {len(wrong)} of {len(expected)} tensors are missing, '
                f'unexpected or of another shape, such as {wrong[0]}; set depth and width'
            )
        network.load_state_dict(state, strict=False)  # without the counters

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract.

        Args:
            x: images with shape (B, 3, H, W) in [-1, 1], RGB.

        Returns:
            L maps with shapes (B, C, h, w), one for each layer.

        Raises:
            ValueError: images have a wrong shape, dtype or range.
        """
        if self.input_size is not None:
            x = F.interpolate(x, self.input_size, mode='bilinear', align_corners=False)
        check_images(x, 1)
        with self.resident(x.device), _inputs_of(self.network, self.layers) as maps:
            self.network((x - self.mean) / self.std)
        return tuple(maps[layer].to(x.dtype) for layer in self.layers)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that a head trained on the maps depends on."""
        return {'weights': self._weights, 'layers': self.layers}


@contextmanager
def _inputs_of(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of modules of a network, by their names."""
    maps: dict[str, Tensor] = {}

    def note(layer: str, inputs: tuple[Tensor, ...]) -> None:
        (maps[layer],) = inputs

    handles = [
        network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs, layer=layer: note(layer, inputs))
        for layer in layers
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
