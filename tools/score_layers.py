"""Match the keypoints of image pairs with every single activation of a model, and print each one's PCK.

The data are laid out as SPair-71k is; `tools/make_toy_data.py OUT --pairs N` draws a toy set.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from diffseg.diffusion.activations import sites
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.diffusion.loading import meta_unet
from diffseg.evaluation import correct_keypoints, pck
from diffseg.models.correspondence import match_points


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', help='preset, hub id, diffusers folder or checkpoint file')
    parser.add_argument('data', type=Path, help='folder with JPEGImages, PairAnnotation and so on')
    parser.add_argument('--split', default='test', choices=['trn', 'val', 'test'])
    parser.add_argument('--layers', nargs='+', help='names of activations (default: all but attention maps)')
    parser.add_argument('--timestep', type=int, default=50)
    parser.add_argument('--size', type=int, help='resize images to SIZE x SIZE (default: as they are)')
    parser.add_argument('--prompt', default='')
    parser.add_argument('--ensemble', type=int, default=1)
    parser.add_argument('--random', action='store_true', help='a UNet of the same architecture with random weights')
    parser.add_argument('--best', type=int, default=10, help='how many of the best activations to print')
    args = parser.parse_args(argv)

    layers = args.layers or [site.name for site in sites(meta_unet(args.model)).values() if site.kind != 'map']
    extractor = DiffusionExtractor(
        args.model,
        layers,
        [args.timestep],
        prompt=args.prompt,
        ensemble=args.ensemble,
        random=['unet'] if args.random else [],
    )
    paths = sorted((args.data / 'PairAnnotation' / args.split).glob('*.json'))
    if not paths:
        raise SystemExit(f'no pairs in {args.data / "PairAnnotation" / args.split}; tools/make_toy_data.py draws some')
    correct = {layer: [] for layer in extractor.layers}
    for path in tqdm(paths, desc='pairs'):
        for layer, hits in match_pair(extractor, args.data, json.loads(path.read_text()), args.size).items():
            correct[layer].append(hits)
    scores = {layer: pck(hits, 'image') for layer, hits in correct.items()}
    print(f'{"activation":40} {"PCK@0.1-bbox/image":>20} {"/point":>8}')
    for layer in sorted(scores, key=scores.get, reverse=True)[: args.best]:
        print(f'{layer:40} {scores[layer]:20.2f} {pck(correct[layer], "point"):8.2f}')


@torch.no_grad()
def match_pair(extractor: DiffusionExtractor, data: Path, pair: dict, size: int | None) -> dict[str, torch.Tensor]:
    """For each activation, which keypoints of the pair are matched correctly at 0.1 of the target's box, bool (N,)."""
    found, shapes = [], []
    for side in ('src', 'trg'):
        path = data / 'JPEGImages' / pair['category'] / pair[f'{side}_imname']
        image = read_image(path, size and (size, size))
        found.append(extractor(image[None]))  # {layer: (1, 1, C, h, w)}
        width, height, _ = pair[f'{side}_imsize']
        shapes.append((height, width))
    points, truth = torch.tensor(pair['src_kps']), torch.tensor(pair['trg_kps'])
    x1, y1, x2, y2 = pair['trg_bndbox']
    return {
        layer: correct_keypoints(
            match_points(source[0, 0], found[1][layer][0, 0], points, *shapes), truth, max(x2 - x1, y2 - y1)
        )
        for layer, source in found[0].items()
    }


if __name__ == '__main__':
    main()
