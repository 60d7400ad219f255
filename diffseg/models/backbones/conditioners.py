"""Learned conditioning of the UNet that replaces a prompt."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmseg.registry import DATASETS, MODELS
from mmseg.utils import get_predefined_templates
from torch import Tensor, nn

from diffseg.captions import Captions
from diffseg.diffusion.conditioning import PromptEncoder
from diffseg.diffusion.embeddings import Conditioning, load_conditioning


def class_names(dataset: str) -> list[str]:
    """Names of the classes of a registered data set, from its `METAINFO`.

    Raises:
        ValueError: the data set is not registered, or defines no class names.
    """
    cls = DATASETS.get(dataset)
    if cls is None:
        raise ValueError(f'there is no data set {dataset!r}; registered are {", ".join(sorted(DATASETS.module_dict))}')
    names = getattr(cls, 'METAINFO', {}).get('classes')
    if not names:
        raise ValueError(f'the data set {dataset} has no class names; write them into the prompt')
    return list(names)


def class_names_prompt(dataset: str, template: str = '{}') -> str:
    """One prompt that joins the names of all classes, each in `template`, with commas.

    Raises:
        ValueError: unknown data set, or a template without `{}`.
    """
    if '{}' not in template:
        raise ValueError(f"the template {template!r} has no '{{}}' for the name of a class")
    return ', '.join(template.format(name) for name in class_names(dataset))


# Types of prompts in a config, in addition to those of the extractor.
PROMPTS = {'class_names': class_names_prompt, 'captions': Captions, 'embedding': load_conditioning}


def build_prompt(prompt: Any) -> Any:
    """Build the prompt of a config: class names, captions or a file of embeddings if it is a `dict(type=...)`.

    `dict(type='embedding', path=...)` needs no text encoder, see `load_conditioning`.

    Raises:
        ValueError: unknown type.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    options = dict(prompt)
    kind = options.pop('type', None)
    if kind not in PROMPTS:
        raise ValueError(f'a prompt of type {kind!r}; there are {", ".join(PROMPTS)}')
    return PROMPTS[kind](**options)


@MODELS.register_module()
class LearnedPrompts(nn.Module):
    """Learned tokens, one sequence for all images.

    Args:
        num_prompts: number of tokens N.
        dim: size D of a token, the UNet's `cross_attention_dim` (768 with SD1.5), or that of a transformer's text
            encoder (4096 with SD3, Flux and PixArt).
        pooled_dim: size of a pooled embedding, which SDXL (1280), SD3 (2048) and Flux (768) need in addition.
        trainable: False keeps the initial values (standard normal). The published frozen rerun of VPD is equivalent,
            since no gradient reaches the prompts there.

    Attributes:
        num_prompts: N.
    """

    def __init__(self, num_prompts: int, dim: int, pooled_dim: int | None = None, trainable: bool = True) -> None:
        super().__init__()
        self.num_prompts = num_prompts
        self.trainable = trainable
        self._add('embeds', (1, num_prompts, dim))
        self._add('pooled', None if pooled_dim is None else (1, pooled_dim))

    def _add(self, name: str, shape: tuple[int, ...] | None) -> None:
        value = None if shape is None else torch.randn(shape)
        if self.trainable:
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that a checkpoint depends on."""
        return {'type': type(self).__name__, 'trainable': self.trainable}

    def forward(self) -> Conditioning:
        """One row of N tokens."""
        return Conditioning(self.embeds, self.pooled)


@MODELS.register_module()
class MetaPrompts(LearnedPrompts):
    """Learned tokens, and learned time embeddings, one for each pass of the UNet.

    Args:
        num_prompts: number of tokens.
        dim: size of a token.
        passes: number of passes K.
        time_dim: size E of a time embedding (1280 with SD1.5).
        pooled_dim: size of SDXL's pooled embedding.
    """

    def __init__(self, num_prompts: int, dim: int, passes: int, time_dim: int, pooled_dim: int | None = None) -> None:
        super().__init__(num_prompts, dim, pooled_dim)
        self._add('times', (passes, time_dim))

    def forward(self) -> Conditioning:
        """One row of N tokens, with the time embeddings (K, E)."""
        return Conditioning(self.embeds, self.pooled, self.times)


@MODELS.register_module()
class TextAdapter(nn.Module):
    """One token for each class: its text embedding plus a scaled residual of an MLP (VPD).

    The tokens are `texts + gamma * MLP(texts)`, with `gamma` learned for each of the D channels and the MLP of two
    layers.

    Args:
        model: source of the text encoder: preset, hub id, folder or file, the same as that of the backbone.
        dataset: registered data set with the classes.
        classes: names of classes, instead of `dataset`.
        templates: prompts over which the embedding of a class is averaged; by default the 80 of CLIP's evaluation on
            ImageNet.
        gamma: initial value of `gamma`.
        encoder: further options of `PromptEncoder`: `revision`, `cache_dir`, `textual_inversion`, ...

    Attributes:
        num_prompts: number of classes N.

    Raises:
        ValueError: not exactly one of `dataset` and `classes`, or an error of `PromptEncoder.class_embeddings`.
    """

    def __init__(
        self,
        model: str,
        dataset: str | None = None,
        classes: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        gamma: float = 1e-4,
        **encoder: Any,
    ) -> None:
        super().__init__()
        if (dataset is None) == (classes is None):
            raise ValueError(f'dataset is {dataset!r} and classes is {classes!r}; give one of them')
        names = list(classes) if dataset is None else class_names(dataset)
        templates = get_predefined_templates('imagenet') if templates is None else list(templates)
        texts = PromptEncoder(model, **encoder).class_embeddings(names, templates)  # (N, D)
        self.num_prompts, dim = texts.shape
        self.register_buffer('texts', texts)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.gamma = nn.Parameter(gamma * torch.ones(dim))
        self._digest = hashlib.sha256(json.dumps([names, templates]).encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that a checkpoint depends on."""
        return {'type': type(self).__name__, 'classes and templates': f'sha256:{self._digest}'}

    def forward(self) -> Conditioning:
        """One row of N tokens."""
        tokens: Tensor = self.texts + self.gamma * self.mlp(self.texts)  # (N, D)
        return Conditioning(tokens.unsqueeze(0))
