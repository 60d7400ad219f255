"""Toy scenes, and views of them that differ by a known homography or in their light: stand-ins for HPatches.

A scene is a flat picture, twice as finely sampled as its views and larger than the first one, so that others see little
beyond its borders, where it is mirrored.
"""

import math

import cv2
import numpy as np
from PIL import Image, ImageDraw
from quadrupeds import draw_pose, paint_background, paint_coat, paint_eye, paint_limbs, skeleton

from diffseg.datasets.toy import SPECIES

SAMPLING = 2  # pixels of the scene per pixel of its first view
EXTENT = 2  # of the scene over that of its first view
NOISE = 1.5  # of a view's grey values, 0 to 255


def scene_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a scene whose views have `size`."""
    return tuple(round(SAMPLING * EXTENT * side) for side in size)


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw four quadrupeds on cluttered ground with a rough surface.

    Args:
        rng: generator of the random choices.
        size: height and width in pixels.

    Returns:
        RGB with shape (H, W, 3), uint8.
    """
    height, width = size
    ground = paint_background(rng, max(size), clutter=(40, 60)).crop((0, 0, width, height))
    image = Image.fromarray(_roughened(rng, np.asarray(ground), 0.25))
    for place in rng.permutation(4):
        _paste_animal(rng, image, (width * (place + 0.5) / 4, height * rng.uniform(0.25, 0.75)), 0.3 * height)
    return _roughened(rng, np.asarray(image), 0.08)


def _paste_animal(rng: np.random.Generator, image: Image.Image, centre: tuple[float, float], extent: float) -> None:
    """Paint an animal of about `extent` pixels."""
    species = SPECIES[rng.integers(len(SPECIES))]
    shapes, points = skeleton(draw_pose(rng, species), species)
    outline = np.concatenate([shape.polygon for shape in shapes])
    middle, scale = (
        (outline.min(0) + outline.max(0)) / 2,
        extent * rng.uniform(0.8, 1.2) / np.ptp(outline, axis=0).max(),
    )
    turn = scale * np.array([rng.choice([-1, 1]), 1])

    def place(xy: np.ndarray) -> np.ndarray:
        return (xy - middle) * turn + centre

    limbs = paint_limbs(shapes, place, image.size)
    coat = paint_coat(rng, limbs, np.asarray(image))
    image.paste(coat, mask=limbs.point(lambda value: 255 if value else 0))
    paint_eye(image, place(points['eye']), 0.016 * extent)


def _roughened(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """Multiply an image with smooth noise of five scales, and scatter small discs of other brightness over it."""
    height, width = image.shape[:2]
    rough = np.zeros((height, width))
    for cell in (4, 8, 16, 32, 64):
        coarse = rng.normal(0, 1, (math.ceil(height / cell) + 1, math.ceil(width / cell) + 1))
        rough += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    speckles = Image.new('L', (width, height), 128)
    paint = ImageDraw.Draw(speckles)
    for x, y, radius, grey in rng.uniform((0, 0, 1.5, 0), (width, height, 6, 255), (height * width // 1500, 4)):
        paint.ellipse((x - radius, y - radius, x + radius, y + radius), fill=int(grey))
    factor = np.exp(strength * (0.5 * rough + (np.asarray(speckles, dtype=float) / 128 - 1)))
    return np.clip(image * factor[..., None], 0, 255).astype(np.uint8)


def fit_scene(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Make a scene of a picture: its middle, scaled to fill (height, width); RGB with shape (H, W, 3), uint8."""
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    extent = width / scale, height / scale
    left, top = (picture.width - extent[0]) / 2, (picture.height - extent[1]) / 2
    box = (left, top, left + extent[0], top + extent[1])
    return np.asarray(picture.convert('RGB').resize((width, height), Image.Resampling.BICUBIC, box))


def draw_homography(rng: np.random.Generator, size: tuple[int, int], strength: float) -> np.ndarray:
    """Draw a homography between images of one size: rotation, scale and perspective.

    Args:
        rng: generator of the random choices.
        size: height and width in pixels.
        strength: in [0, 1]; at 1 up to 60 degrees, a factor of 2, and corners displaced by up to a fifth of the sides.

    Returns:
        Shape (3, 3), the last entry 1.
    """
    height, width = size
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], float)
    angle = math.radians(60 * strength * rng.choice([-1, 1]) * rng.uniform(0.5, 1))
    scale = 2 ** (strength * rng.uniform(-1, 1))
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = corners.mean(axis=0)
    aside = 0.2 * strength * rng.uniform(-1, 1, (4, 2)) * (width, height)
    moved = (corners - middle) @ turn.T + middle + aside
    return cv2.getPerspectiveTransform(corners.astype(np.float32), moved.astype(np.float32))


def view(scene: np.ndarray, homography: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image of a scene.

    Args:
        scene: with shape (H, W, 3), uint8.
        homography: from the first view, which shows the middle of the scene, to this one; with shape (3, 3).
        size: height and width of both.

    Returns:
        RGB with shape (h, w, 3), uint8.
    """
    fine = tuple(SAMPLING * side for side in size)
    margin = [(side - inner) // 2 for side, inner in zip(scene.shape[:2], fine, strict=True)]
    finer = _finer(0, 0)  # pixels of a view to those of its finer version
    matrix = finer @ homography @ np.linalg.inv(_finer(margin[1], margin[0]))
    warped = cv2.warpPerspective(scene, matrix, fine[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.resize(warped, size[::-1], interpolation=cv2.INTER_AREA)


def _finer(left: float, top: float) -> np.ndarray:
    """Pixels of a view to those of the scene, or of a finer view, that begins at (left, top) there."""
    shift = (SAMPLING - 1) / 2  # centres of pixels coincide with those of the areas that they cover
    return np.array([[SAMPLING, 0, left + shift], [0, SAMPLING, top + shift], [0, 0, 1]], float)


def relight(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """Change the light of an image: contrast (gamma), brightness, tint, a shade that grows across it, and more noise.

    Args:
        rng: generator of the random choices.
        image: with shape (H, W, 3), uint8.
        strength: in [0, 1]; at 0 nothing changes.

    Returns:
        Floating point of the same shape, 0 to 255, and possibly beyond.
    """
    height, width = image.shape[:2]
    gamma = 3 ** (strength * rng.uniform(-1, 1))
    gain = np.exp(strength * (rng.uniform(-1, 0.3) + rng.normal(0, 0.12, 3)))  # of each channel
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shade = 1 - strength * rng.uniform(0.2, 0.8) * (0.5 + (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(8))
    lit = 255 * (image / 255) ** gamma * gain * shade[..., None]
    return lit + rng.normal(0, 12 * strength, image.shape)


def add_sensor_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add sensor noise to an image (H, W, 3), 0 to 255, and round it to uint8."""
    return np.clip(np.round(image + rng.normal(0, NOISE, image.shape)), 0, 255).astype(np.uint8)
