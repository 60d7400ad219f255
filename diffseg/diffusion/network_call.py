"""How a network of each class is called with a latent, a timestep and a prompt, as diffusers' pipelines call it.

A trajectory works on latents (N, C, h, w) and on predictions of the same shape, with the model's index as timestep.
Some transformers take packed latents (tokens of 2 x 2 cells), or the time as a share of noise or of signal; all name
their arguments differently.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from diffseg.devices import upload
from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import Network, kind_of

STEPS = 1000  # the model's index of pure noise, or the number of its timesteps
PIXELS = 8  # per cell of Hunyuan-DiT's and PixArt's latents


@dataclass(frozen=True)
class Inputs:
    """What the arguments of a transformer are made of.

    Attributes:
        network: The transformer.
        latent: x_t (N, C, h, w).
        grid: Height and width of the latent in tokens.
        rows: The tensors of `Conditioning.rows`.
        guidance: The embedded guidance (N,); None for networks without.
    """

    network: nn.Module
    latent: Tensor
    grid: tuple[int, int]
    rows: Mapping[str, Tensor]
    guidance: Tensor | None

    def numbers(self, *values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same numbers for every latent, with shape (N, number of values)."""
        row = torch.tensor(values, device='cpu', dtype=dtype)
        return upload(row, self.latent.device).expand(len(self.latent), -1)

    @property
    def text(self) -> Tensor:
        """Embeddings of the prompts (N, tokens, D)."""
        return self.rows['embeds']

    @property
    def positions(self) -> Tensor:
        """Row and column of every token of the image, with shape (h*w, 2)."""
        height, width = (torch.arange(side, device=self.latent.device) for side in self.grid)
        return torch.cartesian_prod(height, width)


def _pixart(x: Inputs) -> dict[str, Any]:
    conditions = {'resolution': None, 'aspect_ratio': None}
    if x.network.use_additional_conditions:
        height, width = (side * PIXELS for side in x.latent.shape[2:])
        conditions = {'resolution': x.numbers(height, width), 'aspect_ratio': x.numbers(height / width)}
    return {
        'encoder_hidden_states': x.text,
        'encoder_attention_mask': x.rows.get('mask'),
        'added_cond_kwargs': conditions,
    }


def _dit(x: Inputs) -> dict[str, Any]:
    return {'class_labels': x.rows['labels']}


def _sd3(x: Inputs) -> dict[str, Any]:
    return {'encoder_hidden_states': x.text, 'pooled_projections': x.rows['pooled']}


def _flux(x: Inputs) -> dict[str, Any]:
    return {
        'encoder_hidden_states': x.text,
        'pooled_projections': x.rows['pooled'],
        'img_ids': F.pad(x.positions, (1, 0)).to(x.latent.dtype),
        'txt_ids': x.text.new_zeros(x.text.shape[1], 3),
        'guidance': x.guidance,
    }


def _flux2(x: Inputs) -> dict[str, Any]:
    tokens = torch.arange(x.text.shape[1], device=x.text.device)
    return {
        'encoder_hidden_states': x.text,
        'img_ids': F.pad(x.positions, (1, 1)),  # time, row, column, place in the text
        'txt_ids': F.pad(tokens[:, None], (3, 0)),
        'guidance': x.guidance,
    }


def _qwen_image(x: Inputs) -> dict[str, Any]:
    return {
        'encoder_hidden_states': x.text,
        'encoder_hidden_states_mask': x.rows.get('mask'),
        'img_shapes': [[(1, *x.grid)]] * len(x.latent),
        'guidance': x.guidance,
    }


def _masked(x: Inputs) -> dict[str, Any]:
    return {'encoder_hidden_states': x.text, 'encoder_attention_mask': x.rows.get('mask')}


def _hunyuan(x: Inputs) -> dict[str, Any]:
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid  # a slow import

    config = x.network.config
    base = 512 // PIXELS // config.patch_size
    rotary = get_2d_rotary_pos_embed(
        config.attention_head_dim,
        get_resize_crop_region_for_grid(x.grid, base),
        x.grid,
        device=x.latent.device,
        output_type='pt',
    )
    kwargs = {
        'encoder_hidden_states': x.text,
        'text_embedding_mask': x.rows['mask'],
        'encoder_hidden_states_t5': x.rows['embeds_2'],
        'text_embedding_mask_t5': x.rows['mask_2'],
        'image_rotary_emb': rotary,
    }
    if config.use_style_cond_and_image_meta_size:
        height, width = (side * PIXELS for side in x.latent.shape[2:])
        sizes = x.numbers(height, width, height, width, 0, 0)
        kwargs['image_meta_size'] = sizes.to(x.text.dtype).contiguous()  # of which diffusers takes a view
        kwargs['style'] = x.numbers(0, dtype=torch.long)[:, 0]
    return kwargs


def _auraflow(x: Inputs) -> dict[str, Any]:
    return {'encoder_hidden_states': x.text}


def _z_image(x: Inputs) -> dict[str, Any]:
    masks = x.rows.get('mask')
    if masks is None:
        return {'cap_feats': list(x.text)}
    return {'cap_feats': [text[mask.bool()] for text, mask in zip(x.text, masks, strict=True)]}


@dataclass(frozen=True)
class TransformerCall:
    """How transformers of one class are called.

    Attributes:
        network: The class, of diffusers.
        arguments: Their arguments besides the latent and the timestep.
        time: What they take as time: the model's 'index', the share of noise ('sigma') or that of signal ('signal').
        sign: -1 where the negative prediction is returned.
        even_steps: As in `FlowSchedule`.
        guidance: Scale of classifier-free guidance that its pipeline generates with; 1 is none.
        embedded_guidance: Scale of guidance that its pipeline passes to networks that take it as an input.
    """

    network: type[nn.Module]
    arguments: Callable[[Inputs], dict[str, Any]]
    time: Literal['index', 'sigma', 'signal'] = 'index'
    sign: int = 1
    even_steps: bool = True
    guidance: float = 1.0
    embedded_guidance: float = 3.5


TRANSFORMER_CALLS = (
    TransformerCall(PixArtTransformer2DModel, _pixart, guidance=4.5),
    TransformerCall(DiTTransformer2DModel, _dit, guidance=4.0),
    TransformerCall(SD3Transformer2DModel, _sd3, even_steps=False, guidance=7.0),
    TransformerCall(FluxTransformer2DModel, _flux, 'sigma'),
    TransformerCall(Flux2Transformer2DModel, _flux2, 'sigma', embedded_guidance=4.0),
    TransformerCall(QwenImageTransformer2DModel, _qwen_image, 'sigma', guidance=4.0),
    TransformerCall(SanaTransformer2DModel, _masked, guidance=4.5),
    TransformerCall(HunyuanDiT2DModel, _hunyuan, guidance=5.0),
    TransformerCall(AuraFlowTransformer2DModel, _auraflow, 'sigma', even_steps=False, guidance=3.5),
    TransformerCall(Lumina2Transformer2DModel, _masked, 'signal', sign=-1, guidance=4.0),
    TransformerCall(ZImageTransformer2DModel, _z_image, 'signal', sign=-1, guidance=5.0),
)


def transformer_call(network: nn.Module) -> TransformerCall | None:
    """How a transformer is called; None for UNets."""
    return next((call for call in TRANSFORMER_CALLS if isinstance(network, call.network)), None)


def takes_guidance(network: nn.Module) -> bool:
    """Whether a network takes the scale of guidance as an input."""
    return bool(network.config.get('guidance_embeds', False))


class NetworkCall:
    """Calls a network under a recorder with latents, the model's index and a condition.

    Args:
        network: The network.
        embedded_guidance: Scale of guidance for networks that take it as an input (Flux-dev); None is their pipeline's.

    Attributes:
        prediction_site: The site where the prediction is read.

    Raises:
        ValueError: `embedded_guidance` for a network without.
    """

    def __init__(self, network: Network, embedded_guidance: float | None = None):
        if embedded_guidance is not None and not takes_guidance(network):
            raise ValueError(
                f'embedded_guidance is {embedded_guidance}, but a {type(network).__name__} of this configuration takes '
                "none; leave it out (classifier-free guidance is the trajectory's `guidance`)"
            )
        self.network = network
        self.kind = kind_of(network)
        self.call = transformer_call(network)
        self.prediction_site = f'{self.kind.part}-out'
        self.embedded_guidance = None
        if takes_guidance(network):
            scale = self.call.embedded_guidance if embedded_guidance is None else embedded_guidance
            self.embedded_guidance = float(scale)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes, independent of that of added trainable layers."""
        return network_dtype(self.network)

    def __call__(
        self,
        recorder: ActivationRecorder,
        x_t: Tensor,
        timestep: Tensor,
        condition: Mapping[str, Any],
        draws: int = 1,
    ) -> dict[str, Tensor]:
        """Activations of latents (N, C, h, w) at timesteps (N,).

        Args:
            recorder: Of activations of the network.
            x_t: Latents, in the network's dtype.
            timestep: The model's indices.
            condition: Keyword arguments of a UNet, or `Conditioning.rows` for a transformer.
            draws: Number of draws in the batch, see `ActivationRecorder`.
        """
        if self.call is None:
            return recorder(x_t, timestep, **condition)
        patch = self.kind.patch_size(self.network)
        grid = x_t.shape[2] // patch, x_t.shape[3] // patch
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((len(x_t),), self.embedded_guidance, device=x_t.device)
        kwargs = self.call.arguments(Inputs(self.network, x_t, grid, condition, guidance))
        if self.kind.packed:
            kwargs['grid'] = grid
            x_t = F.pixel_unshuffle(x_t, patch).flatten(2).transpose(1, 2)  # (N, h*w, 4 C)
        kwargs = {name: x for name, x in kwargs.items() if x is not None}
        return recorder(x_t, self._time(timestep), draws=draws, **kwargs)

    def _time(self, timestep: Tensor) -> Tensor:
        if self.call.time == 'index':
            scale = self.network.config.get('timestep_scale', 1)  # Sana's
            return timestep if scale == 1 else timestep * scale
        sigma = timestep / STEPS
        return sigma if self.call.time == 'sigma' else 1 - sigma

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        """The prediction (N, C, h, w) in the shape and dtype of `x_t`, without a learned variance, from its site."""
        if self.kind.packed:
            output = F.pixel_shuffle(output, self.kind.patch_size(self.network))
        prediction = output[:, : x_t.shape[1]].to(x_t.dtype)
        return -prediction if self.call is not None and self.call.sign < 0 else prediction


def network_dtype(network: Network) -> torch.dtype:
    """Dtype in which a network computes, independent of that of added trainable layers and of quantized weights.

    That of the first weight: frozen weights may be buffers, and other buffers have a dtype of their own.
    """
    weights = (getattr(module, 'weight', None) for module in network.modules())
    return next(weight.dtype for weight in weights if weight is not None and weight.is_floating_point())
