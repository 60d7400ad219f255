"""Prompts that are encoded once: their embeddings are kept on disk.

The file of an embedding is named by a digest of everything that it depends on (text encoders, tokenizers, prompt,
settings); text encoders are loaded for new prompts only.
"""

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from diffseg.diffusion.embeddings import Conditioning
from diffseg.diffusion.loading import FOLDER_LAYOUT, ModelSource, find_source, fingerprint, read_checkpoint
from diffseg.files import whole_file

T = TypeVar('T')
Loader = Callable[..., Any]  # of text encoders

logger = logging.getLogger(__name__)

CHUNK = 256  # prompts that are encoded together
RECENT = 64  # prompts in the cache in memory


class PromptStore(ABC):
    """Encode prompts with the text encoders of a model, which are loaded for new prompts only, and freed.

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        revision: Commit, tag or branch of a hub id; None is that of the preset, else the newest.
        variant: Variant of the weight files; None is that of the preset, else none.
        config: Preset or diffusers folder that describes a single file.
        cache_dir: Cache folder of embeddings; None is that of `default_cache_dir`.
        device: Device of the encoders. The results are on the CPU.
    """

    encoding: ClassVar[str]  # part of an embedding's key: changed whenever the encoding of a prompt changes
    pads: ClassVar[bool] = False  # whether prompts of different lengths may be in a batch: padded, with a mask

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: str | Path | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str = 'cpu',
    ):
        self.model = model
        self.revision = revision
        self.variant = variant
        self.config = config
        self.folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.device = device
        self._recent: dict[str, dict[str, Tensor]] = {}
        self._example = ''  # a prompt that was encoded before, if any was

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings (P, N, D), in the order of the prompts, and the other fields that the model's network reads.

        Raises:
            ValueError: No prompts, or prompts that cannot be in one batch.
        """
        self.prepare(prompts)
        encoded = {prompt: self._recall(prompt) for prompt in dict.fromkeys(prompts)}
        return self._stack([encoded[prompt] for prompt in prompts])

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode any number of prompts that are not on disk yet.

        Text encoders are loaded for every 256 prompts and freed after these; for more prompts, they are loaded once.

        Raises:
            ValueError: No prompts, or prompts that cannot be in one batch.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f'prompts is {prompts!r}; it is a sequence of one or more prompts')
        self._example = prompts[0]
        lengths = {prompt: self._length(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, length in lengths.items() if length is None]
        load = self._load if len(missing) <= CHUNK else cache(self._load)
        with tqdm(total=len(missing), desc='encoding prompts', disable=len(missing) <= CHUNK) as progress:
            for start in range(0, len(missing), CHUNK):
                for prompt, tensors in self._encode(missing[start : start + CHUNK], load):
                    lengths[prompt] = len(tensors['embeds'])
                    progress.update()
        if not self.pads and len(set(lengths.values())) > 1:
            examples = {length: prompt for prompt, length in lengths.items()}
            listed = '; '.join(f'{length} for {prompt[:40]!r}' for length, prompt in examples.items())
            raise ValueError(
                f'prompts have different numbers of tokens ({listed}); encode them one by one, or truncate them at '
                f"the tokenizer's length (truncate)"
            )

    def for_negative_prompts(self) -> 'PromptStore':
        """The encoder of negative prompts, which some pipelines encode in another way."""
        return self

    @cached_property
    def source(self) -> ModelSource:
        """Source of the text encoders."""
        return find_source(self.model, revision=self.revision, variant=self.variant, config=self.config)

    @property
    @abstractmethod
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what embeddings depend on in text encoders, tokenizers and settings, independent of their source.

        It is stored with every embedding, so that no text encoder is loaded for it; if nothing was encoded before, the
        empty prompt is encoded.

        Raises:
            OSError: Nothing was encoded before, and the text encoders are missing, damaged or unreachable.
        """
        path = self._path_of(self._example)
        if (stored := read(path, _encoders_of)) is not None:
            return stored
        list(self._encode([self._example], self._load))
        return self._encoders_digest()

    @property
    @abstractmethod
    def _identity(self) -> str:
        """Identifies the text encoders and tokenizers, without loading them, and what is added to them."""

    @abstractmethod
    def _encoders_digest(self) -> str:
        """The fingerprint, once the text encoders have been loaded."""

    @abstractmethod
    def _load(self, *args: Any) -> Any:
        """Load text encoders."""

    @abstractmethod
    def _run(self, prompts: Sequence[str], load: Loader) -> Iterator[dict[str, Tensor]]:
        """Fields of each prompt on the CPU, without the dimension of the batch, by name: at least `embeds` (N, D)."""

    def _settings(self) -> list[Any]:
        """All else that embeddings depend on, for their keys, ready for JSON."""
        return []

    def _stack(self, encoded: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """A batch of encoded prompts."""
        lengths = {len(x['embeds']) for x in encoded}
        if len(lengths) > 1:
            encoded = [_padded(x, max(lengths)) for x in encoded]
        return Conditioning(**{name: torch.stack([x[name] for x in encoded]) for name in encoded[0]})

    def _path(self, content: Any) -> Path:
        """Path of the file for a key's `content`."""
        return self.folder / f'{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}.safetensors'

    def _path_of(self, prompt: str) -> Path:
        return self._path([self.encoding, self._identity, prompt, *self._settings()])

    def _length(self, prompt: str) -> int | None:
        """Number of tokens of a prompt that is in memory or on disk, None for other prompts."""
        if prompt in self._recent:
            return len(self._recent[prompt]['embeds'])
        return read(self._path_of(prompt), _count)

    def _recall(self, prompt: str) -> dict[str, Tensor]:
        tensors = self._recent.pop(prompt, None) or read(self._path_of(prompt))
        if tensors is None:
            tensors = dict(self._encode([prompt], self._load))[prompt]
        self._recent[prompt] = tensors
        while len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return tensors

    def _encode(self, prompts: Sequence[str], load: Loader) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Encode prompts, with the text encoders that `load` returns, and write them to disk."""
        for prompt, tensors in zip(prompts, self._run(prompts, load), strict=True):
            metadata = {
                'prompt': prompt,
                'encoders': self._identity,
                'encoders_digest': self._encoders_digest(),
                'encoding': self.encoding,
            }
            write(self._path_of(prompt), tensors, metadata)
            yield prompt, tensors


def default_cache_dir() -> Path:
    """Default cache folder of embeddings: `prompts` in `$DIFFSEG_CACHE`, else in `~/.cache/diffseg`."""
    return Path(os.environ.get('DIFFSEG_CACHE') or Path.home() / '.cache' / 'diffseg').expanduser() / 'prompts'


def identify(source: ModelSource, encoders: Sequence[str], begin: bytes = b'') -> str:
    """Identifier of the text encoders and tokenizers of a folder or a hub id, without loading them.

    That of a hub id is its name, so that cached embeddings can be used without the weights; otherwise a digest of the
    content, which does not change if a folder is moved.

    Args:
        source: Of kind 'folder' or 'hub'.
        encoders: Names of text encoders.
        begin: Further content of the digest.

    Raises:
        FileNotFoundError: The folder lacks a text encoder or tokenizer.
    """
    if source.kind == 'hub':
        return f'{source.location}@{source.revision or "main"}/{source.variant or ""}'
    digest = hashlib.sha256(begin)
    for part in encoders:
        for path in _files(source, part, '*.json'):
            digest.update(path.read_bytes())
        for path in _files(source, tokenizer_of(part), '*'):
            digest.update(path.name.encode() + path.read_bytes())
        for path in _files(source, part, '*.safetensors') or _files(source, part, '*.bin'):
            digest.update(fingerprint(read_checkpoint(path)).encode())
    return digest.hexdigest()


def tokenizer_of(encoder: str) -> str:
    """Name of the tokenizer of a text encoder: `tokenizer_2` of `text_encoder_2`."""
    return encoder.replace('text_encoder', 'tokenizer')


def _files(source: ModelSource, part: str, pattern: str) -> list[Path]:
    folder = Path(source.location, part)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{source.location} has no {part}/, so that no prompt can be encoded; expected {FOLDER_LAYOUT}. '
            'Precomputed embeddings can be given instead of prompts'
        )
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _padded(encoded: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Fields of a prompt with zeros after its tokens, which a mask tells from these."""
    n = len(encoded['embeds'])
    return {
        **encoded,
        'embeds': F.pad(encoded['embeds'], (0, 0, 0, length - n)),
        'mask': F.pad(torch.ones(n, dtype=torch.int64, device='cpu'), (0, length - n)),
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file."""
    return load(path.read_bytes())


def _count(path: Path) -> int:
    """Number of tokens in a file; only its beginning is read."""
    with safe_open(path, 'pt') as file:
        return file.get_slice('embeds').get_shape()[0]


def _encoders_of(path: Path) -> str:
    """The digest of the text encoders that made an embedding."""
    with safe_open(path, 'pt') as file:
        return file.metadata()['encoders_digest']


def read(path: Path, read_file: Callable[[Path], T] = _tensors) -> T | None:
    """Result of `read_file` for a file, None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return read_file(path)
    except SafetensorError as error:
        logger.warning('encoding a prompt again, its file %s is damaged: %s', path, error)
        return None


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file atomically."""
    with whole_file(path) as partial:
        partial.write_bytes(save(dict(tensors), metadata))
