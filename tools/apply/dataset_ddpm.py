"""Make a labelled data set of generated images, as DatasetDDPM does (arXiv 2112.03126, section 4).

    python tools/train.py configs/scarce/PIXEL-CLASSIFIER.py
    python tools/apply/dataset_ddpm.py configs/scarce/PIXEL-CLASSIFIER.py CHECKPOINT --count 50000 \\
        --out data/horse_21/generated
    python tools/train.py configs/scarce/deeplabv3-r101_1xb8-20e_dataset-ddpm-horse-21-256x256.py

The published row trains the classifiers on the folder `ddpm` and samples as the model was trained (8 GPUs with batches
of 100 in the released code):

    P=ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_dataset-ddpm-horse-21-256x256
    python tools/train.py configs/scarce/$P.py
    python tools/apply/dataset_ddpm.py configs/scarce/$P.py work_dirs/$P/CHECKPOINT --count 50000 --sampler ancestral \\
        --steps 1000 --batch-size 100 --out data/horse_21/generated
    python tools/train.py configs/scarce/deeplabv3-r101_1xb8-20e_dataset-ddpm-horse-21-256x256.py --cfg-options \\
        model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=torchvision://resnet101

The config's diffusion model, with its weights and dtype, generates images (by default with DDIM), the checkpoint's
ensemble of pixel classifiers labels them from their activations, and a tenth of them is left out: the 30 whose labels
are most certain, which show hardly anything, and the most uncertain ones. An image's uncertainty is the mean of the
Jensen-Shannon divergence between the classifiers over the tenth of its pixels where it is largest. OUT then holds

    all/NAME.png        generated images; existing ones are not generated again
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
from diffusers import DDPMPipeline, DDPMScheduler
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from torch import nn
from tqdm import tqdm

from diffseg.datasets.scarce import find_pictures
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.diffusion.latents import decode
from diffseg.diffusion.loading import load_vae, meta_network
from diffseg.diffusion.options import group_options
from diffseg.diffusion.sites import sites
from diffseg.feature_files import check_configuration
from diffseg.inspection import load_weights
from diffseg.models.decode_heads.pixel_classifier import js_uncertainty, most_uncertain, vote
from diffseg.visualization import colour_labels, grid, to_picture, to_pil

SHOWN = 8  # images on the overview
FILES = 'revision', 'variant', 'config'  # options of a backbone: the files of its parts,
CHANGES = 'network_weights', 'vae', 'lora_weights', 'textual_inversion', 'random'  # changes of their weights,
RUNNING = 'dtype', 'attention', 'micro_batch', 'memory_format', 'cache_dir'  # and how they are run


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='of an ensemble of pixel classifiers')
    parser.add_argument('checkpoint', help='trained with this config by tools/train.py')
    parser.add_argument('--out', type=Path, required=True, help='folder')
    parser.add_argument('--images', type=Path, help='label the images of this folder instead of generating some')
    parser.add_argument('--count', type=int, default=1000, help='images to generate (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the first image; the next images have the next seeds')
    parser.add_argument(
        '--sampler',
        choices=('ddim', 'ancestral'),
        default='ddim',
        help="'ancestral' draws from a model of pixel space as it was trained, with the variance that it learned, and "
        'takes 1000 steps as published (default: %(default)s)',
    )
    parser.add_argument('--steps', type=int, default=50, help='of the sampler (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=1, help='images at once, with --sampler ancestral')
    parser.add_argument('--prompt', nargs='+', default=[''], help='prompts of the images, in turn')
    parser.add_argument('--guidance', type=float, help='classifier-free guidance (default: 7.5, without prompts 1)')
    parser.add_argument('--size', type=int, help='side of the images in pixels (default: that of the model)')
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
    if args.images is None and cfg.model.backbone.type != 'DiffusionBackbone':
        raise ValueError(
            f'{args.config} has a {cfg.model.backbone.type}; images are generated by a DiffusionBackbone, or are those '
            f'of --images'
        )
    expected = args.count if args.images is None else len(find_pictures(args.images))
    kept_range(expected, args.drop, args.drop_certain)  # raises before the work is done
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    load_weights(model, args.checkpoint, args.config)
    model.eval().to(args.device)

    paths = generate(cfg.model.backbone, args) if args.images is None else find_pictures(args.images)
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(f'pictures in {args.images} have the same name but for the suffix; rename them')
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
    """Generate the images that do not exist yet, each from a different seed; returns the paths of all."""
    files, options = ({key: backbone[key] for key in keys if key in backbone} for keys in (FILES, CHANGES + RUNNING))
    unet = meta_network(backbone.model, **{key: value for key, value in files.items() if key != 'variant'})
    guidance = {} if args.guidance is None else {'guidance': args.guidance}
    first = next(iter(sites(unet)))
    extractor = DiffusionExtractor(
        backbone.model,
        [first],  # not used: only the images are
        [0],
        trajectory={'type': 'generation', 'steps': args.steps, 'spacing': 'leading', 'steps_offset': 0, **guidance},
        prompt=args.prompt,
        **group_options({**files, **options}),
    ).to(args.device)
    vae = None
    if extractor.vae is not None:
        vae = load_vae(backbone.model, **files, vae=backbone.get('vae'), dtype=extractor.vae.dtype).to(args.device)
    side = args.size or unet.config.sample_size * extractor.parts.vae_scale_factor
    folder = args.out / 'all'
    folder.mkdir(parents=True, exist_ok=True)
    per_image = ('seed',)
    settings = {'size': side, 'sampler': args.sampler}
    check_configuration(folder, {k: v for k, v in extractor.fingerprint.items() if k not in per_image} | settings)
    paths = {seed: folder / f'{seed:06d}.png' for seed in range(args.seed, args.seed + args.count)}
    missing = [seed for seed, path in paths.items() if not path.exists()]
    pipeline = ancestral_pipeline(extractor, side) if args.sampler == 'ancestral' else None
    with tqdm(total=len(missing), desc='generating', unit='image', disable=None) as progress:
        for seeds in batched(missing, args.batch_size if pipeline else 1):
            if pipeline is None:
                (extractor.seed,) = seeds
                with torch.inference_mode():
                    _, latent = extractor.generate((side, side), args.prompt[seeds[0] % len(args.prompt)])
                    images = [to_pil(to_picture(decode(vae, latent)[0]))]
            else:
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                images = pipeline(len(seeds), generators, num_inference_steps=args.steps).images
            for seed, image in zip(seeds, images, strict=True):
                partial = paths[seed].with_suffix('.partial')
                image.save(partial, 'PNG')
                partial.replace(paths[seed])
            progress.update(len(seeds))
    return list(paths.values())


def batched(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split items into batches of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def ancestral_pipeline(extractor: DiffusionExtractor, side: int) -> DDPMPipeline:
    """Ancestral sampling (DDPM, algorithm 2) with predictions clipped to [-1, 1], as guided-diffusion does.

    Raises:
        ValueError: the model is not of pixel space, or has another size.
    """
    unet = extractor.network
    if extractor.vae is not None:
        raise ValueError('--sampler ancestral is for models of pixel space; leave it out for this one')
    if side != unet.config.sample_size:
        raise ValueError(f'--size is {side}; --sampler ancestral draws images of {unet.config.sample_size} pixels')
    learned = unet.config.out_channels > unet.config.in_channels
    scheduler = DDPMScheduler.from_config(
        extractor.parts.scheduler_config,
        variance_type='learned_range' if learned else 'fixed_small',
        clip_sample=True,
    )
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def label(model: nn.Module, pipeline: Compose, path: Path) -> tuple[np.ndarray, float]:
    """The majority classes of an image, uint8 with shape (H, W), and its uncertainty."""
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
        ValueError: `certain` exceeds the number of images left out, or no image is kept.
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
