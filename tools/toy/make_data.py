"""Draw toy quadrupeds into the folder layouts of Horse-21 (DatasetDDPM), SPair-71k, SPair-U, AP-10K, TSS and mmseg."""

import argparse
import json
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from quadrupeds import ToySample, draw_harness, draw_sample
from tqdm import tqdm

from diffseg.datasets.toy import FAMILIES, KEYPOINTS, PALETTE, SPECIES, UNSEEN
from diffseg.datasets.tss import write_flow

# First picture number of every split: disjoint ranges, so that no picture is in two splits.
PART_SPLITS = {'train': 0, 'test': 1_000_000}
PAIR_SPLITS = {'trn': 2_000_000, 'val': 3_000_000, 'test': 4_000_000}
SPECIES_STRIDE = 200_000

Picture = tuple[str, ToySample]  # its name, without suffix, and what is drawn


def main(argv: list[str] | None = None) -> None:
    """Write the data sets that the arguments request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'out', type=Path, help="folder to write `toy` (Horse-21's layout), `SPair-toy` and `SPair-toy-across` into"
    )
    parser.add_argument(
        '--train', type=int, default=30, help='labelled training pictures (default: 30, as Horse-21 has)'
    )
    parser.add_argument('--test', type=int, default=30, help='labelled test pictures (default: 30)')
    parser.add_argument('--pairs', type=int, default=0, help='pairs per species and split for matching (default: none)')
    parser.add_argument(
        '--across', type=int, default=0, help='pairs per two species (in order) and split (default: none)'
    )
    parser.add_argument(
        '--unseen',
        type=int,
        default=0,
        help='test pairs per species with other keypoints, into `SPair-U-toy` (default: none)',
    )
    parser.add_argument(
        '--tss', type=int, default=0, help='pairs per group with a dense flow, into `TSS-toy` (default: none)'
    )
    parser.add_argument(
        '--ap10k',
        type=int,
        default=0,
        help="pairs per species, two species of a family, and two families, and split, in AP-10K's layout, into "
        '`ap-10k-toy` (default: none)',
    )
    parser.add_argument('--size', type=int, default=64, help='height and width in pixels (default: 64)')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same bytes (default: 0)')
    parser.add_argument(
        '--stickers', action='store_true', help='write a harness for each labelled picture, RGBA, into `toy/stickers`'
    )
    parser.add_argument(
        '--mmseg', action='store_true', help='write pictures and masks into `toy-mmseg/{images,labels}/{train,test}`'
    )
    args = parser.parse_args(argv)
    for split in PART_SPLITS:
        write_parts(args.out / 'toy/real' / split, getattr(args, split), split, args.seed, args.size)
        if args.stickers:
            write_stickers(args.out / 'toy/stickers' / split, getattr(args, split), split, args.seed, args.size)
        if args.mmseg:
            write_mmseg(args.out / 'toy-mmseg', getattr(args, split), split, args.seed, args.size)
    if args.tss:
        write_tss(args.out / 'TSS-toy', args.tss, args.seed, args.size)
    if args.unseen:
        write_unseen(args.out / 'SPair-U-toy', args.unseen, args.seed, args.size)
    for split in PAIR_SPLITS:
        if args.pairs:
            write_pairs(args.out / 'SPair-toy', args.pairs, split, args.seed, args.size)
        if args.across:
            write_pairs_across(args.out / 'SPair-toy-across', args.across, split, args.seed, args.size)
        if args.ap10k:
            write_ap10k(args.out / 'ap-10k-toy', args.ap10k, split, args.seed, args.size)


def write_parts(folder: Path, count: int, split: str, seed: int, size: int) -> None:
    """Pictures NAME.png and part labels NAME.npy (H, W), uint8, as DatasetDDPM lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(count), desc=str(folder)):
        sample = draw_sample(seed, PART_SPLITS[split] + number, size)
        Image.fromarray(sample.image).save(folder / f'{sample.species}_{number:05d}.png')
        np.save(folder / f'{sample.species}_{number:05d}.npy', sample.mask)


def write_mmseg(root: Path, count: int, split: str, seed: int, size: int) -> None:
    """Pictures and masks of the same names, as mmseg's `BaseSegDataset` reads them; masks hold class indices."""
    for kind in ('images', 'labels'):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        sample = draw_sample(seed, PART_SPLITS[split] + number, size)
        name = f'{sample.species}_{number:05d}.png'
        mask = Image.fromarray(sample.mask)
        mask.putpalette(np.array(PALETTE, dtype=np.uint8).tobytes())  # for viewers
        Image.fromarray(sample.image).save(root / 'images' / split / name)
        mask.save(root / 'labels' / split / name)


def write_stickers(folder: Path, count: int, split: str, seed: int, size: int) -> None:
    """NAME.png, RGBA: the sticker that `tools/apply/propagate_edit.py` transfers from the picture of this name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        sample = draw_sample(seed, PART_SPLITS[split] + number, size)
        Image.fromarray(draw_harness(sample)).save(folder / f'{sample.species}_{number:05d}.png')


def write_pairs(root: Path, pairs: int, split: str, seed: int, size: int) -> None:
    """Pictures, annotations and `pairs` pairs per species of one split, as SPair-71k lays them out."""
    layout = []
    for species in SPECIES:
        pictures = []
        for index in tqdm(range(2 * pairs), desc=f'{root} {split} {species}'):
            pictures.append(draw_picture(species, split, index, seed, size))
            write_picture(root, *pictures[-1], species)
        for source, target in zip(pictures[::2], pictures[1::2], strict=True):
            layout.append(write_pair(root, split, len(layout), source, target, species))
    write_layout(root, split, layout)


def write_tss(root: Path, pairs: int, seed: int, size: int) -> None:
    """`pairs` pictures per group, each with itself under a random similarity, and both flows, as TSS lays them out."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=2)  # (H, W, 2), x and y
    for group in ('FG3DCar', 'JODS', 'PASCAL'):
        for index in range(pairs):
            folder = root / group / f'{index:03d}'
            folder.mkdir(parents=True, exist_ok=True)
            sample = draw_picture(SPECIES[index % len(SPECIES)], 'test', index, seed, size)[1]
            centre, angle, scale = (size - 1) / 2, rng.uniform(-15, 15), rng.uniform(0.8, 1)
            there = cv2.getRotationMatrix2D((centre, centre), angle, scale)
            images = sample.image, cv2.warpAffine(sample.image, there, (size, size), borderMode=cv2.BORDER_REPLICATE)
            mask = np.where(sample.mask > 0, 255, 0).astype(np.uint8)
            masks = mask, cv2.warpAffine(mask, there, (size, size), flags=cv2.INTER_NEAREST)
            ways = there, cv2.invertAffineTransform(there)
            for number, (image, mask, way) in enumerate(zip(images, masks, ways, strict=True), start=1):
                flow = grid @ way[:, :2].T + way[:, 2] - grid
                Image.fromarray(image).save(folder / f'image{number}.png')
                Image.fromarray(mask).save(folder / f'mask{number}.png')
                write_flow(folder / f'flow{number}.flo', np.where(mask[..., None] > 0, flow, 1e10))
            (folder / 'flip_gt.txt').write_text('0\n')


def write_unseen(root: Path, pairs: int, seed: int, size: int) -> None:
    """The test pairs of `write_pairs` with the keypoints `UNSEEN`, as SPair-U lays them out."""
    for species in SPECIES:
        for index in range(0, 2 * pairs, 2):
            both = [draw_picture(species, 'test', index + view, seed, size) for view in (0, 1)]
            both = [(name, with_unseen_keypoints(sample)) for name, sample in both]
            for picture in both:
                write_picture(root, *picture, species)
            write_pair(root, 'test', index // 2, *both, species)


def with_unseen_keypoints(sample: ToySample) -> ToySample:
    """The same picture with the keypoints `UNSEEN`, each visible where both ends are."""
    rows = np.array([[KEYPOINTS.index(end) for end in ends] for ends in UNSEEN])
    return replace(sample, keypoints=sample.keypoints[rows].mean(axis=1), visible=sample.visible[rows].all(axis=1))


def write_pairs_across(root: Path, pairs: int, split: str, seed: int, size: int) -> None:
    """`pairs` pairs of every two species in either order, whose category is "SOURCE_TARGET".

    The pictures are those of `write_pairs`: the sources of a species its sources there, the targets its targets, so
    that matching within and across species is compared on the same pictures.
    """
    layout = []
    for species in tqdm(list(permutations(SPECIES, 2)), desc=f'{root} {split}'):
        category = '_'.join(species)
        for index in range(0, 2 * pairs, 2):
            pictures = [draw_picture(name, split, index + view, seed, size) for view, name in enumerate(species)]
            for picture in pictures:
                write_picture(root, *picture, category)
            layout.append(write_pair(root, split, len(layout), *pictures, category))
    write_layout(root, split, layout)


def write_ap10k(root: Path, pairs: int, split: str, seed: int, size: int) -> None:
    """`pairs` pairs per species and, but for training, per two species of a family and per two families.

    The layout is that of AP-10K as GeoAware-SC pairs it. The pictures are those of `write_pairs`: the sources of a
    species its sources there, the targets its targets.
    """
    names = {}  # (species, number of the picture) -> path without suffix
    for family, members in FAMILIES.items():
        for species in members:
            for index in tqdm(range(2 * pairs), desc=f'{root} {split} {species}'):
                names[species, index] = write_animal(root, family, species, split, index, seed, size)
    protocols = {'': [(species, species, species) for species in SPECIES]}
    if split != 'trn':
        protocols['_cross_species'] = [
            (*both, family) for family, members in FAMILIES.items() for both in combinations(members, 2)
        ]
        protocols['_cross_family'] = [
            (source, target, 'all')
            for first, second in combinations(FAMILIES.values(), 2)
            for source, target in zip(first, second, strict=True)
        ]
    for suffix, groups in protocols.items():
        for source, target, category in groups:
            for index in range(0, 2 * pairs, 2):
                both = names[source, index], names[target, index + 1]
                stem = '-'.join(Path(name).name for name in both)
                annotation = {
                    f'{side}_json_path': f'data/ap-10k/ImageAnnotation/{name}.json'
                    for side, name in zip(('src', 'trg'), both, strict=True)
                }
                write_json(root / f'PairAnnotation/{split}{suffix}/{stem}:{category}.json', annotation)


def write_animal(root: Path, family: str, species: str, split: str, index: int, seed: int, size: int) -> str:
    """JPEGImages and ImageAnnotation of one picture; returns FAMILY/SPECIES/NAME."""
    number = PAIR_SPLITS[split] + SPECIES.index(species) * SPECIES_STRIDE + index
    _, sample = draw_picture(species, split, index, seed, size)
    name = f'{family}/{species}/{number:012d}'
    path = root / f'JPEGImages/{name}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample.image).save(path, quality=95, subsampling=0)
    left, top, right, bottom = sample.bbox
    annotation = {
        'id': number,
        'file_name': path.name,
        'width': size,
        'height': size,
        'name': species,
        'supercategory': family,
        'bbox': [left, top, right - left, bottom - top],
        'num_keypoints': int(sample.visible.sum()),
        'keypoints': [
            value
            for point, seen in zip(rounded(sample), sample.visible, strict=True)
            for value in ((*point, 2) if seen else (0, 0, 0))
        ],
    }
    write_json(root / f'ImageAnnotation/{name}.json', annotation)
    return name


def draw_picture(species: str, split: str, index: int, seed: int, size: int) -> Picture:
    """Picture `index` of a species in a split of pairs."""
    first = PAIR_SPLITS[split] + SPECIES.index(species) * SPECIES_STRIDE
    return f'{species}_{split}_{index:06d}', draw_sample(seed, first + index, size, species)


def write_pair(root: Path, split: str, number: int, source: Picture, target: Picture, category: str) -> str:
    """PairAnnotation of one pair; returns its name."""
    stem = f'{number:06d}-{source[0]}-{target[0]}:{category}'
    write_json(root / 'PairAnnotation' / split / f'{stem}.json', pair_annotation(number, source, target, category))
    return stem


def write_layout(root: Path, split: str, names: list[str]) -> None:
    """The list of a split's pairs."""
    path = root / 'Layout/large' / f'{split}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(names) + '\n')


def write_picture(root: Path, name: str, sample: ToySample, category: str) -> None:
    """JPEGImages, Segmentation (number of the species, from 1) and ImageAnnotation of one picture."""
    size = sample.image.shape[0]
    folders = {kind: root / kind / category for kind in ('JPEGImages', 'Segmentation')}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample.image).save(folders['JPEGImages'] / f'{name}.jpg', quality=95, subsampling=0)
    silhouette = np.where(sample.mask > 0, SPECIES.index(sample.species) + 1, 0).astype(np.uint8)
    Image.fromarray(silhouette).save(folders['Segmentation'] / f'{name}.png')
    keypoints = zip(rounded(sample), sample.visible, strict=True)
    annotation = {
        'filename': f'{name}.jpg',
        'category': category,
        'image_width': size,
        'image_height': size,
        'bndbox': dict(zip(('xmin', 'ymin', 'xmax', 'ymax'), sample.bbox, strict=True)),
        'pose': sample.facing.capitalize(),
        'kps': {str(i): point if seen else None for i, (point, seen) in enumerate(keypoints)},
    }
    write_json(root / 'ImageAnnotation' / category / f'{name}.json', annotation)


def pair_annotation(number: int, source: Picture, target: Picture, category: str) -> dict:
    """Annotation of a pair in SPair-71k's format; its keypoints are those visible in both pictures.

    `mirror` tells whether the animals face different ways, `scale_variation` (0 or 1) whether the longer sides of
    their boxes differ by more than a fifth, `occlusion` (0 none, 1 source, 2 target, 3 both) where a keypoint is behind
    another part. All animals are seen from the side and whole: `viewpoint_variation` and `truncation` are 0.
    """
    samples = source[1], target[1]
    size = samples[0].image.shape[0]
    shared = np.flatnonzero(samples[0].visible & samples[1].visible)
    extents = [max(s.bbox[2] - s.bbox[0], s.bbox[3] - s.bbox[1]) for s in samples]
    annotation = {'pair_id': number, 'category': category}
    for side, (name, sample) in (('src', source), ('trg', target)):
        points = rounded(sample)
        annotation |= {
            f'{side}_imname': f'{name}.jpg',
            f'{side}_imsize': [size, size, 3],
            f'{side}_bndbox': list(sample.bbox),
            f'{side}_pose': sample.facing.capitalize(),
            f'{side}_kps': [points[i] for i in shared],
        }
    return annotation | {
        'kps_ids': [str(i) for i in shared],
        'mirror': int(samples[0].facing != samples[1].facing),
        'viewpoint_variation': 0,
        'scale_variation': int(max(extents) > 1.2 * min(extents)),
        'truncation': 0,
        'occlusion': int(not samples[0].visible.all()) + 2 * int(not samples[1].visible.all()),
    }


def rounded(sample: ToySample) -> list[list[int]]:
    """Keypoints as whole pixels [x, y] inside the picture."""
    return np.clip(np.floor(sample.keypoints), 0, sample.image.shape[0] - 1).astype(int).tolist()


def write_json(path: Path, content: dict) -> None:
    """Write `content` and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


if __name__ == '__main__':
    main()
