"""Toy horses for the explorer: a session on them, and strokes as a person would paint them."""

import time
from pathlib import Path

import numpy as np
from PIL import Image
from quadrupeds import ToySample, draw_sample

from diffseg.web.pictures import PictureFolder
from diffseg.web.session import Session, recommended

MODEL = str(Path(__file__).resolve().parents[1] / 'demo' / 'tiny-sd')
ADDRESS = 'http://127.0.0.1:8765'


def draw_horses(count: int = 7) -> list[ToySample]:
    """Toy horses of 64 x 64 pixels, with part masks and keypoints."""
    return [draw_sample(0, 5_000_000 + number, 64, 'horse') for number in range(count)]


def save(folder: Path, samples: list[ToySample]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        Image.fromarray(sample.image).save(folder / f'horse_{number}.png')
    return folder


def open_session(folder: Path, cache: Path, **options) -> Session:
    layers, timesteps = recommended(MODEL)
    backbone = {'model': MODEL, 'layers': layers, 'timesteps': timesteps, 'input_size': (64, 64), 'cache': str(cache)}
    return Session(PictureFolder(folder, max_bytes=200_000, max_pixels=1_000_000), backbone, **options)


def wait(session: Session, seconds: float = 60) -> None:
    """Until the features of all pictures are extracted."""
    deadline = time.monotonic() + seconds
    while len(session.features.ready(session.choice)) < len(session.folder.usable()):
        assert time.monotonic() < deadline and not session.features.choices()[session.choice].errors
        time.sleep(0.02)


def mean_iou(predictions: list[np.ndarray], truths: list[np.ndarray], classes: int) -> float:
    scores = []
    for label in range(classes):
        pairs = [(p == label, t == label) for p, t in zip(predictions, truths, strict=True)]
        scores.append(sum((p & t).sum() for p, t in pairs) / max(1, sum((p | t).sum() for p, t in pairs)))
    return 100 * float(np.mean(scores))
