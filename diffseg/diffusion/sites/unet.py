"""What UNets have in common: levels of residual blocks, with attention behind some of them."""

from collections.abc import Callable, Iterator

from torch import nn

from diffseg.diffusion.sites.site import Site

# Lists the sites inside the attention behind a residual block, from the beginning of their names, the module's path,
# the module and its stride.
AttentionWalk = Callable[[str, str, nn.Module, int], Iterator[Site]]


def walk_unet(unet: nn.Module, stride: int, walk_attention: AttentionWalk) -> Iterator[Site]:
    """List the sites of a UNet in order of execution.

    Args:
        unet: The network, of diffusers.
        stride: Image pixels per cell of its input.
        walk_attention: Lists what is inside its attention modules.
    """
    yield Site('unet-in', 'conv_in', unet.config.in_channels, stride, is_input=True)
    yield Site('unet-after-conv-in', 'conv_in', unet.config.block_out_channels[0], stride)
    for level, block in enumerate(unet.down_blocks):
        name, path = f'down-level{level}', f'down_blocks.{level}'
        yield from _walk_block(name, path, block, stride, walk_attention)
        if block.downsamplers is not None:
            stride *= 2
            channels = block.resnets[-1].out_channels
            yield Site(f'{name}-downsampler-out', f'{path}.downsamplers.0', channels, stride)
    if unet.mid_block is not None:
        yield from _walk_block('mid', 'mid_block', unet.mid_block, stride, walk_attention)
    for level, block in enumerate(unet.up_blocks):
        name, path = f'up-level{level}', f'up_blocks.{level}'
        yield from _walk_block(name, path, block, stride, walk_attention)
        if block.upsamplers is not None:
            stride //= 2
            channels = block.resnets[-1].out_channels
            yield Site(f'{name}-upsampler-out', f'{path}.upsamplers.0', channels, stride)
    yield Site('unet-out', 'conv_out', unet.config.out_channels, stride)


def _walk_block(name: str, path: str, block: nn.Module, stride: int, walk_attention: AttentionWalk) -> Iterator[Site]:
    attentions = dict(enumerate(getattr(block, 'attentions', ())))  # fewer than residual blocks in the middle
    for repeat, resnet in enumerate(block.resnets):
        channels = resnet.out_channels
        yield Site(f'{name}-repeat{repeat}-res-increment', f'{path}.resnets.{repeat}.conv2', channels, stride)
        yield Site(f'{name}-repeat{repeat}-res-out', f'{path}.resnets.{repeat}', channels, stride)
        if (attention := attentions.get(repeat)) is None:
            continue
        vit, vit_path = 'mid-vit' if name == 'mid' else f'{name}-repeat{repeat}-vit', f'{path}.attentions.{repeat}'
        yield from walk_attention(vit, vit_path, attention, stride)
        yield Site(f'{vit}-out', vit_path, channels, stride)
