"""What a search leaves behind: the ranking as a table and as a picture, the selection, and a config of it."""

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
BLOCK = re.compile(r'(unet|mid|(?:down|up)-level\d+)-(.*)')


def write_results(folder: Path, cfg: Config, found: Selection) -> None:
    """Write `ranking.csv`, `ranking.json`, `heatmap.png`, `selected.json` and `selected.py`."""
    rows = [
        {
            'rank': number,
            'activation': candidate.layer,
            'timestep': candidate.timestep,
            found.name: round(score, 4),
            'channels': found.sites[candidate.layer].channels or 'cells',
            'stride': found.sites[candidate.layer].stride,
        }
        for number, (candidate, score) in enumerate(found.ranking, 1)
    ]
    with (folder / 'ranking.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    def describe(candidates: Sequence[Candidate], score: float) -> dict[str, Any]:
        return {'candidates': list(map(str, candidates)), found.name: round(score, 4)}

    _write_json(folder / 'ranking.json', {'settings': found.settings, 'ranking': rows})
    selected = {
        'selected': list(map(str, found.chosen)),
        'steps': [describe(*step) for step in found.steps],
        'own': None if found.own is None else describe(*found.own),
        'settings': found.settings,
    }
    _write_json(folder / 'selected.json', selected)
    picture = Image.fromarray(render(heat_map(found.ranking, list(found.sites), found.name, found.chosen)))
    picture.quantize(256).save(folder / 'heatmap.png', optimize=True)
    selected_config(cfg, found).dump(folder / 'selected.py')


def selected_config(cfg: Config, found: Selection) -> Config:
    """The config with what was selected in place of its own activations.

    A model that has nothing to train is only tested. See `configs` for necks and heads.
    """
    cfg = copy.deepcopy(cfg)
    for variable in ('layers', 'levels', 'timesteps', 'channels'):  # from which the model was written
        cfg.pop(variable, None)
    if cfg.model.type != 'CorrespondenceModel':
        cfg.model = segmentation_model(cfg.model, found.chosen, found.sites)
        return cfg
    cfg.model = correspondence_model(cfg.model, found.chosen, found.sites, found.grid)
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
    """Draw the figures of all candidates, block by block in order of execution, column by column from top to bottom.

    Args:
        ranking: candidates and their figures; those without one stay blank.
        layers: the rows.
        name: of the figure.
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
        picture = axes.imshow(values, norm=norm, aspect='auto', interpolation='none')
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
    """Labels and names of rows, column by column. A block has a title, whose row has no name, and is not torn apart."""
    found = [BLOCK.fullmatch(layer) for layer in layers]
    rows = [(*(match.groups() if match else ('', layer)), layer) for match, layer in zip(found, layers, strict=True)]
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
