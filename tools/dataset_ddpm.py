"""Make a labelled data set of generated images, as DatasetDDPM does (arXiv 2112.03126, section 4).

    python tools/train.py configs/scarce/PIXEL-CLASSIFIER.py
    python tools/dataset_ddpm.py configs/scarce/PIXEL-CLASSIFIER.py CHECKPOINT --count 50000 \\
        --out data/horse_21/generated
    python tools/train.py configs/scarce/deeplabv3-r101_1xb8-20e_dataset-ddpm-horse-21-256x256.py

The config's own diffusion model generates images (DDIM), the ensemble of pixel classifiers of the checkpoint labels
them from the activations that it reads of them as of any image, and of all images a tenth is left out: the 30 whose
labels are most certain, which show next to nothing, and those that are most uncertain. An image's uncertainty is the
mean of the Jensen-Shannon divergence between the classifiers over the tenth of its pixels where it is largest. OUT
then holds

    all/NAME.png        generated images; those that are there are not generated again
    kept/NAME.{png,npy} the data set, in the layout of `ScarceDataset`: `split='generated/kept'`
    uncertainty.csv     of every image, the most certain first
    overview.png        some of the images with their labels, the most certain first
"""

import argparse
import csv
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from extract_features import check_configuration
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import DATASETS, MODELS
from torch import nn
from tqdm import tqdm

from diffseg.datasets.scarce import find_pictures
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import decode, read_image
from diffseg.diffusion.loading import load_vae, meta_unet
from diffseg.diffusion.sites import sites
from diffseg.models.decode_heads.pixel_classifier import js_uncertainty, most_uncertain, vote
from diffseg.visualization import colour_labels, grid, to_picture, to_pil

SHOWN = 8  # images on the overview


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='of an ensemble of pixel classifiers')
    parser.add_argument('checkpoint', help='that tools/train.py made with it')
    parser.add_argument('--out', type=Path, required=True, help='folder')
    parser.add_argument('--images', type=Path, help='label the images of this folder instead of generating some')
    parser.add_argument('--count', type=int, default=1000, help='images to generate (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the first image; the next ones count on from it')
    parser.add_argument('--steps', type=int, default=50, help='DDIM steps (default: %(default)s)')
    parser.add_argument('--prompt', nargs='+', default=[''], help='prompts that the images take in turn')
    parser.add_argument('--guidance', type=float, help='classifier-free guidance (default: 7.5, without prompts 1)')
    parser.add_argument('--size', type=int, help="side of the images in pixels (default: the model's own)")
    parser.add_argument('--drop', type=float, default=0.1, help='share of the images left out (default: %(default)s)')
    parser.add_argument(
        '--drop-certain', type=int, default=30, help='how many of these are the most certain (default: %(default)s)'
    )
    parser.add_argument('--device', default=get_device())
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    if cfg.model.decode_head.type != 'PixelClassifierHead':
        raise ValueError(f'{args.config} has a {cfg.model.decode_head.type}; labels come from a PixelClassifierHead')
    expected = args.count if args.images is None else len(find_pictures(args.images))
    kept_range(expected, args.drop, args.drop_certain)  # complains before the work
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, args.checkpoint, map_location='cpu', strict=True, logger='silent')
    model.eval().to(args.device)

    paths = generate(cfg.model.backbone, args) if args.images is None else find_pictures(args.images)
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(f'pictures in {args.images} share their names, which the data set cannot hold')
    data = cfg.test_dataloader.dataset
    pipeline = Compose([step for step in data.pipeline if step.type != 'LoadLabelArray'])
    labels, uncertainties = {}, {}
    for path in tqdm(paths, desc='labelling', unit='image', disable=None):
        labels[path], uncertainties[path] = label(model, pipeline, path)

    order = sorted(paths, key=uncertainties.__getitem__)
    kept = order[kept_range(len(order), args.drop, args.drop_certain)]
    shutil.rmtree(args.out / 'kept', ignore_errors=True)
    (args.out / 'kept').mkdir(parents=True)
    for path in kept:
        shutil.copy(path, args.out / 'kept')
        np.save(args.out / 'kept' / f'{path.stem}.npy', labels[path])
    with open(args.out / 'uncertainty.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['name', 'uncertainty', 'kept'])
        writer.writerows([path.name, f'{uncertainties[path]:.6f}', int(path in set(kept))] for path in order)
    palette = DATASETS.get(data.type).CATEGORIES[data.category]['palette']
    overview(order, labels, uncertainties, palette).quantize(128).save(args.out / 'overview.png', optimize=True)
    print(f'{len(kept)} of {len(order)} images are in {args.out / "kept"}')


def generate(backbone: dict, args: argparse.Namespace) -> list[Path]:
    """Generate the images that are not there yet, each from a seed of its own; the paths of all."""
    unet = meta_unet(backbone.model)
    guidance = {} if args.guidance is None else {'guidance': args.guidance}
    first = next(iter(sites(unet)))
    extractor = DiffusionExtractor(
        backbone.model,
        [first],  # none is wanted
        [0],
        trajectory={'type': 'generation', 'steps': args.steps, **guidance},
        prompt=args.prompt,
    ).to(args.device)
    vae = None if extractor.vae is None else load_vae(backbone.model).to(args.device)
    side = args.size or unet.config.sample_size * extractor.parts.vae_scale_factor
    folder = args.out / 'all'
    folder.mkdir(parents=True, exist_ok=True)
    own = ('seed',)  # each image has its own
    check_configuration(folder, {k: v for k, v in extractor.fingerprint.items() if k not in own} | {'size': side})
    paths = []
    for seed in tqdm(range(args.seed, args.seed + args.count), desc='generating', unit='image', disable=None):
        paths.append(folder / f'{seed:06d}.png')
        if paths[-1].exists():
            continue
        extractor.seed = seed
        with torch.inference_mode():
            _, latent = extractor.generate((side, side), args.prompt[seed % len(args.prompt)])
            image = to_pil(to_picture(decode(vae, latent)[0]))
        partial = paths[-1].with_suffix('.partial')
        image.save(partial, 'PNG')
        partial.replace(paths[-1])
    return paths


@torch.inference_mode()
def label(model: nn.Module, pipeline: Compose, path: Path) -> tuple[np.ndarray, float]:
    """The voted classes of an image, uint8 with shape (H, W), and its uncertainty."""
    sample = pipeline({'img_path': str(path)})
    batch = model.data_preprocessor({'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}, False)
    inputs = batch['inputs']
    logits = model.decode_head.pixel_logits(model.extract_feat(inputs), tuple(inputs.shape[2:]))  # (1, H, W, N, n)
    classes = vote(logits).argmax(dim=-1)[0]
    return classes.byte().cpu().numpy(), float(most_uncertain(js_uncertainty(logits)))


def kept_range(count: int, drop: float, certain: int) -> slice:
    """Which images are kept, in order of their uncertainty: as published, `[30 : -0.1 N + 30]`.

    Args:
        count: N.
        drop: share of the images that is left out, certain and uncertain ones together.
        certain: how many of those are the most certain ones.

    Raises:
        ValueError: more certain ones than are left out at all, or nothing is kept.
    """
    if not 0 <= drop < 1:
        raise ValueError(f'--drop is {drop}; it is a share of the images, from 0 to below 1')
    dropped = int(drop * count)
    if not 0 <= certain <= dropped or dropped == count:
        raise ValueError(
            f'of {count} images {dropped} are left out (--drop {drop}), which cannot hold {certain} certain ones '
            '(--drop-certain); take more images, or set --drop-certain lower'
        )
    return slice(certain, count - dropped + certain)


def overview(order: Sequence[Path], labels: dict, uncertainties: dict, palette: Sequence[Sequence[int]]):
    """Images above their labels, from the most certain to the most uncertain."""
    chosen = [order[i] for i in np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]
    rows = [
        [to_picture(read_image(path)) for path in chosen],
        [colour_labels(torch.from_numpy(labels[path]), palette) for path in chosen],
    ]
    return grid(rows, column_names=[f'{uncertainties[path]:.3f}' for path in chosen])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, RuntimeError, ValueError, FloatingPointError, pickle.UnpicklingError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
