"""A search that a config describes: on what data, by which measure, of which candidates."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from diffseg.cache import format_size
from diffseg.diffusion.layer_sets import expand, split_timesteps
from diffseg.diffusion.sites import Site, resolve

from .engine import Place, Reader, Samples, Store, collect, most_at_once, order, rank, walk
from .grid import Candidate, Measure, Projection
from .pck import DIM, JointPCK, PairPCK
from .probe import LinearProbe
from .selection import forward_selection

TIMESTEPS = tuple(range(50, 1000, 100))  # ten over the range, the published 50 among them
COUNTS = {'pairs': 500, 'images': 200}  # samples that are enough
RAW_BYTES = 2e9  # of activations that one call of the UNet may leave behind
PER_LAYER = 2  # timesteps of one activation in the shortlist
TOKENS = 77  # of a short prompt
# options of the backbone that concern its training or speed, or that are the search's to say
OWN = (
    'attention_maps attention_mode cache channels frozen layers lora micro_batch noise timesteps trainable train_noise'
).split()


class Options(NamedTuple):
    """What a search may be told.

    Attributes:
        layers: names, patterns and sets of activations.
        timesteps: at each of which every activation is a candidate.
        count: how many samples to look at, drawn from a seed; by default all, up to `COUNTS`.
        seeds: draws of the trajectory's noise; every sample is looked at with each.
        dim: channels above which maps are projected; by default what the measure wants.
        dtype: in which maps are kept between samples, 'float16' or 'float32'.
        store_gb: how much of them, in 10^9 bytes.
        micro_batch: timesteps in one call of the UNet; by default what fits into 2 GB of activations.
        shortlist: candidates among which the selection is made.
        k: how many to select.
        device: of the model.
    """

    layers: Sequence[str] = ('*',)
    timesteps: Sequence[int] = TIMESTEPS
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
    """What a search will take, known before.

    Attributes:
        text: the same in words.
        micro_batch: timesteps in one call of the UNet.
    """

    text: str
    micro_batch: int


class Selection(NamedTuple):
    """What a search found.

    Attributes:
        name: of the figure.
        ranking: candidates and their figures, the best first.
        steps: what is selected after each step, and its figure.
        own: the config's own activations and their figure, if all of them are candidates.
        grid: height and width at which candidates were joined, if that was the same for all pairs.
        sites: of the activations.
        settings: how the figures came about, as JSON.
    """

    name: str
    ranking: list[tuple[Candidate, float]]
    steps: list[tuple[tuple[Candidate, ...], float]]
    own: tuple[tuple[Candidate, ...], float] | None
    grid: tuple[int, int] | None
    sites: dict[str, Site]
    settings: dict[str, Any]

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        """What is selected, in the order of selection."""
        return self.steps[-1][0]


class Search:
    """Rank candidates on the training data of a config, and select some that complement each other.

    By zero-shot PCK for a `CorrespondenceModel`, else by a linear probe. Images pass through the pipeline of the test,
    so without augmentation; the noise is seeded; layers of low rank and trained parts of the UNet are left out.

    Self-attention is ranked where all images have one size, but not selected: no config can say how many channels it
    has.

    Args:
        cfg: of a training with a `DiffusionBackbone`.
        available: the model's activations.
        options: see there.

    Raises:
        ValueError: on a config or an option that cannot be searched.
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
        timesteps = list(dict.fromkeys(options.timesteps))
        self.candidates = [Candidate(layer, t) for layer in self.sites for t in timesteps]
        self.own = own_candidates(cfg.model.backbone, available)
        self.dim = options.dim or (DIM if self.pairs else LinearProbe().dim)

    def load_data(self) -> Samples:
        """The training data. Raises what `training_data` does."""
        config = self.cfg.model.get('data_preprocessor') or {'type': 'PairDataPreProcessor'}
        preprocessor = MODELS.build(config).to(self.options.device)
        prompt = self.cfg.model.get('prompt') if self.pairs else None
        return Samples(DATASETS.build(training_data(self.cfg)), preprocessor, prompt)

    def places(self, samples: Samples) -> list[Place]:
        """Which samples to look at, those that share images near each other."""
        count = self.options.count or COUNTS['pairs' if self.pairs else 'images']
        chosen: Sequence[int] = range(len(samples))
        if count < len(samples):
            chosen = sorted(random.Random(0).sample(chosen, count))
        ordered = [chosen[i] for i in order([samples.images(index) for index in chosen])]
        first = self.cfg.model.backbone.get('seed', 0)
        return [Place(index, seed) for seed in range(first, first + self.options.seeds) for index in ordered]

    def plan(self, samples: Samples | None, size: tuple[int, int] | None = None) -> Plan:
        """Work out what a search takes, without weights.

        Args:
            samples: None if there are no data, for the worst case: every image in one pair only.
            size: height and width of images; by default the first one's.
        """
        options, kind = self.options, 'pairs' if self.pairs else 'images'
        if samples is None:
            places = [
                Place(index, seed) for seed in range(options.seeds) for index in range(options.count or COUNTS[kind])
            ]
            images = [[(*place, view) for view in range(1 + self.pairs)] for place in places]
        else:
            places = self.places(samples)
            images = [[(image, place.seed) for image in samples.images(place.index)] for place in places]
            size = size or next(image.shape[-2:] for place in places for image in samples.load(place.index)[1])
        if resized := self.cfg.model.backbone.get('input_size'):
            size = (resized, resized) if isinstance(resized, int) else resized
        shapes = {layer: (_channels(site, size), *site.size(*size)) for layer, site in self.sites.items()}
        steps = len(self.candidates) // len(self.sites)
        raw = _itemsize(self.cfg.model.backbone.get('dtype', 'float32')) * sum(map(math.prod, shapes.values()))
        kept = _itemsize(options.dtype) * steps * sum(min(c, self.dim) * h * w for c, h, w in shapes.values())
        micro_batch = options.micro_batch or max(1, min(steps, int(RAW_BYTES // raw)))
        encoded: list[int] = []
        for _ in walk(images, lambda *where: encoded.append(kept) or kept, int, options.store_gb * 1e9):
            pass
        memory = min(most_at_once(images) * kept, max(map(len, images)) * kept + options.store_gb * 1e9)
        lines = [
            f'{len(self.sites)} activations x {steps} timesteps = {len(self.candidates)} candidates',
            f'{len(images)} {kind} (seeds: {options.seeds}) of {size[0]} x {size[1]} pixels: {len(encoded)} encodings '
            f'and {len(encoded) * -(-steps // micro_batch)} calls of the UNet, of {micro_batch} timesteps each',
            f'memory besides the model: {format_size(micro_batch * raw)} of activations in a call, {format_size(kept)} '
            f'of maps of an image (in {options.dtype}, projected to {self.dim} channels where there are more), at most '
            f'{format_size(int(memory))} of maps at once',
        ]
        finest = max(h * w for _, h, w in shapes.values())
        measures = (PairPCK, JointPCK) if self.pairs else (LinearProbe(dim=self.dim),)
        stages = zip(('rank', 'select'), measures, (self.candidates, self._short(self.candidates)), strict=False)
        for stage, measure, members in stages:
            each = [measure.nbytes(min(shapes[layer][0], self.dim), finest) for layer, _ in members]
            lines.append(
                f'disk, to {stage}: up to {format_size(max(each))} for a sample and candidate, '
                f'{format_size(len(images) * sum(each))} for {len(each)} candidates'
            )
        return Plan('\n'.join(lines), micro_batch)

    def run(self, samples: Samples, out: Path, micro_batch: int, shard: tuple[int, int] = (0, 1)) -> Selection | int:
        """Do what is left to do of the i-th of n parts of the samples, and finish if nothing is left of the others.

        Args:
            samples: of which to take some.
            out: folder for what is kept of them.
            micro_batch: timesteps in one call of the UNet.
            shard: (i, n) with 0 <= i < n.

        Returns:
            What was found; or how many samples other parts have to do before.
        """
        places = self.places(samples)
        ranked = self._stage('rank', self.candidates, samples, places, out, micro_batch, shard)
        if isinstance(ranked, int):
            return ranked
        ranking = rank(*ranked)
        candidates = self._short([c for c, _ in ranking if self.sites[c.layer].channels])
        if not candidates:
            raise ValueError('nothing can be selected: self-attention alone was searched; add other --layers')
        joined = ranked
        if self.pairs:
            joined = self._stage('select', candidates, samples, places, out, micro_batch, shard)
            if isinstance(joined, int):
                return joined
        store, measure = joined
        usable = [reduction for reduction in store if reduction]
        steps = forward_selection(candidates, lambda chosen: measure.score(usable, chosen), self.options.k)
        own = (self.own, measure.score(usable, self.own)) if self.own and set(self.own) <= set(candidates) else None
        grids = {tuple(reduction[candidates[0]].shape[1:]) for reduction in usable} if self.pairs else set()
        grid = grids.pop() if len(grids) == 1 else None
        settings = {key: x for key, x in ranked[0].settings.items() if key not in ('candidates', 'layers')}
        return Selection(measure.name, ranking, steps, own, grid, self.sites, settings)

    def _short(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The first candidates, few of each activation, and the config's own ones."""
        found: list[Candidate] = []
        numbers: dict[str, int] = {}
        for candidate in candidates:
            numbers[candidate.layer] = numbers.get(candidate.layer, 0) + 1
            if len(found) < self.options.shortlist and numbers[candidate.layer] <= PER_LAYER:
                found.append(candidate)
        return found + [own for own in self.own if own in candidates and own not in found]

    def _stage(
        self,
        name: str,
        candidates: Sequence[Candidate],
        samples: Samples,
        places: Sequence[Place],
        out: Path,
        micro_batch: int,
        shard: tuple[int, int],
    ) -> tuple[Store, Measure] | int:
        """Reduce samples; returns how many are missing, if some are."""
        measure, reader = self._build(name, candidates, micro_batch)
        extractor = reader.backbone.extractor
        self.sites |= extractor.sites  # which know how many tokens the prompt has
        settings = {
            **extractor.fingerprint,
            'text_encoder': reader.backbone.fingerprint['text_encoder'],  # also that of captions
            'measure': {key: x for key, x in vars(measure).items() if isinstance(x, int | float | str)},
            'input_size': reader.backbone.input_size,
            'match_size': self.cfg.model.get('match_size'),
            'prompts': samples.prompt,
            'dtype of maps': self.options.dtype,
            'micro_batch': micro_batch,
            'data': training_data(self.cfg),
            'samples': digest([list(samples.images(place.index)) for place in places]),
            'seeds': self.options.seeds,
        }
        store = Store(out / name, places, candidates, settings)
        collect(store, shard, samples, reader, measure, self.options.store_gb * 1e9)
        return len(store.missing()) or (store, measure)

    def _build(self, name: str, candidates: Sequence[Candidate], micro_batch: int) -> tuple[Measure, Reader]:
        """The measure of a stage, and a backbone that reads no more than it needs."""
        backbone = {key: value for key, value in self.cfg.model.backbone.items() if key not in OWN} | {
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


def _channels(site: Site, size: tuple[int, int]) -> int:
    """Of an activation of an image of this size; attention has as many as there are keys."""
    return site.channels or (math.prod(site.size(*size)) if site.name.endswith('self-map') else TOKENS)


def check_backbone(backbone: Mapping[str, Any]) -> None:
    """Raise a ValueError if a backbone cannot be searched."""
    if backbone['type'] != 'DiffusionBackbone':
        raise ValueError(f'the backbone is a {backbone["type"]}; a search is for one DiffusionBackbone')
    if backbone.get('conditioner') is not None:
        raise ValueError(
            f'the prompt is learned by {backbone["conditioner"]["type"]}, so that activations mean nothing before the '
            f'training; search with a prompt'
        )


def own_candidates(backbone: Mapping[str, Any], available: Mapping[str, Site]) -> tuple[Candidate, ...]:
    """The activations of a config at its timesteps; none if aggregated attention, no candidate, is among them."""
    if backbone.get('attention_maps'):
        return ()
    readings, _ = split_timesteps(backbone['layers'], backbone.get('timesteps'))
    return tuple(Candidate(*resolve([layer], available), t) for layer, timesteps in readings for t in timesteps)


def training_data(cfg: Config) -> dict[str, Any]:
    """Config of the training data, with the pipeline of the test.

    Raises:
        ValueError: there are none, or they are those of the validation or the test, or there is no such pipeline.
    """
    if not cfg.get('train_dataloader'):
        raise ValueError(
            'the config has no train_dataloader, and candidates are chosen on training data; inherit a base of '
            'configs/_base_/datasets that has one'
        )
    config = deepcopy(cfg.train_dataloader.dataset)
    others = [cfg[f'{name}_dataloader'].dataset for name in ('test', 'val') if cfg.get(f'{name}_dataloader')]
    held_out = [leaf for other in others for leaf in leaves(other)]
    if not held_out:
        raise ValueError('the config has no test_dataloader, whose pipeline, without augmentation, is needed')
    for leaf in leaves(config):
        if _source(leaf) in map(_source, held_out) or leaf.get('split') in ('val', 'test'):
            raise ValueError(
                f'the training data ({", ".join(f"{key}={value!r}" for key, value in _source(leaf).items())}) are '
                f'those of the validation or test, by which nothing may be selected; point train_dataloader to others'
            )
        leaf.update(pipeline=held_out[0].pipeline, test_mode=True)
    return config


def leaves(config: Any) -> Iterator[Any]:
    """Configs of data sets within those that wrap or join others."""
    inner = config.get('datasets') or [config[key] for key in ('dataset',) if key in config]
    for each in inner:
        yield from leaves(each)
    if not inner:
        yield config


def _source(leaf: Mapping[str, Any]) -> dict[str, Any]:
    """Where data come from."""
    return {key: value for key, value in leaf.items() if key not in ('pipeline', 'test_mode', 'strict')}


def digest(value: Any) -> str:
    """Of anything that JSON has."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
