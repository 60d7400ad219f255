"""Masks of a trained mmseg model, for the explorer."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from torch import nn

from .export import is_inside
from .pictures import Picture, PictureFolder

LISTED = 200  # files that are offered
KEPT = 256  # masks in memory


class Predictor:
    """The one trained model that all tabs look at.

    Configs are Python code: none is run but those in the folder, into which the page writes pictures and exports alone,
    and those that were named at the start.

    Args:
        folder: the pictures; configs and checkpoints below it may be loaded.
        named: config and checkpoint that were named at the start, wherever they are.
        device: of the model.
    """

    def __init__(self, folder: PictureFolder, named: list[Path], device: torch.device | str) -> None:
        self.folder = folder
        self.named = [path.resolve() for path in named]
        self.device = str(device)
        self.loaded: dict[str, Any] | None = None
        self.revision = 0
        self._model: nn.Module | None = None
        self._masks: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def files(self, suffixes: tuple[str, ...]) -> list[str]:
        """Files that can be loaded, as paths below the folder; those that were named at the start as they are."""
        named = [str(path) for path in self.named if path.suffix in suffixes]
        below = [
            path.relative_to(self.folder.path).as_posix()
            for suffix in suffixes
            for path in sorted(self.folder.path.rglob(f'*{suffix}'))
            if path.is_file() and is_inside(path, self.folder.path)
        ]
        return (named + below)[:LISTED]

    def load(self, config: str, checkpoint: str) -> dict[str, Any]:
        """Load a model; returns its classes and colours.

        Raises:
            ValueError: the files are not in `files()`, or do not fit each other.
        """
        for path, suffixes in ((config, ('.py',)), (checkpoint, ('.pth', '.pt'))):
            if path not in self.files(suffixes):
                raise ValueError(
                    f'{path[:200]!r} is not among the files that can be loaded: those in the folder of pictures, and '
                    f'those given with --config and --checkpoint'
                )
        paths = [self.folder.path / path for path in (config, checkpoint)]
        with self._lock:
            try:
                cfg = Config.fromfile(paths[0])
                model = init_model(cfg, str(paths[1]), device=self.device)
            except Exception as error:  # a config is code, and may raise anything
                raise ValueError(f'{config} with {checkpoint} cannot be loaded: {error}') from error
            if 'test_pipeline' not in model.cfg:
                raise ValueError(f'{config} has no test_pipeline, by which pictures are prepared')
            meta = model.dataset_meta or {}
            classes = list(meta.get('classes') or [str(i) for i in range(model.decode_head.num_classes)])
            palette = [list(map(int, colour)) for colour in meta.get('palette') or spread_colours(len(classes))]
            self._model, self._masks = model, {}
            self.revision += 1
            self.loaded = {'config': config, 'checkpoint': checkpoint, 'classes': classes, 'palette': palette}
            return self.loaded

    def mask(self, picture: Picture) -> np.ndarray:
        """Classes of all pixels of a picture, (H, W), uint8.

        Raises:
            ValueError: no model is loaded, or it fails.
        """
        with self._lock:
            if self._model is None:
                raise ValueError('no model is loaded; choose a config and a checkpoint')
            if picture.id not in self._masks:
                image = cv2.cvtColor(np.array(self.folder.read(picture)), cv2.COLOR_RGB2BGR)
                try:
                    result = inference_model(self._model, image)
                except Exception as error:  # of any model, pipeline and picture
                    raise ValueError(f'{picture.name}: the model fails: {error}') from error
                if len(self._masks) >= KEPT:
                    self._masks.pop(next(iter(self._masks)))
                self._masks[picture.id] = result.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
            return self._masks[picture.id]


def spread_colours(count: int) -> list[list[int]]:
    """Distinct colours for classes without a palette."""
    hues = np.arange(count) * 0.618034 % 1
    hsv = np.stack([hues * 180, np.full(count, 170), np.full(count, 215)], axis=1).astype(np.uint8)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0].tolist()
