"""What each timestep of a correspondence model knows that the others do not.

    python tools/analysis/compare_timesteps.py CONFIG [CHECKPOINT]
    python tools/analysis/compare_timesteps.py CONFIG [CHECKPOINT] --draws 11

The test pairs of the config are matched with all timesteps together, and with each alone: the neck then gets that
timestep in place of every other. With `--draws N` N draws of noise are compared in place of timesteps: what several
looks of the same kind give. Printed is

* PCK@0.1-bbox, per point, of each alone and of all together
* an oracle's, which takes for each pair, or for each keypoint, the best of them; beside it what that would be if they
  were right independently of each other
* the mean correlation between two of them, of which keypoints are matched correctly
* for timesteps, the share of the variance of an activation at one of them that is a linear function of that at another
  one, of those at the one before and the one after, and of all others; mean over activations. It is fitted on every
  other pair of images, and measured on the rest.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import DATASETS, MODELS
from torch import Tensor, nn
from tqdm import tqdm

import diffseg  # noqa: F401  registers its parts
from diffseg.evaluation import correct_keypoints

Maps = Sequence[Tensor]
RIDGE = 1e-3  # of the mean variance of a channel


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--draws', type=int, metavar='N', help='compare draws of noise in place of timesteps')
    parser.add_argument('--category', nargs='+', help='of pairs, as in the data set (default: all)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def compare(args: argparse.Namespace) -> None:
    init_default_scope('mmseg')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    model = MODELS.build(cfg.model).to(get_device()).eval()
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint, map_location='cpu', strict=True)
    elif any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f'the model of {args.config} has trainable parameters; give a checkpoint')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    chosen = [i for i in range(len(dataset)) if args.category is None or category(dataset, i) in args.category]
    if not chosen:
        raise ValueError(f'no test pair has a category of {args.category}')
    timesteps = list(model.backbone.extractor.timesteps)
    if args.draws is None and len(timesteps) < 2:
        raise ValueError(f'the model has the timesteps {timesteps}, of which none can be compared; give --draws')

    names = timesteps if args.draws is None else [f'draw {seed}' for seed in range(args.draws)]
    correct = []  # of each (pairs, keypoints)
    for i, name in enumerate(names):
        if args.draws is not None:
            model.backbone.extractor.seed = i
        change = None if args.draws is not None else lambda maps, i=i: alone(maps, i, len(timesteps))
        correct.append(score(model, dataset, chosen, change, str(name)))
    print(report(names, correct))
    if args.draws is None:
        products = Products(len(timesteps))
        together = torch.cat(score(model, dataset, chosen, products.add, 'all'))
        print(f'all together: {100 * together.double().mean():.2f}\n')
        print(linear_report(timesteps, products))


def category(dataset: Any, index: int) -> str:
    """That of a pair, whose images are not read."""
    return dataset.get_data_info(index)['category']


def alone(maps: Maps, timestep: int, count: int) -> list[Tensor]:
    """Maps (B, T*C, h, w) of T timesteps, that number `timestep` in place of all."""
    return [x.unflatten(1, (count, -1))[:, timestep].repeat(1, count, 1, 1) for x in maps]


@contextmanager
def changed(backbone: nn.Module, change: Callable[[Maps], Maps] | None) -> Iterator[None]:
    """Context in which the maps that a backbone returns are changed."""
    hook = None if change is None else backbone.register_forward_hook(lambda module, args, maps: change(maps))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def score(
    model: nn.Module, dataset: Any, chosen: Sequence[int], change: Callable[[Maps], Maps] | None, name: str
) -> list[Tensor]:
    """For each of the chosen pairs, which of its visible keypoints are matched correctly, on the CPU."""
    model.store.clear()
    correct = []
    with changed(model.backbone, change):
        for index in tqdm(chosen, desc=name):
            (sample,) = model.test_step(pseudo_collate([dataset[index]]))
            x1, y1, x2, y2 = sample.bbox1.tolist()
            target = sample.keypoints1[sample.visible].double().cpu()
            correct.append(correct_keypoints(sample.pred_keypoints1, target, max(x2 - x1, y2 - y1)))
    return correct


def report(names: Sequence[Any], correct: Sequence[Sequence[Tensor]]) -> str:
    """Figures of each alone, and of the oracles.

    Args:
        names: of N rows.
        correct: of each row and each pair, bool with shape (keypoints,).
    """
    pairs = [torch.stack(rows).double() for rows in zip(*correct, strict=True)]  # (N, keypoints) each
    points = torch.cat(pairs, dim=1)  # (N, all keypoints)
    accuracy = points.mean(1)
    best_of_pair = torch.cat([rows[rows.sum(1).argmax()] for rows in pairs]).mean()
    correlations = torch.corrcoef(points)
    others = ~torch.eye(len(names), dtype=torch.bool)
    lines = ['| alone | PCK@0.1-bbox/point | mean correlation with the others |', '|---|---|---|']
    for name, value, row, mask in zip(names, accuracy, correlations, others, strict=True):
        lines.append(f'| {name} | {100 * value:.2f} | {row[mask].mean():.2f} |')
    return '\n'.join(
        [
            *lines,
            '',
            f'mean correlation: {correlations[others].mean():.2f}',
            f'best alone: {100 * accuracy.max():.2f}',
            f'majority: {100 * (points.mean(0) > 0.5).double().mean():.2f}',
            f'oracle for each pair: {100 * best_of_pair:.2f}',
            f'oracle for each keypoint: {100 * points.amax(0).mean():.2f}; '
            f'of independent ones: {100 * (1 - (1 - accuracy).prod()):.2f}',
        ]
    )


class Products:
    """Sums of products of the channels of all timesteps over cells, for every map, apart for every other image pair.

    Args:
        count: number of timesteps T.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls = 0
        self.sums: tuple[list[Tensor], list[Tensor]] = ([], [])  # of each map (1+T*C, 1+T*C), with a channel of ones

    def add(self, maps: Maps) -> Maps:
        """Take part in the sums; returns the maps (B, T*C, h, w)."""
        sums = self.sums[self.calls % 2]
        self.calls += 1
        for i, x in enumerate(maps):
            rows = x.double().transpose(0, 1).flatten(1).cpu()  # (T*C, B*h*w)
            rows = torch.cat([torch.ones(1, rows.shape[1], dtype=rows.dtype), rows])
            if i == len(sums):
                sums.append(torch.zeros(len(rows), len(rows), dtype=rows.dtype))
            sums[i].addmm_(rows, rows.T)
        return maps

    def explained(self, target: int, sources: Sequence[int]) -> float:
        """Share of the variance at a timestep that is a linear function of that at others; mean over maps."""
        shares = []
        for train, test in zip(*self.sums, strict=True):
            channels = (len(train) - 1) // self.count
            columns = torch.arange(1, len(train)).view(self.count, channels)
            inputs, outputs = torch.cat([torch.zeros(1).long(), columns[list(sources)].flatten()]), columns[target]
            scale = train.diagonal()[1:].mean() * RIDGE
            penalty = scale * torch.eye(len(inputs), dtype=train.dtype)
            penalty[0, 0] = 0
            weights = torch.linalg.solve(train[inputs][:, inputs] + penalty, train[inputs][:, outputs])
            cross, square = test[inputs][:, outputs], test[inputs][:, inputs]
            total = (test[outputs, outputs] - test[0, outputs].square() / test[0, 0]).sum()
            error = test[outputs, outputs].sum() - 2 * (weights * cross).sum() + (weights * (square @ weights)).sum()
            shares.append(1 - (error / total).item())
        return sum(shares) / len(shares)


def linear_report(timesteps: Sequence[Any], products: Products) -> str:
    """A row for each timestep, a column for each that it is a function of."""
    count = len(timesteps)
    lines = [
        "| variance at t that is linear in t' = | " + ' | '.join(map(str, timesteps)) + ' | neighbours | all others |',
        '|---' * (count + 3) + '|',
    ]
    for t, name in enumerate(timesteps):
        neighbours = [other for other in (t - 1, t + 1) if 0 <= other < count]
        others = [other for other in range(count) if other != t]
        shares = ['' if other == t else f'{products.explained(t, [other]):.2f}' for other in range(count)]
        shares += [f'{products.explained(t, group):.2f}' for group in (neighbours, others)]
        lines.append(f'| {name} | {" | ".join(shares)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    raise SystemExit(main())
