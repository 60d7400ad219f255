"""Classes and strokes that a person paints; every change is on disk before it is acknowledged."""

import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from diffseg.files import whole_file
from diffseg.geometry import Size

UNLABELLED = 255
SHIFT = 4  # bits of a pixel's fractions in drawing
COLOURS = (
    '#767f89', '#e8553a', '#2f7de1', '#1f9d55', '#b656d6', '#d98e04', '#00a3a3', '#d6478f', '#7a6ff0', '#8a6d3b',
    '#5aa02c', '#c23b3b',
)  # fmt: skip
CLASSES, STROKES, POINTS, LONGEST = 64, 20_000, 5_000, 80  # limits; the last one of names


@dataclass(frozen=True)
class Class:
    """A class: its name, and its colour as '#rrggbb'.

    Raises:
        ValueError: an empty or long name, or one with '{{', which configs of mmengine would replace; or another colour.
    """

    name: str
    colour: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name.strip()) <= LONGEST or '{{' in self.name:
            raise ValueError(f"{self.name!r} is no name of a class; it has 1 to {LONGEST} characters, without '{{{{'")
        if not isinstance(self.colour, str) or not re.fullmatch('#[0-9a-f]{6}', self.colour):
            raise ValueError(f"{self.colour!r} is no colour; it is written as '#1f9d55'")

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue in 0..255."""
        return tuple(bytes.fromhex(self.colour[1:]))


@dataclass(frozen=True)
class Stroke:
    """A line that was painted over a picture.

    Attributes:
        id: number, ascending in the order of painting.
        picture: name of the picture's file.
        label: index of the class; None erases.
        radius: of the brush in pixels of the picture.
        points: (x, y) in pixels.
    """

    id: int
    picture: str
    label: int | None
    radius: float
    points: tuple[tuple[float, float], ...]


class Annotations:
    """Classes and strokes of all pictures, in one JSON file that is replaced atomically at every change.

    Labels that come from elsewhere than strokes (imported ones) lie below the strokes, an indexed PNG for each picture.

    Args:
        folder: of `strokes.json` and of `labels/PICTURE.png`.

    Attributes:
        revision: number of changes.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / 'strokes.json'
        self.labels = folder / 'labels'
        self.classes: list[Class] = []
        self.strokes: list[Stroke] = []
        self.revision = 0
        self.number = 0
        self._lock = threading.RLock()
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text('utf-8'))
                self.classes = [Class(**entry) for entry in content['classes']]
                self.strokes = [parse_stroke(entry) for entry in content['strokes']]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{self.path} is damaged ({error}); move it away to begin anew, or mend it') from error
            self.number = max((stroke.id for stroke in self.strokes), default=0)

    def add(self, picture: str, label: int | None, radius: float, points: Sequence[Sequence[float]]) -> Stroke:
        """Append a stroke, and save.

        Raises:
            ValueError: an unknown class, or too many strokes.
        """
        with self._lock:
            if label is not None and not 0 <= label < len(self.classes):
                raise ValueError(f'there is no class {label}; there are {len(self.classes)}')
            if len(self.strokes) >= STROKES:
                raise ValueError(f'{STROKES} strokes are all that are kept; undo some')
            stroke = Stroke(self.number + 1, picture, label, radius, tuple((float(x), float(y)) for x, y in points))
            self._save(self.classes, [*self.strokes, stroke])
            self.number += 1
            return stroke

    def remove(self, key: int) -> Stroke:
        """Remove a stroke, and save.

        Raises:
            KeyError: there is none of this number.
        """
        with self._lock:
            for stroke in self.strokes:
                if stroke.id == key:
                    self._save(self.classes, [other for other in self.strokes if other.id != key])
                    return stroke
        raise KeyError(f'stroke {key} is gone')

    def set_classes(self, classes: Sequence[Class], kept: Sequence[int | None]) -> None:
        """Rename, recolour, add and remove classes, and save.

        Args:
            classes: the new classes.
            kept: for each of them its former index; None if it is new. Strokes of classes that are not kept go.

        Raises:
            ValueError: too many classes, equal or empty names, or wrong indices.
        """
        names = [entry.name for entry in classes]
        if len(classes) > CLASSES:
            raise ValueError(f'{len(classes)} classes; at most {CLASSES} are possible')
        if len(set(names)) < len(names):
            raise ValueError('every class needs a name of its own')
        with self._lock:
            former = [index for index in kept if index is not None]
            if (
                len(kept) != len(classes)
                or len(set(former)) < len(former)
                or not set(former) <= set(range(len(self.classes)))
            ):
                raise ValueError('the classes were changed elsewhere; reload the page')
            moved: dict[int | None, int | None] = {old: new for new, old in enumerate(kept) if old is not None}
            moved[None] = None
            strokes = [replace(s, label=moved[s.label]) for s in self.strokes if s.label in moved]
            if moved != {None: None, **{i: i for i in range(len(self.classes))}}:
                for file in self.labels.glob('*.png'):
                    self._write_base(file, _relabel(np.array(Image.open(file)), moved))
            self._save(list(classes), strokes)

    def replace_all(self, classes: Sequence[Class], strokes: Iterable[Stroke], labels: dict[str, np.ndarray]) -> None:
        """Put imported classes, strokes and label arrays {picture: (H, W)} in the place of everything."""
        with self._lock:
            numbered = [replace(stroke, id=number) for number, stroke in enumerate(strokes, self.number + 1)]
            for file in self.labels.glob('*.png'):
                file.unlink()
            for picture, array in labels.items():
                self._write_base(self.labels / f'{picture}.png', array)
            self._save(list(classes), numbered)
            self.number += len(numbered)

    def of(self, picture: str) -> list[Stroke]:
        """The strokes of a picture in the order of painting."""
        return [stroke for stroke in list(self.strokes) if stroke.picture == picture]

    def base(self, picture: str, size: Size) -> np.ndarray | None:
        """Imported labels of a picture (H, W), uint8; None if there are none."""
        path = self.labels / f'{picture}.png'
        if not path.is_file():
            return None
        with Image.open(path) as file:
            labels = np.array(file)
        return labels if labels.shape == tuple(size) else None

    def painted(self) -> list[str]:
        """Names of all pictures with labels, sorted."""
        names = {stroke.picture for stroke in list(self.strokes) if stroke.label is not None}
        return sorted(names | {file.name.removesuffix('.png') for file in self.labels.glob('*.png')})

    def pixels(self, picture: str, size: Size) -> np.ndarray:
        """For every pixel (H, W), int32, the number of the stroke that is uppermost there; 0 if none."""
        numbers = np.zeros(size, np.int32)
        for stroke in self.of(picture):
            draw(numbers, stroke, stroke.id)
        return numbers

    def raster(self, picture: str, size: Size) -> np.ndarray:
        """Labels of a picture (H, W), uint8: what was imported, and over it the strokes; else UNLABELLED."""
        numbers, base = self.pixels(picture, size), self.base(picture, size)
        labels = np.full(size, UNLABELLED, np.uint8) if base is None else base
        for stroke in self.of(picture):
            labels[numbers == stroke.id] = UNLABELLED if stroke.label is None else stroke.label
        return labels

    def describe(self) -> dict[str, Any]:
        """Classes and strokes, ready for JSON."""
        return {
            'classes': [asdict(entry) for entry in self.classes],
            'strokes': [asdict(stroke) for stroke in list(self.strokes)],
        }

    def _save(self, classes: list[Class], strokes: list[Stroke]) -> None:
        content = {'classes': [asdict(c) for c in classes], 'strokes': [asdict(s) for s in strokes]}
        with whole_file(self.path) as partial:
            partial.write_text(json.dumps(content), 'utf-8')
        self.classes, self.strokes = classes, strokes  # what could not be saved is not there
        self.revision += 1

    @staticmethod
    def _write_base(path: Path, labels: np.ndarray) -> None:
        with whole_file(path) as partial:
            Image.fromarray(labels).save(partial, 'PNG')


def parse_stroke(entry: dict[str, Any]) -> Stroke:
    """A stroke from JSON.

    Raises:
        TypeError: other fields.
    """
    stroke = Stroke(**entry)
    return replace(stroke, points=tuple((float(x), float(y)) for x, y in stroke.points))


def draw(image: np.ndarray, stroke: Stroke, value: int) -> None:
    """Draw a stroke with round ends into (H, W), int32."""
    points = np.array(stroke.points)
    fixed = np.round(points * 2**SHIFT).astype(np.int32)
    thickness = round(2 * stroke.radius)
    if len(points) > 1:
        cv2.polylines(image, [fixed[:, None]], False, value, max(1, thickness), cv2.LINE_8, SHIFT)
    for point in fixed[[0, -1]]:
        cv2.circle(image, point.tolist(), round(stroke.radius * 2**SHIFT), value, cv2.FILLED, cv2.LINE_8, SHIFT)


def _relabel(labels: np.ndarray, moved: dict[int | None, int | None]) -> np.ndarray:
    table = np.full(256, UNLABELLED, np.uint8)
    for old, new in moved.items():
        if old is not None:
            table[old] = new
    return table[labels]
