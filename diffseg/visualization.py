"""Pictures of features, labels, matches and mixing weights.

A *picture* is an RGB float tensor with shape (3, H, W) and values in [0, 1]. The functions take tensors and return
pictures, a `PIL.Image` or a matplotlib `Figure`; nothing is shown or written, and neither pyplot's state nor any random
number generator is touched. Tensors may be on any device; returned pictures are on the CPU, except those of `resize`.
"""

import colorsys
from collections.abc import Sequence
from itertools import zip_longest

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CORRECT, WRONG = (46, 204, 64), (255, 65, 54)


def to_picture(image: Tensor) -> Tensor:
    """Convert an image with shape (3, H, W) in [-1, 1], the input of the extractor, to a picture."""
    return (image.detach().float().cpu() / 2 + 0.5).clamp(0, 1)


def to_pil(picture: Tensor) -> Image.Image:
    """Convert a picture to an 8-bit image."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def resize(picture: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
    """Resize a picture to `size` (height, width), bilinearly, or by the nearest cell if not `smooth`."""
    if smooth:
        return F.interpolate(picture[None], size, mode='bilinear', align_corners=False, antialias=True)[0]
    return F.interpolate(picture[None], size, mode='nearest-exact')[0]


def pca(features: Sequence[Tensor], components: int = 3, sample: int | None = None) -> list[Tensor]:
    """Project several maps on the principal components of all their cells together.

    Joint components give corresponding cells of different images comparable values. They are deterministic: the
    randomised SVD has a fixed seed, and the sign of a component is such that its largest loading is positive.

    Args:
        features: maps with shapes (C, h_i, w_i), with the same number of channels and any sizes.
        components: number of components to keep.
        sample: about how many cells, evenly taken, the components are computed from (default: all).

    Returns:
        One map with shape (components, h_i, w_i) for each input, in float32 on the CPU, centred on the joint mean.

    Raises:
        ValueError: the numbers of channels differ or are below `components`, or a value is not finite.
    """
    channels = {feature.shape[0] for feature in features}
    if len(channels) != 1:
        raise ValueError(f'joint PCA needs maps with the same number of channels, got {sorted(channels)}')
    if min(channels) < components:
        raise ValueError(f'{components} components need at least as many channels, got {min(channels)}')
    cells = [feature.detach().cpu().float().flatten(1).T for feature in features]  # (h*w, C) each
    step = 1 if sample is None else -(-sum(map(len, cells)) // sample)
    mean, axes = principal_axes(torch.cat([part[::step] for part in cells]), components)
    projected = [F.pad((part - mean) @ axes, (0, components - axes.shape[1])) for part in cells]  # too few cells: zeros
    return [part.T.unflatten(1, feature.shape[1:]) for part, feature in zip(projected, features, strict=True)]


def principal_axes(cells: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Mean and principal axes of cells.

    Args:
        cells: shape (N, C), float32.
        components: number of axes.

    Returns:
        The mean (C,) and the axes (C, K), where K is smaller than `components` if there are fewer cells. They do not
        depend on the state of a random number generator.

    Raises:
        ValueError: a value is not finite.
    """
    if not cells.isfinite().all():
        raise ValueError('features contain NaN or infinity; extract them in float32 or bfloat16')
    mean = cells.mean(0)
    rank = min(*cells.shape, components + 8)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        axes = torch.pca_lowrank(cells - mean, q=rank, center=False, niter=4)[2][:, :components]
    return mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def pca_rgb(features: Sequence[Tensor], clip: float = 0.01, sample: int | None = None) -> list[Tensor]:
    """Colour several maps by their three joint principal components (see `pca`).

    Each component is scaled to [0, 1] over all maps together, so that a colour means the same in each of them; the
    fraction `clip` of the cells at either end saturates, so that outliers do not wash the picture out.
    `sample` is that of `pca`.

    Returns:
        One picture (3, h_i, w_i) for each map (C, h_i, w_i).
    """
    projected = pca(features, sample=sample)
    values = torch.cat([part.flatten(1) for part in projected], dim=1)  # (3, sum h*w)
    rank = round(clip * (values.shape[1] - 1)) + 1
    low = values.kthvalue(rank, dim=1).values[:, None, None]
    high = values.kthvalue(values.shape[1] - rank + 1, dim=1).values[:, None, None]
    return [((part - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) for part in projected]


def heat_map(values: Tensor, limits: tuple[float, float] | None = None, colormap: str = 'magma') -> Tensor:
    """Colour a map with shape (h, w); `limits` are the values at the ends of the colormap (default: of the map)."""
    values = values.detach().float().cpu()
    low, high = limits or (values.min().item(), values.max().item())
    scaled = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    return torch.from_numpy(matplotlib.colormaps[colormap](scaled.numpy())[..., :3]).float().permute(2, 0, 1)


def voc_palette(classes: int = 256) -> Tensor:
    """PASCAL VOC's colours with shape (classes, 3), uint8: class bits spread over R, G and B; class 0 is black."""
    labels = np.arange(classes)
    colours = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return torch.from_numpy(colours)


def colour_labels(labels: Tensor, palette: Tensor | Sequence[Sequence[int]] | None = None, ignore: int = 255) -> Tensor:
    """Colour a label map.

    Args:
        labels: integers with shape (h, w).
        palette: (classes, 3) colours in 0..255, such as those in the metainfo of an mmseg data set (default: VOC's).
        ignore: the label that is drawn white.

    Raises:
        ValueError: a label has no colour.
    """
    labels = labels.detach().cpu().long()
    colours = voc_palette() if palette is None else torch.as_tensor(palette)
    valid = labels != ignore
    classes = labels[valid]
    if classes.numel() and not 0 <= classes.min() <= classes.max() < len(colours):
        raise ValueError(f'labels {classes.min()}..{classes.max()} do not fit a palette of {len(colours)} colours')
    picture = (colours.float() / 255)[labels.where(valid, 0)].permute(2, 0, 1)  # (3, h, w)
    return picture.where(valid, 1.0)


def overlay(picture: Tensor, colours: Tensor, alpha: float = 0.5, mask: Tensor | None = None) -> Tensor:
    """Blend `colours` (3, h, w) with a picture (3, H, W), where `mask` (h, w) is true (default: everywhere).

    The colours are resized to the nearest cell, so that those of labels do not mix.
    """
    size = picture.shape[1:]
    weight = torch.full(colours.shape[1:], alpha) if mask is None else mask.detach().cpu().float() * alpha
    weight = resize(weight.expand(3, -1, -1), size, smooth=False)  # (3, H, W)
    return torch.lerp(picture.cpu(), resize(colours.cpu(), size, smooth=False), weight)


def grid(
    rows: Sequence[Sequence[Tensor]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    cell: int = 192,
    smooth: bool = False,
) -> Image.Image:
    """Arrange pictures of any sizes in a grid with names, the longer side of each scaled to `cell` pixels.

    Args:
        rows: pictures, row by row; rows may differ in length.
        row_names: printed left of the rows.
        column_names: printed over the columns.
        cell: longer side of a picture in the grid, pixels.
        smooth: enlarge small pictures bilinearly instead of to the nearest cell.
    """
    gap, font = 4, ImageFont.load_default(max(10, cell // 16))
    images = [[_fit(picture, cell, smooth) for picture in row] for row in rows]
    heights = [max(image.height for image in row) for row in images]
    row_texts = [_wrap(name, font, cell) for name in row_names]
    column_texts = [_wrap(name, font, cell) for name in column_names]
    probe = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    left = max((int(probe.multiline_textbbox((0, 0), text, font)[2]) + 2 * gap for text in row_texts), default=0)
    top = max((int(probe.multiline_textbbox((0, 0), text, font)[3]) + 2 * gap for text in column_texts), default=0)
    columns = max(len(row) for row in rows)
    size = left + gap + columns * (cell + gap), top + gap + sum(height + gap for height in heights)
    sheet = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(column_texts):
        centre = left + gap + c * (cell + gap) + cell // 2
        draw.multiline_text((centre, top - gap), text, 'black', font, anchor='md', align='center')
    y = top + gap
    for row, height, text in zip_longest(images, heights, row_texts, fillvalue=''):
        draw.multiline_text((gap, y + height // 2), text, 'black', font, anchor='lm')
        for c, image in enumerate(row):
            x = left + gap + c * (cell + gap)
            sheet.paste(image, (x + (cell - image.width) // 2, y + (height - image.height) // 2))
        y += height + gap
    return sheet


def match_lines(
    pictures: tuple[Tensor, Tensor],
    points: tuple[Tensor, Tensor],
    correct: Tensor | None = None,
    height: int = 384,
    confidence: Tensor | None = None,
) -> Image.Image:
    """Draw two pictures side by side, with lines between matched points.

    Args:
        pictures: the source (3, H0, W0) and the target (3, H1, W1).
        points: matched points with shape (N, 2) each, (x, y) in pixels of their picture.
        correct: booleans with shape (N,), drawn green and red; without them the lines have different hues.
        height: of the drawing, pixels; both pictures are scaled to it.
        confidence: of the matches, in [0, 1] with shape (N,), drawn from red to green, the confident ones on top.

    Raises:
        ValueError: the numbers of points differ, or both `correct` and `confidence` are given.
    """
    if correct is not None and confidence is not None:
        raise ValueError('lines are coloured by correct or by confidence, not by both')
    if points[0].shape != points[1].shape or points[0].shape[-1] != 2:
        raise ValueError(f'points must be two (N, 2) tensors, got {[tuple(xy.shape) for xy in points]}')
    scales = [height / picture.shape[1] for picture in pictures]
    images = [
        to_pil(resize(picture.float().cpu(), (height, max(1, round(picture.shape[2] * scale)))))
        for picture, scale in zip(pictures, scales, strict=True)
    ]
    offset = images[0].width + 8
    sheet = Image.new('RGB', (offset + images[1].width, height), 'white')
    sheet.paste(images[0], (0, 0))
    sheet.paste(images[1], (offset, 0))
    draw = ImageDraw.Draw(sheet)
    width, radius = max(1, height // 192), max(2, height // 96)
    count = len(points[0])
    sources = (points[0].cpu() * scales[0]).tolist()
    targets = (points[1].cpu() * scales[1] + torch.tensor([offset, 0])).tolist()
    order = range(count) if confidence is None else confidence.argsort().tolist()
    for i in order:
        source, target = sources[i], targets[i]
        if confidence is not None:
            colour = tuple(round(w + float(confidence[i]) * (c - w)) for c, w in zip(CORRECT, WRONG, strict=True))
        elif correct is None:
            colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / count, 0.9, 1))
        else:
            colour = CORRECT if correct[i] else WRONG
        draw.line([*source, *target], colour, width)
        for x, y in (source, target):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, 'white')
    return sheet


def outline(picture: Tensor, polygon: Tensor, colour: tuple[int, int, int], width: int = 2) -> Tensor:
    """Draw the outline of a polygon on a picture.

    Args:
        picture: with shape (3, H, W).
        polygon: its corners (x, y) in pixels, with shape (N, 2); the outline is clipped to the picture.
        colour: red, green and blue, 0 to 255.
        width: of the line, pixels.
    """
    image = to_pil(picture)
    corners = [tuple(corner) for corner in polygon.tolist()]
    ImageDraw.Draw(image).line([*corners, *corners[:2]], colour, width, joint='curve')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def mixing_figure(weights: Tensor, timesteps: Sequence[int | str], layers: Sequence[str], title: str = '') -> Figure:
    """Draw a table of mixing weights with shape (T, L), a row for each layer and a column for each timestep.

    Every cell is printed in per cent, and the margins hold the sums: the share of a layer and of a timestep. A cell of
    exactly zero, a pair that is not mixed at all, stays empty.

    Raises:
        ValueError: the numbers of names do not match the table.
    """
    if weights.shape != (len(timesteps), len(layers)):
        raise ValueError(f'{len(timesteps)} timesteps, {len(layers)} layers, but weights {tuple(weights.shape)}')
    table = 100 * weights.detach().float().cpu().T  # (L, T)
    width, height = 3 + 0.09 * max(map(len, layers)) + 0.6 * len(timesteps), 1.6 + 0.34 * len(layers)
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(table.numpy(), cmap='magma', vmin=0, aspect='auto')
    middle = table.max().item() / 2
    digits = 1 if middle > 1 else 2
    for layer, row in enumerate(table.tolist()):
        for step, value in enumerate(row):
            colour = 'black' if value > middle else 'white'
            text = f'{value:.{digits}f}' if value else ''
            axes.text(step, layer, text, ha='center', va='center', color=colour, fontsize=8)
    shares = [[f'{share:.0f}%' for share in table.sum(dim).tolist()] for dim in (1, 0)]
    axes.set_yticks(range(len(layers)), [f'{name}  {share}' for name, share in zip(layers, shares[0], strict=True)])
    axes.set_xticks(range(len(timesteps)), [f'{t}\n{share}' for t, share in zip(timesteps, shares[1], strict=True)])
    axes.set_xlabel('timestep')
    axes.set_title(title or 'mixing weights, %')
    figure.colorbar(image, ax=axes, fraction=0.05)
    return figure


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure: RGB with shape (H, W, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _fit(picture: Tensor, side: int, smooth: bool) -> Image.Image:
    """Scale a picture so that its longer side has `side` pixels; shrinking is always smooth."""
    scale = side / max(picture.shape[1:])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[2] * scale))
    return to_pil(resize(picture.float().cpu(), size, smooth or scale < 1))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break a name at hyphens, slashes and spaces into lines of at most `width` pixels where possible."""
    lines = ['']
    for part in text.replace('-', '-\0').replace('/', '/\0').replace(' ', ' \0').split('\0'):
        if lines[-1] and font.getlength(lines[-1] + part) > width:
            lines.append('')
        lines[-1] += part
    return '\n'.join(lines)
