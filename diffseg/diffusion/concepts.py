"""Concepts as tokens beside the prompt's in multimodal transformers: maps of words without training.

ConceptAttention (2502.04320): the embedding of each concept, such as the name of a class, goes through the layers of
the text stream of every block. A concept attends to the image and to the concepts; neither the image nor the prompt
attends to it, so that the network computes what it computes without. Its score in a cell of the image is the inner
product of what attention gives for both; a softmax over concepts makes maps of them.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.nn import functional as F

from diffseg.devices import upload
from diffseg.diffusion.sites import Site, kind_of

NETWORKS = (FluxTransformer2DModel, SD3Transformer2DModel)
SITE = 'concepts'  # the name of what is read

Space = Literal['output', 'attention']


class _Stop(Exception):
    """Ends a forward pass whose remainder nobody needs."""


class ConceptRecorder:
    """Reads maps of concepts from the forward pass of a Flux or an SD3 transformer.

    It is called as an `ActivationRecorder` is. Hooks live for one call only and change nothing; the network is left
    behind the attention of the last of `blocks`. All gradients are off.

    The concepts are modulated as the prompt is, by the embeddings of the time and of the pooled prompt. Unlike the
    released code for Flux, which modulates them with a pooled prompt of zeros: for real images it gives the network
    these zeros too, and a `Conditioning` with such a `pooled` does the same here.

    Args:
        network: The transformer.
        concepts: Embeddings as the network takes those of a prompt's tokens, one for each concept, with shape (K, D).
        blocks: Blocks with a stream for text, counted from 0, over which maps are averaged.
        space: 'output', where the score is the inner product of the outputs of attention, all heads together, before
            their projection (ConceptAttention); or 'attention', where the map is the probability of attention from the
            image to a concept, among concepts, averaged over heads (the baseline of cross-attention).
        interaction: Concepts attend to all concepts, as published, so that the map of one depends on the others by more
            than the softmax; False lets each attend to itself and the image.

    Raises:
        TypeError: Another network.
        ValueError: Embeddings of another width, blocks that the network does not have, or an unknown space.
    """

    def __init__(
        self,
        network: FluxTransformer2DModel | SD3Transformer2DModel,
        concepts: Tensor,
        blocks: Sequence[int],
        space: Space = 'output',
        interaction: bool = True,
    ):
        if not isinstance(network, NETWORKS):
            raise TypeError(
                f'concepts cannot be read in a {type(network).__name__}; the networks that they can be read in are '
                f'{" and ".join(kind.__name__ for kind in NETWORKS)}'
            )
        width, number = network.context_embedder.in_features, len(network.transformer_blocks)
        if concepts.ndim != 2 or concepts.shape[1] != width or not len(concepts):
            raise ValueError(f'concepts have shape {tuple(concepts.shape)}; it is (K, {width}), K 1 or more')
        wrong = [block for block in blocks if block not in range(number)]
        if wrong or not blocks or len(set(blocks)) < len(blocks):
            raise ValueError(f'blocks is {list(blocks)}; these are different numbers from 0 to {number - 1}')
        if space not in get_args(Space):
            raise ValueError(f'space is {space!r}; it is {" or ".join(map(repr, get_args(Space)))}')
        self.network = network
        self.kind = kind_of(network)
        self.concepts = concepts
        self.blocks = sorted(blocks)
        self.space = space
        self.interaction = interaction

    def site(self, vae_scale_factor: int) -> Site:
        """What is read, for a number of image pixels per latent cell."""
        stride = vae_scale_factor * self.kind.patch_size(self.network)
        return Site(SITE, 'transformer_blocks', len(self.concepts), stride, 'tokens')

    @torch.no_grad()
    def __call__(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        grid: tuple[int, int] | None = None,
        draws: int = 1,
        **network_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the network up to the last block.

        Args:
            x_t: Noised latents (B, C, h, w), or packed ones (B, N, C).
            timestep: As the network takes it, one or (B,).
            grid: Height and width of packed latents in tokens.
            draws: Number of draws in the batch, on which maps do not depend.
            network_kwargs: Passed on to the network.

        Returns:
            {'concepts': (B, K, h', w')}: shares of the concepts in every token of the image, which sum to 1; float32.

        Raises:
            ValueError: `grid` is missing.
            RuntimeError: The network did not execute a module that is read.
        """
        if self.kind.packed and grid is None:
            raise ValueError('grid is missing: packed latents do not tell the grid of their tokens')
        if grid is None:
            patch = self.kind.patch_size(self.network)
            grid = x_t.shape[2] // patch, x_t.shape[3] // patch
        embeds = upload(self.concepts, x_t.device, x_t.dtype)
        stream = _ConceptStream(
            self.network.context_embedder(embeds).expand(len(x_t), -1, -1), self.blocks, self.space, self.interaction
        )
        with stream.beside(self.network.transformer_blocks):
            self.kind.call(self.network, x_t, timestep, **network_kwargs)
        return {SITE: torch.stack(stream.maps).mean(0).unflatten(2, tuple(grid))}


class _ConceptStream:
    """The concepts of one call, which go through the blocks behind the network.

    Args:
        concepts: Shape (B, K, C), before the first block.
        blocks: As in `ConceptRecorder`, ascending.
        space: As in `ConceptRecorder`.
        interaction: As in `ConceptRecorder`.

    Attributes:
        maps: Of each of `blocks`, with shape (B, K, N).
    """

    def __init__(self, concepts: Tensor, blocks: Sequence[int], space: Space, interaction: bool):
        self.concepts = concepts
        self.blocks = blocks
        self.space = space
        self.interaction = interaction
        self.maps: list[Tensor] = []
        self._arguments: dict[str, Any] = {}  # that the present block is called with
        self._read: dict[str, Tensor] = {}  # of the image in the present block

    @contextmanager
    def beside(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Context in which the network runs; it is left as soon as all `maps` are there.

        Raises:
            RuntimeError: The network did not execute a module that is read.
        """
        with ExitStack() as hooks:
            for index, block in enumerate(blocks[: self.blocks[-1] + 1]):
                for handle in self._attach(index, block):
                    hooks.callback(handle.remove)
            try:
                yield
            except _Stop:
                return
        raise _not_executed('transformer_blocks')

    def _attach(self, index: int, block: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            self._read = {}

        def keep(name: str, x: Tensor) -> None:
            self._read[name] = x

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            self._advance(index, block)
            if index == self.blocks[-1]:
                raise _Stop

        attention = block.attn
        handles = [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            attention.to_out[0].register_forward_pre_hook(lambda module, args: keep('output', args[0])),
            attention.register_forward_hook(leave),
        ]
        for name in 'qkv':
            projection = getattr(attention, f'to_{name}')
            handles.append(projection.register_forward_hook(lambda module, args, x, name=name: keep(name, x)))
        return handles

    def _advance(self, index: int, block: nn.Module) -> None:
        """Let the concepts pass a block, whose attention has just run for image and prompt."""
        if missing := {'q', 'k', 'v', 'output'} - self._read.keys():
            raise _not_executed(', '.join(sorted(missing)))
        attention, modulation = block.attn, self._arguments['temb']
        if ends := getattr(block, 'context_pre_only', False):  # SD3's last block, behind which there is no text
            modulated = block.norm1_context(self.concepts, modulation)
        else:
            modulated, *gates = block.norm1_context(self.concepts, emb=modulation)
        query, key, value = (
            getattr(attention, f'add_{name}_proj')(modulated).unflatten(2, (attention.heads, -1)) for name in 'qkv'
        )  # (B, K, heads, d)
        query, key = self._placed(attention, query, key, 'added_', 'text')
        image_query, image_key, image_value = (self._read[name].unflatten(2, (attention.heads, -1)) for name in 'qkv')
        image_query, image_key = self._placed(attention, image_query, image_key, '', 'image')  # (B, N, heads, d)

        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            torch.cat([key, image_key], dim=1).transpose(1, 2),
            torch.cat([value, image_value], dim=1).transpose(1, 2),
            attn_mask=self._mask(image_key.shape[1]),
        )
        output = output.transpose(1, 2).flatten(2)  # (B, K, heads * d)
        if index in self.blocks:
            self.maps.append(
                output_map(output, self._read['output']) if self.space == 'output' else attention_map(key, image_query)
            )
        if not ends and index < self.blocks[-1]:
            self._update(block, attention.to_add_out(output), *gates)

    def _update(
        self, block: nn.Module, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, last_gate: Tensor
    ) -> None:
        """The residual stream of the block's text."""
        self.concepts = self.concepts + gate[:, None] * attended
        modulated = block.norm2_context(self.concepts) * (1 + scale[:, None]) + shift[:, None]
        self.concepts = self.concepts + last_gate[:, None] * block.ff_context(modulated)
        if self.concepts.dtype == torch.float16:
            self.concepts = self.concepts.clip(-65504, 65504)  # as in Flux

    def _placed(
        self, attention: nn.Module, query: Tensor, key: Tensor, norms: str, part: Literal['text', 'image']
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, n, heads, d), normalised, and turned by the rotary embedding of their place, if any.

        Concepts lie where all tokens of the prompt do.
        """
        normalise = [getattr(attention, f'norm_{norms}{name}') for name in 'qk']
        query, key = (x if norm is None else norm(x) for norm, x in zip(normalise, (query, key), strict=True))
        rotary = self._arguments.get('image_rotary_emb')
        if rotary is None:
            return query, key
        n = query.shape[1]
        rotary = tuple(x[:1].expand(n, -1) if part == 'text' else x[-n:] for x in rotary)  # cosines, sines: (n, d)
        return apply_rotary_emb(query, rotary, sequence_dim=1), apply_rotary_emb(key, rotary, sequence_dim=1)

    def _mask(self, cells: int) -> Tensor | None:
        """Which keys, of concepts and image, a concept attends to, with shape (K, K + N); None for all."""
        if self.interaction:
            return None
        n, device = self.concepts.shape[1], self.concepts.device
        itself = torch.eye(n, dtype=torch.bool, device=device)
        return torch.cat([itself, itself.new_ones(n, cells)], dim=1)


def output_map(concepts: Tensor, image: Tensor) -> Tensor:
    """Softmax, over concepts, of inner products of outputs of attention (ConceptAttention, section 4).

    Args:
        concepts: Shape (B, K, C).
        image: Shape (B, N, C).

    Returns:
        A tensor with shape (B, K, N), float32.
    """
    return (concepts.float() @ image.float().transpose(1, 2)).softmax(1)


def attention_map(concepts: Tensor, image: Tensor) -> Tensor:
    """Probabilities of attention from the image to concepts, among these, averaged over heads.

    Args:
        concepts: Keys with shape (B, K, heads, d).
        image: Queries with shape (B, N, heads, d).

    Returns:
        A tensor with shape (B, K, N), float32.
    """
    heads = zip(concepts.float().unbind(2), image.float().unbind(2), strict=True)  # one at a time, as they are large
    scale = concepts.shape[3] ** -0.5
    return sum((scale * (key @ query.transpose(1, 2))).softmax(1) for key, query in heads) / concepts.shape[2]


def _not_executed(what: str) -> RuntimeError:
    return RuntimeError(
        f'the network did not execute {what} as it should; compiled code and fused projections (undone by '
        'unfuse_qkv_projections()) hide modules from hooks'
    )
