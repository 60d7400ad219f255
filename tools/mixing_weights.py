"""Show how an AggregationNeck mixes layers and timesteps: a table for each of its levels, and a picture.

    python tools/mixing_weights.py work_dirs/CONFIG/iter_8000.pth --out mixing.png

Without CONFIG, the neck is built from the config that mmengine writes into its checkpoints; it is read as data, and not
run. No model but the neck is built.
"""

import argparse
import ast
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from mmseg.registry import MODELS
from PIL import Image

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.models.necks import MixingWeights
from diffseg.visualization import mixing_figure, render


def stored_model(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`model` of the config in a checkpoint, which is Python code: only literals and `dict(...)` are read.

    Raises:
        ValueError: there is no config, or something else in it.
    """
    text = checkpoint.get('meta', {}).get('cfg')
    if text is None:
        raise ValueError('the checkpoint holds no config; give CONFIG as well')
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], 'id', None) == 'model':
            return _literal(statement.value)
    raise ValueError('the config in the checkpoint has no model; give CONFIG as well')


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
        found: dict[str, Any] = {}
        for argument in node.args:
            found |= _literal(argument)
        return found | {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    return ast.literal_eval(node)


def aggregation_necks(config: Any, name: str = '') -> Iterator[tuple[str, dict[str, Any]]]:
    """Name in the model, and config, of every AggregationNeck in a model's config."""
    if isinstance(config, Mapping):
        if config.get('type') == 'AggregationNeck':
            yield name, dict(config)
        parts = config.items()
    elif isinstance(config, list | tuple):
        parts = enumerate(config)
    else:
        return
    for key, part in parts:
        yield from aggregation_necks(part, f'{name}.{key}' if name else str(key))


def read(checkpoint: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[tuple[str, MixingWeights]]:
    """Name and table of each level.

    Raises:
        ValueError: there is no AggregationNeck, or its weights are not in the checkpoint.
    """
    necks = list(aggregation_necks(model))
    if not necks:
        raise ValueError('the model has no AggregationNeck')
    state = checkpoint.get('state_dict', checkpoint)
    for name, config in necks:
        neck = MODELS.build(config)
        prefix = f'{name}.'
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        try:
            neck.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f'the checkpoint does not fit {name} in the config: {error}') from error
        for level, table in enumerate(neck.mixing_weights()):
            yield f'{name}, level {level}', table


def below_each_other(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """One picture (H, W, 3) of several, on white."""
    width = max(picture.shape[1] for picture in pictures)
    wide = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(wide)


def run(args: argparse.Namespace) -> None:
    init_default_scope('mmseg')
    checkpoint = CheckpointLoader.load_checkpoint(args.checkpoint, map_location='cpu', logger='silent')
    model = stored_model(checkpoint) if args.config is None else Config.fromfile(args.config).model
    pictures = []
    for title, table in read(checkpoint, model):
        print(f'{title}\n{table}\n')
        pictures.append(render(mixing_figure(table.weights, table.timesteps, table.layers, f'{title}: weights, %')))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(below_each_other(pictures)).save(args.out, 'PNG')
        print(args.out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('config', nargs='?', help="(default: the checkpoint's own)")
    parser.add_argument('--out', type=Path, metavar='PNG', help='the picture to write')
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
