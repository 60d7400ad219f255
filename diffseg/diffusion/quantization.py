"""Weights of a network in 8 or 4 bits, by torchao."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

from torch import nn

from diffseg.diffusion.sites import Network

Quantization = Literal['int8', 'fp8', 'nf4']
NF4_BLOCKS = 64, 256  # values that share a scale, and scales that share one (QLoRA, 2305.14314, section 3)


def quantize(network: Network, kind: Quantization) -> None:
    """Keep the weights of linear layers in fewer bits, in place; the network computes in its dtype as before.

    Convolutions, norms, biases and embeddings stay as they are. Weights are loaded with all their bits first, on the
    CPU, and restored in each call of their layer, which costs time. The kinds:

    * 'int8': 8 bits, with a scale for each output channel.
    * 'fp8': 8 bits, float8_e4m3fn, with a scale for each output channel.
    * 'nf4': 4 bits, the normal float of QLoRA (2305.14314) with double quantization, for layers whose number of weights
      is a multiple of 64 x 256; others stay as they are. It takes the CPU minutes for a billion weights.

    Args:
        network: The network, whose weights are loaded.
        kind: How weights are kept.

    Raises:
        ImportError: torchao is not installed.
        ValueError: An unknown kind, or one for which no layer is large enough.
    """
    if kind not in get_args(Quantization):
        raise ValueError(f'quantization is {kind!r}; it is {" or ".join(map(repr, get_args(Quantization)))}, or None')
    if find_spec('torchao') is None:
        raise ImportError("quantization needs torchao: pip install 'diffseg[quantization]'")
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if kind == 'nf4':
        layers = [layer for layer in layers if layer.weight.numel() % (NF4_BLOCKS[0] * NF4_BLOCKS[1]) == 0]
        if not layers:
            raise ValueError(
                f"quantization is 'nf4', but no linear layer of this {type(network).__name__} has a multiple of "
                f"{NF4_BLOCKS[0]} x {NF4_BLOCKS[1]} weights; use 'int8' or 'fp8'"
            )
    convert = _converter(kind)
    for layer in layers:
        convert(layer)


def _converter(kind: Quantization) -> Callable[[nn.Linear], None]:
    """What quantizes the weights of one layer in place."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_, to_nf4

    if kind == 'nf4':

        def convert(layer: nn.Linear) -> None:
            layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), *NF4_BLOCKS), requires_grad=False)

        return convert
    config = {'int8': Int8WeightOnlyConfig, 'fp8': Float8WeightOnlyConfig}[kind](set_inductor_config=False)
    return lambda layer: quantize_(layer, config)
