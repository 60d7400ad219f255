"""The activations of diffusion transformers, computed with the layers' weights but without the blocks' own code.

Text and image are kept apart here, in every network and row, and padding does not exist.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Named = Iterator[tuple[str, Tensor]]


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def modulate(x: Tensor, scale: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    return x * (1 + scale) + shift


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotate pairs of channels of `x` (B,N,heads,d) by `angles`, complex numbers (N,d/2) or (B,N,d/2)."""
    if angles is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles.unsqueeze(-2)).flatten(-2).to(x.dtype)


def complex_of(cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    return torch.complex(cos_sin[0][:, ::2], cos_sin[1][:, ::2])


def by_head(x: Tensor, attention: nn.Module, norm: str, angles: Tensor | None = None) -> Tensor:
    """Normalised, rotated queries or keys (B,N,heads,d)."""
    normed = getattr(attention, norm, None) or nn.Identity()
    width = attention.to_q.out_features // attention.heads if hasattr(attention, 'to_q') else attention.head_dim
    over_all_heads = getattr(normed, 'dim', (0,))[0] > width
    x = normed(x).unflatten(-1, (-1, width)) if over_all_heads else normed(x.unflatten(-1, (-1, width)))
    return rotate(x, angles)


def attend(q: Tensor, k: Tensor, v: Tensor, exist: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities (B,Nq,Nk), averaged over heads, and weighted values (B,Nq,heads*d)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v.unflatten(-1, (-1, q.shape[3]))))
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k) / q.shape[3] ** 0.5
    if exist is not None:
        scores = scores.masked_fill(~exist.bool()[:, None, None], -torch.inf)
    p = scores.softmax(-1)
    return p.mean(1), torch.einsum('bhqk,bkhd->bqhd', p, v).flatten(2)


# Blocks with self-attention of the image and cross-attention to the text ---------------------------------------------


def cross_block(
    block: nn.Module,
    x: Tensor,
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    gates: tuple[Tensor | float, Tensor | float],
    text: Tensor | None,
    exist: Tensor | None = None,
    cross_norm: Callable[[Tensor], Tensor] = lambda x: x,
    angles: Tensor | None = None,
) -> Named:
    """`first` and `second` normalise and modulate the inputs of self-attention and feed-forward layer."""
    yield 'in', x
    yield 'mod', (m := first(x))
    attention = block.attn1
    q, k, v = attention.to_q(m), attention.to_k(m), attention.to_v(m)
    yield from (('self-q', q), ('self-k', k), ('self-v', v))
    p, out = attend(by_head(q, attention, 'norm_q', angles), by_head(k, attention, 'norm_k', angles), v)
    yield 'self-map', p
    x = x + gates[0] * attention.to_out[0](out)
    if text is not None:
        attention = block.attn2
        q, k, v = attention.to_q(cross_norm(x)), attention.to_k(text), attention.to_v(text)
        yield 'cross-q', q
        p, out = attend(by_head(q, attention, 'norm_q', angles), by_head(k, attention, 'norm_k'), v, exist)
        yield 'cross-map', p
        x = x + attention.to_out[0](out)
    inner = F.gelu(block.ff.net[0].proj(second(x)), approximate='tanh')
    yield 'ffn-inner', inner
    yield 'out', x + gates[1] * block.ff.net[2](inner)


def cross_blocks(blocks: nn.ModuleList, x: Tensor, run: Callable[[int, nn.Module, Tensor], Named]) -> Named:
    for i, block in enumerate(blocks):
        for name, value in run(i, block, x):
            yield f'vit-block{i}-{name}', value
        x = value
    yield 'last', x


def pixart(net: nn.Module, x_t: Tensor, timestep: int, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor):
    x, t = net.pos_embed(x_t), torch.full((len(x_t),), timestep)
    six, _ = net.adaln_single(t, None, batch_size=len(x_t), hidden_dtype=x.dtype)
    text = net.caption_projection(encoder_hidden_states)

    def run(i: int, block: nn.Module, x: Tensor) -> Named:
        a, b, g, c, d, h = (block.scale_shift_table + six.unflatten(1, (6, -1))).split(1, dim=1)
        first, second = (lambda x: modulate(layer_norm(x), b, a)), (lambda x: modulate(layer_norm(x), d, c))
        return cross_block(block, x, first, second, (g, h), text, encoder_attention_mask)

    return cross_blocks(net.transformer_blocks, x, run)


def dit(net: nn.Module, x_t: Tensor, timestep: int, class_labels: Tensor) -> Named:
    x, t = net.pos_embed(x_t), torch.full((len(x_t),), timestep)

    def run(i: int, block: nn.Module, x: Tensor) -> Named:
        conditions = F.silu(block.norm1.emb(t, class_labels, hidden_dtype=x.dtype))
        a, b, g, c, d, h = block.norm1.linear(conditions)[:, None].chunk(6, dim=2)
        first, second = (lambda x: modulate(layer_norm(x), b, a)), (lambda x: modulate(layer_norm(x, 1e-5), d, c))
        return cross_block(block, x, first, second, (g, h), None)

    return cross_blocks(net.transformer_blocks, x, run)


def sana(net: nn.Module, x_t: Tensor, timestep: float, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor):
    x, t = net.patch_embed(x_t), torch.full((len(x_t),), timestep)
    six, _ = net.time_embed(t, batch_size=len(x_t), hidden_dtype=x.dtype)
    text = net.caption_norm(net.caption_projection(encoder_hidden_states))

    def run(i: int, block: nn.Module, x: Tensor) -> Named:
        a, b, g, c, d, h = (block.scale_shift_table + six.unflatten(1, (6, -1))).split(1, dim=1)
        yield 'in', x
        yield 'mod', (m := modulate(layer_norm(x), b, a))
        attention = block.attn1
        q, k, v = attention.to_q(m), attention.to_k(m), attention.to_v(m)
        yield from (('self-q', q), ('self-k', k), ('self-v', v))
        q, k = (by_head(y, attention, n).relu() for y, n in ((q, 'norm_q'), (k, 'norm_k')))
        weights = torch.einsum('bqhd,bkhd->bhqk', q, k)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-15)
        out = torch.einsum('bhqk,bkhd->bqhd', weights, v.unflatten(-1, (attention.heads, -1))).flatten(2)
        x = x + g * attention.to_out[0](out)
        attention = block.attn2
        q, k, v = attention.to_q(x), attention.to_k(text), attention.to_v(text)
        yield 'cross-q', q
        p, out = attend(by_head(q, attention, 'norm_q'), by_head(k, attention, 'norm_k'), v, encoder_attention_mask)
        yield 'cross-map', p
        x = x + attention.to_out[0](out)
        y = modulate(layer_norm(x), d, c).transpose(1, 2).unflatten(2, x_t.shape[-2:])
        inner, gate = block.ff.conv_depth(F.silu(block.ff.conv_inverted(y))).chunk(2, dim=1)
        inner = inner * F.silu(gate)
        yield 'ffn-inner', inner
        yield 'out', x + h * block.ff.conv_point(inner).flatten(2).transpose(1, 2)

    return cross_blocks(net.transformer_blocks, x, run)


def hunyuan_dit(
    net: nn.Module,
    x_t: Tensor,
    timestep: int,
    encoder_hidden_states: Tensor,
    text_embedding_mask: Tensor,
    encoder_hidden_states_t5: Tensor,
    text_embedding_mask_t5: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> Named:
    x, t = net.pos_embed(x_t), torch.full((len(x_t),), float(timestep))
    temb = net.time_extra_emb(t, encoder_hidden_states_t5, None, None, hidden_dtype=x.dtype)
    text = torch.cat([encoder_hidden_states, net.text_embedder(encoder_hidden_states_t5)], dim=1)
    exist = torch.cat([text_embedding_mask, text_embedding_mask_t5], dim=1).bool()
    text = torch.where(exist[..., None], text, net.text_embedding_padding)
    outputs: list[Tensor] = []

    def run(i: int, block: nn.Module, x: Tensor) -> Named:
        if i > 0:
            outputs.append(x)
        if i > len(net.blocks) // 2:
            x = block.skip_linear(block.skip_norm(torch.cat([x, outputs[len(net.blocks) - 1 - i]], dim=-1)))
        norm = block.norm1

        def first(x: Tensor) -> Tensor:
            return layer_norm(x) * norm.norm.weight + norm.norm.bias + norm.linear(F.silu(temb))[:, None]

        angles = complex_of(image_rotary_emb)
        return cross_block(block, x, first, block.norm3, (1, 1), text, cross_norm=block.norm2, angles=angles)

    return cross_blocks(net.blocks, x, run)


# Joint attention to text and image -----------------------------------------------------------------------------------


class Gelu(nn.Module):
    """A feed-forward layer in two parts: what its last projection is given, and the last projection."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, layer.net[2]

    def inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer.net[0].proj(x), approximate='tanh')


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], last: nn.Module) -> None:
        super().__init__()
        self.gate, self.value, self.last = gate, value, last

    def inner(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.value(x)


def flux2_gated(layer: nn.Module) -> Gated:
    gate, value = (lambda x, part=part: layer.linear_in(x).chunk(2, dim=-1)[part] for part in (0, 1))
    return Gated(gate, value, layer.linear_out)


def auraflow_gated(layer: nn.Module) -> Gated:
    return Gated(layer.linear_1, layer.linear_2, layer.out_projection)


def double_block(
    block: nn.Module,
    x: Tensor,
    text: Tensor,
    image_modulation: tuple[Tensor, ...],
    text_modulation: tuple[Tensor, ...],
    feed_forward: nn.Module,
    text_feed_forward: nn.Module | None,
    angles: tuple[Tensor | None, Tensor | None] = (None, None),
    exist: Tensor | None = None,
    eps: float = 1e-6,
    skip_attention: bool = False,
    second_modulation: tuple[Tensor, ...] | None = None,
) -> Named:
    """Modulations are shift, scale and gate of the attention and the same of the feed-forward layer."""
    shift, scale, gate, shift2, scale2, gate2 = image_modulation
    normed = layer_norm(x, eps)
    yield 'in', x
    yield 'mod', (m := modulate(normed, scale, shift))
    n = modulate(layer_norm(text, eps), text_modulation[1], text_modulation[0])
    attention, length = block.attn, text.shape[1]
    q, k, v = attention.to_q(m), attention.to_k(m), attention.to_v(m)
    yield from (('q', q), ('k', k), ('v', v))
    q = by_head(q, attention, 'norm_q', angles[1])
    k = by_head(k, attention, 'norm_k', angles[1])
    text_q = by_head(attention.add_q_proj(n), attention, 'norm_added_q', angles[0])
    text_k = by_head(attention.add_k_proj(n), attention, 'norm_added_k', angles[0])
    values = torch.cat([attention.add_v_proj(n), v], dim=1)
    p, out = attend(torch.cat([text_q, q], dim=1), torch.cat([text_k, k], dim=1), values, exist)
    yield 'cross-map', p[:, length:, :length]
    yield 'self-map', p[:, length:, length:]
    yield 'attn-out', (y := attention.to_out[0](out[:, length:]))
    attended = x + gate * y
    if second_modulation is not None:
        yield 'attn2-mod', (m := modulate(normed, second_modulation[1], second_modulation[0]))
        attention = block.attn2
        q, k, v = attention.to_q(m), attention.to_k(m), attention.to_v(m)
        yield from (('attn2-q', q), ('attn2-k', k), ('attn2-v', v))
        p, weighted = attend(by_head(q, attention, 'norm_q'), by_head(k, attention, 'norm_k'), v)
        yield 'attn2-self-map', p
        yield 'attn2-out', (y := attention.to_out[0](weighted))
        attended = attended + second_modulation[2] * y
    yield 'norm-out', (m := modulate(layer_norm(attended, eps), scale2, shift2))
    yield 'ffn-inner', (inner := feed_forward.inner(m))
    yield 'out', (x if skip_attention else attended) + gate2 * feed_forward.last(inner)
    if text_feed_forward is not None:
        _, _, gate, shift2, scale2, gate2 = text_modulation
        attended = text + gate * block.attn.to_add_out(out[:, :length])
        m = modulate(layer_norm(attended, eps), scale2, shift2)
        y = gate2 * text_feed_forward.last(text_feed_forward.inner(m))
        yield 'text', (text if skip_attention else attended) + y


def joint_blocks(
    blocks: nn.ModuleList, x: Tensor, text: Tensor, run: Callable[[nn.Module, Tensor, Tensor], Named], first: int = 0
) -> Named:
    for i, block in enumerate(blocks):
        values = dict(run(block, x, text))
        x, text = values['out'], values.pop('text', None)
        yield from ((f'vit-block{first + i}-{name}', value) for name, value in values.items())
    yield 'last', x
    yield 'last text', text


def sd3(net: nn.Module, x_t: Tensor, timestep: float, encoder_hidden_states: Tensor, pooled_projections: Tensor):
    temb = F.silu(net.time_text_embed(torch.full((len(x_t),), timestep), pooled_projections))[:, None]

    def run(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        image = block.norm1.linear(temb).chunk(9 if block.attn2 is not None else 6, dim=2)
        context = block.norm1_context.linear(temb).chunk(2 if block.context_pre_only else 6, dim=2)
        if block.context_pre_only:
            context = context[::-1]  # scale before shift
        layers = Gelu(block.ff), None if block.context_pre_only else Gelu(block.ff_context)
        return double_block(block, x, text, image[:6], context, *layers, second_modulation=image[6:] or None)

    return joint_blocks(net.transformer_blocks, net.pos_embed(x_t), net.context_embedder(encoder_hidden_states), run)


def single_block(
    attention: nn.Module, m: Tensor, length: int, angles: Tensor | None, qkv: tuple[Tensor, Tensor, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Up to the weighted values of all tokens, which are called 'weighted'; `m` is the modulated [text, image]."""
    yield 'mod', m[:, length:]
    yield from zip('qkv', (y[:, length:] for y in qkv), strict=True)
    q, k, v = qkv
    p, weighted = attend(by_head(q, attention, 'norm_q', angles), by_head(k, attention, 'norm_k', angles), v)
    yield 'cross-map', p[:, length:, :length]
    yield 'self-map', p[:, length:, length:]
    yield 'weighted', weighted


def project(attention: nn.Module, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention.to_q(m), attention.to_k(m), attention.to_v(m)


def flux(
    net: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor,
) -> Named:
    temb = F.silu(net.time_text_embed(1000 * timestep, 1000 * guidance, pooled_projections))[:, None]
    angles = complex_of(net.pos_embed(txt_ids)), complex_of(net.pos_embed(img_ids))

    def double(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        modulations = (norm.linear(temb).chunk(6, dim=2) for norm in (block.norm1, block.norm1_context))
        return double_block(block, x, text, *modulations, Gelu(block.ff), Gelu(block.ff_context), angles)

    def single(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        shift, scale, gate = block.norm.linear(temb).chunk(3, dim=2)
        tokens, length = torch.cat([text, x], dim=1), text.shape[1]
        yield 'in', x
        m = modulate(layer_norm(tokens), scale, shift)
        values = dict(single_block(block.attn, m, length, torch.cat(angles), project(block.attn, m)))
        weighted = values.pop('weighted')
        yield from values.items()
        yield 'attn-out', weighted[:, length:]
        inner = F.gelu(block.proj_mlp(m), approximate='tanh')
        tokens = tokens + gate * block.proj_out(torch.cat([weighted, inner], dim=2))
        yield 'out', tokens[:, length:]
        yield 'text', tokens[:, :length]

    x, text = net.x_embedder(x_t), net.context_embedder(encoder_hidden_states)
    first = dict(joint_blocks(net.transformer_blocks, x, text, double))
    x, text = first.pop('last'), first.pop('last text')
    yield from first.items()
    yield from joint_blocks(net.single_transformer_blocks, x, text, single, len(net.transformer_blocks))


def flux2(
    net: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor,
) -> Named:
    temb = F.silu(net.time_guidance_embed(1000 * timestep, 1000 * guidance))[:, None]
    angles = complex_of(net.pos_embed(txt_ids)), complex_of(net.pos_embed(img_ids))

    def double(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        layers = net.double_stream_modulation_img, net.double_stream_modulation_txt
        modulations = (layer.linear(temb).chunk(6, dim=2) for layer in layers)
        return double_block(block, x, text, *modulations, flux2_gated(block.ff), flux2_gated(block.ff_context), angles)

    def single(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        shift, scale, gate = net.single_stream_modulation.linear(temb).chunk(3, dim=2)
        tokens, length = torch.cat([text, x], dim=1), text.shape[1]
        yield 'in', x
        m = modulate(layer_norm(tokens), scale, shift)
        width = x.shape[2]
        *qkv, hidden = block.attn.to_qkv_mlp_proj(m).split([width, width, width, 6 * width], dim=2)
        values = dict(single_block(block.attn, m, length, torch.cat(angles), tuple(qkv)))
        weighted = values.pop('weighted')
        yield from values.items()
        yield 'attn-out', weighted[:, length:]
        inner = F.silu(hidden[..., : 3 * width]) * hidden[..., 3 * width :]
        tokens = tokens + gate * block.attn.to_out(torch.cat([weighted, inner], dim=2))
        yield 'out', tokens[:, length:]
        yield 'text', tokens[:, :length]

    x, text = net.x_embedder(x_t), net.context_embedder(encoder_hidden_states)
    first = dict(joint_blocks(net.transformer_blocks, x, text, double))
    x, text = first.pop('last'), first.pop('last text')
    yield from first.items()
    yield from joint_blocks(net.single_transformer_blocks, x, text, single, len(net.transformer_blocks))


def qwen_image(
    net: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
    img_shapes: list,
) -> Named:
    x, text = net.img_in(x_t), net.txt_in(net.txt_norm(encoder_hidden_states))
    temb = net.time_text_embed(timestep, x)[:, None]
    image_angles, text_angles = net.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=x.device)
    exist = torch.cat([encoder_hidden_states_mask.bool(), torch.ones(x.shape[:2], dtype=torch.bool)], dim=1)

    def run(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        modulations = (layer(temb).chunk(6, dim=2) for layer in (block.img_mod, block.txt_mod))
        layers = Gelu(block.img_mlp), Gelu(block.txt_mlp)
        return double_block(block, x, text, *modulations, *layers, (text_angles, image_angles), exist)

    return joint_blocks(net.transformer_blocks, x, text, run)


def auraflow(net: nn.Module, x_t: Tensor, timestep: float, encoder_hidden_states: Tensor) -> Named:
    t = torch.full((len(x_t),), timestep)
    temb = F.silu(net.time_step_proj(net.time_step_embed(t)))[:, None]
    registers = net.register_tokens.expand(len(x_t), -1, -1)
    text = torch.cat([registers, net.context_embedder(encoder_hidden_states)], dim=1)

    def double(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        modulations = (norm.linear(temb).chunk(6, dim=2) for norm in (block.norm1, block.norm1_context))
        layers = auraflow_gated(block.ff), auraflow_gated(block.ff_context)
        return double_block(block, x, text, *modulations, *layers, eps=1e-5, skip_attention=True)

    def single(block: nn.Module, x: Tensor, text: Tensor) -> Named:
        shift, scale, gate, shift2, scale2, gate2 = block.norm1.linear(temb).chunk(6, dim=2)
        tokens, length = torch.cat([text, x], dim=1), text.shape[1]
        yield 'in', x
        m = modulate(layer_norm(tokens, 1e-5), scale, shift)
        values = dict(single_block(block.attn, m, length, None, project(block.attn, m)))
        y = block.attn.to_out[0](values.pop('weighted'))
        yield from values.items()
        yield 'attn-out', y[:, length:]
        m = modulate(layer_norm(tokens + gate * y, 1e-5), scale2, shift2)
        feed_forward = auraflow_gated(block.ff)
        yield 'norm-out', m[:, length:]
        yield 'ffn-inner', (inner := feed_forward.inner(m))[:, length:]
        tokens = tokens + gate2 * feed_forward.last(inner)
        yield 'out', tokens[:, length:]
        yield 'text', tokens[:, :length]

    first = dict(joint_blocks(net.joint_transformer_blocks, net.pos_embed(x_t), text, double))
    x, text = first.pop('last'), first.pop('last text')
    yield from first.items()
    yield from joint_blocks(net.single_transformer_blocks, x, text, single, len(net.joint_transformer_blocks))


# One sequence of text and image, another length in each row ----------------------------------------------------------


def sandwich_block(
    attention: nn.Module,
    norms: tuple[Callable[[Tensor], Tensor], ...],
    feed_forward: Gated,
    modulation: tuple[Tensor | float, ...],
    tokens: Tensor,
    angles: Tensor,
) -> Named:
    """Norms before and behind attention and feed-forward layer; all tokens."""
    scale, gate, scale2, gate2 = modulation
    yield 'in', tokens
    yield 'mod', (m := norms[0](tokens) * (1 + scale))
    q, k, v = project(attention, m)
    yield from (('q', q), ('k', k), ('v', v))
    p, weighted = attend(by_head(q, attention, 'norm_q', angles), by_head(k, attention, 'norm_k', angles), v)
    yield 'map', p
    yield 'attn-out', (y := attention.to_out[0](weighted))
    tokens = tokens + gate * norms[1](y)
    yield 'norm-out', (m := norms[2](tokens) * (1 + scale2))
    yield 'ffn-inner', (inner := feed_forward.inner(m))
    yield 'out', tokens + gate2 * norms[3](feed_forward.last(inner))


def sandwich_blocks(
    prefix: str, blocks: nn.ModuleList, tokens: Tensor, run: Callable, image: slice, text: slice | None
) -> Named:
    """`image` and `text` are where their tokens are."""
    for i, block in enumerate(blocks):
        values = dict(run(block, tokens))
        p = values.pop('map')[:, image]
        tokens = values['out']
        if text is not None:
            yield f'{prefix}vit-block{i}-cross-map', p[:, :, text]
        yield f'{prefix}vit-block{i}-self-map', p[:, :, image]
        yield from ((f'{prefix}vit-block{i}-{name}', value[:, image]) for name, value in values.items())
    yield 'last', tokens


def by_row(rows: list[dict[str, Tensor]]) -> Named:
    """Join rows; where one has fewer keys than another, the probabilities of what is missing are zero."""
    for name in rows[0]:
        widest = max(row[name].shape[2] for row in rows)
        yield name, torch.cat([F.pad(row[name], (0, widest - row[name].shape[2])) for row in rows])


def lumina2(
    net: nn.Module, x_t: Tensor, timestep: float, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
) -> Named:
    def run_with(angles: Tensor, temb: Tensor | None) -> Callable[[nn.Module, Tensor], Named]:
        def run(block: nn.Module, tokens: Tensor) -> Named:
            norms = block.norm1, block.norm2, block.ffn_norm1, block.ffn_norm2
            modulation = 0.0, 1.0, 0.0, 1.0
            if temb is not None:
                scale, gate, scale2, gate2 = block.norm1.linear(F.silu(temb))[:, None].chunk(4, dim=2)
                modulation = scale, gate.tanh(), scale2, gate2.tanh()
                norms = block.norm1.norm, *norms[1:]
            layer = block.feed_forward
            gated = Gated(layer.linear_1, layer.linear_3, layer.linear_2)
            return sandwich_block(block.attn, norms, gated, modulation, tokens, angles)

        return run

    rows = []
    for row, text, mask in zip(x_t, encoder_hidden_states, encoder_attention_mask, strict=True):
        length = int(mask.sum())
        temb, text = net.time_caption_embed(row[None], torch.tensor([timestep]), text[None, :length])
        x, text_angles, image_angles, angles, *_ = net.rope_embedder(row[None], torch.ones(1, length, dtype=torch.long))
        *_, (_, text) = sandwich_blocks('', net.context_refiner, text, run_with(text_angles, None), slice(None), None)
        refiner = run_with(image_angles, temb)
        values = dict(sandwich_blocks('refiner-', net.noise_refiner, net.x_embedder(x), refiner, slice(None), None))
        tokens = torch.cat([text, values.pop('last')], dim=1)
        parts = slice(length, None), slice(length)
        values |= dict(sandwich_blocks('', net.layers, tokens, run_with(angles, temb), *parts))
        values.pop('last')
        rows.append(values)
    return by_row(rows)


def z_image(net: nn.Module, x_t: Tensor, timestep: float, cap_feats: list[Tensor]) -> Named:
    def run_with(angles: Tensor, temb: Tensor | None) -> Callable[[nn.Module, Tensor], Named]:
        def run(block: nn.Module, tokens: Tensor) -> Named:
            norms = block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2
            modulation = 0.0, 1.0, 0.0, 1.0
            if temb is not None:
                scale, gate, scale2, gate2 = block.adaLN_modulation(temb)[:, None].chunk(4, dim=2)
                modulation = scale, gate.tanh(), scale2, gate2.tanh()
            layer = block.feed_forward
            gated = Gated(layer.w1, layer.w3, layer.w2)
            return sandwich_block(block.attention, norms, gated, modulation, tokens, angles)

        return run

    def padded(tokens: Tensor, ids: list, pad: Tensor) -> tuple[Tensor, Tensor]:
        missing = -len(tokens) % 32
        angles = net.rope_embedder(torch.tensor([*ids, *[(0, 0, 0)] * (missing + len(tokens) - len(ids))]))
        return torch.cat([tokens, pad.expand(missing, -1)])[None], angles[None]

    rows = []
    temb = net.t_embedder(torch.tensor([1000 * timestep]))
    height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
    for row, caption in zip(x_t, cap_feats, strict=True):
        length = len(caption) + -len(caption) % 32
        text_ids = [(1 + i, 0, 0) for i in range(length)]  # of the padding, too
        text, text_angles = padded(net.cap_embedder(caption), text_ids, net.cap_pad_token)
        patches = row.unflatten(1, (height, 2)).unflatten(3, (width, 2)).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        image_ids = [(length + 1, i, j) for i in range(height) for j in range(width)]
        x, image_angles = padded(net.all_x_embedder['2-1'](patches), image_ids, net.x_pad_token)
        image = slice(height * width)
        *_, (_, text) = sandwich_blocks('', net.context_refiner, text, run_with(text_angles, None), slice(None), None)
        values = dict(sandwich_blocks('refiner-', net.noise_refiner, x, run_with(image_angles, temb), image, None))
        tokens = torch.cat([values.pop('last'), text], dim=1)
        angles = torch.cat([image_angles, text_angles], dim=1)
        parts = image, slice(x.shape[1], None)
        values |= dict(sandwich_blocks('', net.layers, tokens, run_with(angles, temb), *parts))
        values.pop('last')
        rows.append(values)
    return by_row(rows)


BY_HAND = {
    'pixart': pixart,
    'dit': dit,
    'sd3': sd3,
    'sd35-medium': sd3,
    'flux': flux,
    'flux2': flux2,
    'qwen-image': qwen_image,
    'sana': sana,
    'hunyuan-dit': hunyuan_dit,
    'auraflow': auraflow,
    'lumina2': lumina2,
    'z-image': z_image,
}


def by_hand(kind: str, network: nn.Module, given: dict) -> dict[str, Tensor]:
    """Every activation of the blocks: {name: (B,h*w,C)}, or (B,C,h,w) where the network has it so."""
    given = {name: value for name, value in given.items() if name != 'grid'}
    return {name: value for name, value in BY_HAND[kind](network, **given) if not name.startswith('last')}
