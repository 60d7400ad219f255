"""Masks from names of classes, without training."""

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from mmseg.models import BaseSegmentor
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.nn import functional as F

from diffseg.diffusion.concepts import SITE, ConceptRecorder, Space
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import Interpolation, resize_images
from diffseg.diffusion.options import group_options
from diffseg.diffusion.schedules import Timestep

from ..backbones.conditioners import class_names
from ..backbones.frozen import freeze


@dataclass(frozen=True, kw_only=True)
class Background:
    """How the class that stands for all else, and has no name to look for, is recognised.

    Its score is the largest of those of `concepts`, or `threshold` if that is larger.

    Attributes:
        index: Of the class.
        concepts: What it may show, such as 'background', 'sky' and 'floor'; they compete with the classes.
        threshold: Share, between 0 and 1, that a class has to exceed.
    """

    index: int
    concepts: Sequence[str] = ()
    threshold: float | None = None


@MODELS.register_module()
class TextMaskSegmentor(BaseSegmentor):
    """Segment images by names of classes with a frozen Flux or SD3 transformer (ConceptAttention, 2502.04320).

    ```text
    names -> text encoder -> one token each (K, D)
    image (B, 3, H, W) -> VAE -> noise -> transformer with these -> maps (B, K, h, w) -> scores (B, classes, H, W)
    ```

    Nothing is trained, and a test needs no checkpoint. The text is the same for every image: the names of all classes,
    and one prompt. Unlike the released code of the paper, whose evaluation on Pascal VOC gives the model the names of
    the classes that each image shows, in its prompt too. The `protocol` in the meta information of all predictions has
    the text; `TextMaskIoUMetric` writes it beside the figures.

    Scores (`seg_logits`) are not logits, but shares between 0 and 1 that sum to 1 over all concepts. `VoteTTAModel`
    averages those of augmentations.

    Args:
        model: Preset, hub id or diffusers folder, see `DiffusionExtractor`.
        classes: Names of all classes of the data set, in its order; or the name of a registered data set, whose names
            these are.
        blocks: Blocks of the transformer over which maps are averaged, see `ConceptRecorder`.
        timesteps: Those over which maps are averaged.
        prompt: Of all images.
        templates: What the names of classes are put into, and over which their embeddings are averaged. They begin with
            the name, since the embedding of the first token is taken, see `PipelinePromptEncoder.first_tokens`.
        background: Fields of `Background`; None gives each pixel to a class.
        space: 'output' for ConceptAttention, 'attention' for the baseline of cross-attention, see `ConceptRecorder`.
        interaction: Whether concepts attend to each other, see `ConceptRecorder`.
        zero_pooled: Replace the pooled embedding of the prompt by zeros, as the released code does for Flux.
        input_size: Side or (height, width) to which images are resized, aspect ratio not kept.
        interpolation: By which they are resized, see `resize_images`.
        data_preprocessor: Config; it brings images to [-1, 1], RGB.
        init_cfg: See mmengine's `BaseModule`.
        pretrained: None, which mmseg's `init_model` gives to every model; so are `train_cfg` and `test_cfg`.
        train_cfg: None.
        test_cfg: None.
        extractor: Further options of `DiffusionExtractor`, and fields of its `Weights` and `Runtime`: `ensemble`,
            `noise`, `seed`, `dtype`, `max_sequence_length`, `trajectory` ('noise' or 'clean'), ...

    Attributes:
        out_channels: Number of classes.
        dataset_meta: Names of the classes and a color for each, which mmseg's functions draw with.

    Raises:
        ValueError: Fewer than two classes, templates that do not begin with the name, a background that contradicts
            itself, or a model or trajectory that concepts cannot be read in.
    """

    align_corners = False

    def __init__(
        self,
        model: str,
        classes: str | Sequence[str],
        blocks: Sequence[int],
        timesteps: Sequence[Timestep],
        *,
        prompt: str = '',
        templates: Sequence[str] = ('{}',),
        background: Mapping[str, Any] | None = None,
        space: Space = 'output',
        interaction: bool = True,
        zero_pooled: bool = False,
        input_size: int | Sequence[int] | None = None,
        interpolation: Interpolation = 'bilinear',
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        pretrained: None = None,
        train_cfg: None = None,
        test_cfg: None = None,
        **extractor: Any,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        unused = {'pretrained': pretrained, 'train_cfg': train_cfg, 'test_cfg': test_cfg}
        if given := [name for name, value in unused.items() if value is not None]:
            raise ValueError(f'a TextMaskSegmentor has no {", ".join(given)}; leave it out')
        names = class_names(classes) if isinstance(classes, str) else list(classes)
        self.classes = [name.strip() for name in names]
        self.out_channels = len(self.classes)
        self.dataset_meta = {'classes': names, 'palette': _palette(classes, len(names))}
        if self.out_channels < 2:
            raise ValueError(f'classes is {self.classes}; a softmax needs two or more')
        self.templates = [templates] if isinstance(templates, str) else list(templates)
        if not self.templates or any(not template.startswith('{}') for template in self.templates):
            raise ValueError(f"templates is {self.templates}; they begin with '{{}}', the name, whose token is read")
        self.background = None if background is None else _checked(Background(**background), self.out_channels)
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.interpolation = interpolation

        frozen = DiffusionExtractor(model, [], timesteps, prompt=prompt, **group_options(extractor)).eval()
        if zero_pooled and frozen.conditioning.pooled is None:
            raise ValueError(f'zero_pooled is for models with a pooled embedding; {model} has none')
        if zero_pooled:
            frozen.conditioning = replace(frozen.conditioning, pooled=torch.zeros_like(frozen.conditioning.pooled))
        self.extractor = frozen.reading_concepts(
            ConceptRecorder(frozen.network, self._encode(frozen), blocks, space, interaction)
        )
        freeze(self.extractor)
        self.settings = {
            'method': {'output': 'ConceptAttention', 'attention': 'cross-attention'}[space],
            'classes': list(names),
            'concepts': self.concepts,
            'templates': self.templates,
            'background': None if self.background is None else asdict(self.background),
            'prompt': prompt,
            'text': 'the names of all classes and one prompt, the same for every image',
            'blocks': sorted(blocks),
            'interaction': interaction,
            'zero_pooled': zero_pooled,
            'input_size': self.input_size,
            'interpolation': self.interpolation,
        }

    @property
    def concepts(self) -> list[str]:
        """Names that are looked for: of the classes without the background, then the background's."""
        if self.background is None:
            return self.classes
        index = self.background.index
        return [*self.classes[:index], *self.classes[index + 1 :], *self.background.concepts]

    def _encode(self, extractor: DiffusionExtractor) -> Tensor:
        """Embeddings (K, D) of the concepts."""
        concepts, encoder = self.concepts, extractor.prompt_encoder
        if not hasattr(encoder, 'first_tokens'):
            raise ValueError(
                f'{extractor.parts.source.location} has a {type(extractor.network).__name__}; masks are made from text '
                'with the transformers of Flux and SD3'
            )
        rows = encoder.first_tokens([template.format(name) for template in self.templates for name in concepts])
        return rows.float().unflatten(0, (len(self.templates), len(concepts))).mean(0)

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything that a prediction depends on, ready for JSON; above all, the text that the model gets."""
        return {**self.settings, 'model': self.extractor.fingerprint}

    def extract_feat(self, inputs: Tensor) -> Tensor:
        """Shares of the concepts (B, K, h, w), which sum to 1, of images (B, 3, H, W) in [-1, 1], RGB."""
        if self.input_size is not None:
            inputs = resize_images(inputs, self.input_size, self.interpolation)
        return self.extractor(inputs)[SITE].mean(1)

    def encode_decode(self, inputs: Tensor, batch_data_samples: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """Scores of the classes (B, classes, H, W), of images (B, 3, H, W)."""
        maps = self.extract_feat(inputs)
        maps = F.interpolate(maps, size=inputs.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return self.class_scores(maps)

    def class_scores(self, maps: Tensor) -> Tensor:
        """Scores of the classes (B, classes, H, W) from the shares of the concepts (B, K, H, W)."""
        if self.background is None:
            return maps
        named, extra = maps.split([self.out_channels - 1, len(self.background.concepts)], dim=1)
        candidates = [*extra.unbind(1)]
        if self.background.threshold is not None:
            candidates.append(torch.full_like(maps[:, 0], self.background.threshold))
        score = torch.stack(candidates, dim=1).amax(1, keepdim=True)
        index = self.background.index
        return torch.cat([named[:, :index], score, named[:, index:]], dim=1)

    def predict(self, inputs: Tensor, data_samples: Sequence[SegDataSample] | None = None) -> list[SegDataSample]:
        """Label images.

        Args:
            inputs: Images (B, 3, H, W).
            data_samples: Of which the sizes, paddings and flips are read, no labels; None keeps the size of `inputs`.

        Returns:
            Samples with `seg_logits` (classes, H, W), see above, `pred_sem_seg` (1, H, W), and the `protocol` in their
            meta information.
        """
        samples = self.postprocess_result(self.encode_decode(inputs), data_samples)
        for sample in samples:
            sample.set_metainfo({'protocol': self.protocol})
        return list(samples)

    def _forward(self, inputs: Tensor, data_samples: Sequence[SegDataSample] | None = None) -> Tensor:
        return self.class_scores(self.extract_feat(inputs))

    def loss(self, inputs: Tensor, data_samples: Sequence[SegDataSample]) -> NoReturn:
        """Raise an error."""
        raise NotImplementedError(
            'TextMaskSegmentor has nothing to train; test it with tools/test.py CONFIG, or train a head on a '
            'DiffusionBackbone of the same model'
        )

    def train(self, mode: bool = True) -> 'TextMaskSegmentor':
        """Set the mode; the network stays in evaluation mode."""
        super().train(mode)
        self.extractor.eval()
        return self


def _palette(classes: str | Sequence[str], number: int) -> list[Sequence[int]]:
    """RGB, from 0 to 255, of each class: those of a registered data set, if it has any, else different hues."""
    if isinstance(classes, str) and (palette := DATASETS.get(classes).METAINFO.get('palette')):
        return [*palette]
    return [[round(255 * x) for x in hsv_to_rgb(i / number, 0.8, 0.9)] for i in range(number)]


def _checked(background: Background, classes: int) -> Background:
    if background.index not in range(classes):
        raise ValueError(f'background.index is {background.index}; classes are counted from 0 to {classes - 1}')
    if background.threshold is None and not background.concepts:
        raise ValueError('the background has no concepts and no threshold; give one of them, or both')
    if background.threshold is not None and not 0 < background.threshold < 1:
        raise ValueError(f'background.threshold is {background.threshold}; shares lie between 0 and 1')
    if isinstance(background.concepts, str):
        raise ValueError(f'background.concepts is {background.concepts!r}; it is a list of names')
    if classes - 1 + len(background.concepts) < 2:
        raise ValueError('there is one concept in all, whose share is 1 everywhere; give background.concepts')
    return background
