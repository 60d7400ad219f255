"""Train a decode head on a frozen diffusion model with 30 labelled pictures, and on the same UNet with random weights.

Draws the data, trains and tests both segmentors with mmengine's runner, side by side, and writes a page of pictures.
Takes a minute on two CPU cores; nothing is downloaded. The network is frozen and pictures are flipped at most, so its
activations of a picture are computed twice and kept: training reads them from a cache. What is logged while it runs is
of the pretrained network.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint, load_checkpoint
from mmseg.registry import MODELS
from torch import nn

import diffseg  # noqa: F401  registers its parts
from diffseg.datasets.toy import PALETTE, SPECIES
from diffseg.diffusion.images import read_image
from diffseg.visualization import colour_labels, grid, mixing_figure, pca_rgb, to_picture

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'tools/toy'))
from make_data import main as draw  # noqa: E402

RANDOM = {'pretrained': [], 'random': ['unet']}  # parts with random weights
CONFIG = ROOT / 'configs/scarce/tiny-sd-t50+150+300_agg-fcn_1xb8-300_toy-64x64.py'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'demo/output', help='folder for data, checkpoints and pictures'
    )
    parser.add_argument('--config', type=Path, default=CONFIG)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args(argv)

    draw([str(args.out / 'data'), '--test', '100'])
    threads = max(1, torch.get_num_threads() // len(RANDOM))
    context = get_context('spawn')  # a forked process must not use PyTorch's threads
    with ProcessPoolExecutor(len(RANDOM), context, torch.set_num_threads, (threads,)) as pool:
        scores = dict(zip(RANDOM, pool.map(train, [configure(args, weights) for weights in RANDOM]), strict=True))
    write_page(args.out, {weights: load(configure(args, weights)) for weights in RANDOM})
    print(f'pictures: {args.out / "page.png"} and {args.out / "mixing.png"}')
    for weights, score in scores.items():
        print(f'mIoU {weights}: {score:.2f}')
    print(f'took {time.time() - psutil.Process().create_time():.0f} s')


def train(cfg: Config) -> float:
    """Train and test; the mIoU in percent."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner.test()['mIoU']


def load(cfg: Config) -> nn.Module:
    """The segmentor that was trained."""
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, find_latest_checkpoint(cfg.work_dir), map_location='cpu', logger='silent')
    return model.eval()


def configure(args: argparse.Namespace, weights: str) -> Config:
    """The demo's config for 'pretrained' or 'random' weights of the UNet, without validation."""
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    cfg.merge_from_dict(
        {
            'work_dir': str(args.out / weights),
            'experiment_name': f'demo-{weights}',
            'log_level': 'INFO' if weights == 'pretrained' else 'WARNING',
            'model.backbone.random': RANDOM[weights],
            'model.backbone.cache': str(args.out / 'features'),
            **dict.fromkeys(('val_cfg', 'val_dataloader', 'val_evaluator')),
            **{
                f'{split}_dataloader.dataset.data_root': str(args.out / 'data/toy')
                for split in ('train', 'test')
            },
        }
    )
    return cfg


@torch.no_grad()
def write_page(out: Path, models: dict[str, nn.Module]) -> None:
    """Write a page of test pictures, one of each species, and the mixing weights of the pretrained segmentor."""
    folder = out / 'data/toy/real/test'
    paths = [min(folder.glob(f'{species}_*.png')) for species in SPECIES]
    images = [read_image(path) for path in paths]
    labels = [torch.from_numpy(np.load(path.with_suffix('.npy'))) for path in paths]
    columns = [[to_picture(image) for image in images], [colour_labels(label, PALETTE) for label in labels]]
    names = ['image', 'truth']
    for weights, model in models.items():
        predictions = [model.encode_decode(image[None], [{'img_shape': image.shape[1:]}])[0] for image in images]
        columns.append([colour_labels(prediction.argmax(dim=0), PALETTE) for prediction in predictions])
        columns.append(pca_rgb([model.extract_feat(image[None])[0][0] for image in images]))
        names += [f'prediction ({weights})', f'PCA after the neck ({weights})']
    grid(list(zip(*columns, strict=True)), column_names=names).save(out / 'page.png')
    table = models['pretrained'].neck.mixing_weights()[0]
    mixing_figure(table.weights, table.timesteps, table.layers).savefig(out / 'mixing.png', dpi=110)


if __name__ == '__main__':
    main()
