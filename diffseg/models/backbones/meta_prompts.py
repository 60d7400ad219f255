"""Meta Prompts (arXiv 2312.14733): learned prompts that also group the UNet's features, refined in several passes."""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffseg.diffusion.conditioning import pooled_size
from diffseg.diffusion.loading import load_config

from .diffusion import DiffusionBackbone

# activations of the published code, fine -> coarse: strides 8, 16, 32 and 64
LAYERS = (
    'up-level3-repeat2-vit-out',
    'up-level2-repeat1-vit-out',
    'up-level1-repeat1-vit-out',
    'up-level0-repeat1-res-out',
)


@MODELS.register_module()
class MetaPromptsBackbone(DiffusionBackbone):
    """N learned prompts condition the UNet, whose activations are compared with each of them.

    ```text
    image (B, 3, H, W) -> VAE -> latent (B, 4, h, w), the posterior's mode, not scaled, without noise
    -> UNet(prompts, times[0]) -> ... -> UNet(prompts, times[K-1]), each pass over the output of the one before
    -> 4 maps (B, C, h', w') of the last pass -> twice the size, 3x3 convolution, group norm, ReLU (B, D, 2h', 2w')
    -> scalar products with the prompts (N, D) -> 4 maps (B, N, 2h', 2w')
    ```

    Args:
        model: preset, hub id, diffusers folder or checkpoint file.
        num_prompts: number of prompts N; the published configs have 150, also for Cityscapes' 19 classes.
        refine_steps: number of passes K.
        layers: names of the activations, in the order of the maps.
        num_groups: of the group norm.
        options: further options of `DiffusionBackbone`. With `frozen`, the default, the prompts, the time embeddings
            and the projections are trained.

    Attributes:
        channels: N for each map.

    Raises:
        ValueError: `refine_steps` is not positive, the model works on pixels or is a transformer, or an error of
            `DiffusionBackbone`.
    """

    def __init__(
        self,
        model: str,
        num_prompts: int = 150,
        refine_steps: int = 3,
        layers: Sequence[str] = LAYERS,
        *,
        num_groups: int = 16,
        **options: Any,
    ) -> None:
        if refine_steps < 1:
            raise ValueError(f'refine_steps is {refine_steps}; it is a number of passes, 1 or more')
        configs = load_config(model, revision=options.get('revision'), config=options.get('config'))
        if configs.pixel_space or configs.part == 'transformer':
            kind = 'is a transformer' if configs.part == 'transformer' else 'works on pixels and reads no prompt'
            raise ValueError(f'{model} {kind}; choose a Stable Diffusion model')
        unet = configs.network
        dim = unet['cross_attention_dim']
        conditioner = {
            'type': 'MetaPrompts',
            'num_prompts': num_prompts,
            'dim': dim,
            'pooled_dim': pooled_size(unet),
            'passes': refine_steps,
            'time_dim': 4 * unet['block_out_channels'][0],
        }
        super().__init__(
            model,
            layers,
            timesteps=[refine_steps - 1],  # timesteps count passes
            conditioner=conditioner,
            **{'trajectory': 'refinement', 'vae_sample': 'mode', 'scale_latent': False, **options},
        )
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode='bilinear'),
                nn.Conv2d(channels, dim, 3, padding=1),
                nn.GroupNorm(num_groups, dim),
                nn.ReLU(),
            )
            for channels in self.channels
        )
        self.channels = [num_prompts] * len(self.channels)

    def _extract(self, x: Tensor, prompts: None = None) -> tuple[Tensor, ...]:
        """Extract, project and compare with the prompts."""
        maps = super()._extract(x, prompts)
        queries = self.conditioner().embeds[0]  # (N, D)
        return tuple(
            torch.einsum('bchw,nc->bnhw', project(activation), queries)
            for project, activation in zip(self.projections, maps, strict=True)
        )
