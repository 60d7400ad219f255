"""Tiny random Stable Diffusion parts: the block topology and layer names of the real ones, a few channels wide."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BETAS = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012, 'steps_offset': 1}
BOS, EOS = '<|startoftext|>', '<|endoftext|>'
MERGES = [('p', 'h'), ('o', 'f</w>'), ('h', 'o'), ('ph', 'o')]
SHALLOW = {  # of a UNet of two levels
    'block_out_channels': (32, 64),
    'down_block_types': ('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
    'layers_per_block': 1,
}
PIXEL_TOPOLOGIES = {
    'adm': {},
    'strided-convolutions': {
        'down_block_types': ('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
        'up_block_types': ('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        'downsample_type': 'conv',
        'upsample_type': 'conv',
        'resnet_time_scale_shift': 'default',
    },
    'middle-without-attention': {'add_attention': False},
}


def unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """SD1.5's topology: 197 sites; `config` overrides single fields."""
    torch.manual_seed(seed)
    defaults = {
        'block_out_channels': (32, 32, 64, 64),
        'cross_attention_dim': 32,
        'attention_head_dim': 4,
        'norm_num_groups': 16,
        'sample_size': 8,
    }
    return UNet2DConditionModel(**{**defaults, **config}).eval()


def sdxl_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """SDXL's topology: 612 sites (1, 2 and 10 transformer blocks), pooled text and time ids as added conditions."""
    defaults = {
        'block_out_channels': (32, 32, 64),
        'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
        'transformer_layers_per_block': (1, 2, 10),
        'attention_head_dim': (2, 4, 8),
        'cross_attention_dim': 64,
        'use_linear_projection': True,
        'addition_embed_type': 'text_time',
        'addition_time_embed_dim': 8,
        'projection_class_embeddings_input_dim': 32 + 6 * 8,  # pooled text and six time ids
        'sample_size': 16,
    }
    return unet(seed, **{**defaults, **config})


def pixel_unet(seed: int = 0, **config) -> UNet2DModel:
    """The topology of guided-diffusion's networks (ADM) with three levels, attention in the two coarser ones."""
    torch.manual_seed(seed)
    defaults = {
        'sample_size': 16,
        'out_channels': 6,  # a learned variance beside the noise
        'block_out_channels': (16, 16, 32),
        'down_block_types': ('ResnetDownsampleBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
        'up_block_types': ('AttnUpBlock2D', 'AttnUpBlock2D', 'ResnetUpsampleBlock2D'),
        'layers_per_block': 2,
        'downsample_type': 'resnet',
        'upsample_type': 'resnet',
        'resnet_time_scale_shift': 'scale_shift',
        'attention_head_dim': 8,
        'norm_num_groups': 8,
        'attn_norm_num_groups': 8,
    }
    return UNet2DModel(**{**defaults, **config}).eval()


def vae(seed: int = 0, **config) -> AutoencoderKL:
    """A KL autoencoder of factor 8."""
    torch.manual_seed(seed)
    defaults = {
        'block_out_channels': (8, 8, 16, 16),
        'down_block_types': ('DownEncoderBlock2D',) * 4,
        'up_block_types': ('UpDecoderBlock2D',) * 4,
        'layers_per_block': 1,
        'norm_num_groups': 4,
        'latent_channels': 4,
        'sample_size': 64,
    }
    return AutoencoderKL(**{**defaults, **config}).eval()


def taesd(seed: int = 0, **config) -> AutoencoderTiny:
    """An `AutoencoderTiny`, of 8 channels unless there is a config."""
    widths = {f'{part}_block_out_channels': (8, 8, 8, 8) for part in ('encoder', 'decoder')}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(**(config or widths)).eval()


def tokenizer(pad_token: str = EOS) -> CLIPTokenizer:
    """CLIP's byte-level BPE with four merges: nearly one token per letter, so that prompts soon pass 77 tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in MERGES), BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=MERGES, pad_token=pad_token, model_max_length=77)


def text_encoder(words: CLIPTokenizer, projection: bool = False, seed: int = 0) -> CLIPTextModel:
    """A CLIP text model of width 32; with `projection` the kind that SDXL has second."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def save_sd15(folder: Path) -> Path:
    """Write a complete pipeline folder of SD1.5's kind."""
    words = tokenizer()
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=unet(),
        scheduler=PNDMScheduler.from_config({**BETAS, 'skip_prk_steps': True, 'clip_sample': False}),  # as SD1.5 has it
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def change_text_encoder(folder: Path) -> Path:
    """Give a pipeline folder another text encoder, all else as it is."""
    text_encoder(tokenizer(), seed=7).save_pretrained(folder / 'text_encoder')
    return folder


def save_sdxl(folder: Path) -> Path:
    """Write a complete pipeline folder of SDXL's kind, its VAE marked as one that overflows in half precision."""
    words, words_2 = tokenizer(), tokenizer(pad_token='!')
    StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=text_encoder(words),
        text_encoder_2=text_encoder(words_2, projection=True, seed=1),
        tokenizer=words,
        tokenizer_2=words_2,
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler(timestep_spacing='leading', **BETAS),
    ).save_pretrained(folder)
    return folder


def save_pixel(folder: Path, seed: int = 0, **config) -> Path:
    """Write a folder of a model of pixel space, such as `tools/convert/adm.py` makes."""
    DDPMPipeline(pixel_unet(seed, **config), DDPMScheduler(variance_type='learned_range')).save_pretrained(folder)
    return folder


def inputs(unet: UNet2DConditionModel | UNet2DModel, batch: int = 1, height: int = 16, width: int = 24) -> dict:
    """Random arguments of an `ActivationRecorder` for any of these networks."""
    config = unet.config
    values = {'x_t': torch.randn(batch, config.in_channels, height, width), 'timestep': 50}
    if isinstance(unet, UNet2DModel):
        return values
    values['encoder_hidden_states'] = torch.randn(batch, 5, config.cross_attention_dim)
    if config.addition_embed_type == 'text_time':
        values['added_cond_kwargs'] = {'text_embeds': torch.randn(batch, 32), 'time_ids': torch.rand(batch, 6)}
    return values
