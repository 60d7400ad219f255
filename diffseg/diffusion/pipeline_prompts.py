"""Prompts of diffusion transformers, encoded by the `encode_prompt` of diffusers' pipelines.

Each family has its own text encoders, lengths, masks and templates around a prompt. They are those of the pipeline; a
table says which parts it needs for them, and which fields of `Conditioning` its results are.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, Transformer2DModel
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available, logging

from diffseg.diffusion.conditioning import NoPromptEncoder, PromptEncoder
from diffseg.diffusion.loading import ModelSource, explain, find_source, fingerprint, without_progress_bar
from diffseg.diffusion.lora import LoraWeights
from diffseg.diffusion.prompt_store import Loader, PromptStore, identify, read, tokenizer_of, write

# Part of an embedding's key: changed whenever the use of `encode_prompt` changes.
ENCODING = 'encode_prompt of a pipeline, one prompt at a time, 1'
FIRST_TOKENS = 'first tokens of T5, 1'  # the same for the embeddings of concepts
ENDING_WITH_T5 = ('FluxPipeline', 'StableDiffusion3Pipeline')  # the last tokens of their embeddings are T5's
WITHOUT_TEXT = ('UNet2DModel', 'DiTTransformer2DModel')  # classes of networks that read no prompt
# Of a text encoder's configuration, what its results do not depend on
VOLATILE = ('_name_or_path', 'architectures', 'dtype', 'torch_dtype', 'transformers_version')


class Call(NamedTuple):
    """A call of `encode_prompt`.

    Attributes:
        fields: The fields of `Conditioning` that its results are, None for results that the network does not read.
        arguments: Further arguments.
    """

    fields: tuple[str | None, ...]
    arguments: Mapping[str, Any] = {}


class PromptEncoding(NamedTuple):
    """How a pipeline encodes prompts.

    Attributes:
        network: Class of its transformer.
        calls: Of `encode_prompt`.
        length: Number of tokens (`max_sequence_length`); None if the calls fix it.
        encoders: Its text encoders; each has a tokenizer.
        negative: As `calls`, for negative prompts, if they are encoded in another way.
        defaults: Arguments of `encode_prompt` that are the defaults of `__call__`.
        templates: Attributes of the pipeline with text that is added to prompts.
        options: Arguments of the pipeline, other than its components.
    """

    network: str
    calls: tuple[Call, ...]
    length: int | None
    encoders: tuple[str, ...] = ('text_encoder',)
    negative: tuple[Call, ...] = ()
    defaults: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}


_UNGUIDED = {'do_classifier_free_guidance': False}
_GUIDED = {'do_classifier_free_guidance': True}
_MASKED = (Call(('embeds', 'mask', None, None), _UNGUIDED),)
_MASKED_NEGATIVE = (Call((None, None, 'embeds', 'mask'), _GUIDED),)
# PixArt's captions are not cleaned (`clean_caption`), which depends on the libraries that are installed.
ENCODINGS = {
    'PixArtAlphaPipeline': PromptEncoding('PixArtTransformer2DModel', _MASKED, 120),
    'PixArtSigmaPipeline': PromptEncoding('PixArtTransformer2DModel', _MASKED, 300),
    'StableDiffusion3Pipeline': PromptEncoding(
        'SD3Transformer2DModel',
        (Call(('embeds', None, 'pooled', None), {**_UNGUIDED, 'prompt_2': None, 'prompt_3': None}),),
        256,
        ('text_encoder', 'text_encoder_2', 'text_encoder_3'),
    ),
    'FluxPipeline': PromptEncoding(
        'FluxTransformer2DModel',
        (Call(('embeds', 'pooled', None)),),
        512,
        ('text_encoder', 'text_encoder_2'),
    ),
    'Flux2Pipeline': PromptEncoding(
        'Flux2Transformer2DModel', (Call(('embeds', None)),), 512, templates=('system_message',)
    ),
    'Flux2KleinPipeline': PromptEncoding('Flux2Transformer2DModel', (Call(('embeds', None)),), 512),
    'QwenImagePipeline': PromptEncoding(
        'QwenImageTransformer2DModel',
        (Call(('embeds', 'mask')),),
        512,
        templates=('prompt_template_encode', 'prompt_template_encode_start_idx', 'tokenizer_max_length'),
    ),
    'SanaPipeline': PromptEncoding(
        'SanaTransformer2DModel', _MASKED, 300, negative=_MASKED_NEGATIVE, defaults=('complex_human_instruction',)
    ),
    'HunyuanDiTPipeline': PromptEncoding(
        'HunyuanDiT2DModel',
        (
            Call(('embeds', None, 'mask', None), {**_UNGUIDED, 'text_encoder_index': 0, 'max_sequence_length': 77}),
            Call(
                ('embeds_2', None, 'mask_2', None), {**_UNGUIDED, 'text_encoder_index': 1, 'max_sequence_length': 256}
            ),
        ),
        None,
        ('text_encoder', 'text_encoder_2'),
        options={'requires_safety_checker': False},
    ),
    'AuraFlowPipeline': PromptEncoding(  # the embeddings of padding are zeros, and the network reads no mask
        'AuraFlowTransformer2DModel', (Call(('embeds', None, None, None), _UNGUIDED),), 256
    ),
    'Lumina2Pipeline': PromptEncoding(
        'Lumina2Transformer2DModel', _MASKED, 256, negative=_MASKED_NEGATIVE, templates=('system_prompt',)
    ),
    'ZImagePipeline': PromptEncoding('ZImageTransformer2DModel', (Call(('embeds', None), _UNGUIDED),), 512),
}


def find_pipeline(source: ModelSource, network: str | None = None) -> str:
    """Name of the pipeline that encodes the prompts of a model, one of `ENCODINGS`.

    It is that of the model's preset, or that of `model_index.json`, if the table has it, else the one with the model's
    class of transformers. Of a hub id, only those of the transformer's class are considered if `network` is given, so
    that the hub is not needed unless there are several.

    Args:
        source: Of kind 'folder' or 'hub'.
        network: Class of the transformer; None is that of `transformer/config.json`.

    Raises:
        OSError: The model does not describe its transformer.
        ValueError: The class of the transformer belongs to none of the pipelines, or to several.
    """
    if source.preset is not None and source.preset.pipeline is not None:
        return source.preset.pipeline
    index = {}
    candidates = _pipelines_with(network)
    if source.kind != 'hub' or len(candidates) != 1:
        index = _index(source)
        if (name := index.get('_class_name')) in ENCODINGS:
            return name
    if network is None:
        try:
            config = Transformer2DModel.load_config(source.location, subfolder='transformer', revision=source.revision)
        except (OSError, ValueError) as error:
            raise explain(source, 'transformer', error) from error
        network = config.get('_class_name')
        candidates = _pipelines_with(network)
    if len(candidates) == 1:
        return candidates[0]
    named = f' (its model_index.json names {index["_class_name"]})' if '_class_name' in index else ''
    if candidates:
        raise ValueError(
            f'{source.location}{named} has a {network}, which belongs to {" and ".join(candidates)}; say which with '
            'pipeline=...'
        )
    networks = ', '.join(dict.fromkeys(encoding.network for encoding in ENCODINGS.values()))
    raise ValueError(
        f'no prompts can be encoded for {source.location}{named} with a {network}; supported are models with '
        f'{networks}. Precomputed embeddings can be given instead of prompts'
    )


class PipelinePromptEncoder(PromptStore):
    """Encode prompts with the text encoders of a diffusers pipeline of a diffusion transformer.

    A prompt is what the pipeline makes of it (lower case for PixArt, in a template or after an instruction for others),
    truncated at the sequence length. Fields of the result are those that the network reads: `embeds` and, where it
    reads them, `pooled`, `mask`, or `embeds_2` and `mask_2`. Prompts are encoded one by one. Where the pipeline does
    not pad them to the sequence length (QwenImage, Z-Image), those of different lengths are padded with zeros, and
    `mask` tells their tokens; without a mask, all tokens of all prompts exist.

    Args:
        model: A preset's name, a hub id, a diffusers folder, or a checkpoint file with `config`.
        network: Class of the transformer, if known; see `find_pipeline`.
        pipeline: Name of the pipeline, one of `ENCODINGS`; None finds it.
        revision: Commit, tag or branch of a hub id; None is that of the preset, else the newest.
        variant: Variant of the weight files; None is that of the preset, else none.
        config: Preset, hub id or diffusers folder with the text encoders and tokenizers of a single file.
        cache_dir: Cache folder of embeddings; None is that of `default_cache_dir`.
        max_sequence_length: Number of tokens; None is the pipeline's (512 for Flux; FLUX.1-schnell takes 256 at most,
            as diffusers documents).
        negative: Encode prompts as the pipeline does with negative prompts, see `for_negative_prompts`.
        dtype: Of the text encoders and the embeddings.
        device: Of the text encoders. The results are on the CPU.

    Raises:
        ImportError: A tokenizer needs packages that are not installed; raised by the first prompt.
        OSError: Text encoders or tokenizers are missing, damaged or unreachable; raised by the first prompt.
        ValueError: Unknown pipeline, or a sequence length that cannot be used.
    """

    encoding = ENCODING
    pads = True
    inversions = ()
    truncate = True

    def __init__(
        self,
        model: str | Path,
        *,
        network: str | None = None,
        pipeline: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        config: str | Path | None = None,
        cache_dir: str | Path | None = None,
        max_sequence_length: int | None = None,
        negative: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = 'cpu',
    ):
        super().__init__(model, revision=revision, variant=variant, config=config, cache_dir=cache_dir, device=device)
        if pipeline is not None and pipeline not in ENCODINGS:
            raise ValueError(f'pipeline is {pipeline!r}; it is one of {", ".join(ENCODINGS)}')
        if max_sequence_length is not None and max_sequence_length < 1:
            raise ValueError(f'max_sequence_length is {max_sequence_length}; it is 1 or more')
        self.network = network
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self.negative = negative
        self._weights: dict[str, str] = {}  # digests of the text encoders, once they have been loaded

    def for_negative_prompts(self) -> 'PipelinePromptEncoder':
        """The encoder of negative prompts: without Sana's instruction and Lumina's system prompt; else itself."""
        if not self._row.negative:
            return self
        return PipelinePromptEncoder(
            self.model,
            network=self.network,
            pipeline=self.pipeline,
            revision=self.revision,
            variant=self.variant,
            config=self.config,
            cache_dir=self.folder,
            max_sequence_length=self.max_sequence_length,
            negative=True,
            dtype=self.dtype,
            device=self.device,
        )

    def first_tokens(self, texts: Sequence[str]) -> Tensor:
        """The embedding of each text's first token by T5, as ConceptAttention takes them, kept on disk.

        It depends on the whole text, which T5 reads in both directions, and on the sequence length, since diffusers'
        pipelines of Flux and SD3 do not mask the padding.

        Args:
            texts: Such as names of classes.

        Returns:
            A tensor with shape (len(texts), D), on the CPU.

        Raises:
            ValueError: No texts, or a pipeline other than those of Flux and SD3.
        """
        if self.pipeline_name not in ENDING_WITH_T5:
            raise ValueError(
                f"first tokens are T5's of {' and '.join(ENDING_WITH_T5)}; {self.model} has a {self.pipeline_name}"
            )
        if isinstance(texts, str) or not texts:
            raise ValueError(f'texts is {texts!r}; it is a sequence of one or more texts')
        path = self._path([FIRST_TOKENS, self._identity, list(texts), *self._settings()])
        if (stored := read(path)) is None:
            pipeline = self._load()
            length = self.max_sequence_length or self._row.length
            rows = [
                self._encode_one(pipeline, text)['embeds'][-length] for text in tqdm(texts, desc='encoding concepts')
            ]
            stored = {'embeds': torch.stack(rows)}
            write(path, stored, {'texts': json.dumps(list(texts)), 'encoding': FIRST_TOKENS})
        return stored['embeds']

    @cached_property
    def source(self) -> ModelSource:
        """Source of the text encoders."""
        source = super().source
        if source.kind != 'file':
            return source
        if source.config is None:
            raise OSError(
                f'{source.location} is a single file, of which no text encoders are read; name a model in the '
                'diffusers layout that has them with config=FOLDER, or give precomputed embeddings instead of prompts'
            )
        return find_source(source.config)

    @cached_property
    def pipeline_name(self) -> str:
        """Name of the pipeline."""
        return find_pipeline(self.source, self.network) if self.pipeline is None else self.pipeline

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return self._row.encoders

    @property
    def _row(self) -> PromptEncoding:
        return ENCODINGS[self.pipeline_name]

    @cached_property
    def _calls(self) -> list[Call]:
        """Calls of `encode_prompt` with all arguments."""
        row = self._row
        if row.length is None and self.max_sequence_length is not None:
            raise ValueError(
                f'max_sequence_length is {self.max_sequence_length}, but the network of {self.model} reads fixed '
                f'numbers of tokens; leave it out'
            )
        shared = {} if row.length is None else {'max_sequence_length': self.max_sequence_length or row.length}
        parameters = inspect.signature(self._pipeline_class.__call__).parameters
        shared |= {name: parameters[name].default for name in row.defaults}
        calls = row.negative if self.negative and row.negative else row.calls
        return [Call(call.fields, {**shared, **call.arguments}) for call in calls]

    @property
    def _pipeline_class(self) -> type[DiffusionPipeline]:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # of what image processors, which are not used, lack
        try:
            return getattr(diffusers, self.pipeline_name)
        finally:
            logging.set_verbosity(verbosity)

    def _pipeline_of(self, **components: Any) -> DiffusionPipeline:
        """The pipeline with these components alone."""
        parameters = list(inspect.signature(self._pipeline_class.__init__).parameters.values())[1:]
        none = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
        return self._pipeline_class(**{**none, **components, **self._row.options})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that embeddings depend on apart from text encoders and tokenizers, ready for JSON."""
        empty = self._pipeline_of()
        parameters = inspect.signature(empty.encode_prompt).parameters.values()
        return {
            'pipeline': self.pipeline_name,
            'calls': [[call.fields, dict(call.arguments)] for call in self._calls],
            'defaults': {p.name: p.default for p in parameters if p.default is not p.empty},
            'templates': {name: getattr(empty, name) for name in self._row.templates},
            'negative': self.negative,
            'dtype': str(self.dtype).removeprefix('torch.'),
            'diffusers': '.'.join(diffusers.__version__.split('.')[:2]),  # whose code has chat templates' options
        }

    def _settings(self) -> list[Any]:
        return [self.settings]

    @cached_property
    def _identity(self) -> str:
        return identify(self.source, self.encoders)

    def _encoders_digest(self) -> str:
        settings = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]
        return '+'.join([*(self._weights[part] for part in self.encoders), settings])

    @torch.no_grad()
    def _encode_one(self, pipeline: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        encoded = {}
        for fields, arguments in self._calls:
            if self.negative and self._row.negative:
                arguments = {**arguments, 'negative_prompt': [prompt]}
            results = pipeline.encode_prompt([prompt], device=torch.device(self.device), **arguments)
            for field, result in zip(fields, results, strict=True):
                if field is not None and result is not None:  # no mask of QwenImage, where all tokens exist
                    encoded[field] = result[0].cpu().contiguous()
        return encoded

    def _run(self, prompts: Sequence[str], load: Loader) -> Iterator[dict[str, Tensor]]:
        pipeline = load()
        for prompt in prompts:
            yield self._encode_one(pipeline, prompt)

    def _load(self) -> DiffusionPipeline:
        index = _index(self.source)
        components = {}
        for part in self.encoders:
            tokenizer = _load_tokenizer(self.source, tokenizer_of(part), index)
            encoder = _load_encoder(self.source, part, index, self.dtype)
            self._weights[part] = _digest(tokenizer, encoder)
            components |= {tokenizer_of(part): tokenizer, part: encoder.to(self.device)}
        return self._pipeline_of(**components)


def prompt_encoder(
    model: str | Path,
    network: str,
    *,
    textual_inversion: Sequence[str | Path] = (),
    lora_weights: Sequence[LoraWeights] = (),
    truncate: bool = False,
    pipeline: str | None = None,
    max_sequence_length: int | None = None,
    **options: Any,
) -> PromptEncoder | PipelinePromptEncoder | NoPromptEncoder:
    """The encoder of prompts for a class of networks.

    Args:
        model: A preset's name, a hub id, a diffusers folder or a checkpoint file.
        network: Class of the UNet or transformer.
        textual_inversion: Files of learned tokens, for `UNet2DConditionModel` alone.
        lora_weights: LoRA weights; those of text encoders are added to these, for `UNet2DConditionModel` alone.
        truncate: See `PromptEncoder`; prompts of transformers are always truncated.
        pipeline: Name of the pipeline, for transformers alone.
        max_sequence_length: Number of tokens, for transformers alone.
        options: Further options of `PromptEncoder` and `PipelinePromptEncoder`: `revision`, `variant`, `config`,
            `cache_dir`, `device`, and, for transformers alone, `dtype`.

    Raises:
        ValueError: An option that the network's encoder does not have.
    """
    transformer_options = {'pipeline': pipeline, 'max_sequence_length': max_sequence_length}
    if network == 'UNet2DConditionModel':
        _refuse(network, **transformer_options)
        return PromptEncoder(
            model, textual_inversion=textual_inversion, lora_weights=lora_weights, truncate=truncate, **options
        )
    _refuse(network, textual_inversion=textual_inversion)
    for weights in lora_weights:
        if any(name.startswith('text_encoder') for name in weights.state):
            raise ValueError(
                f'{weights.path} has LoRA weights of text encoders, which can be added to those of Stable Diffusion '
                f'and SDXL alone, not to those of a {network}; give a file with the weights of the network'
            )
    if network in WITHOUT_TEXT:
        _refuse(network, **transformer_options)
        return NoPromptEncoder(model)
    return PipelinePromptEncoder(model, network=network, **transformer_options, **options)


def _refuse(network: str, **options: Any) -> None:
    """Raise a ValueError for options that are given."""
    if names := ' and '.join(name for name, value in options.items() if value):
        raise ValueError(f'prompts of a {network} are encoded without {names}; leave out {names}')


def _pipelines_with(network: str | None) -> list[str]:
    return [name for name, encoding in ENCODINGS.items() if encoding.network == network]


def _index(source: ModelSource) -> dict[str, Any]:
    """Content of `model_index.json`; empty for folders without."""
    if source.kind == 'folder' and not Path(source.location, DiffusionPipeline.config_name).is_file():
        return {}
    try:
        return dict(DiffusionPipeline.load_config(source.location, revision=source.revision))
    except (OSError, ValueError) as error:
        raise explain(source, DiffusionPipeline.config_name, error) from error


def _class_in(index: Mapping[str, Any], part: str, base: type) -> type | None:
    """The class that `model_index.json` names for a part, if it is one of transformers and a subclass of `base`."""
    match index.get(part):
        case ['transformers', str(name)]:
            cls = getattr(transformers, name, None)
            return cls if isinstance(cls, type) and issubclass(cls, base) else None
    return None


def _where(source: ModelSource, part: str) -> dict[str, Any]:
    return {'subfolder': part, **({'revision': source.revision} if source.kind == 'hub' else {})}


def _load_tokenizer(source: ModelSource, part: str, index: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer; of a processor of images and text, such as that of Mistral 3, the tokenizer alone."""
    cls = _class_in(index, part, PreTrainedTokenizerBase) or AutoTokenizer
    try:
        return cls.from_pretrained(source.location, **_where(source, part))
    except (OSError, ValueError, ImportError) as error:
        if 'tiktoken' in str(error) and not (is_sentencepiece_available() and is_protobuf_available()):
            raise ImportError(
                f'{part} of {source.location} is a SentencePiece model, for which packages are missing: pip install '
                f"'diffseg[text]'"
            ) from error
        raise explain(source, part, error) from error


def _load_encoder(source: ModelSource, part: str, index: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    where = _where(source, part)
    try:
        cls = _class_in(index, part, PreTrainedModel)
        if cls is None:
            config, _ = PreTrainedConfig.get_config_dict(source.location, **where)
            name = next(iter(config.get('architectures') or ()), None)
            cls = _class_in({part: ('transformers', name)}, part, PreTrainedModel)
        if cls is None:
            raise ValueError(
                f'neither model_index.json nor config.json names a text encoder of transformers for {part}'
            )
        with without_progress_bar(source.location):
            encoder, info = cls.from_pretrained(
                source.location, variant=source.variant, dtype=dtype, output_loading_info=True, **where
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise explain(source, part, error) from error
    if missing := sorted(info['missing_keys']):
        raise OSError(f'the {part} of {source.location} lacks {len(missing)} tensors, such as {missing[0]}')
    return encoder.eval()


def _digest(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> str:
    """Sixteen hexadecimal digits that identify all that embeddings depend on in a text encoder and its tokenizer."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    content = [
        fingerprint(encoder.state_dict()),
        _lasting(encoder.config.to_dict()),
        {key: value for key, value in words.items() if key not in ('padding', 'truncation')},  # of the last call
        [tokenizer.pad_token_id, tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lasting(config: Any) -> Any:
    """A configuration without what results do not depend on."""
    if not isinstance(config, Mapping):
        return config
    return {str(key): _lasting(value) for key, value in config.items() if key not in VOLATILE}
