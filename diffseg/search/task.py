"""Search on the task of a config: its data, the measure and the candidates."""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from diffseg.cache import format_size
from diffseg.devices import fast_dtype
from diffseg.diffusion.layer_sets import expand, split_timesteps
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.schedules import FlowSchedule, NoiseSchedule, Timestep, build_schedule
from diffseg.diffusion.sites import Site, resolve
from diffseg.inspection import dataset_configs

from .engine import Draw, Reader, Samples, Store, collect, order, peak_images, rank, walk
from .grid import Candidate, Measure, Projection
from .pck import DIM, JointPCK, PairPCK
from .probe import LinearProbe
from .selection import forward_selection

TIMESTEPS = tuple(range(50, 1000, 100))  # ten over the range, including the published 50; evenly spaced sigmas
COUNTS = {'pairs': 500, 'images': 200}  # default number of samples
RAW_BYTES = 2e9  # of the activations of one UNet call, at most
PER_LAYER = 2  # timesteps of one activation in the shortlist
# options of the backbone that concern training or speed, or that the search sets
REPLACED = (
    'attention_maps attention_mode cache channels frozen layers lora micro_batch noise timesteps trainable train_noise'
).split()


class Options(NamedTuple):
    """Options of a search.

    Attributes:
        layers: names, patterns and sets of activations.
        timesteps: every activation at each of these is a candidate; those of rectified flow may be sigmas.
        count: number of samples, drawn with a fixed seed; by default all, up to `COUNTS`.
        seeds: number of noise seeds; every sample is used with each of them.
        dim: channels above which maps are projected; by default that of the measure.
        dtype: of the maps that are kept between samples, 'float16' or 'float32'.
        store_gb: size of these maps, in 10^9 bytes.
        micro_batch: timesteps in one call of the network; by default as many as take 2 GB of activations.
        shortlist: number of candidates to select from.
        k: number of candidates to select.
        device: of the model.
    """

    layers: Sequence[str] = ('*',)
    timesteps: Sequence[Timestep] = TIMESTEPS
    count: int | None = None
    seeds: int = 1
    dim: int | None = None
    dtype: str = 'float16'
    store_gb: float = 8
    micro_batch: int | None = None
    shortlist: int = 60
    k: int = 4
    device: str = 'cpu'


class Plan(NamedTuple):
    """Estimated cost of a search.

    Attributes:
        text: numbers of calls, memory and disk space, as text.
        micro_batch: timesteps in one call of the network.
    """

    text: str
    micro_batch: int


class Selection(NamedTuple):
    """Result of a search.

    Attributes:
        name: of the score.
        ranking: candidates and their scores, best first.
        steps: the selection after each step, and its score.
        configured: the config's activations and their score, if all of them are candidates.
        grid: height and width to which maps were resized for joint scores, if equal for all pairs.
        sites: of the activations.
        settings: everything that the scores depend on, as JSON.
    """

    name: str
    ranking: list[tuple[Candidate, float]]
    steps: list[tuple[tuple[Candidate, ...], float]]
    configured: tuple[tuple[Candidate, ...], float] | None
    grid: tuple[int, int] | None
    sites: dict[str, Site]
    settings: dict[str, Any]

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        """The selected candidates, in the order of selection."""
        return self.steps[-1][0]


class Search:
    """Rank candidates on the training data of a config, and select some that complement each other.

    The score is zero-shot PCK for a `CorrespondenceModel`, else the mIoU of a linear probe. Images are prepared with
    the test pipeline, thus without augmentation; the noise is seeded; LoRA layers and trained parts of the UNet are
    removed.

    Self-attention is ranked if all images have one size, but not selected: a config cannot give its number of channels.

    Args:
        cfg: training config with a `DiffusionBackbone`.
        available: the model's activations.
        options: see `Options`.

    Raises:
        ValueError: an unsupported config or option.
    """

    def __init__(self, cfg: Config, available: Mapping[str, Site], options: Options) -> None:
        init_default_scope('mmseg')
        check_backbone(cfg.model.backbone)
        for name in ('count', 'seeds', 'dim', 'micro_batch', 'shortlist', 'k'):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ValueError(f'{name} is {value}; it is 1 or more')
        self.cfg = cfg
        self.options = options
        self.pairs = cfg.model.type == 'CorrespondenceModel'
        self.sites = {name: available[name] for name in expand(options.layers, available)}
        backbone = cfg.model.backbone
        configs = load_config(backbone.model, revision=backbone.get('revision'), config=backbone.get('config'))
        schedule = build_schedule(configs.scheduler, backbone.model)
        self.tokens = placeholder_conditioning(configs.network).tokens  # of a prompt
        timesteps = list(dict.fromkeys(schedule.read(options.timesteps)))
        self.candidates = [Candidate(layer, t) for layer in self.sites for t in timesteps]
        self.configured = configured_candidates(backbone, available, schedule)
        self.dim = options.dim or (DIM if self.pairs else LinearProbe().dim)

    def load_data(self) -> Samples:
        """The training data. Raises what `training_data` does."""
        config = self.cfg.model.get('data_preprocessor') or {'type': 'PairDataPreProcessor'}
        preprocessor = MODELS.build(config).to(self.options.device)
        prompt = self.cfg.model.get('prompt') if self.pairs else None
        return Samples(DATASETS.build(training_data(self.cfg)), preprocessor, prompt)

    def draws(self, samples: Samples) -> list[Draw]:
        """The samples to use with their seeds; those that share images are near each other."""
        count = self.options.count or COUNTS['pairs' if self.pairs else 'images']
        chosen: Sequence[int] = range(len(samples))
        if count < len(samples):
            chosen = sorted(random.Random(0).sample(chosen, count))
        ordered = [chosen[i] for i in order([samples.images(index) for index in chosen])]
        first = self.cfg.model.backbone.get('seed', 0)
        return [Draw(index, seed) for seed in range(first, first + self.options.seeds) for index in ordered]

    def plan(self, samples: Samples | None, size: tuple[int, int] | None = None) -> Plan:
        """Estimate the cost of a search, without weights.

        Args:
            samples: None estimates the worst case without data: every image in one pair only.
            size: height and width of images; by default that of the first image.
        """
        options, kind = self.options, 'pairs' if self.pairs else 'images'
        if samples is None:
            draws = [
                Draw(index, seed) for seed in range(options.seeds) for index in range(options.count or COUNTS[kind])
            ]
            images = [[(*draw, view) for view in range(1 + self.pairs)] for draw in draws]
        else:
            draws = self.draws(samples)
            images = [[(image, draw.seed) for image in samples.images(draw.index)] for draw in draws]
            size = size or next(image.shape[-2:] for draw in draws for image in samples.load(draw.index)[1])
        if resized := self.cfg.model.backbone.get('input_size'):
            size = (resized, resized) if isinstance(resized, int) else resized
        shapes = {layer: (_channels(site, size, self.tokens), *site.size(*size)) for layer, site in self.sites.items()}
        steps = len(self.candidates) // len(self.sites)
        dtype = self.cfg.model.backbone.get('dtype', 'float32')
        if dtype == 'auto':
            dtype = str(fast_dtype(torch.device(options.device))).removeprefix('torch.')
        raw = _itemsize(dtype) * sum(map(math.prod, shapes.values()))
        kept = _itemsize(options.dtype) * steps * sum(min(c, self.dim) * h * w for c, h, w in shapes.values())
        micro_batch = options.micro_batch or max(1, min(steps, int(RAW_BYTES // raw)))
        encoded: list[int] = []
        for _ in walk(images, lambda *where: encoded.append(kept) or kept, int, options.store_gb * 1e9):
            pass
        memory = min(peak_images(images) * kept, max(map(len, images)) * kept + options.store_gb * 1e9)
        lines = [
            f'{len(self.sites)} activations x {steps} timesteps = {len(self.candidates)} candidates',
            f'{len(images)} {kind} (seeds: {options.seeds}) of {size[0]} x {size[1]} pixels: {len(encoded)} encodings '
            f'and {len(encoded) * -(-steps // micro_batch)} calls of the network, of {micro_batch} timesteps each',
            f'memory besides the model: {format_size(micro_batch * raw)} of activations in a call, {format_size(kept)} '
            f'of maps of an image (in {options.dtype}, projected to {self.dim} channels where there are more), at most '
            f'{format_size(int(memory))} of maps at once',
        ]
        finest = max(h * w for _, h, w in shapes.values())
        measures = (PairPCK, JointPCK) if self.pairs else (LinearProbe(dim=self.dim),)
        stages = zip(('rank', 'select'), measures, (self.candidates, self._short(self.candidates)), strict=False)
        for stage, measure, members in stages:
            sizes = [measure.nbytes(min(shapes[layer][0], self.dim), finest) for layer, _ in members]
            lines.append(
                f'disk, to {stage}: up to {format_size(max(sizes))} for a sample and candidate, '
                f'{format_size(len(images) * sum(sizes))} for {len(sizes)} candidates'
            )
        return Plan('\n'.join(lines), micro_batch)

    def run(self, samples: Samples, out: Path, micro_batch: int, shard: tuple[int, int] = (0, 1)) -> Selection | int:
        """Process the remaining samples of the i-th of n shards, and select candidates once all shards are complete.

        Args:
            samples: training data.
            out: folder for the reductions of samples.
            micro_batch: timesteps in one call of the network.
            shard: (i, n) with 0 <= i < n.

        Returns:
            The selection; or the number of samples that other shards still have to process.
        """
        draws = self.draws(samples)
        ranked = self._stage('rank', self.candidates, samples, draws, out, micro_batch, shard)
        if isinstance(ranked, int):
            return ranked
        ranking = rank(*ranked)
        candidates = self._short([c for c, _ in ranking if self.sites[c.layer].channels])
        if not candidates:
            raise ValueError('nothing can be selected: self-attention alone was searched; add other --layers')
        joined = ranked
        if self.pairs:
            joined = self._stage('select', candidates, samples, draws, out, micro_batch, shard)
            if isinstance(joined, int):
                return joined
        store, measure = joined
        usable = [reduction for reduction in store if reduction]
        steps = forward_selection(candidates, lambda chosen: measure.score(usable, chosen), self.options.k)
        configured = None
        if self.configured and set(self.configured) <= set(candidates):
            configured = self.configured, measure.score(usable, self.configured)
        grids = {tuple(reduction[candidates[0]].shape[1:]) for reduction in usable} if self.pairs else set()
        grid = grids.pop() if len(grids) == 1 else None
        settings = {key: x for key, x in ranked[0].settings.items() if key not in ('candidates', 'layers')}
        return Selection(measure.name, ranking, steps, configured, grid, self.sites, settings)

    def _short(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The first candidates, at most `PER_LAYER` of each activation, and those of the config."""
        shortlist: list[Candidate] = []
        numbers: dict[str, int] = {}
        for candidate in candidates:
            numbers[candidate.layer] = numbers.get(candidate.layer, 0) + 1
            if len(shortlist) < self.options.shortlist and numbers[candidate.layer] <= PER_LAYER:
                shortlist.append(candidate)
        return shortlist + [c for c in self.configured if c in candidates and c not in shortlist]

    def _stage(
        self,
        name: str,
        candidates: Sequence[Candidate],
        samples: Samples,
        draws: Sequence[Draw],
        out: Path,
        micro_batch: int,
        shard: tuple[int, int],
    ) -> tuple[Store, Measure] | int:
        """Reduce samples for a stage; returns the number of missing samples instead if there are any."""
        measure, reader = self._build(name, candidates, micro_batch)
        extractor = reader.backbone.extractor
        self.sites |= extractor.sites  # with the number of tokens of the prompt
        settings = {
            **extractor.fingerprint,
            'text_encoder': reader.backbone.fingerprint['text_encoder'],  # the one that also encodes captions
            'measure': {key: x for key, x in vars(measure).items() if isinstance(x, int | float | str)},
            'input_size': reader.backbone.input_size,
            'match_size': self.cfg.model.get('match_size'),
            'prompts': samples.prompt,
            'dtype of maps': self.options.dtype,
            'micro_batch': micro_batch,
            'data': training_data(self.cfg),
            'samples': digest([list(samples.images(draw.index)) for draw in draws]),
            'seeds': self.options.seeds,
        }
        store = Store(out / name, draws, candidates, settings)
        collect(store, shard, samples, reader, measure, self.options.store_gb * 1e9)
        return len(store.missing()) or (store, measure)

    def _build(self, name: str, candidates: Sequence[Candidate], micro_batch: int) -> tuple[Measure, Reader]:
        """The measure of a stage, and a reader of its candidates only."""
        backbone = {key: value for key, value in self.cfg.model.backbone.items() if key not in REPLACED} | {
            'layers': list(dict.fromkeys(candidate.layer for candidate in candidates)),
            'timesteps': list(dict.fromkeys(candidate.timestep for candidate in candidates)),
            'noise': 'seeded',
            'micro_batch': micro_batch,
            'transform': Projection(self.dim),
        }
        device, dtype = torch.device(self.options.device), getattr(torch, self.options.dtype)
        if self.pairs:
            config = {**self.cfg.model, 'backbone': backbone, 'neck': None, 'head': None, 'window': None}
            model = MODELS.build(config).to(device)
            measure = {'rank': PairPCK, 'select': JointPCK}[name](model, self.dim, device)
            return measure, Reader(model.backbone, dtype)
        return LinearProbe(dim=self.dim), Reader(MODELS.build(backbone).to(device), dtype)


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _channels(site: Site, size: tuple[int, int], tokens: int) -> int:
    """Channels of an activation for an image of this size and a prompt; those of attention maps are the keys."""
    return site.channels or (math.prod(site.size(*size)) if site.name.endswith('self-map') else tokens)


def check_backbone(backbone: Mapping[str, Any]) -> None:
    """Raise a ValueError if a backbone cannot be searched."""
    if backbone['type'] != 'DiffusionBackbone':
        raise ValueError(f'the backbone is a {backbone["type"]}; a search is for one DiffusionBackbone')
    if backbone.get('conditioner') is not None:
        raise ValueError(
            f'the prompt is learned by {backbone["conditioner"]["type"]}, so that activations are meaningless before '
            f'training; search with a text prompt'
        )


def configured_candidates(
    backbone: Mapping[str, Any], available: Mapping[str, Site], schedule: NoiseSchedule | FlowSchedule
) -> tuple[Candidate, ...]:
    """The activations of a config at its timesteps; empty if it uses aggregated attention, which is no candidate."""
    if backbone.get('attention_maps'):
        return ()
    readings, _ = split_timesteps(backbone['layers'], backbone.get('timesteps'))
    return tuple(
        Candidate(*resolve([layer], available), t) for layer, timesteps in readings for t in schedule.read(timesteps)
    )


def training_data(cfg: Config) -> dict[str, Any]:
    """Config of the training data, with the test pipeline.

    Raises:
        ValueError: no training data, or they are also validation or test data, or there is no test pipeline.
    """
    if not cfg.get('train_dataloader'):
        raise ValueError(
            'the config has no train_dataloader, and candidates are selected on training data; inherit a base of '
            'configs/_base_/datasets that has one'
        )
    config = deepcopy(cfg.train_dataloader.dataset)
    others = [cfg[f'{name}_dataloader'].dataset for name in ('test', 'val') if cfg.get(f'{name}_dataloader')]
    held_out = [leaf for other in others for leaf in dataset_configs(other)]
    if not held_out:
        raise ValueError('the config has no test_dataloader; its pipeline, without augmentation, is needed')
    for leaf in dataset_configs(config):
        if _source(leaf) in map(_source, held_out) or leaf.get('split') in ('val', 'test'):
            raise ValueError(
                f'the training data ({", ".join(f"{key}={value!r}" for key, value in _source(leaf).items())}) are '
                f'also validation or test data, on which nothing may be selected; point train_dataloader to others'
            )
        leaf.update(pipeline=held_out[0].pipeline, test_mode=True)
    return config


def _source(leaf: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a data set that identify its data."""
    return {key: value for key, value in leaf.items() if key not in ('pipeline', 'test_mode', 'strict')}


def digest(value: Any) -> str:
    """Digest of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
