"""Reading activations from a network's forward pass, with forward hooks."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffseg.diffusion.sites import AttentionMode, Network, Site, aggregates, kind_of, resolve, sites
from diffseg.diffusion.sites.tokens import image_tokens, key_positions


class _Tap(NamedTuple):
    """What one hook stores of the module at `path`.

    That is one of its outputs, its first positional argument, or all arguments that it is called with (a pair of
    positional ones and those with keywords).
    """

    path: str
    what: Literal['output', 'input', 'call'] = 'output'
    item: int = 0


class _Stop(Exception):
    """Ends a forward pass whose remainder nobody needs."""


class _Tokens(NamedTuple):
    """The tokens of one call.

    Attributes:
        size: Height and width of the image in pixels.
        patch: Height and width of a token in cells of the latent.
        cells: Number of the image's tokens.
        text_lengths: Number of text tokens in each row, where it differs.
    """

    size: tuple[int, int]
    patch: int
    cells: int
    text_lengths: Tensor | None


class ActivationRecorder:
    """Reads activations from the forward pass of a UNet or a transformer.

    The hooks live for one call only, and the network keeps no trace of them. Attention maps of UNets are recomputed
    from queries and keys, so that it does not matter which attention processor runs. For those of transformers the
    attention module is called again with values that mark the keys, as many at a time as a head has channels; so they
    are the probabilities of its own processor, with its norms, rotary embedding, scale and masks.

    Args:
        network: The network.
        names: Sites to read, or aliases, see `resolve`.
        stop_early: End the forward pass with the last activation that is wanted. With gradient checkpointing in use it
            runs to its end all the same, since checkpointed modules must not be left by an exception.
        attention: Categories of aggregated attention, which is returned after `names`, see `aggregates`.
        attention_mode: How it is aggregated, 'concat' or 'average'.
        vae_scale_factor: Image pixels per latent cell, on which strides depend and with them the names of averaged
            attention; None as in `sites`.
        discard: Channels of a transformer's raw features that are set to zero before they are normalised and modulated
            again for the `-mod` sites (DiTF, 2505.18584: a few channels hold massive activations). Nothing else that
            is read depends on it.
        average_draws: For the `-mod` sites, raw features are averaged over several draws of noise before they are
            normalised and modulated again, as in DiTF's released code; each draw then has the same features.

    Raises:
        ValueError: For names, or channels to discard, that the network does not have; for `discard` or `average_draws`
            and no `-mod` site.
    """

    def __init__(
        self,
        network: Network,
        names: Sequence[str],
        stop_early: bool = True,
        attention: Sequence[str] = (),
        attention_mode: AttentionMode = 'concat',
        vae_scale_factor: int | None = None,
        discard: Sequence[int] = (),
        average_draws: bool = False,
    ) -> None:
        available = sites(network, vae_scale_factor)
        self.network = network
        self.kind = kind_of(network)
        self.vae_scale_factor = vae_scale_factor or self.kind.vae_scale_factor
        self.stop_early = stop_early
        self.sites = [available[name] for name in resolve(names, available)]
        self.aggregates = aggregates(available, attention, attention_mode)
        self.discard = tuple(discard)
        self.average_draws = average_draws
        self._check_discard()
        self.taps = {tap for site in self._all_sites() for tap in self._taps(site)}

    def _all_sites(self) -> list[Site]:
        return [*self.sites, *(site for _, groups in self.aggregates for group in groups for site in group)]

    def _check_discard(self) -> None:
        modulated = [site for site in self.sites if site.norm]
        if (self.discard or self.average_draws) and not modulated:
            option = f'discard is {self.discard}' if self.discard else 'average_draws is set'
            raise ValueError(
                f'{option}, but no modulated features are read, which it is for; '
                f'read a site such as vit-block0-mod, or leave out {option.split()[0]}'
            )
        for site in modulated:
            if wrong := [channel for channel in self.discard if not 0 <= channel < site.channels]:
                raise ValueError(f'discard holds {wrong}; {site.name!r} has the channels 0 to {site.channels - 1}')

    def __call__(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        grid: tuple[int, int] | None = None,
        draws: int = 1,
        **network_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the network and return the wanted activations.

        Gradients flow through the activations when gradient mode is on.

        Args:
            x_t: Noised latent with shape (B, C, h, w), of any size that the network takes; or image (B, 3, h, w). For
                transformers that take packed latents (Flux, Flux2, QwenImage) these, with shape (B, N, C).
            timestep: The network's own index, one or (B,). Flux, Flux2, QwenImage, AuraFlow and ZImage multiply it by
                1000 themselves.
            encoder_hidden_states: Text embedding with shape (B, N, D), for networks that read one.
            added_cond_kwargs: SDXL's `text_embeds` and `time_ids`; PixArt-Alpha's conditions.
            grid: Height and width of packed latents in tokens, which their shape does not tell; other networks do not
                need it.
            draws: Number of draws in the batch, for `average_draws`; the rows of each come together.
            network_kwargs: Passed on to the network.

        Returns:
            The activations, in the order of `names`, each with shape (B, C, h', w') and in the network's dtype. Those
            of transformers are of the image's tokens alone, folded to the grid. A map is the mean over heads, its
            channels are the keys. 'unet-out' and 'transformer-out' are the prediction.

        Raises:
            ValueError: For attention masks together with maps of a UNet, which are recomputed without them; a latent
                that is no whole number of patches; a missing or wrong `grid`, or mask of Lumina2.
            RuntimeError: If the network did not execute a module that is to be read.
        """
        masked = any(network_kwargs.get(name) is not None for name in ('attention_mask', 'encoder_attention_mask'))
        if masked and any(site.kind == 'map' and site.probe is None for site in self._all_sites()):
            raise ValueError('attention maps cannot be read under an attention mask; ask for other activations')
        conditions = {'encoder_hidden_states': encoder_hidden_states, 'added_cond_kwargs': added_cond_kwargs}
        network_kwargs |= {name: value for name, value in conditions.items() if value is not None}
        tokens = self._tokens(x_t, grid, network_kwargs)
        stop = self.stop_early and not (torch.is_grad_enabled() and self.network.is_gradient_checkpointing)
        call = partial(self.kind.call, self.network, x_t, timestep, **network_kwargs)
        raw = _record(self.network, self.taps, stop, call)
        height, width = tokens.size
        activations = {site.name: self._read(site, raw, tokens, draws) for site in self.sites}
        for site, groups in self.aggregates:
            maps = [self._average(group, raw, tokens) for group in groups]
            resized = [F.interpolate(x, size=site.size(height, width)) for x in maps]
            activations[site.name] = torch.cat(resized, dim=1)  # (B, groups * keys, h, w)
        return activations

    def _tokens(self, x_t: Tensor, grid: tuple[int, int] | None, network_kwargs: dict[str, Any]) -> _Tokens:
        patch = self.kind.patch_size(self.network)
        name = type(self.network).__name__
        if self.kind.packed:
            if grid is None:
                raise ValueError(
                    f'grid is missing: a {name} takes packed latents, whose shape {tuple(x_t.shape)} does not tell '
                    "the grid of tokens; give its height and width, half the latent's"
                )
            if x_t.shape[1] != grid[0] * grid[1]:
                raise ValueError(f'grid is {tuple(grid)}, but there are {x_t.shape[1]} tokens in {tuple(x_t.shape)}')
        else:
            height, width = x_t.shape[-2:]
            if height % patch or width % patch:
                raise ValueError(
                    f'the latent has {height} x {width} cells; a {name} with patches of {patch} x {patch} needs '
                    f'multiples of {patch}: pad it to {-(-height // patch) * patch} x {-(-width // patch) * patch}'
                )
            true_grid = height // patch, width // patch
            if grid is not None and tuple(grid) != true_grid:
                raise ValueError(f'grid is {tuple(grid)}; a latent of {height} x {width} cells has {true_grid}')
            grid = true_grid
        size = tuple(side * patch * self.vae_scale_factor for side in grid)
        lengths = None
        if self.kind.text_mask:
            if (mask := network_kwargs.get(self.kind.text_mask)) is None:
                raise ValueError(
                    f'{self.kind.text_mask} is missing: it tells a {name} where text ends and image begins'
                )
            lengths = mask.sum(1)
        return _Tokens(size, patch, grid[0] * grid[1], lengths)

    def _taps(self, site: Site) -> tuple[_Tap, ...]:
        """What has to be stored to read a site."""
        if site.probe is not None:
            return (_Tap(site.path, 'call'),)
        if site.kind == 'map':
            return _Tap(f'{site.path}.to_q'), _Tap(f'{site.path}.to_k')
        if self._modulates_again(site):
            return (_Tap(site.block, 'call'),)
        return (_own_tap(site),)

    def _modulates_again(self, site: Site) -> bool:
        return bool(site.norm and (self.discard or self.average_draws))

    def _read(self, site: Site, raw: dict[_Tap, Any], tokens: _Tokens, draws: int = 1) -> Tensor:
        value, *key = (raw[tap] for tap in self._taps(site))
        if site.probe is not None:
            value = self._probed_map(site, value, tokens)
        elif site.kind == 'map':
            value = _attention_map(self.network.get_submodule(site.path), value, *key)
        elif self._modulates_again(site):
            value = self._modulate_again(site, value, draws)
        if site.kind == 'spatial':
            return value
        if site.probe is None:
            value = image_tokens(value, site.order, tokens.cells, tokens.text_lengths)
        if site.part is not None:
            value = value[..., site.part * site.channels : (site.part + 1) * site.channels]
        height, width = site.size(*tokens.size)
        if site.kind == 'patches':
            p = tokens.patch
            value = value.unflatten(2, (p, p, -1)).unflatten(1, (height // p, width // p))  # (B, h/p, w/p, p, p, C)
            return value.permute(0, 5, 1, 3, 2, 4).reshape(len(value), -1, height, width)
        return value.transpose(1, 2).unflatten(2, (height, width))  # (B, h*w, C) -> (B, C, h, w)

    def _modulate_again(self, site: Site, call: tuple[tuple, dict[str, Any]], draws: int) -> Tensor:
        """Call a block again, up to its modulated features (B, N, C), with another input of its norm.

        That is the mean over draws, if wanted, with discarded channels set to zero.
        """

        def change(module: nn.Module, inputs: tuple) -> tuple:
            features = inputs[0].clone()  # (B, N, C)
            if self.average_draws:
                by_draw = features.unflatten(0, (draws, -1))
                features = by_draw.mean(0, keepdim=True).expand_as(by_draw).flatten(0, 1).clone()
            for channel in self.discard:
                features[..., channel] = 0
            return features, *inputs[1:]

        args, kwargs = call
        block, tap = self.network.get_submodule(site.block), _own_tap(site)
        with self.network.get_submodule(site.norm).register_forward_pre_hook(change):
            return _record(self.network, {tap}, True, partial(block, *args, **kwargs))[tap]

    def _probed_map(self, site: Site, call: tuple[tuple, dict[str, Any]], tokens: _Tokens) -> Tensor:
        """Attention probabilities (B, h*w, keys), averaged over heads, see `AttentionProbe`.

        Where the values of key j are 1 in channel j of each head and 0 elsewhere, channel j of the weighted values is
        the probability of key j.
        """
        probe, (args, kwargs) = site.probe, call
        attention = self.network.get_submodule(site.path)
        head_width = probe.width // attention.heads
        tap = _Tap(probe.output, 'input') if probe.output else _Tap(site.path)
        start, keys, exist = 0, 0, None
        executed = set()

        def mark_keys(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            nonlocal keys, exist
            executed.add(probe.values)
            order, part = ('image', 'image') if probe.keys == 'all' else (site.order, probe.keys)
            cells = output.shape[1] if probe.keys == 'all' else tokens.cells
            positions, exist = key_positions(output, order, part, cells, tokens.text_lengths)  # (B, K)
            keys = positions.shape[1]
            first = (probe.values_part or 0) * probe.width
            width = output.shape[2] if probe.values_part is None else probe.width
            marks = output.new_zeros(*output.shape[:2], width).unflatten(2, (-1, head_width))  # (B, N, heads, d)
            chunk = positions[:, start : start + head_width]
            index = chunk[:, :, None, None].expand(-1, -1, 1, marks.shape[2])
            marks.permute(0, 3, 1, 2)[:, : chunk.shape[1]].scatter_(2, index, 1)  # in (B, chunk, N, heads)
            return torch.cat([output[..., :first], marks.flatten(2), output[..., first + width :]], dim=2)

        def no_values(path: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            executed.add(path)
            return torch.zeros_like(output)

        chunks = []
        with ExitStack() as hooks:
            hooks.enter_context(self.network.get_submodule(probe.values).register_forward_hook(mark_keys))
            for path in probe.others:
                hooks.enter_context(self.network.get_submodule(path).register_forward_hook(partial(no_values, path)))
            while start == 0 or start < keys:
                weighted = _record(self.network, {tap}, True, partial(attention, *args, **kwargs))[tap]
                _check_executed({probe.values, *probe.others} - executed)
                weighted = image_tokens(weighted[..., : probe.width], site.order, tokens.cells, tokens.text_lengths)
                by_head = weighted.unflatten(2, (attention.heads, head_width))  # (B, h*w, heads, d)
                chunks.append(by_head.float().mean(2)[..., : keys - start])
                start += head_width
        probabilities = torch.cat(chunks, dim=2)
        if exist is not None:
            probabilities = probabilities * exist[:, None]
        return probabilities.to(weighted.dtype)

    def _average(self, layers: Sequence[Site], raw: dict[_Tap, Any], tokens: _Tokens) -> Tensor:
        return sum(self._read(site, raw, tokens) for site in layers) / len(layers)


def _own_tap(site: Site) -> _Tap:
    """The activation as the network computes it."""
    return _Tap(site.path, 'input' if site.is_input else 'output', site.item)


def _record(network: nn.Module, taps: set[_Tap], stop: bool, run: Callable[[], Any]) -> dict[_Tap, Any]:
    """Run a network, or a part of it, under hooks that store what `taps` say as it is, and do nothing else.

    Anything computed inside a hook would be missing when gradient checkpointing runs the module again.

    Args:
        network: The network that the paths of `taps` are in.
        taps: What to store.
        stop: Whether to end with the last of them.
        run: Runs it.

    Raises:
        RuntimeError: If a module was not executed.
    """
    raw: dict[_Tap, Any] = {}

    def store(tap: _Tap, value: Any) -> None:
        raw[tap] = value
        if stop and len(raw) == len(taps):
            raise _Stop

    def register(tap: _Tap) -> torch.utils.hooks.RemovableHandle:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            store(tap, (args, kwargs) if tap.what == 'call' else args[0])

        def behind(module: nn.Module, args: tuple, output: Any) -> None:
            store(tap, output if isinstance(output, Tensor) else output[tap.item])

        module = network.get_submodule(tap.path)
        if tap.what == 'output':
            return module.register_forward_hook(behind)
        return module.register_forward_pre_hook(before, with_kwargs=True)

    handles = []
    try:
        for tap in taps:
            handles.append(register(tap))
        run()
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    _check_executed(tap.path for tap in taps - raw.keys())
    return raw


def _check_executed(missing: Iterable[str]) -> None:
    if missing := sorted(set(missing)):
        raise RuntimeError(
            f'the network did not execute {", ".join(missing)}; compiled code and fused projections (undone by '
            'unfuse_qkv_projections()) hide modules from hooks'
        )


def _attention_map(attention: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Attention probabilities, averaged over heads; one head at a time, since they are large.

    Args:
        attention: diffusers' module that the queries and keys are of.
        query: Shape (B, N, heads * d).
        key: Shape (B, keys, heads * d).

    Returns:
        A tensor with shape (B, N, keys), computed in float32 because single probabilities underflow in half precision.
    """
    heads = zip(query.float().chunk(attention.heads, dim=-1), key.float().chunk(attention.heads, dim=-1), strict=True)
    return (sum(attention.get_attention_scores(q, k) for q, k in heads) / attention.heads).to(query.dtype)
