"""What can be read in each class of diffusion transformers of diffusers: one table each.

The rows of a block are in order of execution. The names of PixArt, Hunyuan-DiT and Flux are GDF's; the others follow
them. Beside GDF's there are

* `-in`: what the block's first norm is given, the raw features (in Hunyuan-DiT, behind the long skip).
* `-mod`: the block's first normalised and modulated features, the input of its first attention, as DiTF reads them.
* `-self-map`, `-cross-map`: probabilities of attention from image to image and from image to text, over all keys of
  the layer together.
"""

from functools import partial
from typing import Any

from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from diffseg.diffusion.sites.transformer import BlockMap, BlockSite, Head, Stack, one_timestep_each, transformer_kind

INPUT = {'is_input': True}
SPATIAL_INPUT = INPUT | {'kind': 'spatial'}


def _inputs(norm: str, query: str) -> tuple[BlockSite, ...]:
    """The raw and the modulated input of a block, whose first norm and first projection these are."""
    width = f'{query}.in_features'
    return BlockSite('in', norm, width, INPUT), BlockSite('mod', query, width, INPUT | {'norm': norm})


def _projections(attention: str, prefix: str = '', needs: str = '') -> tuple[BlockSite, ...]:
    """Queries, keys and values, before their norms and rotary embedding."""
    return tuple(
        BlockSite(f'{prefix}{x}', f'{attention}.to_{x}', f'{attention}.to_{x}.out_features', needs=needs) for x in 'qkv'
    )


def _feed_forward(path: str, last: str, width: str) -> tuple[BlockSite, ...]:
    """What a feed-forward layer is given, normalised and modulated, and what its last projection is given."""
    last = f'{path}.{last}'
    return BlockSite('norm-out', path, width, INPUT), BlockSite('ffn-inner', last, f'{last}.in_features', INPUT)


def _map(name: str, attention: str, keys: str, **fields: Any) -> BlockMap:
    """Attention to keys whose values are made by `to_v`."""
    defaults = {
        'values': f'{attention}.to_v',
        'width': f'{attention}.to_q.out_features',
        'output': f'{attention}.to_out.0',
    }
    return BlockMap(name, attention, keys, **{**defaults, **fields})


def _joint_maps(attention: str) -> tuple[BlockMap, ...]:
    """Attention of the image to itself and to the text, whose keys and values are projected by layers of their own."""
    image, text = f'{attention}.to_v', f'{attention}.add_v_proj'
    return (
        _map('cross-map', attention, 'all', values=text, others=(image,)),
        _map('self-map', attention, 'all', values=image, others=(text,)),
    )


def _single_maps(attention: str, **fields: Any) -> tuple[BlockMap, ...]:
    """Attention within one sequence of image and text."""
    return _map('cross-map', attention, 'text', **fields), _map('self-map', attention, 'image', **fields)


# Image and text in two streams of tokens: the output is a pair.
TEXT_AND_IMAGE = {'item': 1, 'order': 'image'}


def _double_block(
    feed_forward: tuple[str, str],
    norm: str = 'norm1',
    second_input: tuple[BlockSite, ...] = (),
    second_attention: tuple[BlockSite | BlockMap, ...] = (),
) -> tuple[BlockSite | BlockMap, ...]:
    """Blocks with a stream of tokens for the image and one for the text, which attend to both."""
    raw, modulated = _inputs(norm, 'attn.to_q')
    return (
        raw,
        *second_input,
        modulated,
        *_projections('attn'),
        *_joint_maps('attn'),
        BlockSite('attn-out', 'attn', 'attn.to_q.in_features'),
        *second_attention,
        *_feed_forward(*feed_forward, 'attn.to_q.in_features'),
        BlockSite('out', '', 'attn.to_q.in_features', TEXT_AND_IMAGE),
    )


def _cross_block(feed_forward: BlockSite, self_map: bool = True) -> tuple[BlockSite | BlockMap, ...]:
    """Blocks with self-attention of the image and cross-attention to the text, if any."""
    return (
        *_inputs('norm1', 'attn1.to_q'),
        *_projections('attn1', 'self-'),
        *([_map('self-map', 'attn1', 'all')] if self_map else []),
        BlockSite('cross-q', 'attn2.to_q', 'attn2.to_q.out_features', needs='attn2'),
        _map('cross-map', 'attn2', 'all', needs='attn2'),
        feed_forward,
        BlockSite('out', '', 'attn1.to_q.in_features'),
    )


def _single_block(attention: str, norm: str, feed_forward: tuple[str, str]) -> tuple[BlockSite | BlockMap, ...]:
    """Blocks of one stream of tokens with a feed-forward layer behind the attention."""
    return (
        *_inputs(norm, f'{attention}.to_q'),
        *_projections(attention),
        *_single_maps(attention),
        BlockSite('attn-out', attention, f'{attention}.to_q.in_features'),
        *_feed_forward(*feed_forward, f'{attention}.to_q.in_features'),
        BlockSite('out', '', f'{attention}.to_q.in_features'),
    )


GELU_BLOCK = _cross_block(BlockSite('ffn-inner', 'ff.net.2', 'ff.net.2.in_features', INPUT))
SANA_BLOCK = _cross_block(  # self-attention is linear: no probabilities
    BlockSite('ffn-inner', 'ff.conv_point', 'ff.conv_point.in_channels', SPATIAL_INPUT), self_map=False
)

# Unlike GDF, whose '-out' of double blocks is '-norm-out' a second time, ours is the block's output.
FLUX_DOUBLE_BLOCK = _double_block(('ff', 'net.2'))
FLUX_SINGLE_BLOCK = (
    *_inputs('norm', 'attn.to_q'),
    *_projections('attn'),
    *_single_maps('attn', output=''),
    BlockSite('attn-out', 'attn', 'attn.to_q.out_features'),
    BlockSite('out', '', 'attn.to_q.in_features', TEXT_AND_IMAGE),
)

FLUX2_FUSED = 'attn.to_qkv_mlp_proj'  # queries, keys, values and the feed-forward layer's input, in one tensor
FLUX2_SINGLE_BLOCK = (
    *_inputs('norm', FLUX2_FUSED),
    *(BlockSite(x, FLUX2_FUSED, 'attn.inner_dim', {'part': part}) for part, x in enumerate('qkv')),
    *_single_maps('attn', values=FLUX2_FUSED, values_part=2, width='attn.inner_dim', output='attn.to_out'),
    BlockSite('attn-out', 'attn.to_out', 'attn.inner_dim', INPUT | {'part': 0}),
    BlockSite('out', '', f'{FLUX2_FUSED}.in_features'),
)

# Some blocks of SD3.5-medium have a second attention, of the image to itself. Its modulated input is the sixth output
# of the first norm, where it can be modulated again without the first attention.
SD3_BLOCK = _double_block(
    ('ff', 'net.2'),
    second_input=(
        BlockSite('attn2-mod', 'norm1', 'attn.to_q.in_features', {'item': 5, 'norm': 'norm1'}, needs='attn2'),
    ),
    second_attention=(
        *_projections('attn2', 'attn2-', needs='attn2'),
        _map('attn2-self-map', 'attn2', 'all', needs='attn2'),
        BlockSite('attn2-out', 'attn2', 'attn.to_q.in_features', needs='attn2'),
    ),
)

LUMINA2_BLOCK = _single_block('attn', 'norm1', ('feed_forward', 'linear_2'))
ZIMAGE_BLOCK = _single_block('attention', 'attention_norm1', ('feed_forward', 'w2'))


def _image_only(block: tuple[BlockSite | BlockMap, ...]) -> tuple[BlockSite | BlockMap, ...]:
    """The sites of a block that sees no text."""
    return tuple(site for site in block if site.name != 'cross-map')


def _two(network: nn.Module) -> int:
    """Pipelines pack 2 x 2 cells of the latent into a token; the config of the network says nothing of it."""
    return 2


def _zimage_patch_size(network: nn.Module) -> int:
    return network.config.all_patch_size[0]


def _zimage_head(network: nn.Module) -> str:
    return f'all_final_layer.{network.config.all_patch_size[0]}-{network.config.all_f_patch_size[0]}.linear'


def _call_zimage(network: nn.Module, x_t: Tensor, timestep: Tensor | float, **kwargs: Any) -> Any:
    """Call a network that takes a list of videos (C,F,h,w), here of one frame each."""
    return network(
        x=list(x_t.unsqueeze(2)),
        t=one_timestep_each(x_t, timestep),
        patch_size=network.config.all_patch_size[0],
        f_patch_size=network.config.all_f_patch_size[0],
        return_dict=False,
        **kwargs,
    )


def _call_auraflow(network: nn.Module, x_t: Tensor, timestep: Tensor | float, **kwargs: Any) -> Any:
    """Call a network that computes in the dtype of its first parameter, also where its weights are buffers."""
    call = partial(network, hidden_states=x_t, timestep=one_timestep_each(x_t, timestep), return_dict=False, **kwargs)
    if (tokens := network._buffers.get('register_tokens')) is None:
        return call()
    del network.register_tokens
    network.register_parameter('register_tokens', nn.Parameter(tokens, requires_grad=False))
    try:
        return call()
    finally:
        del network.register_tokens
        network.register_buffer('register_tokens', tokens, persistent=False)


def _call_hunyuan(network: nn.Module, x_t: Tensor, timestep: Tensor | float, **kwargs: Any) -> Any:
    """Call a network whose embeddings get the dtype of the timestep."""
    timesteps = one_timestep_each(x_t, timestep).to(x_t.dtype)
    return network(hidden_states=x_t, timestep=timesteps, return_dict=False, **kwargs)


TRANSFORMERS = (
    transformer_kind(PixArtTransformer2DModel, (Stack('transformer_blocks', GELU_BLOCK),)),
    # diffusers cuts its output into a square of patches, whatever their number; ours is the last projection's
    transformer_kind(DiTTransformer2DModel, (Stack('transformer_blocks', GELU_BLOCK),), Head('proj_out_2')),
    transformer_kind(SD3Transformer2DModel, (Stack('transformer_blocks', SD3_BLOCK),)),
    transformer_kind(
        FluxTransformer2DModel,
        (
            Stack('transformer_blocks', FLUX_DOUBLE_BLOCK),
            Stack('single_transformer_blocks', FLUX_SINGLE_BLOCK, 'text-image'),
        ),
        patch_size=_two,
        packed=True,
    ),
    transformer_kind(
        Flux2Transformer2DModel,
        (
            Stack('transformer_blocks', _double_block(('ff', 'linear_out'))),
            Stack('single_transformer_blocks', FLUX2_SINGLE_BLOCK, 'text-image'),
        ),
        patch_size=_two,
        packed=True,
    ),
    transformer_kind(
        QwenImageTransformer2DModel,
        (Stack('transformer_blocks', _double_block(('img_mlp', 'net.2'), 'img_norm1')),),
        patch_size=_two,
        packed=True,
    ),
    transformer_kind(SanaTransformer2DModel, (Stack('transformer_blocks', SANA_BLOCK),), vae_scale_factor=32),
    transformer_kind(HunyuanDiT2DModel, (Stack('blocks', GELU_BLOCK),), call=_call_hunyuan),
    transformer_kind(
        AuraFlowTransformer2DModel,
        (
            Stack('joint_transformer_blocks', _double_block(('ff', 'out_projection'))),
            Stack('single_transformer_blocks', _single_block('attn', 'norm1', ('ff', 'out_projection')), 'text-image'),
        ),
        call=_call_auraflow,
    ),
    transformer_kind(
        Lumina2Transformer2DModel,
        (
            Stack('noise_refiner', _image_only(LUMINA2_BLOCK), prefix='refiner-'),
            Stack('layers', LUMINA2_BLOCK, 'text-image-padding'),
        ),
        Head('norm_out.linear_2', 'text-image-padding'),
        text_mask='encoder_attention_mask',
    ),
    transformer_kind(
        ZImageTransformer2DModel,
        (
            Stack('noise_refiner', _image_only(ZIMAGE_BLOCK), 'image-text', prefix='refiner-'),
            Stack('layers', ZIMAGE_BLOCK, 'image-text'),
        ),
        Head(_zimage_head, 'image-text'),
        patch_size=_zimage_patch_size,
        call=_call_zimage,
    ),
)
