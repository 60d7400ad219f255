"""What all tabs of the explorer share: pictures, one model, features, strokes and a classifier."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor

from diffseg.diffusion.layer_sets import LAYER_SETS, expand
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import Site, sites
from diffseg.inspection import available_sites
from diffseg.visualization import pca_rgb

from .classifier import SAMPLED, PixelClassifier, Projection, labelled_pixels
from .export import list_exports, read_export, write_export
from .features import Choice, FeatureStore
from .matching import Match, match_all
from .pictures import Picture, PictureFolder
from .prediction import Predictor
from .strokes import Annotations

WORK = '.diffseg'  # beside the pictures: strokes, and the cache of activations
RECOMMENDED = 'layers.json'  # in the folder of a model
TIMESTEP = 50  # where nothing else is recommended


def recommended(model: str) -> tuple[list[str], list[int]]:
    """Layers and timesteps to begin with.

    They are what `layers.json` in the model's folder says, as in demo/tiny-sd; else those of the first published set
    that fits the network; else the output of the network.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(model, RECOMMENDED)
    if path.is_file():
        try:
            content = json.loads(path.read_text('utf-8'))
            return list(content['layers']), list(content['timesteps'])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} has no "layers" and "timesteps" ({error!r}); mend or delete it') from error
    available = sites(meta_network(model))
    for name in LAYER_SETS:
        try:
            return expand([name], available), [TIMESTEP]
        except ValueError:
            continue
    return [next(site.name for site in reversed(available.values()) if site.channels)], [TIMESTEP]


class Session:
    """The state behind the page.

    Args:
        folder: the pictures.
        backbone: config of a `DiffusionBackbone` with `model`, `layers`, `timesteps` and further options; a cache is
            added if there is none.
        device: of the model.
        search: folder with results of `tools/search.py`, whose ranking is shown.
        memory: bytes of descriptors in memory.
        named: config and checkpoint that may be loaded from anywhere.
        store: class of the store of descriptors.

    Raises:
        ValueError: a model, layer or file that cannot be used.
    """

    def __init__(
        self,
        folder: PictureFolder,
        backbone: Mapping[str, Any],
        device: torch.device | str = 'cpu',
        search: Path | None = None,
        memory: int = 2_000_000_000,
        named: Sequence[Path] = (),
        store: type[FeatureStore] = FeatureStore,
    ) -> None:
        init_default_scope('mmseg')
        self.folder = folder
        self.options = {'type': 'DiffusionBackbone', 'cache': str(folder.path / WORK / 'features'), **backbone}
        self.model = str(backbone['model'])
        self.sites, self.native_size = available_sites(self.model)
        self.ranking = None if search is None else read_ranking(search)
        model = MODELS.build(self.options).to(device).eval()
        self.annotations = Annotations(folder.path / WORK)
        self.features = store(model, folder, memory, device)
        self.predictor = Predictor(folder, list(named), device)
        self.classifier: PixelClassifier | None = None
        self.fitted: dict[str, Any] = {'revision': 0, 'seconds': None, 'scores': {}, 'next': None}
        self._projection: tuple[tuple[str, ...], Projection] | None = None
        self._maps: dict[str, Tensor] = {}  # projected, by the picture's id
        self._fitting = threading.RLock()
        self._exporting = threading.Lock()

    @property
    def choice(self) -> Choice:
        """The layers that pictures are segmented with."""
        return self.features.default

    def add(self, name: str, data: bytes) -> Picture:
        """Add a picture to the folder and have it extracted; raises what `PictureFolder.add` does."""
        picture = self.folder.add(name, data)
        self.features.notify()
        return picture

    def layers(self) -> list[Site]:
        """What can be chosen: all activations with a fixed number of channels, in order of execution."""
        return [site for site in self.sites.values() if site.channels and site.kind != 'map']

    def match(
        self, choice: Choice, source: Picture, points: Sequence[Sequence[float]], targets: Sequence[Picture]
    ) -> list[Match]:
        """Match the mean of points (x, y) of one picture in others; see `match_all`.

        Raises:
            ValueError: a point outside of the picture, or a picture without features.
        """
        height, width = source.size
        if any(not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5) for x, y in points):
            raise ValueError(f'a point is outside of {source.name}, which has {width} x {height} pixels')
        found = [(self.features.get(choice, target), target.size) for target in targets]
        query = torch.tensor([list(point) for point in points], dtype=torch.float64)
        return match_all(self.features.get(choice, source), query, source.size, found)

    def colours(self, choice: Choice) -> dict[str, Tensor]:
        """Colours (3, h, w) of joint principal components by the picture's id, of all pictures that are ready."""
        pictures = self.features.ready(choice)
        if not pictures:
            return {}
        with torch.inference_mode():
            colours = pca_rgb([self.features.get(choice, picture).map for picture in pictures], sample=SAMPLED)
        return {picture.id: colour for picture, colour in zip(pictures, colours, strict=True)}

    def fit(self) -> dict[str, Any]:
        """Fit the classifier to all strokes, and compare all pictures.

        Returns:
            Number of the fit, seconds that fitting took, uncertainty of each picture, and the picture that it is best
            to paint next: the most uncertain of those that have no strokes.
        """
        with self._fitting:
            painted = set(self.annotations.painted())
            ready = self.features.ready(self.choice)
            revision, classes = self.annotations.revision, len(self.annotations.classes)
            maps = {picture.id: self._map(picture, ready) for picture in ready}
            started = time.perf_counter()
            pixels = labelled_pixels(
                self.annotations, {p.name: (maps[p.id], p.size) for p in ready if p.name in painted}
            )
            present = pixels.labels.unique().tolist()
            self.classifier = PixelClassifier(pixels, classes) if len(present) > 1 else None
            seconds = time.perf_counter() - started
            scores = {}
            if self.classifier is not None:
                with torch.inference_mode():
                    scores = {key: self.classifier.score(x) for key, x in maps.items()}
            unpainted = [p.id for p in ready if p.name not in painted and p.id in scores]
            self.fitted = {
                'revision': self.fitted['revision'] + 1,
                'annotations': revision,
                'seconds': seconds,
                'present': present,
                'scores': scores,
                'next': max(unpainted or scores, key=scores.__getitem__, default=None),
            }
            return self.fitted

    def masks(self, pictures: Sequence[Picture]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Classes (h, w), uint8, and uncertainty (h, w), float32, of pictures, for the page.

        There are none while there is no classifier, for want of strokes of two classes.
        """
        with self._fitting:
            if self.classifier is None:
                return []
            classifier = self.classifier
            ready = self.features.ready(self.choice)
            maps = [self._map(picture, ready) for picture in pictures]
        with torch.inference_mode():
            predictions = [classifier.predict(x) for x in maps]
        return [(p.argmax(0).byte().numpy(), u.clamp(min=0).numpy()) for p, u in predictions]

    def export(self, name: str) -> Path:
        """Write labels, masks and a training config; raises what `write_export` does."""
        with self._exporting:
            self.fit()
            backbone = {**self.options, 'layers': list(self.choice.layers)}
            backbone.pop('timesteps', None)
            backbone.pop('device', None)  # training chooses its device
            backbone['dtype'] = self.features.backbone.extractor.fingerprint['dtype']
            return write_export(
                self.folder,
                name,
                self.annotations,
                None if self.classifier is None else self._mask,
                absolute_paths(backbone),
                self.features.backbone.channels,
            )

    def exports(self) -> list[str]:
        """Names of exports."""
        return list_exports(self.folder)

    def import_labels(self, name: str, source: str) -> None:
        """Put an export in the place of all classes and strokes; raises what `read_export` does."""
        classes, strokes, labels = read_export(self.folder, name, source)
        names = {picture.name for picture in self.folder.usable()}
        self.annotations.replace_all(classes, [s for s in strokes if s.picture in names], labels)

    def close(self) -> None:
        """End the extraction."""
        self.features.close()

    def _mask(self, picture: Picture) -> np.ndarray:
        with torch.inference_mode():
            return self.classifier.mask(self._map(picture, self.features.ready(self.choice)), picture.size)

    def _map(self, picture: Picture, ready: Sequence[Picture]) -> Tensor:
        """Projected map of a picture.

        Components are those of all pictures that are ready. While pictures are extracted, they are computed anew only
        when there are twice as many.
        """
        with torch.no_grad(), self._fitting:
            basis = self._projection[0] if self._projection else ()
            keys = tuple(p.id for p in ready)
            complete = len(ready) == len(self.folder.usable())
            if not basis or (keys != basis and (complete or len(keys) >= 2 * len(basis))):
                step = Projection.step([self.features.get(self.choice, p).grid for p in ready])
                cells = [self.features.get(self.choice, p).cells[::step] for p in ready]
                self._projection, self._maps = (keys, Projection(torch.cat(cells).float())), {}
            if picture.id not in self._maps:
                self._maps[picture.id] = self._projection[1](self.features.get(self.choice, picture))
            return self._maps[picture.id]


def absolute_paths(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the paths of a model's folder and of the cache made absolute, for use in any working folder."""
    absolute = dict(backbone)
    if Path(absolute['model']).exists():
        absolute['model'] = str(Path(absolute['model']).resolve())
    cache = absolute['cache']
    if isinstance(cache, Mapping):
        absolute['cache'] = {**cache, 'path': str(Path(cache['path']).expanduser().resolve())}
    else:
        absolute['cache'] = str(Path(cache).expanduser().resolve())
    return absolute


def read_ranking(folder: Path) -> dict[str, Any]:
    """The ranking of a search: the name of its score, and a list of (layer, timestep, score), the best first.

    Raises:
        ValueError: the folder has no readable ranking.json.
    """
    path = folder / 'ranking.json'
    try:
        rows = json.loads(path.read_text('utf-8'))['ranking']
        score = next(key for key in rows[0] if key not in ('rank', 'activation', 'timestep', 'channels', 'stride'))
        return {'score': score, 'rows': [[row['activation'], row['timestep'], row[score]] for row in rows]}
    except (OSError, ValueError, KeyError, IndexError, StopIteration) as error:
        raise ValueError(f'{path} is no ranking of tools/search.py ({error!r})') from error
