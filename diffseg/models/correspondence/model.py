"""Correspondence as models that mmengine trains and tests."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from mmengine.model import BaseDataPreprocessor
from mmseg.registry import MODELS
from torch import Tensor

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.structures import HomographySample, PairSample

from ..descriptors import DescriptorEncoder
from .heads import points_to_cells
from .matching import Size, Unit, match_points, mutual_distance

Images = Mapping[str, Sequence[Tensor | None]]  # 'image0', 'image1' -> of each pair, None if damaged
Sample = PairSample | HomographySample
VIEWS = (0, 1)  # source, target


@MODELS.register_module()
class PairDataPreProcessor(BaseDataPreprocessor):
    """Bring images of pairs (3, H, W), uint8, RGB, of any sizes, to the model's device and to [-1, 1]."""

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Convert the images; other data are passed on unchanged."""
        images = {
            view: [None if image is None else image.to(self.device).float() / 127.5 - 1 for image in images]
            for view, images in data['inputs'].items()
        }
        return {'inputs': images, 'data_samples': data['data_samples']}


class DescriptorStore:
    """Least-recently-used cache of descriptors, on the CPU.

    Args:
        max_bytes: largest size of all descriptors.
    """

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self._maps: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, key: Hashable) -> Tensor | None:
        """Get a map and mark it as used; None if it is not cached."""
        if key in self._maps:
            self._maps.move_to_end(key)
        return self._maps.get(key)

    def put(self, key: Hashable, maps: Tensor) -> None:
        """Store a copy of a map; drop the least recently used ones beyond `max_bytes`."""
        self._maps[key] = maps.to('cpu', copy=True)
        self._bytes += maps.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._maps.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all maps."""
        self._maps.clear()
        self._bytes = 0


class PairModel(DescriptorEncoder):
    """Base class of models of image pairs: descriptors of both images.

    ```text
    images (3, H, W) -> backbone -> maps -> neck -> one map (B, C, h, w) -> head -> descriptors (B, C', h, w)
      predict: descriptors of both images, points -> `match`
    ```

    Descriptors are cached while the model is in evaluation mode, so that an image in many pairs is encoded once, if
    `store_gb` suffices for the images in between; changing the mode, as at the start of every evaluation, drops them.

    Args:
        backbone: config of any backbone whose images are in [-1, 1], RGB.
        neck: config of a neck with one level, such as `AggregationNeck` (DHF's aggregation network) or `ConcatNeck`.
            Not needed for a backbone with one map.
        head: config of a `DescriptorHead`.
        data_preprocessor: config.
        prompt: of each image; `{category}` is replaced by its category, as in DIFT's `a photo of a {category}`; None
            uses the prompt of the backbone.
        store_gb: size of the cache of descriptors in evaluation, in 10^9 bytes of CPU memory.
        store_dtype: precision of descriptors in evaluation, 'float32' or 'float16'.
        init_cfg: see mmengine's `BaseModule`.

    Raises:
        ValueError: unknown precision.
    """

    PREDICTION: ClassVar[str]  # the field of a sample that `match` fills

    def __init__(
        self,
        backbone: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        store_gb: float = 4,
        store_dtype: Literal['float32', 'float16'] = 'float32',
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, neck, head, data_preprocessor or {'type': 'PairDataPreProcessor'}, init_cfg)
        if store_dtype not in ('float32', 'float16'):
            raise ValueError(f"store_dtype is {store_dtype!r}; it is 'float32' or 'float16'")
        self.prompt = prompt
        self.store = DescriptorStore(store_gb * 1e9)
        self.store_dtype = getattr(torch, store_dtype)
        self._protocol: dict[str, Any] | None = None
        self.register_load_state_dict_post_hook(PairModel._forget)

    def forward(
        self,
        inputs: Images,
        data_samples: Sequence[Sample],
        mode: Literal['loss', 'predict', 'tensor'] = 'tensor',
    ) -> dict[str, Tensor] | Sequence[Sample] | list[list[Tensor]]:
        """Entry point of mmengine.

        Args:
            inputs: for both views ('image0', 'image1') the images (3, H, W) of all pairs, in [-1, 1].
            data_samples: of all pairs.
            mode: 'loss', 'predict', or 'tensor' for the descriptors (C', h, w) of both images of each pair.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        if mode == 'tensor':
            return self.encode_pairs(inputs, data_samples)
        raise ValueError(f"mode is {mode!r}; it is 'loss', 'predict' or 'tensor'")

    def loss(self, inputs: Images, data_samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Training loss, for trainable models."""
        raise NotImplementedError(
            f'{type(self).__name__} cannot be trained; train a CorrespondenceModel with the same parts'
        )

    def predict(self, inputs: Images, data_samples: Sequence[Sample]) -> list[Sample]:
        """Match each pair.

        Returns:
            The samples with the results of `predict_pair`. Those of samples that have one already are kept; damaged
            samples get none. The meta information of all samples has the `protocol`.
        """
        pending = [i for i, s in enumerate(data_samples) if 'damaged' not in s and self.PREDICTION not in s]
        samples = [data_samples[i] for i in pending]
        pairs = self.encode_pairs({view: [images[i] for i in pending] for view, images in inputs.items()}, samples)
        for sample, descriptors in zip(samples, pairs, strict=True):
            for name, value in self.predict_pair(*descriptors, sample).items():
                sample.set_field(value, name)
        for sample in data_samples:
            sample.set_metainfo({'protocol': self.protocol})
        return list(data_samples)

    def predict_pair(self, source: Tensor, target: Tensor, sample: Sample) -> dict[str, Tensor]:
        """All fields that are predicted for one pair, from descriptors with shapes (C', h, w) and (C', h', w')."""
        return {self.PREDICTION: self.match(source, target, sample)}

    def match(self, source: Tensor, target: Tensor, sample: Sample) -> Tensor:
        """Prediction for one pair, from descriptors with shapes (C', h, w) and (C', h', w')."""
        raise NotImplementedError

    def encode_pairs(self, inputs: Images, data_samples: Sequence[Sample]) -> list[list[Tensor]]:
        """Descriptors (C', h, w) of both images of each pair, on the images' device.

        Images of one size are encoded together, and in evaluation those with the same file, prompt and size once.
        Images without a path are never considered equal.
        """
        images = [inputs[f'image{view}'][i] for i in range(len(data_samples)) for view in VIEWS]
        paths = [sample.get(f'img_path{view}') for sample in data_samples for view in VIEWS]
        prompts = [self._prompt_of(sample) for sample in data_samples for _ in VIEWS]
        evaluating = not self.training and not torch.is_grad_enabled()
        shapes = [image.shape for image in images]
        keep = [evaluating and path is not None for path in paths]
        keys: list[Hashable] = [(paths[i], prompts[i], shapes[i]) if keep[i] else i for i in range(len(images))]
        descriptors = {key: self.store.get(key) for key in keys}
        groups: dict[torch.Size, dict[Hashable, int]] = {}  # shape -> key -> one of the images with this key
        for i, key in enumerate(keys):
            if descriptors[key] is None:
                groups.setdefault(shapes[i], {})[key] = i
        for group in groups.values():
            indices = list(group.values())
            maps = self.encode(torch.stack([images[i] for i in indices]), [prompts[i] for i in indices])
            if evaluating:
                maps = maps.to(self.store_dtype)
            for (key, i), x in zip(group.items(), maps, strict=True):
                descriptors[key] = x
                if keep[i]:
                    self.store.put(key, x)
        encoded = [descriptors[key].to(image.device) for key, image in zip(keys, images, strict=True)]
        return [encoded[i : i + 2] for i in range(0, len(encoded), 2)]

    def encode(self, images: Tensor, prompts: Sequence[str | None]) -> Tensor:
        """See `DescriptorEncoder`; without a `prompt`, the prompts of all images are None."""
        return super().encode(images, None if self.prompt is None else prompts)

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that a prediction depends on, ready for JSON."""
        if self._protocol is None:
            model = getattr(self.backbone, 'fingerprint', type(self.backbone).__name__)
            own_prompt = model.get('prompt') if isinstance(model, dict) else None
            extractors = [module for module in self.modules() if isinstance(module, DiffusionExtractor)]
            sizes = [getattr(part, 'input_size', None) for part in getattr(self.backbone, 'members', [self.backbone])]
            self._protocol = {
                **self._matching(),
                'prompt': own_prompt if self.prompt is None else self.prompt,
                'input_size': sizes if len(sizes) > 1 else sizes[0],
                'draws': [{'noise': e.noise, 'seed': e.seed, 'ensemble': e.ensemble} for e in extractors],
                'store_dtype': str(self.store_dtype).removeprefix('torch.'),
                'model': model,
                'weights': _digest(self.state_dict()),
            }
        return self._protocol

    def train(self, mode: bool = True) -> 'PairModel':
        """Set the mode, and drop cached descriptors: weights may have changed."""
        self._forget()
        return super().train(mode)

    def _forget(self, *_: object) -> None:
        self.store.clear()
        self._protocol = None

    def _matching(self) -> dict[str, Any]:
        """Options of `match`, for the `protocol`."""
        raise NotImplementedError

    def _prompt_of(self, sample: Sample) -> str | None:
        return None if self.prompt is None else self.prompt.format(category=sample.category)


@MODELS.register_module()
class CorrespondenceModel(PairModel):
    """Match the keypoints of image pairs by descriptors.

    ```text
    loss:    descriptors of both images, annotated points -> symmetric cross-entropy
    predict: descriptors of both images, points of the source -> points of the target, `pred_keypoints1`
                                                              -> and back, `cycle_error`, if requested
    ```

    Args:
        *args: see `PairModel`.
        match_size: size to which maps are upsampled for matching: that of the 'original' images, as in DIFT, or one
            side for all, as in DHF (224 or 512). Predictions are in original pixels in both cases.
        window: refine matches to sub-pixel positions, see `match_points`.
        temperature: of the refinement.
        unit: of matches and of the window, see `match_points`.
        cycle_error: predict the confidence of every match as well: each sample gets `cycle_error`, see the method
            `measure_cycle`, which `PCKMetric(confidence='cycle_error')` scores.
        align_pose: predict with pose alignment as well: each sample gets `pred_keypoints1_aligned`, see `align`.
        **kwargs: see `PairModel`.

    Raises:
        ValueError: unknown `match_size`, unit or precision.
    """

    PREDICTION = 'pred_keypoints1'

    def __init__(
        self,
        *args: Any,
        match_size: Literal['original'] | int = 'original',
        window: int | None = None,
        temperature: float = 0.04,
        unit: Unit = 'pixels',
        cycle_error: bool = False,
        align_pose: bool = False,
        **kwargs: Any,
    ) -> None:
        if match_size != 'original' and (not isinstance(match_size, int) or match_size < 1):
            raise ValueError(f"match_size is {match_size!r}; it is 'original' or a number of pixels")
        if unit not in get_args(Unit):
            raise ValueError(f'unit is {unit!r}; it is {" or ".join(map(repr, get_args(Unit)))}')
        super().__init__(*args, **kwargs)
        self.match_size = match_size
        self.window = window
        self.temperature = temperature
        self.unit = unit
        self.cycle_error = cycle_error
        self.align_pose = align_pose

    def loss(self, inputs: Images, data_samples: Sequence[PairSample]) -> dict[str, Tensor]:
        """Mean loss of the pairs with keypoints that are visible in both images."""
        pairs = self.encode_pairs(inputs, data_samples)
        losses = []
        for descriptors, sample in zip(pairs, data_samples, strict=True):
            if sample.visible.any():
                cells = []
                for view, maps in zip(VIEWS, descriptors, strict=True):
                    points, size = sample.get(f'keypoints{view}')[sample.visible], sample.get(f'ori_shape{view}')
                    cells.append(points_to_cells(points, size, maps.shape[1:]).to(maps.device))
                losses.append(self.head.loss(*descriptors, *cells))
        if not losses:  # parameters get gradients of zero, which distributed training waits for
            return {'loss_match': 0 * sum(maps.sum() for descriptors in pairs for maps in descriptors)}
        return {'loss_match': torch.stack(losses).mean()}

    def match(self, source: Tensor, target: Tensor, sample: PairSample) -> Tensor:
        """Match the visible keypoints of the source, from descriptors with shapes (C', h, w) and (C', h', w').

        Returns:
            (x, y) in original pixels of the target for every visible keypoint, in order, float64 with shape (V, 2), on
            the CPU.
        """
        points, sizes, scale = self.frame(sample)
        if not len(points):
            return points
        return self._match_points(source, target, points, *sizes).cpu().double() * scale

    def predict_pair(self, source: Tensor, target: Tensor, sample: PairSample) -> dict[str, Tensor]:
        """`pred_keypoints1`, and `cycle_error` if the model predicts it; see `match` and `measure_cycle`."""
        matches = self.match(source, target, sample)
        fields = {self.PREDICTION: matches}
        if self.cycle_error:
            fields['cycle_error'] = self.measure_cycle(source, target, sample, matches)
        return fields

    def predict(self, inputs: Images, data_samples: Sequence[PairSample]) -> list[PairSample]:
        """Match each pair, see `PairModel.predict`; with `align_pose` also by the mirrored source."""
        samples = super().predict(inputs, data_samples)
        pending = [i for i, s in enumerate(samples) if 'damaged' not in s and 'pred_keypoints1_aligned' not in s]
        if not self.align_pose or not pending:
            return samples
        images = {view: [inputs[view][i] for i in pending] for view in ('image0', 'image1')}
        chosen = [samples[i] for i in pending]
        twins = [_mirrored(sample) for sample in chosen]
        originals = self.encode_pairs(images, chosen)
        mirrored = self.encode_pairs(images | {'image0': [image.flip(-1) for image in images['image0']]}, twins)
        for sample, twin, (source, target), (reflection, _) in zip(chosen, twins, originals, mirrored, strict=True):
            sample.pred_keypoints1_aligned = self.align(source, reflection, target, sample, twin)
        return samples

    def align(self, source: Tensor, reflection: Tensor, target: Tensor, sample: PairSample, twin: PairSample) -> Tensor:
        """Match with pose alignment at test time (GeoAware-SC, arXiv 2311.17034, section 4.1).

        The mirrored source replaces the source if cells of it that are mutual nearest neighbours of cells of the target
        are closer to them on average, see `mutual_distance`. A keypoint is then looked for where its counterpart, such
        as the left eye for the right one, lies in the mirrored source. A keypoint whose counterpart is not visible in
        both images keeps its match, as in GeoAware-SC.

        Args:
            source: descriptors with shape (C', h, w).
            reflection: those of the mirrored source, with shape (C', h, w).
            target: descriptors with shape (C', h', w').
            sample: the pair, with `pred_keypoints1`.
            twin: the pair with the mirrored source; only keypoints with a counterpart are visible.

        Returns:
            As `match`, for the visible keypoints of `sample`.
        """
        matches = sample.pred_keypoints1.clone()
        if twin.visible.any() and mutual_distance(reflection, target) < mutual_distance(source, target):
            matches[twin.visible[sample.visible]] = self.match(reflection, target, twin)
        return matches

    def measure_cycle(self, source: Tensor, target: Tensor, sample: PairSample, matches: Tensor) -> Tensor:
        """How far from its origin a point is after it was matched with the target and back: a match's confidence.

        Args:
            source: descriptors with shape (C', h, w).
            target: descriptors with shape (C', h', w').
            sample: the pair.
            matches: what `match` returned for it, with shape (V, 2).

        Returns:
            Distances in original pixels of the source, float64 with shape (V,), on the CPU.
        """
        points, sizes, scale = self.frame(sample)
        if not len(points):
            return points.new_zeros(0)
        (height, width), (rows, columns) = sample.ori_shape0, sizes[0]
        inside = points.new_tensor([sizes[1][1] - 1, sizes[1][0] - 1])
        there = torch.minimum((matches / scale).clamp(min=0), inside).round()
        back = self._match_points(target, source, there, *sizes[::-1]).cpu().double()
        return torch.linalg.vector_norm((back - points) * points.new_tensor([width / columns, height / rows]), dim=1)

    def _match_points(self, source: Tensor, target: Tensor, points: Tensor, *sizes: Size) -> Tensor:
        return match_points(
            source, target, points, *sizes, window=self.window, temperature=self.temperature, unit=self.unit
        )

    def frame(self, sample: PairSample) -> tuple[Tensor, list[Size], Tensor]:
        """The frame in which a pair is matched, see `match_size`.

        Returns:
            The source's visible keypoints (x, y) in the pixels of matching, float64 with shape (V, 2); (height, width)
            of both images there; and the size of such a pixel of the target in original pixels, (x, y) with shape (2,).
        """
        sizes = original = [sample.ori_shape0, sample.ori_shape1]
        if self.match_size != 'original':
            sizes = [(self.match_size, self.match_size)] * 2
        scales = [
            torch.tensor([width / w, height / h], dtype=torch.float64)
            for (h, w), (height, width) in zip(sizes, original, strict=True)
        ]
        height, width = sizes[0]
        points = sample.keypoints0[sample.visible].double().cpu() / scales[0]
        points = torch.minimum(points.clamp(min=0), points.new_tensor([width - 1, height - 1])).round()
        return points, sizes, scales[1]

    def _matching(self) -> dict[str, Any]:
        return {
            'match_size': self.match_size,
            'ties': 'first in row order',
            'window': self.window,
            'temperature': None if self.window is None else self.temperature,
            'unit': self.unit,
            'cycle_error': self.cycle_error,
            'align_pose': 'mutual neighbours' if self.align_pose else None,
        }


def _mirrored(sample: PairSample) -> PairSample:
    """The pair whose source is mirrored; visible are the keypoints whose counterpart is visible as well."""
    if 'mirror_rows' not in sample:
        raise ValueError(
            f'pair {sample.pair_id} of category {sample.category!r} does not say which keypoints are exchanged by '
            f'mirroring, so that poses cannot be aligned; set align_pose=False'
        )
    rows, visible = sample.mirror_rows.cpu(), sample.visible.cpu()
    points = sample.keypoints0.cpu()[rows]
    path = sample.get('img_path0')
    names = ('pair_id', 'category', 'img_path1', 'ori_shape0', 'ori_shape1')
    twin = PairSample(metainfo={name: sample.get(name) for name in names})
    twin.set_metainfo({'img_path0': None if path is None else f'{path} (mirrored)'})  # its key in the store
    twin.keypoints0 = torch.stack([sample.ori_shape0[1] - 1 - points[:, 0], points[:, 1]], dim=1)
    twin.visible = visible & visible[rows] & (rows >= 0)
    return twin


def _digest(state: Mapping[str, Tensor]) -> str:
    """Digest of a state dict's content."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f'sha256:{digest.hexdigest()[:16]}'
