"""Toy quadrupeds: pictures drawn on the fly, with part masks and keypoints.

Four species seen from the side, in random pose, size, colour, texture and direction, before a cluttered background.
Parts differ in shape alone: the colours of all parts of all animals come from one distribution. The pictures replace
Horse-21 (part segmentation) and SPair-71k (keypoint matching) where the real data are not available.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from diffseg.datasets.toy import KEYPOINTS, SPECIES

SUPERSAMPLING = 4

# Parallelograms of a harness: part that they lie on; start and end along it, top and bottom across it, in units of the
# frames of `draw_harness`; and colour.
_HARNESS = (
    ('torso', -0.85, 0.85, -0.05, 0.85, (200, 30, 40)),
    *(('torso', x - 0.08, x + 0.08, -0.05, 0.72, (250, 210, 40)) for x in (-0.6, -0.2, 0.2)),
    ('torso', -0.85, 0.85, 0.7, 0.85, (30, 60, 160)),
    ('torso', 0.45, 0.85, -0.05, 0.3, (245, 245, 245)),
    ('neck', 0.4, 0.7, -0.7, 0.5, (30, 60, 160)),
    ('neck', 0.5, 0.6, -0.7, 0.5, (250, 210, 40)),
    ('head', 0.35, 0.65, -0.3, 0.6, (200, 30, 40)),
)

# Proportions in units of the torso's length, as (low, high) of a uniform distribution; angles in degrees, anticlockwise
# from "forwards" for neck and tail, clockwise from the neck's direction for the head.
_PROPORTIONS = {
    'horse': {
        'torso': (0.2, 0.24), 'leg': (0.62, 0.74), 'leg_width': (0.045, 0.065), 'neck': (0.44, 0.56),
        'neck_width': (0.1, 0.13), 'neck_angle': (35, 65), 'head': (0.32, 0.38), 'head_width': (0.085, 0.105),
        'head_angle': (75, 105), 'ear': (0.12, 0.16), 'tail': (0.42, 0.58), 'tail_angle': (225, 250),
        'tail_width': (0.035, 0.055),
    },
    'giraffe': {
        'torso': (0.2, 0.24), 'leg': (0.8, 0.95), 'leg_width': (0.04, 0.055), 'neck': (0.95, 1.2),
        'neck_width': (0.075, 0.1), 'neck_angle': (50, 80), 'head': (0.24, 0.3), 'head_width': (0.07, 0.09),
        'head_angle': (75, 110), 'ear': (0.09, 0.12), 'tail': (0.32, 0.45), 'tail_angle': (235, 260),
        'tail_width': (0.02, 0.03),
    },
    'dog': {
        'torso': (0.16, 0.2), 'leg': (0.36, 0.46), 'leg_width': (0.055, 0.075), 'neck': (0.2, 0.28),
        'neck_width': (0.1, 0.13), 'neck_angle': (25, 60), 'head': (0.3, 0.36), 'head_width': (0.12, 0.145),
        'head_angle': (35, 65), 'ear': (0.16, 0.22), 'tail': (0.4, 0.55), 'tail_angle': (115, 165),
        'tail_width': (0.03, 0.045),
    },
    'elephant': {
        'torso': (0.33, 0.38), 'leg': (0.44, 0.54), 'leg_width': (0.1, 0.13), 'neck': (0.16, 0.22),
        'neck_width': (0.22, 0.26), 'neck_angle': (15, 40), 'head': (0.16, 0.22), 'head_width': (0.2, 0.24),
        'head_angle': (30, 60), 'ear': (0.26, 0.34), 'tail': (0.34, 0.44), 'tail_angle': (240, 262),
        'tail_width': (0.018, 0.028),
    },
}  # fmt: skip


@dataclass(frozen=True)
class ToySample:
    """One drawn animal.

    Attributes:
        image: RGB picture with shape (H, W, 3), uint8.
        mask: index into `PARTS` for every pixel, with shape (H, W), uint8.
        keypoints: (x, y) in pixels for every name of `KEYPOINTS`, with shape (14, 2), float64.
        visible: whether a keypoint is seen, i.e. not behind another part, with shape (14,), bool.
        bbox: the animal's box (x1, y1, x2, y2) in pixels, the right and lower ends exclusive.
        species: one of `SPECIES`.
        facing: "left" or "right".
    """

    image: np.ndarray
    mask: np.ndarray
    keypoints: np.ndarray
    visible: np.ndarray
    bbox: tuple[int, int, int, int]
    species: str
    facing: str

    @property
    def caption(self) -> str:
        """The sentence that goes with the picture."""
        return caption(self.species)


def caption(species: str) -> str:
    """The sentence that goes with a picture of a species, e.g. "a photo of an elephant"."""
    return f'a photo of {"an" if species[0] in "aeiou" else "a"} {species}'


def draw_sample(seed: int, index: int, size: int = 64, species: str | None = None) -> ToySample:
    """Draw picture `index` of the series `seed`.

    Args:
        seed: series; the same (seed, index, size, species) gives the same bytes.
        index: number of the picture within the series.
        size: height and width in pixels, at least 16.
        species: one of `SPECIES`; drawn at random when None.

    Raises:
        ValueError: on an unknown species or a size below 16.
    """
    if species is not None and species not in SPECIES:
        raise ValueError(f'species {species!r} is unknown, choose from {", ".join(SPECIES)}')
    if size < 16:
        raise ValueError(f'size is {size}, toy pictures need at least 16 pixels')
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    drawn = SPECIES[rng.integers(len(SPECIES))]
    return _render(rng, species or drawn, size)


def draw_harness(sample: ToySample) -> np.ndarray:
    """Draw an edit that follows the animal's pose: a saddle cloth, a collar around the neck and a band over the nose.

    Returns:
        RGBA with shape (H, W, 4), uint8, transparent around the harness.
    """
    points = SUPERSAMPLING * sample.keypoints
    withers, back, belly, chest, poll, eye, muzzle = (
        points[KEYPOINTS.index(name)] for name in ('withers', 'back', 'belly', 'chest', 'poll', 'eye', 'muzzle')
    )
    neck = (withers + chest) / 2
    side = np.array([[0, -1], [1, 0]]) * np.sign(withers[0] - back[0])  # a quarter turn, down where the animal faces
    frames = {  # origin, along, across
        'torso': (back, withers - back, belly - back),
        'neck': (neck, poll - neck, (chest - withers) / 2),
        'head': (eye, muzzle - eye, (muzzle - eye) @ side.T / 2),
    }
    canvas = Image.new('RGBA', tuple(SUPERSAMPLING * length for length in sample.mask.shape[::-1]))
    paint = ImageDraw.Draw(canvas)
    for part, start, end, top, bottom, colour in _HARNESS:
        origin, along, across = frames[part]
        corners = [(start, top), (end, top), (end, bottom), (start, bottom)]
        paint.polygon([tuple(origin + x * along + y * across) for x, y in corners], fill=colour)
    return np.array(canvas.reduce(SUPERSAMPLING))


@dataclass(frozen=True)
class Shape:
    """A filled polygon (N, 2) that belongs to a limb; the limb names are those of `_LIMBS`."""

    limb: str
    polygon: np.ndarray


# Every limb has its part; limbs are painted in this order, later ones over earlier ones.
_LIMBS = {
    'tail': 7, 'far front leg': 5, 'far hind leg': 6, 'neck': 2, 'torso': 1, 'near front leg': 5, 'near hind leg': 6,
    'head': 3, 'ear': 4,
}  # fmt: skip
_LEGS = ('far front leg', 'far hind leg', 'near front leg', 'near hind leg')
_UPRIGHT_EARS = ('horse', 'giraffe')

# Lengths in units of the torso's, and angles in degrees, whose names end in "angle". What lies between two poses of a
# species is a pose.
Pose = Mapping[str, float]


def _uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    return float(rng.uniform(bounds[0], bounds[1]))


def _direction(degrees: float) -> np.ndarray:
    return np.array([math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))])


def _capsule(start: np.ndarray, end: np.ndarray, start_radius: float, end_radius: float) -> np.ndarray:
    """Outline (16, 2) of two discs and what lies between them."""
    dx, dy = end - start
    heading = math.atan2(dy, dx)
    turn = np.linspace(math.pi / 2, 3 * math.pi / 2, 8) + heading
    around_start = start + start_radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    around_end = end - end_radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.concatenate([around_start, around_end])


def _ellipse(centre: np.ndarray, radii: Sequence[float], degrees: float) -> np.ndarray:
    turn = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    along, across = _direction(degrees), _direction(degrees + 90)
    return centre + radii[0] * np.cos(turn)[:, None] * along + radii[1] * np.sin(turn)[:, None] * across


def draw_pose(rng: np.random.Generator, species: str) -> Pose:
    """Proportions and angles of an animal at random."""
    pose = {name: _uniform(rng, bounds) for name, bounds in _PROPORTIONS[species].items()}
    pose['shoulder'] = rng.uniform(-0.06, 0.04)
    pose['haunch'] = rng.uniform(0.9, 1.0)
    for leg in _LEGS:
        pose[f'{leg} forwards'] = rng.uniform(-0.05, 0.05)
        pose[f'{leg} stride_angle'] = rng.uniform(-24, 24)
        pose[f'{leg} bend_angle'] = rng.uniform(0, 28)
    if species == 'elephant':
        for end, length, angles in (('trunk', (0.28, 0.36), (262, 300)), ('trunk_tip', (0.24, 0.34), (240, 320))):
            pose[end] = _uniform(rng, length)
            pose[f'{end}_angle'] = _uniform(rng, angles)
    pose['ear_angle'] = _uniform(rng, (15, 55) if species in _UPRIGHT_EARS else (230, 265))
    pose['tail_swing_angle'] = rng.uniform(-10, 10)
    pose['tail_tip_angle'] = rng.uniform(-5, 35)
    return pose


def skeleton(p: Pose, species: str) -> tuple[list[Shape], dict[str, np.ndarray]]:
    """Shapes and keypoints of an animal facing right, in units of its torso's length, y down."""
    shapes, points = [], {}
    hip = np.array([0.0, 0.0])
    shoulder = np.array([1.0 - 2 * p['torso'], p['shoulder']])
    girth = p['torso']
    shapes.append(Shape('torso', _capsule(hip, shoulder, girth * p['haunch'], girth)))
    middle = (hip + shoulder) / 2
    points['back'] = middle + np.array([0, -0.8 * girth])
    points['belly'] = middle + np.array([0, 0.8 * girth])
    points['chest'] = shoulder + girth * np.array([0.8, 0.25])
    points['withers'] = shoulder + girth * np.array([-0.1, -0.8])

    for leg in _LEGS:
        joint, side = (shoulder, 1) if 'front' in leg else (hip, -1)
        forwards = 0.25 * girth * (1 if 'near' in leg else -1) + p[f'{leg} forwards']
        top = joint + np.array([forwards, 0.45 * girth])
        stride, bend = p[f'{leg} stride_angle'], side * p[f'{leg} bend_angle'] / 2
        upper, lower = 0.5 * (p['leg'] + 0.1), 0.5 * p['leg']
        knee = top + upper * _direction(270 + stride + bend)
        hoof = knee + lower * _direction(270 + stride - bend)
        shapes.append(Shape(leg, _capsule(top, knee, 1.35 * p['leg_width'], p['leg_width'])))
        shapes.append(Shape(leg, _capsule(knee, hoof, p['leg_width'], 0.9 * p['leg_width'])))
        points[leg.replace('leg', 'hoof')] = hoof

    neck_base = shoulder + girth * np.array([0.35, -0.35])
    poll = neck_base + p['neck'] * _direction(p['neck_angle'])
    shapes.append(Shape('neck', _capsule(neck_base, poll, 1.5 * p['neck_width'], p['neck_width'])))
    head_angle = p['neck_angle'] - p['head_angle']
    muzzle = poll + p['head'] * _direction(head_angle)
    width = p['head_width']
    shapes.append(Shape('head', _capsule(poll, muzzle, width, 0.6 * width)))
    points['poll'] = poll + 0.6 * width * _direction(p['neck_angle'])
    points['eye'] = poll + 0.4 * (muzzle - poll) + 0.3 * width * _direction(head_angle + 90)
    points['muzzle'] = muzzle
    if species == 'elephant':  # the trunk belongs to the head, its tip is the muzzle
        bend = muzzle + p['trunk'] * _direction(p['trunk_angle'])
        tip = bend + p['trunk_tip'] * _direction(p['trunk_tip_angle'])
        shapes.append(Shape('head', _capsule(muzzle, bend, 0.45 * width, 0.3 * width)))
        shapes.append(Shape('head', _capsule(bend, tip, 0.3 * width, 0.2 * width)))
        points['muzzle'] = tip
    if species in _UPRIGHT_EARS:
        lean = p['neck_angle'] + p['ear_angle']
        root = poll + 0.7 * width * _direction(lean)
        ear_tip = root + p['ear'] * _direction(lean)
        shapes.append(Shape('ear', _ellipse((root + ear_tip) / 2, (0.62 * p['ear'], 0.3 * p['ear']), lean)))
    else:  # hanging beside the head
        lean = p['ear_angle']
        root = poll + 0.35 * width * _direction(p['neck_angle'] + 60)
        ear_tip = root + p['ear'] * _direction(lean)
        broad = 0.42 if species == 'dog' else 0.55
        shapes.append(Shape('ear', _ellipse((root + ear_tip) / 2, (0.6 * p['ear'], broad * p['ear']), lean)))
    points['ear tip'] = ear_tip

    tail_base = hip + girth * np.array([-0.85, -0.45])
    angle = p['tail_angle'] + p['tail_swing_angle']
    bend = tail_base + 0.5 * p['tail'] * _direction(angle)
    tip = bend + 0.5 * p['tail'] * _direction(angle + p['tail_tip_angle'])
    shapes.append(Shape('tail', _capsule(tail_base, bend, p['tail_width'], p['tail_width'])))
    shapes.append(Shape('tail', _capsule(bend, tip, p['tail_width'], 1.2 * p['tail_width'])))
    points['tail base'], points['tail tip'] = tail_base, tip
    return shapes, points


def _render(rng: np.random.Generator, species: str, size: int) -> ToySample:
    shapes, points = skeleton(draw_pose(rng, species), species)
    facing = 'right' if rng.random() < 0.5 else 'left'
    place = _placement(rng, shapes, size * SUPERSAMPLING, mirrored=facing == 'left')

    canvas = (size * SUPERSAMPLING,) * 2
    limbs = paint_limbs(shapes, place, canvas)
    background = paint_background(rng, size)
    image = background.resize(canvas, Image.Resampling.BILINEAR)
    coat = paint_coat(rng, limbs, np.asarray(background))
    image.paste(coat, mask=limbs.point(lambda value: 255 if value else 0))
    keypoints = place(np.stack([points[name] for name in KEYPOINTS]))
    paint_eye(image, keypoints[0], 0.016 * canvas[0])
    pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float64)
    pixels = np.clip(pixels + rng.normal(0, 1.5, pixels.shape), 0, 255).astype(np.uint8)

    limb_map = np.asarray(limbs)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    mask = np.array([0, *_LIMBS.values()], dtype=np.uint8)[limb_map]
    rows, columns = np.nonzero(mask)
    keypoints = keypoints / SUPERSAMPLING
    return ToySample(
        image=pixels,
        mask=mask,
        keypoints=keypoints,
        visible=_visibility(np.asarray(limbs), keypoints * SUPERSAMPLING),
        bbox=(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1),
        species=species,
        facing=facing,
    )


def paint_limbs(
    shapes: Sequence[Shape], place: Callable[[np.ndarray], np.ndarray], size: tuple[int, int]
) -> Image.Image:
    """Number of the limb, from 1, for every pixel of a (width, height), 0 where there is none; `place` maps (N, 2)."""
    limbs = Image.new('L', size)
    paint = ImageDraw.Draw(limbs)
    for number, limb in enumerate(_LIMBS, start=1):
        for shape in shapes:
            if shape.limb == limb:
                paint.polygon([tuple(xy) for xy in place(shape.polygon)], fill=number)
    return limbs


def paint_eye(image: Image.Image, centre: Sequence[float], radius: float) -> None:
    """Draw an eye at (x, y)."""
    ImageDraw.Draw(image).ellipse(_disc(centre, radius), fill=(15, 15, 15))


def _placement(rng: np.random.Generator, shapes: list[Shape], size: int, mirrored: bool):
    """Function from units of the torso to pixels: mirror, tilt, scale, and a translation; the animal is whole."""
    tilt = math.radians(rng.uniform(-8, 8))
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    turn = turn @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    outline = np.concatenate([shape.polygon for shape in shapes]) @ turn.T
    low, extent = outline.min(axis=0), np.ptp(outline, axis=0)
    scale = size * rng.uniform(0.72, 0.95) / extent.max()
    margin = 0.015 * size
    corner = margin + rng.uniform(0, 1, 2) * (size - 2 * margin - scale * extent)

    def place(xy: np.ndarray) -> np.ndarray:
        return (xy @ turn.T - low) * scale + corner

    return place


def _disc(centre: Sequence[float], radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random colour (3,): grey with some chroma."""
    return np.clip(rng.uniform(50, 215) + rng.normal(0, 32, 3), 15, 240)


def paint_coat(rng: np.random.Generator, limbs: Image.Image, background: np.ndarray) -> Image.Image:
    """Colours of an animal: a hue for the animal, a shade for every limb, and plain, spotted or striped texture."""
    around = background.reshape(-1, 3).mean(axis=0)
    base = _colour(rng)
    while np.abs(base - around).mean() < 38:
        base = _colour(rng)
    shades = base + rng.normal(0, 16, (len(_LIMBS), 1)) + rng.normal(0, 9, (len(_LIMBS), 3))
    names = list(_LIMBS)
    for end in ('front', 'hind'):  # legs of one pair look alike, the far one lies in shade
        shades[names.index(f'far {end} leg')] = 0.72 * shades[names.index(f'near {end} leg')]
    lookup = np.zeros((256, 3), dtype=np.uint8)
    lookup[1 : len(_LIMBS) + 1] = np.clip(shades, 0, 255)
    coat = Image.fromarray(lookup[np.asarray(limbs)])

    texture = ('plain', 'spots', 'stripes')[rng.integers(3)]
    if texture != 'plain':
        width = limbs.width
        pattern = Image.new('L', limbs.size)
        paint = ImageDraw.Draw(pattern)
        if texture == 'spots':
            for x, y, radius in rng.uniform((0, 0, 0.008), (1, 1, 0.026), (90, 3)) * width:
                paint.ellipse(_disc((x, y), radius), fill=255)
        else:
            angle = rng.uniform(0, math.pi)
            along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
            for offset in np.arange(-0.75, 0.75, rng.uniform(0.055, 0.10)) * width:
                centre = np.array([width / 2, width / 2]) + offset * across
                ends = [tuple(centre + sign * width * along) for sign in (-1, 1)]
                paint.line(ends, fill=255, width=max(1, int(0.02 * width)))
        factor = rng.uniform(0.55, 0.75) if base.mean() > 110 else rng.uniform(1.3, 1.5)
        marked = Image.fromarray(np.clip(np.asarray(coat) * factor, 0, 255).astype(np.uint8))
        coat = Image.composite(marked, coat, pattern)
    light = Image.linear_gradient('L').resize(limbs.size).point(lambda value: 255 - value // 4)  # from above
    return ImageChops.multiply(coat, Image.merge('RGB', (light, light, light)))


def paint_background(rng: np.random.Generator, size: int, clutter: tuple[int, int] = (2, 7)) -> Image.Image:
    """Sky and ground, each with a gradient, and some posts, boulders and branches: `clutter`, the end exclusive."""
    horizon = rng.uniform(0.3, 0.75)
    rows = np.linspace(0, 1, size)[:, None]
    sky, ground = (_colour(rng) + np.linspace(-1, 1, size)[:, None] * rng.normal(0, 14, 3) for _ in range(2))
    column = np.where(rows < horizon, sky, ground)
    image = Image.fromarray(np.clip(np.repeat(column[:, None], size, axis=1), 0, 255).astype(np.uint8))
    paint = ImageDraw.Draw(image)
    for _ in range(rng.integers(*clutter)):
        colour = tuple(int(value) for value in 0.6 * _colour(rng) + 0.4 * column[int(horizon * size)])
        x, y = rng.uniform(0, size, 2)
        kind = rng.integers(3)
        if kind == 0:  # post
            half, height = rng.uniform(0.02, 0.06) * size, rng.uniform(0.15, 0.5) * size
            paint.rectangle((x - half, y - height / 2, x + half, y + height / 2), fill=colour)
        elif kind == 1:  # boulder
            rx, ry = rng.uniform(0.05, 0.18, 2) * size
            paint.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
        else:  # branch
            end = np.array([x, y]) + rng.uniform(0.15, 0.45) * size * _direction(rng.uniform(0, 360))
            outline = _capsule(np.array([x, y]), end, 0.045 * size, 0.02 * size)
            paint.polygon([tuple(xy) for xy in outline], fill=colour)
    return image


# The limbs that may be on top where a keypoint is seen.
_SEEN_ON = {
    'eye': ('head', 'ear'), 'muzzle': ('head',), 'ear tip': ('ear',), 'poll': ('head', 'neck', 'ear'),
    'withers': ('torso', 'neck'), 'back': ('torso',), 'tail base': ('torso', 'tail'), 'tail tip': ('tail',),
    'chest': ('torso', 'neck'), 'belly': ('torso',),
    'near front hoof': ('near front leg',), 'far front hoof': ('far front leg',),
    'near hind hoof': ('near hind leg',), 'far hind hoof': ('far hind leg',),
}  # fmt: skip


def _visibility(limb_map: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    numbers = {limb: number for number, limb in enumerate(_LIMBS, start=1)}
    visible = []
    for name, (x, y) in zip(KEYPOINTS, keypoints, strict=True):
        on_top = limb_map[int(y), int(x)]
        visible.append(on_top in [numbers[limb] for limb in _SEEN_ON[name]])
    return np.array(visible)
