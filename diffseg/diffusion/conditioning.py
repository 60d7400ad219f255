"""Prompts as what the UNet reads: token embeddings and, for SDXL, a pooled embedding and time ids.

A prompt is encoded once. Its embedding is kept on disk under a key of its content (text encoders, prompt, settings);
where it is there, no text encoder is loaded.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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

logger = logging.getLogger(__name__)

# Belongs to the key of an embedding: changes whenever the same prompt would be encoded differently.
ENCODING = 'float32, chunks of the tokenizer length, pooled of the truncated prompt, 1'
SINGLE_FILE_PREFIXES = ('cond_stage_model.', 'conditioner.embedders.')

_ENCODERS = {'text_encoder': CLIPTextModel, 'text_encoder_2': CLIPTextModelWithProjection}
_TOKENIZERS = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        embeds: One row for each prompt, with shape (P, N, D).
        pooled: SDXL's pooled embeddings, with shape (P, D2); None for models without.
    """

    embeds: Tensor
    pooled: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The embeddings, and the pooled ones where there are such."""
        return [self.embeds] if self.pooled is None else [self.embeds, self.pooled]

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
            size: Height and width of the images in pixels. SDXL is told that this is the original size, uncropped.
            device: Of the arguments; None is the embeddings'.
            dtype: Of the arguments; None is the embeddings'.

        Returns:
            `encoder_hidden_states` (B, N, D) and `added_cond_kwargs`: None, or `text_embeds` (B, D2) and `time_ids`
            (B, 6), which are original height and width, top and left of the crop, target height and width; in float32
            always, for half precision has no 2049.
        """
        index = torch.as_tensor(index, device=self.embeds.device)
        embeds = self.embeds[index].to(device, dtype)
        added = None
        if self.pooled is not None:
            time_ids = torch.tensor([*size, 0, 0, *size], device=embeds.device, dtype=torch.float32)
            pooled = self.pooled[index.to(self.pooled.device)].to(embeds)
            added = {'text_embeds': pooled, 'time_ids': time_ids.expand(len(index), -1)}
        return {'encoder_hidden_states': embeds, 'added_cond_kwargs': added}


def encode_prompts(
    model: str | Path,
    prompts: Sequence[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.float32,
) -> Conditioning:
    """Encode prompts with a model's text encoders, or read what was encoded before.

    The encoders run in float32 (unlike GDF, which runs SDXL's in float16), one after the other, and are freed.

    A prompt of more tokens than the tokenizer's length (77 with begin and end) is cut into chunks of that length, of
    which the last is short, and the chunks' states are concatenated. Unlike GDF, which does this above 70 words
    separated by spaces, and so truncates prompts of many tokens in few words and pads none of 71 to 75 short words. The
    pooled embedding is that of the truncated prompt (GDF has none, and so no long prompts with SDXL).

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        prompts: All of the same number of chunks; long ones of the same number of tokens.
        revision: Commit, tag or branch of a hub id; None is the preset's, else the newest.
        variant: Variant of the weight files; None is the preset's, else none.
        config: Preset or diffusers folder that describes a single file, and has the tokenizers, which a file has not.
        cache_dir: Where embeddings are kept; None is `prompts` in the folder that the environment variable
            `DIFFSEG_CACHE` names, else in `~/.cache/diffseg`.
        device: Where encoders run. The result is there too.
        dtype: Of the result.

    Returns:
        Embeddings with shape (P, N, D), in the order of the prompts, and pooled ones with shape (P, D2) for SDXL.

    Raises:
        OSError: Text encoders or tokenizers are missing, damaged or unreachable.
        ValueError: Prompts of different lengths, or none.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f'prompts is {prompts!r}; it is a sequence of one or more prompts')
    source = find_source(model, revision=revision, variant=variant, config=config)
    pair = load_config(model, revision=revision, config=config).unet['addition_embed_type'] == 'text_time'
    encoders = ('text_encoder', 'text_encoder_2') if pair else ('text_encoder',)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    identity = _identity(source, encoders)
    paths = {prompt: folder / f'{_key(identity, prompt)}.safetensors' for prompt in dict.fromkeys(prompts)}
    found = {prompt: _read(path) for prompt, path in paths.items()}
    if missing := [prompt for prompt, tensors in found.items() if tensors is None]:
        for prompt, tensors in zip(missing, _encode(source, encoders, missing, device), strict=True):
            _write(paths[prompt], tensors, {'prompt': prompt, 'encoders': identity, 'encoding': ENCODING})
            found[prompt] = tensors
    lengths = {prompt: len(tensors['embeds']) for prompt, tensors in found.items()}
    if len(set(lengths.values())) > 1:
        listed = '; '.join(f'{n} for {prompt[:40]!r}' for prompt, n in lengths.items())
        raise ValueError(f'prompts have different numbers of tokens ({listed}); encode them one by one')
    stacked = {
        name: torch.stack([found[prompt][name] for prompt in prompts]).to(device, dtype) for name in found[prompts[0]]
    }
    return Conditioning(**stacked)


def default_cache_dir() -> Path:
    """Where embeddings are kept unless another folder is named."""
    return Path(os.environ.get('DIFFSEG_CACHE') or Path.home() / '.cache' / 'diffseg').expanduser() / 'prompts'


def _key(identity: str, prompt: str) -> str:
    return hashlib.sha256(json.dumps([ENCODING, identity, prompt]).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors in a file, None if it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        logger.warning('encoding a prompt anew, its file %s is damaged: %s', path, error)
        return None


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that is there as a whole or not at all, whoever else writes it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as file:
        try:
            file.write(save(dict(tensors), metadata))
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _identity(source: ModelSource, encoders: Sequence[str]) -> str:
    """What tells text encoders and tokenizers apart, found without loading them.

    That of a hub id is its name, so that embeddings on disk can be used without the weights; else it is a digest of the
    content, so that it survives moving a folder.
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


def _files(source: ModelSource, part: str, pattern: str) -> list[Path]:
    folder = Path(source.location, part)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{source.location} has no {part}/, so that no prompt can be encoded; expected {FOLDER_LAYOUT}. Embeddings '
            'made elsewhere can be given instead of prompts'
        )
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _text_encoders_in_file(source: ModelSource) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(source.location)
    tensors = {name: tensor for name, tensor in checkpoint.items() if name.startswith(SINGLE_FILE_PREFIXES)}
    if not tensors:
        raise OSError(f'{source.location} has no text encoder; embeddings made elsewhere can replace prompts')
    return tensors


def _encode(
    source: ModelSource, encoders: Sequence[str], prompts: Sequence[str], device: torch.device | str
) -> Iterator[dict[str, Tensor]]:
    """Embeddings of each prompt on the CPU: `embeds` (N, D) and, of a pair of encoders, `pooled` (D2,)."""
    pair = len(encoders) == 2
    states: list[list[Tensor]] = [[] for _ in prompts]  # per prompt, one (N, D_e) for each encoder
    pooled: list[Tensor] = []
    for part in encoders:
        tokenizer, encoder = _load(source, part)
        encoder = encoder.to(device)
        for i, prompt in enumerate(prompts):
            chunks = _chunks(tokenizer, prompt)
            outputs = [_run(encoder, ids) for ids in chunks]
            # SD reads the last layer's normalised states (SD 2.x has its last layer cut off), SDXL the layer before.
            states[i].append(torch.cat([o.hidden_states[-2] if pair else o.last_hidden_state for o in outputs], 1)[0])
            if hasattr(encoder, 'text_projection'):
                whole = outputs[0] if len(chunks) == 1 else _run(encoder, _truncated(tokenizer, prompt))
                pooled.append(whole.text_embeds[0])
        del encoder
    for i in range(len(prompts)):
        tensors = {'embeds': torch.cat(states[i], dim=-1), **({'pooled': pooled[i]} if pair else {})}
        yield {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _run(encoder: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor) -> Any:
    return encoder(ids.to(encoder.device), output_hidden_states=True)


def _truncated(tokenizer: CLIPTokenizer, prompt: str) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding='max_length', max_length=length, truncation=True, return_tensors='pt').input_ids


def _chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[Tensor]:
    """Token ids with shape (1, N) each: the padded prompt, or of a long one its pieces."""
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
