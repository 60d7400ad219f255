"""Toy quadrupeds that move: clips drawn on the fly, with a mask of each animal and its keypoints.

One or two animals walk past each other while the camera pans over a cluttered background; they swing their legs, nod,
grow and shrink as they come nearer or go away. The clips stand in for DAVIS-2017 and JHMDB.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from quadrupeds import SUPERSAMPLING, Pose, draw_pose, paint_background, paint_coat, paint_eye, paint_limbs, skeleton

from diffseg.datasets.toy import KEYPOINTS, SPECIES

SPRITE_EXTENT = 4.0  # of the square that an animal is painted in, in units of its torso's length; the hip in its middle
PANORAMA = 1.5  # side of the square background over the longer side of a frame


@dataclass(frozen=True)
class ToyClip:
    """Some drawn animals in motion.

    Attributes:
        images: RGB frames with shape (T, H, W, 3), uint8.
        masks: 0 for the background, 1, 2, ... for the animals, with shape (T, H, W), uint8.
        keypoints: of each animal (x, y) in pixels for every name of `KEYPOINTS`, with shape (animals, T, 14, 2),
            float64, whether hidden or not; a pixel's centre has whole coordinates.
        species: of each animal, one of `SPECIES`; a later one walks in front of an earlier one.
    """

    images: np.ndarray
    masks: np.ndarray
    keypoints: np.ndarray
    species: tuple[str, ...]


@dataclass(frozen=True)
class _Walk:
    """How one animal moves; pairs are its state in the first and the last frame."""

    species: str
    poses: tuple[Pose, Pose]  # between which it swings
    cycles: float
    phase: float
    mirrored: bool
    centres: np.ndarray  # (2, 2), (x, y) in pixels
    scales: tuple[float, float]  # pixels per length of the torso
    tilts: tuple[float, float]  # radians
    coat_seed: int

    def pose(self, time: float) -> Pose:
        weight = 0.5 - 0.5 * math.cos(2 * math.pi * (self.cycles * time + self.phase))
        return blend(*self.poses, weight)

    def placement(self, time: float) -> np.ndarray:
        """Affine map (2, 3) from units of the torso, the hip at the origin, to pixels."""
        tilt, scale = (np.interp(time, (0, 1), ends) for ends in (self.tilts, self.scales))
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        turn = scale * turn @ np.diag([-1.0 if self.mirrored else 1.0, 1.0])
        outline = _outline(self.poses[0], self.species)
        middle = (outline.min(axis=0) + outline.max(axis=0)) / 2
        centre = self.centres[0] + time * (self.centres[1] - self.centres[0])
        return np.column_stack([turn, centre - turn @ middle])


def blend(first: Pose, second: Pose, weight: float) -> dict[str, float]:
    """The first pose with angles turned towards those of the second by `weight` in [0, 1]; lengths stay."""
    return {
        name: value + weight * (second[name] - value) if name.endswith('angle') else value
        for name, value in first.items()
    }


def draw_clip(seed: int, index: int, frames: int, height: int, width: int, animals: int | None = None) -> ToyClip:
    """Draw clip `index` of the series `seed`.

    Args:
        seed: series; the same arguments give the same bytes.
        index: number of the clip within the series.
        frames: their number, at least 2.
        height: of frames, in pixels, at least 32.
        width: of frames, in pixels, at least 32.
        animals: 1 or 2; drawn at random when None, two more often.

    Raises:
        ValueError: a number that is out of range.
    """
    for name, value, allowed in (('frames', frames, 2), ('height', height, 32), ('width', width, 32)):
        if value < allowed:
            raise ValueError(f'{name} is {value}, toy clips need at least {allowed}')
    if animals not in (None, 1, 2):
        raise ValueError(f'animals is {animals}, choose 1, 2 or None')
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    drawn = 1 if rng.random() < 0.3 else 2
    count = animals or drawn
    panorama = paint_background(rng, round(PANORAMA * max(height, width)), clutter=(20, 36))
    corners = rng.uniform(0, np.subtract(panorama.size, (width, height)), (2, 2))  # of the first and the last view
    walks = [_draw_walk(rng, (height, width), place, count) for place in range(count)]

    images, masks, keypoints = [], [], np.empty((count, frames, len(KEYPOINTS), 2))
    canvas = width * SUPERSAMPLING, height * SUPERSAMPLING
    for t, time in enumerate(np.linspace(0, 1, frames)):
        left, top = corners[0] + time * (corners[1] - corners[0])
        view = (1 / SUPERSAMPLING, 0, left, 0, 1 / SUPERSAMPLING, top)
        image = panorama.transform(canvas, Image.Transform.AFFINE, view, Image.Resampling.BILINEAR)
        ids = np.zeros((height, width), dtype=np.uint8)
        for number, walk in enumerate(walks):
            silhouette, keypoints[number, t] = _paste(image, walk, time, np.asarray(panorama))
            centres = np.asarray(silhouette)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
            ids[centres > 0] = number + 1
        pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float64)
        images.append(np.clip(pixels + rng.normal(0, 1.5, pixels.shape), 0, 255).astype(np.uint8))
        masks.append(ids)
    return ToyClip(np.stack(images), np.stack(masks), keypoints, tuple(walk.species for walk in walks))


def _draw_walk(rng: np.random.Generator, shape: tuple[int, int], place: int, count: int) -> _Walk:
    """Animal `place` of `count`: it starts in its own part of the frame and goes where it faces, or nearly."""
    height, width = shape
    species = SPECIES[rng.integers(len(SPECIES))]
    poses = draw_pose(rng, species), draw_pose(rng, species)
    extent = np.ptp(_outline(poses[0], species), axis=0)
    largest = rng.uniform(0.5, 0.7, 2)  # of the first and the last frame, as a share of the frame
    scales = largest * min(height / extent[1], 0.75 * width / extent[0])
    start = rng.uniform(0.25, 0.75) if count == 1 else (0.27, 0.73)[place] + rng.uniform(-0.06, 0.06)
    mirrored = bool(rng.random() < (0.5 if count == 1 else (0.3, 0.7)[place]))
    end = start + (-1 if mirrored else 1) * rng.uniform(0.15, 0.45)
    inside = 0.5 * scales * extent[0] / width  # keeps the animal in the picture
    columns = np.clip((start, end), inside, 1 - inside)
    rows = 0.5 + rng.uniform(-0.08, 0.08, 2)
    return _Walk(
        species=species,
        poses=poses,
        cycles=rng.uniform(1, 2),
        phase=rng.uniform(0, 1),
        mirrored=mirrored,
        centres=np.column_stack([columns * width, rows * height]),
        scales=tuple(scales),
        tilts=tuple(np.radians(rng.uniform(-8, 8, 2))),
        coat_seed=int(rng.integers(2**32)),
    )


def _outline(pose: Pose, species: str) -> np.ndarray:
    return np.concatenate([shape.polygon for shape in skeleton(pose, species)[0]])


def _paste(image: Image.Image, walk: _Walk, time: float, background: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Paint an animal into a frame that is `SUPERSAMPLING` times as large.

    It is painted into a square of its own, where the coat's texture stays where it is on the body, and then placed.

    Returns:
        The silhouette, 0 where the animal is not, of the large frame's size; keypoints (14, 2) in pixels of the frame.
    """
    pose, placement = walk.pose(time), walk.placement(time)  # (2, 3)
    unit = SUPERSAMPLING * max(walk.scales)  # pixels of the square per length of the torso
    side = math.ceil(SPRITE_EXTENT * unit)
    shapes, points = skeleton(pose, walk.species)
    places = np.stack([points[name] for name in KEYPOINTS])  # (14, 2)
    limbs = paint_limbs(shapes, lambda xy: xy * unit + side / 2, (side, side))
    coat = paint_coat(np.random.Generator(np.random.PCG64(walk.coat_seed)), limbs, background)
    paint_eye(coat, places[0] * unit + side / 2, 0.035 * unit)

    # PIL's transform takes the map from pixels of the large frame to those of the square
    turn = np.linalg.inv(placement[:, :2])
    shift = -turn @ placement[:, 2] * unit + side / 2
    data = tuple(np.column_stack([turn * unit / SUPERSAMPLING, shift]).ravel())
    coat = coat.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    silhouette = limbs.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.NEAREST)
    silhouette = silhouette.point(lambda value: 255 if value else 0)
    image.paste(coat, mask=silhouette)
    return silhouette, places @ placement[:, :2].T + placement[:, 2] - 0.5
