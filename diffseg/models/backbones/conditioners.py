"""What a backbone tells the UNet instead of a prompt, and learns."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmseg.registry import DATASETS, MODELS
from mmseg.utils import get_predefined_templates
from torch import Tensor, nn

from diffseg.captions import Captions
from diffseg.diffusion.conditioning import Conditioning, PromptEncoder


def class_names(dataset: str) -> list[str]:
    """Names of the classes of a registered data set, from its `METAINFO`.

    Raises:
        ValueError: there is no such data set, or it has no names of its own.
    """
    cls = DATASETS.get(dataset)
    if cls is None:
        raise ValueError(f'there is no data set {dataset!r}; registered are {", ".join(sorted(DATASETS.module_dict))}')
    names = getattr(cls, 'METAINFO', {}).get('classes')
    if not names:
        raise ValueError(f'the data set {dataset} has no class names of its own; write them into the prompt')
    return list(names)


def class_names_prompt(dataset: str, template: str = '{}') -> str:
    """One prompt that joins the names of all classes, each in `template`, with commas.

    Raises:
        ValueError: no such data set, or a template without the place for the name.
    """
    if '{}' not in template:
        raise ValueError(f"the template {template!r} has no '{{}}' for the name of a class")
    return ', '.join(template.format(name) for name in class_names(dataset))


# What a prompt in a config can be besides what the extractor takes, by its type.
PROMPTS = {'class_names': class_names_prompt, 'captions': Captions}


def build_prompt(prompt: Any) -> Any:
    """A prompt, the class names or captions if it is a `dict(type=...)`.

    Raises:
        ValueError: another type.
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
    """Tokens that are learned, one sequence for all images.

    Args:
        num_prompts: how many tokens N.
        dim: their size D, the UNet's `cross_attention_dim` (768 with SD1.5).
        pooled_dim: size of a pooled embedding, which SDXL needs besides (1280).
        trainable: False keeps what they are drawn as (standard normal). This is what the published frozen rerun of VPD
            amounts to, where no gradient reaches the prompts.

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
        """What a checkpoint takes for granted."""
        return {'type': type(self).__name__, 'trainable': self.trainable}

    def forward(self) -> Conditioning:
        """One row of N tokens."""
        return Conditioning(self.embeds, self.pooled)


@MODELS.register_module()
class MetaPrompts(LearnedPrompts):
    """Learned tokens, and learned embeddings in place of those of timesteps, one for each pass of the UNet.

    Args:
        num_prompts: how many tokens.
        dim: their size.
        passes: how many passes K.
        time_dim: size E of an embedding of time (1280 with SD1.5).
        pooled_dim: size of SDXL's pooled embedding.
    """

    def __init__(self, num_prompts: int, dim: int, passes: int, time_dim: int, pooled_dim: int | None = None) -> None:
        super().__init__(num_prompts, dim, pooled_dim)
        self._add('times', (passes, time_dim))

    def forward(self) -> Conditioning:
        """One row of N tokens, with the embeddings of time (K, E)."""
        return Conditioning(self.embeds, self.pooled, self.times)


@MODELS.register_module()
class TextAdapter(nn.Module):
    """One token for each class: its embedding plus a little of what an MLP makes of it (VPD).

    The tokens are `texts + gamma * MLP(texts)`, with `gamma` learned for each of the D channels and the MLP of two
    layers.

    Args:
        model: where the text encoder comes from: preset, hub id, folder or file, the same as the backbone's.
        dataset: registered data set whose classes these are.
        classes: names of classes, instead of `dataset`.
        templates: prompts over which a class is averaged; by default the 80 that CLIP was evaluated with on ImageNet.
        gamma: initial value.
        encoder: further options of `PromptEncoder`: `revision`, `cache_dir`, `textual_inversion`, ...

    Attributes:
        num_prompts: how many classes N.

    Raises:
        ValueError: not one of `dataset` and `classes`, or what `PromptEncoder.class_embeddings` raises.
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
        """What a checkpoint takes for granted."""
        return {'type': type(self).__name__, 'classes and templates': f'sha256:{self._digest}'}

    def forward(self) -> Conditioning:
        """One row of N tokens."""
        tokens: Tensor = self.texts + self.gamma * self.mlp(self.texts)  # (N, D)
        return Conditioning(tokens.unsqueeze(0))
