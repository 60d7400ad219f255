"""Collages: textured and shaded shapes and animals that hide each other, before textured backgrounds.

What `quadrupeds.py` draws has one animal, flat surfaces and nothing in front of it. A model that is to be used on other
pictures sees more of what surfaces and their borders look like here.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from quadrupeds import draw_pose, paint_limbs, skeleton

from diffseg.datasets.toy import SPECIES

SUPERSAMPLING = 2


def draw_collage(seed: int, index: int, size: int = 64) -> np.ndarray:
    """Draw picture `index` of the series `seed`.

    Args:
        seed: series; the same (seed, index, size) gives the same bytes.
        index: number of the picture within the series.
        size: height and width in pixels, at least 16.

    Returns:
        RGB picture with shape (H, W, 3), uint8.

    Raises:
        ValueError: on a size below 16.
    """
    if size < 16:
        raise ValueError(f'size is {size}, collages need at least 16 pixels')
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    side = size * SUPERSAMPLING
    rows = np.linspace(-1, 1, side)
    grid = np.stack(np.meshgrid(rows, rows), axis=-1)  # (x, y) in [-1, 1]
    light = rng.normal(size=2)
    light /= np.linalg.norm(light)
    picture = paint_texture(rng, side)
    if rng.random() < 0.6:  # ground
        line = grid[..., 1] - rng.uniform(-0.5, 0.6) - rng.normal(0, 0.2) * grid[..., 0]
        picture = np.where(line[..., None] > 0, paint_texture(rng, side), picture)
    for _ in range(rng.integers(2, 7)):
        species = rng.integers(len(SPECIES)) if rng.random() < 0.4 else None
        brightness = draw_blob(rng, side) if species is None else draw_animal(rng, side, SPECIES[species])
        inside = brightness > 0
        if not inside.any():
            continue
        if rng.random() < 0.5:
            picture = cast_shadow(rng, picture, inside, light)
        centre, extent = grid[inside].mean(axis=0), grid[inside].std() + 0.05
        slope = np.clip((grid - centre) @ light / extent, -1.5, 1.5)
        brightness = brightness * (1 + rng.uniform(0, 0.3) * slope)
        picture = np.where(inside[..., None], paint_texture(rng, side) * brightness[..., None], picture)
    haze = rng.uniform(0.85, 1.15) + rng.uniform(0, 0.2) * (grid @ light)
    pixels = Image.fromarray(np.clip(picture * haze[..., None], 0, 255).astype(np.uint8)).reduce(SUPERSAMPLING)
    noisy = np.asarray(pixels) + rng.normal(0, 1.5, (size, size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def cast_shadow(rng: np.random.Generator, picture: np.ndarray, inside: np.ndarray, light: np.ndarray) -> np.ndarray:
    """The picture (side, side, 3), darkened where a shape (side, side) keeps the light out."""
    side = len(picture)
    across, down = (int(value) for value in -light * rng.uniform(0.03, 0.1) * side)
    shadow = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.02 * side))
    shade = np.roll(np.asarray(shadow) / 255, (down, across), axis=(0, 1))
    return picture * (1 - rng.uniform(0.2, 0.6) * shade[..., None])


def fractal_noise(rng: np.random.Generator, side: int, coarsest: int, persistence: float) -> np.ndarray:
    """Smooth noise (side, side) with a standard deviation of one; each octave has `persistence` times the last's."""
    total, amplitude, cells = np.zeros((side, side)), 1.0, coarsest
    while cells <= side // 2:
        octave = Image.fromarray(rng.normal(size=(cells + 1, cells + 1)).astype(np.float32))
        total += amplitude * np.asarray(octave.resize((side, side), Image.Resampling.BICUBIC))
        amplitude, cells = persistence * amplitude, 2 * cells
    return total / total.std()


def paint_texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A surface (side, side, 3) in 0..255: plain, cloudy, grained, striped or chequered, in two random colours."""
    first = rng.uniform(30, 225) + rng.normal(0, 35, 3)
    second = first + rng.normal(0, rng.uniform(10, 60), 1) + rng.normal(0, 15, 3)
    kind = ('plain', 'clouds', 'grain', 'stripes', 'checks')[rng.integers(5)]
    if kind == 'plain':
        amount = np.zeros((side, side))
    elif kind in ('clouds', 'grain'):
        coarsest, persistence = (2, rng.uniform(0.4, 0.7)) if kind == 'clouds' else (16, 0.9)
        amount = 0.5 + 0.5 * fractal_noise(rng, side, coarsest, persistence)
    else:
        rows = np.linspace(-1, 1, side)
        x, y = np.meshgrid(rows, rows)
        turn, frequency = rng.uniform(0, math.pi), rng.uniform(6, 24)
        bend = rng.uniform(0, 0.1) * fractal_noise(rng, side, 2, 0.5)
        waves = np.sin(frequency * (math.cos(turn) * x + math.sin(turn) * y + bend))
        if kind == 'checks':
            waves = waves * np.sin(frequency * (math.cos(turn) * y - math.sin(turn) * x + bend))
        amount = np.clip(0.5 + rng.uniform(0.5, 4) * waves, 0, 1)
    fine = rng.uniform(0, 6) * fractal_noise(rng, side, 8, 0.8)
    return np.clip(first + amount[..., None] * (second - first) + fine[..., None], 0, 255)


def draw_blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """Brightness (side, side) of a shape with a random outline, rounded or with corners: one inside, zero outside."""
    corners = rng.integers(3, 8) if rng.random() < 0.4 else 48
    turn = np.linspace(0, 2 * math.pi, corners, endpoint=False) + rng.uniform(0, 2)
    orders = np.arange(1, 6)
    waves, phases = rng.normal(0, 0.3, 5) / orders, rng.uniform(0, 2 * math.pi, 5)
    radius = np.exp((waves * np.cos(orders * turn[:, None] + phases)).sum(axis=1))
    outline = np.stack([np.cos(turn), np.sin(turn)], axis=1) * radius[:, None] * (1.0, rng.uniform(0.3, 1.0))
    place = draw_placement(rng, outline, rng.uniform(0.15, 0.7) * side, side)
    mask = Image.new('L', (side, side))
    ImageDraw.Draw(mask).polygon([tuple(xy) for xy in place(outline)], fill=1)
    return np.asarray(mask, dtype=np.float64)


def draw_animal(rng: np.random.Generator, side: int, species: str) -> np.ndarray:
    """Brightness (side, side) of an animal, which differs from limb to limb and is zero outside."""
    shapes, _ = skeleton(draw_pose(rng, species), species)
    outline = np.concatenate([shape.polygon for shape in shapes])
    place = draw_placement(rng, outline, rng.uniform(0.4, 1.1) * side, side, tilt=0.3)
    limbs = np.asarray(paint_limbs(shapes, place, (side, side)))
    brightness = rng.uniform(0.75, 1.2, 256)
    brightness[0] = 0
    return brightness[limbs]


def draw_placement(
    rng: np.random.Generator, outline: np.ndarray, extent: float, side: int, tilt: float = math.pi
) -> Callable[[np.ndarray], np.ndarray]:
    """A map of points (N, 2) that mirrors, turns by at most `tilt`, scales `outline` to `extent`, and moves it."""
    turn = rng.uniform(-tilt, tilt)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    matrix = np.array([[mirror * math.cos(turn), -math.sin(turn)], [mirror * math.sin(turn), math.cos(turn)]])
    scale = extent / np.ptp(outline, axis=0).max()
    middle = (outline.max(axis=0) + outline.min(axis=0)) / 2
    centre = rng.uniform(0.1, 0.9, 2) * side
    return lambda points: centre + scale * (points - middle) @ matrix.T
