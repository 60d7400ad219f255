"""Tokens learned by textual inversion: reading their files, and adding them to a tokenizer and a text encoder."""

import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# names of vectors other than the token, and their text encoder
_ENCODER_KEYS = {'emb_params': 'text_encoder', 'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2'}


@dataclass(frozen=True)
class Inversion:
    """A learned token.

    Attributes:
        token: Its text in prompts.
        vectors: {text encoder: (n, D)}, n vectors for one token.
        path: The file.
        digest: Of the file's content.
    """

    token: str
    vectors: dict[str, Tensor]
    path: str
    digest: str


def read_inversion(path: str | Path) -> Inversion:
    """Read a file of diffusers' format or of AUTOMATIC1111's, for SD or (with `clip_l` and `clip_g`) SDXL.

    The token's name is read from the file, or else is that of the file.

    Raises:
        OSError: The file does not exist.
        ValueError: The file is damaged or has another format.
    """
    path = Path(path).expanduser()
    content = path.read_bytes()
    try:
        safe = path.suffix == '.safetensors'
        state = load(content) if safe else torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path} cannot be read as textual inversion: {error}') from error
    token, vectors = _parse(state)
    if not vectors or not all(isinstance(x, Tensor) and x.ndim in (1, 2) for x in vectors.values()):
        keys = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f'{path} holds {keys}; textual inversion is one vector or (n, D) vectors under their token, under clip_l '
            f'and clip_g (SDXL), or under string_to_param'
        )
    vectors = {part: x.detach().float().reshape(-1, x.shape[-1]) for part, x in vectors.items()}
    return Inversion(token or path.stem, vectors, str(path), hashlib.sha256(content).hexdigest()[:16])


def _parse(state: Any) -> tuple[str | None, dict[str, Any]]:
    """Token, if it has a name, and its vectors for each text encoder."""
    if isinstance(state, Tensor):
        return None, {'text_encoder': state}
    if not isinstance(state, Mapping):
        return None, {}
    if 'string_to_param' in state:
        return state.get('name'), {'text_encoder': state['string_to_param'].get('*')}
    if set(state) <= set(_ENCODER_KEYS):
        return None, {_ENCODER_KEYS[key]: x for key, x in state.items()}
    if len(state) == 1:
        ((token, x),) = state.items()
        return token, {'text_encoder': x}
    return None, {}


class _Loader(TextualInversionLoaderMixin):
    """diffusers' loader without a pipeline around it."""

    components: Mapping[str, Any] = {}
    hf_device_map = None


def add_tokens(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    part: str,
    inversions: Sequence[Inversion],
) -> None:
    """Add tokens to a tokenizer and its text encoder, in place.

    Args:
        tokenizer: Of the encoder.
        encoder: The text encoder.
        part: 'text_encoder' or 'text_encoder_2'.
        inversions: The tokens.

    Raises:
        ValueError: A token has no vectors for this encoder or vectors of another size, or it exists in the tokenizer.
    """
    width = encoder.get_input_embeddings().weight.shape[1]
    for inversion in inversions:
        vectors = inversion.vectors.get(part)
        if vectors is None or vectors.shape[1] != width:
            there = ', '.join(f'{x.shape[1]} for {name}' for name, x in inversion.vectors.items())
            raise ValueError(
                f'{inversion.path} has vectors of {there}, but the {part} of this model needs {width}; the token was '
                f'trained for another kind of model'
            )
        if inversion.token in tokenizer.get_vocab():
            raise ValueError(
                f'the token {inversion.token!r} of {inversion.path} is known to the tokenizer already; rename it'
            )
        _Loader().load_textual_inversion({inversion.token: vectors}, tokenizer=tokenizer, text_encoder=encoder)


def spell_out(prompt: str, tokenizer: CLIPTokenizer) -> str:
    """The prompt with every token of n vectors written as n tokens."""
    return _Loader().maybe_convert_prompt(prompt, tokenizer)
