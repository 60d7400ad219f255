"""Prompt embeddings for the UNet: token embeddings and, for SDXL, a pooled embedding and time ids.

A prompt is encoded once. Its embedding is cached on disk under a digest of everything that it depends on (text
encoders, learned tokens, prompt, settings); text encoders are loaded for new prompts only.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffseg.devices import upload
from diffseg.diffusion.loading import (
    FOLDER_LAYOUT,
    ModelSource,
    describe_file,
    explain,
    find_source,
    fingerprint,
    load_config,
    read_checkpoint,
)
from diffseg.diffusion.lora import LoraWeights, fuse_text_lora
from diffseg.diffusion.textual_inversion import add_tokens, read_inversion, spell_out
from diffseg.files import whole_file

T = TypeVar('T')
Loader = Callable[[str], tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]]  # by name of the encoder

logger = logging.getLogger(__name__)

# Part of an embedding's key: changed whenever the encoding of a prompt changes.
ENCODING = 'float32, chunks of the tokenizer length, pooled of the truncated prompt, 2'
CLASS_ENCODING = 'float32, pooled, mean over templates, 1'  # the same for the embeddings of classes
CHUNK = 256  # prompts that are encoded together
RECENT = 64  # prompts in the cache in memory

SINGLE_FILE_PREFIXES = ('cond_stage_model.', 'conditioner.embedders.')

_ENCODERS = {'text_encoder': CLIPTextModel, 'text_encoder_2': CLIPTextModelWithProjection}
_TOKENIZERS = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}


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


def pooled_size(unet_config: Mapping[str, Any]) -> int | None:
    """Size D2 of the pooled embedding that a UNet reads; None for UNets without."""
    if unet_config['addition_embed_type'] != 'text_time':
        return None
    return unet_config['projection_class_embeddings_input_dim'] - 6 * unet_config['addition_time_embed_dim']


class PromptEncoder:
    """Encode prompts with the text encoders of a model, which are loaded for new prompts only.

    The encoders run in float32 (unlike GDF, which runs SDXL's in float16), one after the other, and are freed.

    A prompt of more tokens than the tokenizer's length (77 with begin and end) is split into chunks of that length, the
    last of which is shorter, and the states of the chunks are concatenated. Unlike GDF, which does this above 70 words
    separated by spaces, and so truncates prompts of many tokens in few words and does not pad those of 71 to 75 short
    words. The pooled embedding is that of the truncated prompt (GDF has none, and so no long prompts with SDXL).

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        revision: Commit, tag or branch of a hub id; None is that of the preset, else the newest.
        variant: Variant of the weight files; None is that of the preset, else none.
        config: Preset or diffusers folder that describes a single file, and has the tokenizers, which a file lacks.
        cache_dir: Cache folder of embeddings; None is `prompts` in the folder that the environment variable
            `DIFFSEG_CACHE` names, else in `~/.cache/diffseg`.
        textual_inversion: Files of learned tokens, see `read_inversion`.
        lora_weights: LoRA weights that are added to those of the text encoders, if they have any for these.
        truncate: Truncate long prompts at the tokenizer's length, as diffusers' pipelines do, instead of using chunks.
        device: Device of the encoders. The results are on the CPU.

    Raises:
        OSError: Text encoders, tokenizers or tokens are missing, damaged or unreachable; for those of the model, raised
            by the first prompt.
        ValueError: Learned tokens cannot be read or belong to another kind of model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: str | Path | None = None,
        cache_dir: str | Path | None = None,
        textual_inversion: Sequence[str | Path] = (),
        lora_weights: Sequence[LoraWeights] = (),
        truncate: bool = False,
        device: torch.device | str = 'cpu',
    ):
        self.model = model
        self.revision = revision
        self.variant = variant
        self.config = config
        self.folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.inversions = [read_inversion(path) for path in textual_inversion]
        self.lora_weights = lora_weights
        self.truncate = truncate
        self.device = device
        self._recent: dict[str, dict[str, Tensor]] = {}
        self._example = ''  # a prompt that was encoded before, if any was
        self._weights: dict[str, str] = {}  # of each text encoder that was loaded

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings with shape (P, N, D), in the order of the prompts, and pooled ones with shape (P, D2) for SDXL.

        Raises:
            ValueError: No prompts, or prompts with different numbers of tokens.
        """
        self.prepare(prompts)
        encoded = {prompt: self._recall(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning(
            **{name: torch.stack([encoded[prompt][name] for prompt in prompts]) for name in encoded[prompts[0]]}
        )

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode any number of prompts that are not on disk yet.

        Up to 256 prompts are encoded with one text encoder in memory at a time; for more, all are loaded once.

        Raises:
            ValueError: No prompts, or prompts with different numbers of tokens.
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
        if len(set(lengths.values())) > 1:
            examples = {length: prompt for prompt, length in lengths.items()}
            listed = '; '.join(f'{length} for {prompt[:40]!r}' for length, prompt in examples.items())
            raise ValueError(
                f'prompts have different numbers of tokens ({listed}); encode them one by one, or truncate them at '
                f"the tokenizer's length (truncate)"
            )

    def class_embeddings(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embeddings of classes, with shape (N, D), as in VPD.

        That of a class is the mean of the text encoder's pooled embedding (not projected, not normalised) over prompts
        such as 'a photo of a {}.'.

        Raises:
            ValueError: No template, a template without `{}`, or a model with two text encoders.
        """
        if wrong := [template for template in templates if '{}' not in template] or not templates:
            raise ValueError(f"templates {wrong or list(templates)} have no '{{}}' for the name of a class")
        if len(self.encoders) > 1:
            raise ValueError(
                f'{self.model} has two text encoders; embeddings of classes are defined for models with one'
            )
        path = self._path([CLASS_ENCODING, self._identity, list(names), list(templates)])
        if (stored := _read(path)) is None:
            tokenizer, encoder = self._load('text_encoder')
            embeds = [
                _pooled(tokenizer, encoder, [template.format(name) for template in templates]).mean(0).cpu()
                for name in tqdm(names, desc='encoding classes')
            ]
            stored = {'classes': torch.stack(embeds)}
            _write(path, stored, {'classes': json.dumps(list(names)), 'encoding': CLASS_ENCODING})
        return stored['classes']

    @cached_property
    def source(self) -> ModelSource:
        """Source of the text encoders."""
        return find_source(self.model, revision=self.revision, variant=self.variant, config=self.config)

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        config = load_config(self.model, revision=self.revision, config=self.config)
        pair = config.unet['addition_embed_type'] == 'text_time'
        return ('text_encoder', 'text_encoder_2') if pair else ('text_encoder',)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content of text encoders and tokenizers, independent of their source.

        Learned tokens and LoRA weights, which are added to them, are not included. The digest is stored with every
        embedding, so that no text encoder is loaded for it; if nothing was encoded before, the empty prompt is encoded.

        Raises:
            OSError: Nothing was encoded before, and the text encoders are missing, damaged or unreachable.
        """
        path = self._path_of(self._example)
        if (stored := _read(path, _encoders_of)) is not None:
            return stored
        list(self._encode([self._example], self._load))
        return self._encoders_digest()

    def _encoders_digest(self) -> str:
        return '+'.join(self._weights[part] for part in self.encoders)

    @cached_property
    def _identity(self) -> str:
        learned = [[inversion.token, inversion.digest] for inversion in self.inversions]
        learned += [[x.scale, x.digest] for x in self.lora_weights if any(map(x.part, self.encoders))]
        return _identity(self.source, self.encoders) + (f'+{json.dumps(learned)}' if learned else '')

    def _path(self, content: Any) -> Path:
        """Path of the file for a key's `content`."""
        return self.folder / f'{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}.safetensors'

    def _path_of(self, prompt: str) -> Path:
        return self._path([ENCODING, self._identity, prompt, *(['truncated'] if self.truncate else [])])

    def _length(self, prompt: str) -> int | None:
        """Number of tokens of a prompt that is in memory or on disk, None for other prompts."""
        if prompt in self._recent:
            return len(self._recent[prompt]['embeds'])
        return _read(self._path_of(prompt), _count)

    def _recall(self, prompt: str) -> dict[str, Tensor]:
        tensors = self._recent.pop(prompt, None) or _read(self._path_of(prompt))
        if tensors is None:
            tensors = dict(self._encode([prompt], self._load))[prompt]
        self._recent[prompt] = tensors
        while len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return tensors

    def _encode(self, prompts: Sequence[str], load: Loader) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Encode prompts, with the text encoders that `load` returns by name, and write them to disk."""
        for prompt, tensors in zip(prompts, self._run(prompts, load), strict=True):
            metadata = {
                'prompt': prompt,
                'encoders': self._identity,
                'encoders_digest': self._encoders_digest(),
                'encoding': ENCODING,
            }
            _write(self._path_of(prompt), tensors, metadata)
            yield prompt, tensors

    def _run(self, prompts: Sequence[str], load: Loader) -> Iterator[dict[str, Tensor]]:
        """Embeddings of each prompt on the CPU: `embeds` (N, D) and, of a pair of encoders, `pooled` (D2,)."""
        pair = len(self.encoders) == 2
        states: list[list[Tensor]] = [[] for _ in prompts]  # per prompt, one (N, D_e) for each encoder
        pooled: list[Tensor] = []
        for part in self.encoders:
            tokenizer, encoder = load(part)
            for i, prompt in enumerate(prompts):
                text = spell_out(prompt, tokenizer) if self.inversions else prompt
                chunks = [_truncated(tokenizer, text)] if self.truncate else _chunks(tokenizer, text)
                outputs = [_run(encoder, ids) for ids in chunks]
                # SD reads the last layer's normalised states (SD 2.x has its last layer cut off), SDXL those before it.
                read = [o.hidden_states[-2] if pair else o.last_hidden_state for o in outputs]
                states[i].append(torch.cat(read, dim=1)[0].cpu())
                if hasattr(encoder, 'text_projection'):
                    whole = outputs[0] if len(chunks) == 1 else _run(encoder, _truncated(tokenizer, text))
                    pooled.append(whole.text_embeds[0].cpu())
            del encoder
        for i in range(len(prompts)):
            yield {'embeds': torch.cat(states[i], dim=-1).contiguous(), **({'pooled': pooled[i]} if pair else {})}

    def _load(self, part: str) -> tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]:
        tokenizer, encoder = _load(self.source, part)
        self._weights[part] = _digest(tokenizer, encoder)
        add_tokens(tokenizer, encoder, part, self.inversions)
        for weights in self.lora_weights:
            fuse_text_lora(encoder, part, weights)
        return tokenizer, encoder.to(self.device)


class NoPromptEncoder:
    """Replaces `PromptEncoder` for models without text encoders; only the empty prompt is allowed.

    Args:
        model: Name of the model in error messages.
    """

    inversions = ()
    truncate = False
    fingerprint = None

    def __init__(self, model: str | Path):
        self.model = model

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings without tokens, (P, 0, 0). Raises a ValueError for prompts that are not empty."""
        self.prepare(prompts)
        return Conditioning(torch.empty(len(prompts), 0, 0, device='cpu'))

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raise a ValueError for prompts that are not empty."""
        if prompt := next(filter(None, prompts), None):
            raise ValueError(f'{self.model} has no text encoder and reads no prompt; leave out {prompt!r}')


def encode_prompts(
    model: str | Path,
    prompts: Sequence[str],
    *,
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Conditioning:
    """Encode prompts with a model's text encoders, or read cached embeddings.

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        prompts: Prompts with the same number of chunks; long ones with the same number of tokens.
        device: Of the encoders and the result.
        dtype: Of the result.
        options: Further options of `PromptEncoder`.

    Raises:
        OSError: Text encoders or tokenizers are missing, damaged or unreachable.
        ValueError: Prompts of different lengths, or no prompts.
    """
    return PromptEncoder(model, device=device, **options)(prompts).to(device, dtype)


def default_cache_dir() -> Path:
    """Default cache folder of embeddings."""
    return Path(os.environ.get('DIFFSEG_CACHE') or Path.home() / '.cache' / 'diffseg').expanduser() / 'prompts'


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


def _read(path: Path, read: Callable[[Path], T] = _tensors) -> T | None:
    """Result of `read` for a file, None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except SafetensorError as error:
        logger.warning('encoding a prompt again, its file %s is damaged: %s', path, error)
        return None


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file atomically."""
    with whole_file(path) as partial:
        partial.write_bytes(save(dict(tensors), metadata))


def _identity(source: ModelSource, encoders: Sequence[str]) -> str:
    """Identifier of text encoders and tokenizers, without loading them.

    That of a hub id is its name, so that cached embeddings can be used without the weights; otherwise a digest of the
    content, which does not change if a folder is moved.
    """
    if source.kind == 'hub':
        return f'{source.location}@{source.revision or "main"}/{source.variant or ""}'
    digest = hashlib.sha256()
    if source.kind == 'file':
        digest.update(fingerprint(_text_encoders_in_file(source)).encode())
        described = describe_file(source)
        if described.kind == 'hub':
            return f'{digest.hexdigest()}+{_identity(described, encoders)}'
        source = described
    for part in encoders:
        for path in _files(source, part, '*.json'):
            digest.update(path.read_bytes())
        for path in _files(source, _TOKENIZERS[part], '*'):
            digest.update(path.name.encode() + path.read_bytes())
        for path in _files(source, part, '*.safetensors') or _files(source, part, '*.bin'):
            digest.update(fingerprint(read_checkpoint(path)).encode())
    return digest.hexdigest()


def _digest(tokenizer: CLIPTokenizer, encoder: CLIPTextModel | CLIPTextModelWithProjection) -> str:
    """Sixteen hexadecimal digits that identify all that embeddings depend on in a text encoder and its tokenizer."""
    config = encoder.config
    settings = [config.hidden_act, config.num_attention_heads, config.layer_norm_eps]
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.model_max_length]
    content = json.dumps([fingerprint(encoder.state_dict()), settings, words])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _files(source: ModelSource, part: str, pattern: str) -> list[Path]:
    folder = Path(source.location, part)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{source.location} has no {part}/, so that no prompt can be encoded; expected {FOLDER_LAYOUT}. '
            'Precomputed embeddings can be given instead of prompts'
        )
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _text_encoders_in_file(source: ModelSource) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(source.location)
    tensors = {name: tensor for name, tensor in checkpoint.items() if name.startswith(SINGLE_FILE_PREFIXES)}
    if not tensors:
        raise OSError(f'{source.location} has no text encoder; precomputed embeddings can replace prompts')
    return tensors


@torch.no_grad()
def _run(encoder: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor) -> Any:
    return encoder(ids.to(encoder.device), output_hidden_states=True)


def _pooled(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Pooled embeddings (P, D): the last layer's normalised state of the first end token."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding=True, max_length=length, truncation=True, return_tensors='pt').input_ids
    return _run(encoder, ids).pooler_output


def _truncated(tokenizer: CLIPTokenizer, prompt: str) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding='max_length', max_length=length, truncation=True, return_tensors='pt').input_ids


def _chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[Tensor]:
    """Token ids with shape (1, N) each: the padded prompt, or the chunks of a long one."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, truncation=False, verbose=False, return_tensors='pt').input_ids
    return [_truncated(tokenizer, prompt)] if ids.shape[1] <= length else list(ids.split(length, dim=1))


def _load(source: ModelSource, part: str) -> tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]:
    described = describe_file(source) if source.kind == 'file' else source
    where = {'revision': described.revision} if described.kind == 'hub' else {}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(described.location, subfolder=_TOKENIZERS[part], **where)
    except (OSError, ValueError) as error:
        raise explain(described, _TOKENIZERS[part], error) from error
    cls = _ENCODERS[part]
    try:
        if source.kind == 'file':
            state = _text_encoders_in_file(source)
            encoder = create_diffusers_clip_model_from_ldm(
                cls, state, subfolder=part, config=described.location, torch_dtype=torch.float32
            )
            missing = [name for name, tensor in encoder.state_dict().items() if tensor.is_meta]
        else:
            encoder, info = cls.from_pretrained(
                described.location,
                subfolder=part,
                variant=source.variant,
                dtype=torch.float32,
                output_loading_info=True,
                **where,
            )
            missing = sorted(info['missing_keys'])
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise explain(source, part, error) from error
    if missing:
        raise OSError(f'the {part} of {source.location} lacks {len(missing)} tensors, such as {missing[0]}')
    return tokenizer, encoder.eval()
