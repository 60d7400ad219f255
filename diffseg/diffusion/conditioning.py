"""Prompts of Stable Diffusion and SDXL: token embeddings and, for SDXL, a pooled embedding."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffseg.diffusion.embeddings import Conditioning
from diffseg.diffusion.loading import (
    ModelSource,
    describe_file,
    explain,
    fingerprint,
    load_config,
    read_checkpoint,
    without_progress_bar,
)
from diffseg.diffusion.lora import LoraWeights, fuse_text_lora
from diffseg.diffusion.prompt_store import PromptStore, identify, read, tokenizer_of, write
from diffseg.diffusion.textual_inversion import add_tokens, read_inversion, spell_out

Loader = Callable[[str], tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]]  # by name of the encoder

# Part of an embedding's key: changed whenever the encoding of a prompt changes.
ENCODING = 'float32, chunks of the tokenizer length, pooled of the truncated prompt, 2'
CLASS_ENCODING = 'float32, pooled, mean over templates, 1'  # the same for the embeddings of classes

SINGLE_FILE_PREFIXES = ('cond_stage_model.', 'conditioner.embedders.')

_ENCODERS = {'text_encoder': CLIPTextModel, 'text_encoder_2': CLIPTextModelWithProjection}


def pooled_size(network_config: Mapping[str, Any]) -> int | None:
    """Size D2 of the pooled embedding that a UNet reads; None for UNets without."""
    if network_config['addition_embed_type'] != 'text_time':
        return None
    return network_config['projection_class_embeddings_input_dim'] - 6 * network_config['addition_time_embed_dim']


class PromptEncoder(PromptStore):
    """Encode prompts with the text encoders of a model, which are loaded for new prompts only.

    The encoders run in float32 (unlike GDF, which runs SDXL's in float16), one after the other, and are freed.

    A prompt of more tokens than the tokenizer's length (77 with begin and end) is split into chunks of that length, the
    last of which is shorter, and the states of the chunks are concatenated. Unlike GDF, which does this above 70 words
    separated by spaces, and so truncates prompts of many tokens in few words and does not pad those of 71 to 75 short
    words. The pooled embedding is that of the truncated prompt (GDF has none, and so no long prompts with SDXL).

    The fingerprint does not include learned tokens and LoRA weights.

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

    encoding = ENCODING

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
        super().__init__(model, revision=revision, variant=variant, config=config, cache_dir=cache_dir, device=device)
        self.inversions = [read_inversion(path) for path in textual_inversion]
        self.lora_weights = lora_weights
        self.truncate = truncate
        self._weights: dict[str, str] = {}  # of each text encoder that was loaded

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
        if (stored := read(path)) is None:
            tokenizer, encoder = self._load('text_encoder')
            embeds = [
                _pooled(tokenizer, encoder, [template.format(name) for template in templates]).mean(0).cpu()
                for name in tqdm(names, desc='encoding classes')
            ]
            stored = {'classes': torch.stack(embeds)}
            write(path, stored, {'classes': json.dumps(list(names)), 'encoding': CLASS_ENCODING})
        return stored['classes']

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        config = load_config(self.model, revision=self.revision, config=self.config)
        pair = config.network['addition_embed_type'] == 'text_time'
        return ('text_encoder', 'text_encoder_2') if pair else ('text_encoder',)

    def _encoders_digest(self) -> str:
        return '+'.join(self._weights[part] for part in self.encoders)

    @cached_property
    def _identity(self) -> str:
        learned = [[inversion.token, inversion.digest] for inversion in self.inversions]
        learned += [[x.scale, x.digest] for x in self.lora_weights if any(map(x.part, self.encoders))]
        return _identity(self.source, self.encoders) + (f'+{json.dumps(learned)}' if learned else '')

    def _settings(self) -> list[Any]:
        return ['truncated'] if self.truncate else []

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
                layer = [o.hidden_states[-2] if pair else o.last_hidden_state for o in outputs]
                states[i].append(torch.cat(layer, dim=1)[0].cpu())
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

    def for_negative_prompts(self) -> 'NoPromptEncoder':
        """The encoder of negative prompts: itself."""
        return self

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


def _identity(source: ModelSource, encoders: Sequence[str]) -> str:
    """Identifier of text encoders and tokenizers, without loading them, see `identify`."""
    if source.kind != 'file':
        return identify(source, encoders)
    in_file = fingerprint(_text_encoders_in_file(source)).encode()
    described = describe_file(source)
    if described.kind == 'hub':
        return f'{hashlib.sha256(in_file).hexdigest()}+{identify(described, encoders)}'
    return identify(described, encoders, in_file)


def _digest(tokenizer: CLIPTokenizer, encoder: CLIPTextModel | CLIPTextModelWithProjection) -> str:
    """Sixteen hexadecimal digits that identify all that embeddings depend on in a text encoder and its tokenizer."""
    config = encoder.config
    settings = [config.hidden_act, config.num_attention_heads, config.layer_norm_eps]
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.model_max_length]
    content = json.dumps([fingerprint(encoder.state_dict()), settings, words])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
        tokenizer = CLIPTokenizer.from_pretrained(described.location, subfolder=tokenizer_of(part), **where)
    except (OSError, ValueError) as error:
        raise explain(described, tokenizer_of(part), error) from error
    cls = _ENCODERS[part]
    try:
        if source.kind == 'file':
            state = _text_encoders_in_file(source)
            encoder = create_diffusers_clip_model_from_ldm(
                cls, state, subfolder=part, config=described.location, torch_dtype=torch.float32
            )
            missing = [name for name, tensor in encoder.state_dict().items() if tensor.is_meta]
        else:
            with without_progress_bar(described.location):
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
