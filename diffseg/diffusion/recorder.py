"""Reading activations from a network's forward pass, with forward hooks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffseg.diffusion.sites import AttentionMode, Network, Site, aggregates, default_scale_factor, resolve, sites


class _Tap(NamedTuple):
    """What one hook stores: the output of the module at `path`, or its input."""

    path: str
    is_input: bool = False


class _Stop(Exception):
    """Ends a forward pass whose remainder nobody needs."""


class ActivationRecorder:
    """Reads activations from a UNet's forward pass.

    The hooks live for one call only, and the UNet keeps no trace of them. Attention maps are recomputed from queries
    and keys, so that it does not matter which attention processor runs.

    Args:
        network: The UNet.
        names: Sites to read, or aliases, see `resolve`.
        stop_early: End the forward pass with the last activation that is wanted. With gradient checkpointing in use it
            runs to its end all the same, since checkpointed modules must not be left by an exception.
        attention: Categories of aggregated attention, which is returned after `names`, see `aggregates`.
        attention_mode: How it is aggregated, 'concat' or 'average'.
        vae_scale_factor: Image pixels per latent cell, on which strides depend and with them the names of averaged
            attention; None as in `sites`.

    Raises:
        ValueError: For names that the UNet does not have.
    """

    def __init__(
        self,
        network: Network,
        names: Sequence[str],
        stop_early: bool = True,
        attention: Sequence[str] = (),
        attention_mode: AttentionMode = 'concat',
        vae_scale_factor: int | None = None,
    ) -> None:
        available = sites(network, vae_scale_factor)
        self.network = network
        self.vae_scale_factor = vae_scale_factor or default_scale_factor(network)
        self.stop_early = stop_early
        self.sites = [available[name] for name in resolve(names, available)]
        self.aggregates = aggregates(available, attention, attention_mode)
        self.taps = {tap for site in self._all_sites() for tap in _taps(site)}

    def _all_sites(self) -> list[Site]:
        return [*self.sites, *(site for _, groups in self.aggregates for group in groups for site in group)]

    def __call__(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **network_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the UNet and return the wanted activations.

        Gradients flow through the activations when gradient mode is on.

        Args:
            x_t: Noised latent with shape (B, 4, h, w), of any size that the UNet takes; or image (B, 3, h, w).
            timestep: The scheduler's own index, one or (B,).
            encoder_hidden_states: Text embedding with shape (B, N, D), for networks that read one.
            added_cond_kwargs: SDXL's `text_embeds` and `time_ids`.
            network_kwargs: Passed on to the UNet.

        Returns:
            The activations, in the order of `names`, each with shape (B, C, h', w') and in the UNet's dtype. A map is
            the mean over heads, its channels are the keys. 'unet-out' is the predicted noise (or velocity).

        Raises:
            ValueError: For attention masks together with maps, which are recomputed without them.
            RuntimeError: If the UNet did not execute a module that is to be read.
        """
        masked = any(network_kwargs.get(name) is not None for name in ('attention_mask', 'encoder_attention_mask'))
        if masked and any(site.kind == 'map' for site in self._all_sites()):
            raise ValueError('attention maps cannot be read under an attention mask; ask for other activations')
        conditions = {'encoder_hidden_states': encoder_hidden_states, 'added_cond_kwargs': added_cond_kwargs}
        network_kwargs |= {name: value for name, value in conditions.items() if value is not None}
        raw = self._run(x_t, timestep, **network_kwargs)
        height, width = (side * self.vae_scale_factor for side in x_t.shape[-2:])
        activations = {site.name: self._read(site, raw, (height, width)) for site in self.sites}
        for site, groups in self.aggregates:
            maps = [self._average(group, raw, (height, width)) for group in groups]
            resized = [F.interpolate(x, size=site.size(height, width)) for x in maps]
            activations[site.name] = torch.cat(resized, dim=1)  # (B, groups * keys, h, w)
        return activations

    def _run(self, *args: Any, **kwargs: Any) -> dict[_Tap, Tensor]:
        """Run the UNet under hooks that store modules' inputs and outputs as they are, and do nothing else.

        Anything computed inside a hook would be missing when gradient checkpointing runs the module again.
        """
        raw = {}
        stop = self.stop_early and not (torch.is_grad_enabled() and self.network.is_gradient_checkpointing)

        def hook_for(tap: _Tap):
            def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
                value = inputs if tap.is_input else output
                raw[tap] = value if isinstance(value, Tensor) else value[0]
                if stop and len(raw) == len(self.taps):
                    raise _Stop

            return hook

        handles = []
        try:
            for tap in self.taps:
                handles.append(self.network.get_submodule(tap.path).register_forward_hook(hook_for(tap)))
            self.network(*args, return_dict=False, **kwargs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := sorted({tap.path for tap in self.taps - raw.keys()}):
            raise RuntimeError(
                f'the UNet did not execute {", ".join(missing)}; compiled code and fused projections (undone by '
                'unfuse_qkv_projections()) hide modules from hooks'
            )
        return raw

    def _read(self, site: Site, raw: dict[_Tap, Tensor], size: tuple[int, int]) -> Tensor:
        value, *key = (raw[tap] for tap in _taps(site))
        if site.kind in ('input', 'spatial'):
            return value
        if site.kind == 'map':
            value = _attention_map(self.network.get_submodule(site.path), value, *key)
        return value.transpose(1, 2).unflatten(2, site.size(*size))  # (B, h*w, C) -> (B, C, h, w)

    def _average(self, layers: Sequence[Site], raw: dict[_Tap, Tensor], size: tuple[int, int]) -> Tensor:
        return sum(self._read(site, raw, size) for site in layers) / len(layers)


def _taps(site: Site) -> tuple[_Tap, ...]:
    """What has to be stored to read a site."""
    if site.kind == 'map':
        return _Tap(f'{site.path}.to_q'), _Tap(f'{site.path}.to_k')
    return (_Tap(site.path, is_input=site.kind == 'input'),)


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
