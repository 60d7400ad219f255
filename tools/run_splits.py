"""Train and test configs over several seeds, and print mean ± standard deviation as the label-scarce tables do.

    python tools/run_splits.py configs/scarce/CONFIG.py --seeds 5
    python tools/run_splits.py configs/scarce/*toy*.py --seeds 5 --cfg-options train_cfg.max_epochs=20

The seeds are 0, 1, ... A seed is used for the training and, for a `ScarceDataset`, for the split into training and test
pictures (`resplit`), so that all configs see the same splits. Runs follow one another in WORK_DIR/CONFIG/seedN, and
each writes WORK_DIR/CONFIG/seedN.json. A config without `train_cfg` is only tested. When called again, the tool skips
finished runs and resumes an interrupted one. It refuses to mix results of different versions of a config. A config may
name a file of its seed: `{{$SEED:0}}` in it is the number.

The standard deviation is that of a sample (divided by the number of seeds - 1). With `--baseline CONFIG`, one of the
configs, a second table has the differences from it, of the same seed each.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import diffseg  # registers its parts
from diffseg.files import whole_file

PACKAGES = ('torch', 'diffusers', 'transformers', 'mmengine')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument('--seeds', type=int, default=5, help='how many (default: 5)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/splits'), help='(default: %(default)s)')
    parser.add_argument('--baseline', type=Path, metavar='CONFIG', help='print the differences from this one as well')
    parser.add_argument('--metrics', default='*', metavar='PATTERN', help='print these only (default: all)')
    parser.add_argument('--no-resplit', action='store_true', help='keep the split of the folders')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    stems = [path.stem for path in args.configs]
    if len(set(stems)) < len(stems):
        parser.error(f'configs need different file names, but these repeat: {", ".join(stems)}')
    if args.baseline is not None and args.baseline.stem not in stems:
        parser.error(f'--baseline {args.baseline} is none of the configs')

    rows = {}
    for path in args.configs:
        records = []
        for seed in range(args.seeds):
            os.environ['SEED'] = str(seed)
            cfg = Config.fromfile(path)
            cfg.merge_from_dict(args.cfg_options)
            records.append(run(cfg, path, seed, args.work_dir / path.stem, resplit=not args.no_resplit))
        rows[path.stem] = [select(record['metrics'], args.metrics) for record in records]
    print(table(rows))
    if args.baseline is not None:
        print(f'\ndifferences from `{args.baseline.stem}`, of the same seed each\n')
        print(table(differences(rows, args.baseline.stem)))


def run(cfg: Config, path: Path, seed: int, folder: Path, resplit: bool) -> dict[str, Any]:
    """Train and test with one seed, unless its result exists; returns the content of the JSON file."""
    datasets = list(scarce_datasets([cfg[key] for key in cfg])) if resplit else []
    for dataset in datasets:
        dataset['resplit'] = seed
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
    digest = hashlib.sha256(json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
    work_dir, result = folder / f'seed{seed}', folder / f'seed{seed}.json'
    digest_file = work_dir / 'config.sha256'
    if result.is_file():
        record = json.loads(result.read_text())
        check(record['config_sha256'], digest, result)
        return record
    if digest_file.is_file():
        check(digest_file.read_text(), digest, work_dir)
    write(digest_file, digest)

    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{path.stem}-seed{seed}'
    cfg.get('visualizer', {}).pop('name', None)  # each run has its own, named after the experiment
    if (work_dir / 'last_checkpoint').is_file():
        cfg.resume, cfg.load_from = True, None
    start = time.perf_counter()
    runner = Runner.from_cfg(cfg)
    if cfg.get('train_cfg'):
        runner.train()
    metrics = {name: float(value) for name, value in runner.test().items()}
    record = {
        'config': str(path),
        'config_sha256': digest,
        'seed': seed,
        'resplit': bool(datasets),
        'metrics': metrics,
        'seconds': round(time.perf_counter() - start, 1),
        'versions': {'python': platform.python_version(), 'diffseg': diffseg.__version__}
        | {name: version(name) for name in PACKAGES},
    }
    write(result, json.dumps(record, indent=2) + '\n')
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return record


def select(metrics: Mapping[str, float], pattern: str) -> dict[str, float]:
    """The metrics whose names match a pattern in the style of `fnmatch`."""
    return {name: value for name, value in metrics.items() if fnmatchcase(name, pattern)}


def differences(rows: Mapping[str, Sequence[Mapping[str, float]]], baseline: str) -> dict[str, list[dict[str, float]]]:
    """For every other config the metrics of each seed minus those of the baseline with this seed."""
    return {
        config: [
            {name: value - reference[name] for name, value in run.items() if name in reference}
            for run, reference in zip(runs, rows[baseline], strict=True)
        ]
        for config, runs in rows.items()
        if config != baseline
    }


def scarce_datasets(node: Any) -> Iterator[dict]:
    """Configs of `ScarceDataset`s anywhere in a config."""
    if isinstance(node, Mapping):
        if node.get('type') == 'ScarceDataset':
            yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from scarce_datasets(child)


def check(stored: str, current: str, path: Path) -> None:
    """Exit unless the stored digest of the config is the current one."""
    if stored != current:
        raise SystemExit(
            f'error: {path} was made with another version of this config; delete it or choose another --work-dir'
        )


def write(path: Path, text: str) -> None:
    """Write a file atomically, so that it is complete or absent."""
    with whole_file(path) as partial:
        partial.write_text(text)


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a row for each config, a column for each metric."""
    metrics = list(dict.fromkeys(name for runs in rows.values() for run in runs for name in run))
    lines = [['config', 'seeds', *metrics], ['---'] * (len(metrics) + 2)]
    for config, runs in rows.items():
        cells = [summary([run[name] for run in runs]) if name in runs[0] else '' for name in metrics]
        lines.append([f'`{config}`', str(len(runs)), *cells])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def summary(values: Sequence[float]) -> str:
    """Mean ± standard deviation of a sample; the mean alone of a single value."""
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


if __name__ == '__main__':
    main()
