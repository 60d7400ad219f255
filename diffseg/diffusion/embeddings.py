"""Embeddings of prompts, and files of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffseg.devices import upload
from diffseg.files import whole_file

# Dimensions of the fields, for messages; the same letter is the same size
SHAPES = {
    'embeds': 'P, N, D',
    'pooled': 'P, D2',
    'times': 'K, E',
    'mask': 'P, N',
    'embeds_2': 'P, N2, D3',
    'mask_2': 'P, N2',
    'labels': 'P',
}
MASKS = ('mask', 'mask_2')


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, and class labels.

    Attributes:
        embeds: One row for each prompt, with shape (P, N, D); without tokens, N = 0, for networks that read none.
        pooled: Pooled embeddings of SDXL, SD3 and Flux, with shape (P, D2); None for models without.
        times: Replacements of the UNet's embeddings of timesteps 0 to K - 1 (after its MLP), with shape (K, E); None
            without replacement.
        mask: Which tokens of `embeds` exist, with shape (P, N), bool or int; None if all do.
        embeds_2: Token embeddings of a second text encoder that the network reads apart from the first's (mT5 of
            HunyuanDiT), with shape (P, N2, D3); None for models without.
        mask_2: Which tokens of `embeds_2` exist, with shape (P, N2), bool or int; None if all do.
        labels: Class labels, int64, with shape (P,); None for models without.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    times: Tensor | None = None
    mask: Tensor | None = None
    embeds_2: Tensor | None = None
    mask_2: Tensor | None = None
    labels: Tensor | None = None

    @property
    def by_name(self) -> dict[str, Tensor]:
        """All tensors that are not None, by the names of their fields."""
        return {field.name: x for field in fields(self) if (x := getattr(self, field.name)) is not None}

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are not None."""
        return list(self.by_name.values())

    @property
    def tokens(self) -> int:
        """Number of tokens of all text encoders."""
        return sum(x.shape[1] for x in (self.embeds, self.embeds_2) if x is not None)

    def first(self) -> 'Conditioning':
        """The first prompt."""
        return replace(self, **{name: x[:1] for name, x in self.by_name.items() if name != 'times'})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> 'Conditioning':
        """A copy on a device; embeddings are converted to `dtype`, masks and labels are not."""
        return Conditioning(
            **{name: upload(x, device, dtype if x.is_floating_point() else None) for name, x in self.by_name.items()}
        )

    def rows(
        self,
        index: Tensor | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """All tensors that are not None for a batch, one prompt for each of its B images, by the names of the fields.

        Args:
            index: Rows of the prompts, with shape (B,).
            device: Of the tensors; None is that of the embeddings.
            dtype: Of embeddings; None is that of `embeds`. Masks and labels are not converted.

        Returns:
            `embeds` (B, N, D), also without tokens, and of the other fields those that are not None, with B rows;
            `times` has shape (B, K, E).
        """
        index = torch.as_tensor(index)
        device = self.embeds.device if device is None else device
        dtype = self.embeds.dtype if dtype is None else dtype
        batch = {}
        for name, x in self.by_name.items():
            chosen = x.expand(len(index), -1, -1) if name == 'times' else x[upload(index, x.device)]
            batch[name] = upload(chosen, device, dtype if x.is_floating_point() else None)
        return batch

    def unet_kwargs(
        self,
        index: Tensor | Sequence[int],
        size: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Arguments of the UNet for a batch, one prompt for each of its B images.

        Args:
            index: Rows of the prompts, with shape (B,).
            size: Height and width of the images in pixels. For SDXL this is the original size, uncropped.
            device: Of the arguments; None is that of the embeddings.
            dtype: Of the arguments; None is that of the embeddings.

        Returns:
            `encoder_hidden_states` (B, N, D) and `added_cond_kwargs`: None, or `text_embeds` (B, D2) and `time_ids` (B,
            6), which are original height and width, top and left of the crop, target height and width; always in
            float32, since half precision cannot represent 2049. With `times` also, for `Denoiser`, `time_embeddings`
            (B, K, E). Empty without tokens.
        """
        if not self.embeds.shape[1]:
            return {}
        batch = self.rows(index, device, dtype)
        embeds, added = batch['embeds'], None
        if 'pooled' in batch:
            time_ids = upload(torch.tensor([*size, 0, 0, *size], device='cpu', dtype=torch.float32), embeds.device)
            added = {'text_embeds': batch['pooled'], 'time_ids': time_ids.expand(len(index), -1)}
        kwargs = {'encoder_hidden_states': embeds, 'added_cond_kwargs': added}
        return kwargs | ({'time_embeddings': batch['times']} if 'times' in batch else {})


def save_conditioning(path: str | Path, conditioning: Conditioning) -> None:
    """Write embeddings to a safetensors file, whose tensors have the names of the fields.

    A model reads such a file without its text encoders, see `load_conditioning`.

    Raises:
        ValueError: The tensors do not fit each other.
    """
    _check(conditioning.by_name, path)
    tensors = {name: x.detach().cpu().contiguous() for name, x in conditioning.by_name.items()}
    with whole_file(path) as partial:
        partial.write_bytes(save(tensors))


def load_conditioning(path: str | Path) -> Conditioning:
    """Read precomputed embeddings.

    Args:
        path: A safetensors file with the fields of `Conditioning` by name, such as `save_conditioning` writes: at least
            `embeds`.

    Raises:
        OSError: The file does not exist or is damaged.
        ValueError: It holds other tensors, or tensors that do not fit each other.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'no file of embeddings at {path}; write one with save_conditioning')
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise OSError(
            f'cannot read embeddings from {path}: {error}. It is truncated or not a safetensors file; write it again '
            'with save_conditioning'
        ) from error
    _check(tensors, path)
    return Conditioning(**tensors)


def _check(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a ValueError unless tensors are fields of a `Conditioning` that fit each other and are finite."""
    listed = ', '.join(f'{name} ({shape})' for name, shape in SHAPES.items())
    if 'embeds' not in tensors or (unknown := sorted(tensors.keys() - SHAPES.keys())):
        wrong = f'unknown tensors {", ".join(unknown)}' if 'embeds' in tensors else 'no tensor embeds'
        raise ValueError(f'embeddings in {path} have {wrong}; the tensors are {listed}, all but embeds optional')
    sizes: dict[str, int] = {}
    for name in (name for name in SHAPES if name in tensors):
        x, letters = tensors[name], SHAPES[name].split(', ')
        if x.ndim != len(letters) or any(sizes.setdefault(k, n) != n for k, n in zip(letters, x.shape, strict=True)):
            fixed = ', '.join(f'{letter} = {n}' for letter, n in sizes.items())
            raise ValueError(
                f'{name} in {path} has shape {tuple(x.shape)}; it is ({SHAPES[name]})'
                + (f' with {fixed}' * bool(fixed))
            )
    if not sizes['P']:
        raise ValueError(f'embeddings in {path} are of no prompt')
    if 'mask_2' in tensors and 'embeds_2' not in tensors:
        raise ValueError(f'{path} has mask_2 without embeds_2')
    for name, x in tensors.items():
        if error := _wrong_values(name, x):
            raise ValueError(f'{name} in {path} {error}')


def _wrong_values(name: str, x: Tensor) -> str:
    """What is wrong with the dtype or the values of a field; empty if nothing is."""
    if name == 'labels':
        if x.dtype != torch.int64:
            return f'has dtype {x.dtype}; labels are int64'
        return 'has negative labels' if x.min() < 0 else ''
    if name in MASKS:
        if x.is_floating_point() or x.is_complex():
            return f'has dtype {x.dtype}; masks are bool or integers'
        return 'has values other than 0 and 1' if ((x != 0) & (x != 1)).any() else ''
    if not x.is_floating_point():
        return f'has dtype {x.dtype}; embeddings are floating-point numbers'
    return '' if x.isfinite().all() else 'has NaN or infinite values'
