"""Output files of a search: the ranking as tables and as a heat map, the selection, and its config."""

import copy
import csv
import json
import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image

from diffseg.visualization import render

from .configs import correspondence_model, segmentation_model
from .grid import Candidate
from .task import Selection

ROWS = 52  # of a column of the heat map
BLOCK = re.compile(r'(unet|transformer|mid|(?:down|up)-level\d+|(?:refiner-)?vit-block\d+)-(.*)')


def write_results(folder: Path, cfg: Config, selection: Selection) -> None:
    """Write `ranking.csv`, `ranking.json`, `heatmap.png`, `selected.json` and `selected.py`."""
    rows = [
        {
            'rank': number,
            'activation': candidate.layer,
            'timestep': candidate.timestep,
            selection.name: round(score, 4),
            'channels': selection.sites[candidate.layer].channels or 'cells',
            'stride': selection.sites[candidate.layer].stride,
        }
        for number, (candidate, score) in enumerate(selection.ranking, 1)
    ]
    with (folder / 'ranking.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    def describe(candidates: Sequence[Candidate], score: float) -> dict[str, Any]:
        return {'candidates': list(map(str, candidates)), selection.name: round(score, 4)}

    _write_json(folder / 'ranking.json', {'settings': selection.settings, 'ranking': rows})
    selected = {
        'selected': list(map(str, selection.chosen)),
        'steps': [describe(*step) for step in selection.steps],
        'configured': None if selection.configured is None else describe(*selection.configured),
        'settings': selection.settings,
    }
    _write_json(folder / 'selected.json', selected)
    figure = heat_map(selection.ranking, list(selection.sites), selection.name, selection.chosen)
    picture = Image.fromarray(render(figure))
    picture.quantize(256).save(folder / 'heatmap.png', optimize=True)
    selected_config(cfg, selection).dump(folder / 'selected.py')


def selected_config(cfg: Config, selection: Selection) -> Config:
    """The config with its activations replaced by the selected ones.

    A model without trainable parameters gets no training. See `configs` for necks and heads.
    """
    cfg = copy.deepcopy(cfg)
    for variable in (
        'layers',
        'levels',
        'timesteps',
        'channels',
    ):  # of the config file, outdated
        cfg.pop(variable, None)
    if cfg.model.type != 'CorrespondenceModel':
        cfg.model = segmentation_model(cfg.model, selection.chosen, selection.sites)
        return cfg
    cfg.model = correspondence_model(cfg.model, selection.chosen, selection.sites, selection.grid)
    if cfg.model.neck.type == 'ConcatNeck':
        for name in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'val_dataloader', 'val_cfg', 'val_evaluator'):
            cfg[name] = None
        cfg.param_scheduler = None
    return cfg


def heat_map(
    ranking: Sequence[tuple[Candidate, float]],
    layers: Sequence[str],
    name: str,
    selected: Sequence[Candidate] = (),
) -> Figure:
    """Draw the scores of all candidates, block by block in order of execution, column by column from top to bottom.

    Args:
        ranking: candidates and their scores; the others stay blank.
        layers: the rows.
        name: of the score.
        selected: candidates to mark with their numbers; the best one has a star.
    """
    scores = dict(ranking)
    timesteps = sorted({candidate.timestep for candidate in scores})
    best = max(scores, key=scores.__getitem__)
    norm = matplotlib.colors.Normalize(min(scores.values()), max(scores.values()))
    columns = _columns(layers)
    height = max(map(len, columns))
    size = (1.6 + 0.16 * len(timesteps)) * len(columns) + 0.8, 0.14 * height + 0.9
    figure = Figure(size, dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, rows in zip(grid, columns, strict=True):
        values = torch.full((height, len(timesteps)), torch.nan)
        for y, (_, layer) in enumerate(rows):
            for x, t in enumerate(timesteps):
                candidate = Candidate(layer, t)
                values[y, x] = scores.get(candidate, torch.nan)
                mark = '★' if candidate == best else ''
                if candidate in selected:
                    mark = str(selected.index(candidate) + 1)
                    axes.add_patch(
                        matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor='red', lw=1.2)
                    )
                if mark:
                    color = 'black' if norm(scores[candidate]) > 0.6 else 'white'
                    axes.text(x, y, mark, size=6, color=color, ha='center', va='center_baseline', weight='bold')
        picture = axes.imshow(values.numpy(), norm=norm, aspect='auto', interpolation='none')
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], size=6)
        for tick, (_, layer) in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_weight('normal' if layer else 'bold')
        axes.set_xticks(range(len(timesteps)), timesteps, size=6, rotation=90)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
    figure.suptitle(f'{name} of each activation (rows) at each timestep (columns)', size=9)
    figure.colorbar(picture, ax=list(grid), fraction=0.02, pad=0.01, shrink=0.6).ax.tick_params(labelsize=6)
    return figure


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n')


def _columns(layers: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Labels and names of rows, column by column. A block starts with a title row without name and is not split."""
    matches = [BLOCK.fullmatch(layer) for layer in layers]
    rows = [(*(match.groups() if match else ('', layer)), layer) for match, layer in zip(matches, layers, strict=True)]
    blocks = [
        [(title, ''), *((label, layer) for _, label, layer in members)]
        for title, members in groupby(rows, key=itemgetter(0))
    ]
    longest = max(ROWS, *map(len, blocks))
    columns: list[list[tuple[str, str]]] = [[]]
    for block in blocks:
        if len(columns[-1]) + len(block) > longest:
            columns.append([])
        columns[-1] += block
    return columns
