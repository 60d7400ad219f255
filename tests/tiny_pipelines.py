"""Tiny random pipelines of diffusion transformers: complete diffusers folders, with the parts of the real ones."""

import inspect
import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from tiny_transformers import KINDS as TRANSFORMERS
from tiny_transformers import randomise
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT = [  # on which tokenizers are trained
    'Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships.',
    'You are an assistant designed to generate superior images with the superior degree of image-text alignment.',
    'You are an AI that reasons about image descriptions. You give structured responses focusing on object',
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for",
    'Evaluate the level of detail in the user prompt: <Prompt Start> a photo of a horse, two dogs, an elephant.',
]
LAYERS = {'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1, 'intermediate_size': 16}
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n'
    '{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}'
)
MISTRAL_TEMPLATE = (
    '<s>{% for message in messages %}'
    "{{ '[SYSTEM_PROMPT]' if message['role'] == 'system' else '[INST]' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message['role'] == 'system' else '[/INST]' }}{% endfor %}"
)


# ---- tokenizers


@cache
def bpe(space: str, special: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: of bytes, or, if `space` replaces spaces, of characters."""
    words = Tokenizer(models.BPE())
    if space:
        words.normalizer = normalizers.Replace(' ', space)
        words.pre_tokenizer = pre_tokenizers.Split(space, 'merged_with_next')
        alphabet = [*string.printable.replace(' ', space)]
    else:
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(TEXT, trainer)
    model = json.loads(words.to_str())['model']
    return model['vocab'], [tuple(pair) for pair in model['merges']]


def t5_tokenizer() -> T5Tokenizer:
    letters = string.ascii_letters + string.digits + string.punctuation
    words = ['▁a', '▁the', '▁photo', '▁of', '▁horse', '▁dog', 's', 'ing']
    vocabulary = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -2.0)]
    vocabulary += [(word, -1.0 - 0.01 * i) for i, word in enumerate(words)]
    vocabulary += [(letter, -4.0) for letter in letters if letter != 's']
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def bert_tokenizer() -> BertTokenizer:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'photo', 'of', 'horse', 'dog', *letters]
    words += [f'##{letter}' for letter in letters]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)


def gemma_tokenizer() -> GemmaTokenizer:
    special = ('<pad>', '<eos>', '<bos>', '<unk>', '<mask>')
    vocabulary, merges = bpe('▁', special)
    words = GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=8192)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='<bos> $A', special_tokens=[('<bos>', vocabulary['<bos>'])]
    )
    return words


def llama_tokenizer() -> LlamaTokenizer:
    vocabulary, merges = bpe('▁', ('<unk>', '<s>', '</s>', '<pad>'))
    return LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token='<pad>', model_max_length=2048)


def qwen_tokenizer() -> Qwen2Tokenizer:
    special = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
    vocabulary, merges = bpe('', special)
    words = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=2048, extra_special_tokens=[*special[1:]])
    words.chat_template = QWEN_TEMPLATE
    return words


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    special = ('<unk>', '<s>', '</s>', '<pad>', '[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]', '[INST]', '[/INST]')
    vocabulary, merges = bpe('', special)
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    named = dict(zip(('unk_token', 'bos_token', 'eos_token', 'pad_token'), special, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        **named,
        extra_special_tokens=[*special[4:]],
        padding_side='left',
        model_max_length=2048,
        chat_template=MISTRAL_TEMPLATE,
    )


# ---- text encoders


def t5(width: int, words: T5Tokenizer | LlamaTokenizer, multilingual: bool = False) -> PreTrainedModel:
    config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return model(
        config(
            vocab_size=len(words),
            d_model=width,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            feed_forward_proj='gated-gelu',
            pad_token_id=words.pad_token_id,
        )
    )


def bert(width: int, words: BertTokenizer) -> BertModel:
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=96,
    )
    return BertModel(config)


def gemma(width: int, words: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(vocab_size=len(words), hidden_size=width, head_dim=8, query_pre_attn_scalar=8, **LAYERS)
    )


def qwen3(width: int, words: Qwen2Tokenizer, layers: int = 2, causal_lm: bool = False) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=width,
        head_dim=8,
        tie_word_embeddings=True,
        **{**LAYERS, 'num_hidden_layers': layers},
    )
    return (Qwen3ForCausalLM if causal_lm else Qwen3Model)(config)


def qwen_vl(width: int, words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    vision = {'depth': 1, 'hidden_size': 16, 'intermediate_size': 16, 'num_heads': 2, 'out_hidden_size': width}
    text = {
        'vocab_size': len(words),
        'bos_token_id': None,
        'eos_token_id': words.eos_token_id,
        'hidden_size': width,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6, 'mrope_section': [1, 1, 2]},
        **LAYERS,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config={**vision, 'fullatt_block_indexes': [0]})
    )


def mistral(width: int, words: PreTrainedTokenizerFast, layers: int) -> Mistral3ForConditionalGeneration:
    text = {
        'model_type': 'mistral',
        'vocab_size': len(words),
        'hidden_size': width,
        'head_dim': 8,
        **LAYERS,
        'num_hidden_layers': layers,
    }
    vision = {
        'model_type': 'pixtral',
        'hidden_size': 16,
        'intermediate_size': 16,
        'num_hidden_layers': 1,
        'num_attention_heads': 2,
        'image_size': 28,
        'patch_size': 14,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


# ---- VAEs and schedulers


def kl(channels: int = 4, scaling_factor: float = 0.13025, shift_factor: float | None = None) -> AutoencoderKL:
    return tiny.vae(
        latent_channels=channels,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def dc() -> AutoencoderDC:
    """Factor 32, with both kinds of blocks."""
    channels, blocks = (8, 8, 8, 8, 32, 32), ('ResBlock',) * 4 + ('EfficientViTBlock',) * 2
    scales = ((), (), (), (), (5,), (5,))
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=32, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def flow(**config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def dynamic(**config) -> FlowMatchEulerDiscreteScheduler:
    return flow(use_dynamic_shifting=True, **config)


def linear(cls: type[SchedulerMixin], **config) -> SchedulerMixin:
    return cls(beta_schedule='linear', beta_start=0.0001, beta_end=0.02, **config)


# ---- pipelines


class Kind(NamedTuple):
    """A kind of pipelines.

    Attributes:
        pipeline: Of diffusers.
        transformer: Its kind in `tiny_transformers`.
        config: What differs there.
        vae: Makes the VAE.
        scheduler: Makes the scheduler.
        texts: Makes the components of text by name.
        options: Further arguments of the pipeline.
    """

    pipeline: type[DiffusionPipeline]
    transformer: str
    config: dict
    vae: Callable[[], torch.nn.Module]
    scheduler: Callable[[], SchedulerMixin]
    texts: Callable[[], dict] = dict
    options: dict = {}  # noqa: RUF012


def one(tokenizer: Callable, encoder: Callable) -> Callable[[], dict]:
    """Components of a pipeline with one text encoder."""

    def make() -> dict:
        words = tokenizer()
        return {'tokenizer': words, 'text_encoder': encoder(words)}

    return make


def clips_and_t5() -> dict:
    words, words_2, words_3 = tiny.tokenizer(), tiny.tokenizer(pad_token='!'), t5_tokenizer()
    return {
        'tokenizer': words,
        'tokenizer_2': words_2,
        'tokenizer_3': words_3,
        'text_encoder': tiny.text_encoder(words, projection=True),
        'text_encoder_2': tiny.text_encoder(words_2, projection=True, seed=1),
        'text_encoder_3': t5(64, words_3),
    }


def clip_and_t5() -> dict:
    words, words_2 = tiny.tokenizer(), t5_tokenizer()
    return {
        'tokenizer': words,
        'tokenizer_2': words_2,
        'text_encoder': tiny.text_encoder(words),
        'text_encoder_2': t5(32, words_2),
    }


def bert_and_t5() -> dict:
    words, words_2 = bert_tokenizer(), t5_tokenizer()
    return {
        'tokenizer': words,
        'tokenizer_2': words_2,
        'text_encoder': bert(16, words),
        'text_encoder_2': t5(8, words_2),
    }


PIXART = {'num_attention_heads': 2, 'attention_head_dim': 12, 'cross_attention_dim': 24, 'caption_channels': 16}
SD3 = {'in_channels': 16, 'out_channels': 16, 'joint_attention_dim': 64, 'pooled_projection_dim': 64}
SD3_PARTS = (
    lambda: kl(16, 1.5305, 0.0609),
    lambda: flow(shift=3.0),
    clips_and_t5,
)
FLUX2 = {'in_channels': 128, 'joint_attention_dim': 24}
HUNYUAN = {
    'text_len': 77,
    'text_len_t5': 256,
    'cross_attention_dim': 16,
    'cross_attention_dim_t5': 8,
    'pooled_projection_dim': 16,
    'use_style_cond_and_image_meta_size': True,  # as versions 1.0 and 1.1, unlike 1.2
}
KINDS = {
    'pixart-alpha': Kind(
        PixArtAlphaPipeline,
        'pixart',
        {**PIXART, 'sample_size': 128},  # for which it has conditions on the resolution
        kl,
        lambda: linear(DPMSolverMultistepScheduler),
        one(t5_tokenizer, lambda words: t5(16, words)),
    ),
    'pixart-sigma': Kind(
        PixArtSigmaPipeline,
        'pixart',
        {**PIXART, 'use_additional_conditions': False},
        kl,
        lambda: linear(DPMSolverMultistepScheduler),
        one(t5_tokenizer, lambda words: t5(16, words)),
    ),
    'dit': Kind(
        DiTPipeline,
        'dit',
        {'num_embeds_ada_norm': 1000},
        lambda: kl(scaling_factor=0.18215),
        lambda: linear(DDIMScheduler, clip_sample=False),
        options={'id2label': {'0': 'tench, Tinca tinca', '1': 'goldfish'}},
    ),
    'sd3': Kind(StableDiffusion3Pipeline, 'sd3', SD3, *SD3_PARTS),
    'sd35-medium': Kind(StableDiffusion3Pipeline, 'sd35-medium', SD3, *SD3_PARTS),
    'flux': Kind(
        FluxPipeline,
        'flux',
        {'in_channels': 64, 'joint_attention_dim': 32, 'pooled_projection_dim': 32},
        lambda: kl(16, 0.3611, 0.1159),
        lambda: dynamic(shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096),
        clip_and_t5,
    ),
    'flux2': Kind(
        Flux2Pipeline,
        'flux2',
        FLUX2,
        flux2_vae,
        lambda: dynamic(shift=3.0),
        one(mistral_tokenizer, lambda words: mistral(8, words, layers=30)),  # of which three are read
    ),
    'flux2-klein': Kind(
        Flux2KleinPipeline,
        'flux2',
        {**FLUX2, 'guidance_embeds': False},
        flux2_vae,
        lambda: dynamic(shift=3.0),
        one(qwen_tokenizer, lambda words: qwen3(8, words, layers=28, causal_lm=True)),
        {'is_distilled': False},
    ),
    'qwen-image': Kind(
        QwenImagePipeline,
        'qwen-image',
        {'in_channels': 64, 'out_channels': 16, 'joint_attention_dim': 16},
        qwen_vae,
        lambda: dynamic(base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        one(qwen_tokenizer, lambda words: qwen_vl(16, words)),
    ),
    'sana': Kind(
        SanaPipeline,
        'sana',
        {'in_channels': 32, 'out_channels': 32, 'caption_channels': 16},
        dc,
        lambda: DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=3.0, beta_schedule='linear'
        ),
        one(gemma_tokenizer, lambda words: gemma(16, words)),
    ),
    'hunyuan-dit': Kind(
        HunyuanDiTPipeline,
        'hunyuan-dit',
        HUNYUAN,
        kl,
        lambda: DDPMScheduler(
            beta_schedule='scaled_linear',
            beta_start=0.00085,
            beta_end=0.03,
            prediction_type='v_prediction',
            clip_sample=False,
            steps_offset=1,
        ),
        bert_and_t5,
        {'safety_checker': None, 'feature_extractor': None, 'requires_safety_checker': False},
    ),
    'auraflow': Kind(
        AuraFlowPipeline,
        'auraflow',
        {'joint_attention_dim': 16},
        kl,
        lambda: flow(shift=1.73),
        one(llama_tokenizer, lambda words: t5(16, words, multilingual=True)),
    ),
    'lumina2': Kind(
        Lumina2Pipeline,
        'lumina2',
        {'in_channels': 16, 'cap_feat_dim': 16, 'axes_lens': (400, 16, 16)},
        lambda: kl(16, 0.3611, 0.1159),
        lambda: flow(shift=6.0),
        one(gemma_tokenizer, lambda words: gemma(16, words)),
    ),
    'z-image': Kind(
        ZImagePipeline,
        'z-image',
        {'in_channels': 16, 'cap_feat_dim': 16, 'axes_lens': [600, 16, 16]},
        lambda: kl(16, 0.3611, 0.1159),
        lambda: flow(shift=3.0),
        one(qwen_tokenizer, lambda words: qwen3(16, words)),
    ),
}
QUICK = ('pixart-sigma', 'flux', 'hunyuan-dit', 'z-image')  # masked, packed, of two encoders, of variable length
TEXTS = tuple(kind for kind, row in KINDS.items() if row.texts is not dict)  # kinds that read prompts


def pipeline(kind: str, seed: int = 0) -> DiffusionPipeline:
    """A tiny pipeline with random weights; the global random state is unchanged."""
    row = KINDS[kind]
    network, config = TRANSFORMERS[row.transformer]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = randomise(network(**{**config, **row.config}))
        parts = {'transformer': transformer, **row.texts(), 'vae': row.vae(), 'scheduler': row.scheduler()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return row.pipeline(**parts, **row.options)


def save(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a complete diffusers folder of one of `KINDS`."""
    pipeline(kind, seed).save_pretrained(folder)
    return folder


def generate(loaded: DiffusionPipeline, steps: int = 2, height: int = 64, width: int = 96, **options) -> torch.Tensor:
    """The latent that a pipeline generates, or the image where it returns images alone (DiT: square, of its own size).

    Args:
        loaded: Of one of `KINDS`.
        steps: Of the sampler.
        height: Of the image in pixels.
        width: Of the image in pixels.
        options: Further arguments of the pipeline.
    """
    loaded.set_progress_bar_config(disable=True)
    accepted = inspect.signature(loaded.__call__).parameters
    options = {'num_inference_steps': steps, 'generator': torch.Generator().manual_seed(0), **options}
    if 'class_labels' in accepted:
        return loaded(**{'class_labels': [1], 'output_type': 'pt', **options})[0]
    options = {'prompt': 'a photo of a horse', 'height': height, 'width': width, 'output_type': 'latent', **options}
    plain = {'use_resolution_binning': False, 'clean_caption': False}
    return loaded(**{name: value for name, value in plain.items() if name in accepted}, **options)[0]


def network_calls(loaded: DiffusionPipeline, **options) -> list[dict[str, Any]]:
    """Arguments, by name, of each call of the transformer while a pipeline generates.

    Args:
        loaded: Of one of `KINDS`.
        options: Arguments of `generate`.
    """
    calls = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    hook = loaded.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        generate(loaded, **options)
    finally:
        hook.remove()
    return calls
