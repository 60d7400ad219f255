"""Maps of concepts (ConceptAttention), held against a dense computation without hooks."""

import pytest
import torch
from tiny_transformers import inputs, transformer

from diffseg.diffusion.concepts import ConceptRecorder

GRID = 4, 6
BLOCKS = {'flux': (0, 1), 'sd3': (0, 2), 'sd35-medium': (1, 2)}  # the last of SD3 has no feed-forward layer for text
kinds = pytest.mark.parametrize('kind', BLOCKS)


def setting(kind, batch=2, concepts=4):
    """A network, its arguments, and embeddings of concepts."""
    network = transformer(kind)
    return network, inputs(kind, batch), torch.randn(concepts, network.context_embedder.in_features)


def read(network, kwargs, embeddings, blocks=(0, 1), **options):
    return ConceptRecorder(network, embeddings, blocks, **options)(**kwargs)['concepts']


# ---- the same without hooks


def projected(attention, x, names, norms, rotary):
    """Queries, keys and values (B, heads, n, d)."""
    q, k, v = (getattr(attention, name)(x).unflatten(2, (attention.heads, -1)).transpose(1, 2) for name in names)
    q, k = (norm(y) if norm else y for norm, y in zip((getattr(attention, n) for n in norms), (q, k), strict=True))
    return turned(q, rotary), turned(k, rotary), v


def turned(x, rotary):
    """Each pair of channels as a complex number that is turned by the angle of its token."""
    if not rotary:
        return x
    turn = torch.complex(*(side[:, ::2] for side in rotary))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous()) * turn).flatten(3)


def attended(q, k, v):
    return ((q @ k.transpose(2, 3)) / q.shape[3] ** 0.5).softmax(3) @ v


TEXT = ('add_q_proj', 'add_k_proj', 'add_v_proj'), ('norm_added_q', 'norm_added_k')
IMAGE = ('to_q', 'to_k', 'to_v'), ('norm_q', 'norm_k')


def block_maps(block, image, text, concepts, temb, rotary):
    """Maps in both spaces (B, K, N)."""
    n = image.shape[1]

    def text_stream(x):
        if getattr(block, 'context_pre_only', False):
            modulated = block.norm1_context(x, temb)
        else:
            modulated = block.norm1_context(x, emb=temb)[0]
        return projected(block.attn, modulated, *TEXT, rotary and tuple(side[:-n] for side in rotary[x.shape[1]]))

    of_text, of_concepts = text_stream(text), text_stream(concepts)
    places = rotary and tuple(side[-n:] for side in rotary[text.shape[1]])
    of_image = projected(block.attn, block.norm1(image, emb=temb)[0], *IMAGE, places)
    image_output = attended(of_image[0], *(torch.cat(pair, 2) for pair in zip(of_text[1:], of_image[1:], strict=True)))
    output = attended(of_concepts[0], *(torch.cat(pair, 2) for pair in zip(of_concepts[1:], of_image[1:], strict=True)))
    products = torch.einsum('bhkd,bhnd->bhkn', of_concepts[1], of_image[0]) / output.shape[3] ** 0.5
    return {
        'output': torch.einsum('bhkd,bhnd->bkn', output, image_output).softmax(1),
        'attention': products.softmax(2).mean(1),
    }


def by_hand(network, kwargs, embeddings, blocks, space):
    """Block after block; in a second call of it, the concepts are the text."""
    flux = 'img_ids' in kwargs
    time = torch.as_tensor(kwargs['timestep']).expand(len(kwargs['x_t']))
    times = [1000 * time, 1000 * kwargs['guidance']] if flux else [time]
    temb = network.time_text_embed(*times, kwargs['pooled_projections'])
    image = (network.x_embedder if flux else network.pos_embed)(kwargs['x_t'])
    text = network.context_embedder(kwargs['encoder_hidden_states'])
    concepts = network.context_embedder(embeddings).expand(len(image), -1, -1)
    rotary = flux and {
        tokens: network.pos_embed(torch.cat([torch.zeros(tokens, 3), kwargs['img_ids']]))
        for tokens in (text.shape[1], len(embeddings))
    }
    maps = []
    for i, block in enumerate(network.transformer_blocks[: max(blocks) + 1]):
        if i in blocks:
            maps.append(block_maps(block, image, text, concepts, temb, rotary)[space])
        places = [{'image_rotary_emb': rotary[x.shape[1]]} if flux else {} for x in (text, concepts)]
        concepts, _ = block(hidden_states=image, encoder_hidden_states=concepts, temb=temb, **places[1])
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, **places[0])
    return (sum(maps) / len(maps)).unflatten(2, GRID)


@kinds
@pytest.mark.parametrize('space', ['output', 'attention'])
@torch.no_grad()
def test_maps_are_those_of_a_dense_computation(kind, space):
    network, kwargs, embeddings = setting(kind)
    expected = by_hand(network, kwargs, embeddings, BLOCKS[kind], space)
    maps = read(network, kwargs, embeddings, BLOCKS[kind], space=space)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, *GRID))
    assert maps.std(dim=(2, 3)).min() > 1e-4  # they show something


@kinds
@torch.no_grad()
def test_the_network_computes_what_it_computes_without_concepts(kind):
    network, kwargs, embeddings = setting(kind)
    plain = {name: x for name, x in kwargs.items() if name != 'grid'}
    plain['hidden_states'] = plain.pop('x_t')
    plain['timestep'] = torch.as_tensor(plain['timestep']).expand(2)
    outputs = []
    first, second = network.transformer_blocks[:2]
    handles = [
        first.register_forward_hook(lambda module, args, output: outputs.append(output)),
        second.attn.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    before = network(**plain, return_dict=False)[0]
    expected = [x for output in outputs for x in output]
    outputs.clear()
    read(network, kwargs, embeddings, [1])
    assert len(outputs) == 2 and all(map(torch.equal, (x for output in outputs for x in output), expected))
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.equal(network(**plain, return_dict=False)[0], before)


@kinds
def test_nothing_runs_behind_the_last_block(kind):
    network, kwargs, embeddings = setting(kind)
    expected = read(network, kwargs, embeddings, [0])
    for block in network.transformer_blocks[1:]:
        block.register_forward_pre_hook(lambda *_: pytest.fail('a block behind the last one ran'))
    network.transformer_blocks[0].ff.register_forward_pre_hook(lambda *_: pytest.fail('feed-forward layer ran'))
    assert read(network, kwargs, embeddings, [0]).equal(expected)


@kinds
@pytest.mark.parametrize('interaction', [True, False])
def test_the_order_of_concepts_is_of_no_matter(kind, interaction):
    network, kwargs, embeddings = setting(kind)
    order = torch.tensor([2, 0, 3, 1])
    maps = [read(network, kwargs, x, interaction=interaction) for x in (embeddings, embeddings[order])]
    torch.testing.assert_close(maps[1], maps[0][:, order])


@kinds
def test_images_of_a_batch_do_not_depend_on_each_other(kind):
    network, kwargs, embeddings = setting(kind)
    maps = read(network, kwargs, embeddings)
    shared = ('img_ids', 'txt_ids', 'grid')
    for i in range(2):
        one = {
            name: x if name in shared or not isinstance(x, torch.Tensor) else x[i : i + 1] for name, x in kwargs.items()
        }
        torch.testing.assert_close(read(network, one, embeddings), maps[i : i + 1])
    assert not torch.allclose(maps[0], maps[1])


@kinds
@pytest.mark.parametrize('interaction', [True, False])
def test_another_concept_changes_scores_only_where_concepts_attend_to_each_other(kind, interaction):
    network, kwargs, embeddings = setting(kind)
    few, more = (read(network, kwargs, embeddings[:n], [1], interaction=interaction).log() for n in (2, 4))
    difference = (few[:, 0] - few[:, 1]) - (more[:, 0] - more[:, 1])  # of scores, without the softmax's denominator
    assert (difference.abs().max() < 1e-4) != interaction


@kinds
def test_the_prompt_reaches_concepts_through_the_image_alone(kind):
    network, kwargs, embeddings = setting(kind)
    other = {**kwargs, 'encoder_hidden_states': torch.randn_like(kwargs['encoder_hidden_states'])}
    keys = {'space': 'attention', 'blocks': [0]}  # keys and queries of the first block are made before any attention
    assert read(network, kwargs, embeddings, **keys).equal(read(network, other, embeddings, **keys))
    assert not read(network, kwargs, embeddings, [1]).allclose(read(network, other, embeddings, [1]))


@pytest.mark.parametrize(
    'kind, options, error, message',
    [
        ('pixart', {}, TypeError, 'FluxTransformer2DModel and SD3Transformer2DModel'),
        ('flux', {'concepts': torch.zeros(2, 3)}, ValueError, r'shape \(2, 3\); it is \(K, 12\)'),
        ('flux', {'blocks': [1, 2]}, ValueError, r'blocks is \[1, 2\]; these are different numbers from 0 to 1'),
        ('flux', {'blocks': [1, 1]}, ValueError, 'different numbers'),
        ('flux', {'blocks': []}, ValueError, 'different numbers'),
        ('flux', {'space': 'value'}, ValueError, "space is 'value'; it is 'output' or 'attention'"),
    ],
)
def test_what_cannot_be_read_is_said(kind, options, error, message):
    with pytest.raises(error, match=message):
        ConceptRecorder(transformer(kind), **{'concepts': torch.zeros(2, 12), 'blocks': [0], **options})


def test_packed_latents_need_a_grid():
    network, kwargs, embeddings = setting('flux')
    with pytest.raises(ValueError, match='grid is missing'):
        read(network, {**kwargs, 'grid': None}, embeddings)


def test_fused_projections_are_refused():
    network, kwargs, embeddings = setting('flux')
    network.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match='did not execute k, q, v'):
        read(network, kwargs, embeddings)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
