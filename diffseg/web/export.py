"""Labels, masks and a training config of what was painted, in the layout of Horse-21; and back."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from diffseg.files import whole_file

from .pictures import Picture, PictureFolder
from .strokes import UNLABELLED, Annotations, Class, Stroke, parse_stroke

EXPORTS = 'exports'  # folder beside the pictures
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,63}')
ITERATIONS = 300


def export_folder(folder: PictureFolder, name: str) -> Path:
    """Folder of the export of this name.

    Raises:
        ValueError: the name has other characters than letters, digits, _ and -.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f'{name[:80]!r} is no name of an export; it has letters, digits, _ and -, at most 64')
    return folder.path / EXPORTS / name


def write_export(
    folder: PictureFolder,
    name: str,
    annotations: Annotations,
    mask: Callable[[Picture], np.ndarray] | None,
    backbone: Mapping[str, Any],
    channels: Sequence[int],
) -> Path:
    """Write an export; its parts are replaced one by one, each as a whole.

    ```text
    exports/NAME
    ├── real/train/PICTURE.png, PICTURE.npy    pictures with labels, as Horse-21 has them; 255 is not labelled
    ├── masks/PICTURE.png                      predictions for all pictures, indexed
    ├── classes.json
    ├── strokes.json
    └── config.py                              for tools/train.py
    ```

    Args:
        folder: the pictures.
        name: of the export.
        annotations: classes and strokes.
        mask: predicts (H, W); None if there is no classifier.
        backbone: config of the backbone, each of its layers with timesteps of its own.
        channels: of each layer.

    Raises:
        ValueError: nothing is painted, or another name than letters, digits, _ and -.
    """
    out = export_folder(folder, name)
    painted = set(annotations.painted())
    pictures = [picture for picture in folder.usable() if picture.name in painted]
    rasters = {picture: annotations.raster(picture.name, picture.size) for picture in pictures}
    rasters = {picture: raster for picture, raster in rasters.items() if (raster != UNLABELLED).any()}
    if not rasters:
        raise ValueError('nothing is painted yet; paint strokes of at least two classes first')
    train = out / 'real' / 'train'
    stems = unique_stems(list(rasters))
    for old in (*train.glob('*.png'), *train.glob('*.npy'), *(out / 'masks').glob('*.png')):
        old.unlink()
    for picture, raster in rasters.items():
        with whole_file(train / f'{stems[picture]}.png') as partial:
            folder.read(picture).save(partial, 'PNG')
        with whole_file(train / f'{stems[picture]}.npy') as partial, partial.open('wb') as file:
            np.save(file, raster)
    if mask is not None:
        names = unique_stems(folder.usable())
        for picture, stem in names.items():
            write_indexed(out / 'masks' / f'{stem}.png', mask(picture), annotations.classes)
    sources = {stem: picture.name for picture, stem in {**unique_stems(folder.usable()), **stems}.items()}
    describe = {'classes': [asdict(c) for c in annotations.classes], 'pictures': sources}
    write_json(out / 'classes.json', describe)
    write_json(out / 'strokes.json', annotations.describe())
    batch = 4 if len({picture.size for picture in rasters}) == 1 and len(rasters) >= 4 else 1
    config = Config(training_config(out, annotations.classes, backbone, channels, batch))
    with whole_file(out / 'config.py') as partial:
        partial.write_text(config.pretty_text, 'utf-8')
    return out


def training_config(
    out: Path, classes: Sequence[Class], backbone: Mapping[str, Any], channels: Sequence[int], batch: int
) -> dict[str, Any]:
    """Config that trains mmseg's FCNHead, linear on an AggregationNeck, on exactly the exported labels.

    Pictures are not augmented, so that activations come from the explorer's cache.

    Args:
        out: folder of the export.
        classes: names and colours.
        backbone: its config.
        channels: of each layer.
        batch: pictures in a batch, all of one size if several.
    """
    steps = [layer.count('+') + 1 for layer in backbone['layers']]
    pipeline = [
        {'type': 'LoadImageFromFile', 'imdecode_backend': 'pillow'},
        {'type': 'LoadLabelArray'},
        {'type': 'PackSegInputs'},
    ]
    metainfo = {'classes': [c.name for c in classes], 'palette': [list(c.rgb) for c in classes]}
    return {
        'custom_imports': {'imports': ['diffseg']},
        'default_scope': 'mmseg',
        'model': {
            'type': 'EncoderDecoder',
            'data_preprocessor': {
                'type': 'SegDataPreProcessor',
                'mean': [127.5] * 3,
                'std': [127.5] * 3,
                'bgr_to_rgb': True,
                'pad_val': 0,
                'seg_pad_val': UNLABELLED,
                'size_divisor': 1,
            },
            'backbone': dict(backbone),
            'neck': {
                'type': 'AggregationNeck',
                'levels': [list(channels)],
                'timesteps': [steps],
                'out_channels': 128,
            },
            'decode_head': {
                'type': 'FCNHead',
                'in_channels': 128,
                'in_index': 0,
                'channels': 128,
                'num_convs': 0,  # strokes are too few for convolutions
                'concat_input': False,
                'dropout_ratio': 0.1,
                'num_classes': len(classes),
                'norm_cfg': {'type': 'BN'},
                'align_corners': False,
                'loss_decode': {'type': 'CrossEntropyLoss', 'loss_weight': 1.0, 'avg_non_ignore': True},
            },
            'train_cfg': {},
            'test_cfg': {'mode': 'whole'},
        },
        'train_dataloader': {
            'batch_size': batch,
            'num_workers': 0,
            'sampler': {'type': 'InfiniteSampler', 'shuffle': True},
            'dataset': {
                'type': 'BaseSegDataset',
                'data_root': str(out),
                'data_prefix': {'img_path': 'real/train', 'seg_map_path': 'real/train'},
                'img_suffix': '.png',
                'seg_map_suffix': '.npy',
                'metainfo': metainfo,
                'reduce_zero_label': False,
                'pipeline': pipeline,
            },
        },
        'test_pipeline': [pipeline[0], pipeline[2]],
        'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': ITERATIONS},
        'optim_wrapper': {'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 2e-3, 'weight_decay': 1e-2}},
        'param_scheduler': [
            {'type': 'PolyLR', 'power': 1.0, 'eta_min': 0, 'begin': 0, 'end': ITERATIONS, 'by_epoch': False}
        ],
        'default_hooks': {
            'logger': {'type': 'LoggerHook', 'interval': 50, 'log_metric_by_epoch': False},
            'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': ITERATIONS},
        },
        'randomness': {'seed': 0},
        'log_processor': {'by_epoch': False},
        'work_dir': str(out / 'work_dir'),
    }


def list_exports(folder: PictureFolder) -> list[str]:
    """Names of what can be imported, sorted: folders of `exports` that hold classes.json."""
    found = [path.parent for path in (folder.path / EXPORTS).glob('*/classes.json')]
    return sorted(path.name for path in found if NAME.fullmatch(path.name) and is_inside(path, folder.path))


def read_export(folder: PictureFolder, name: str, source: str) -> tuple[list[Class], list[Stroke], dict[str, Any]]:
    """Read an export again.

    Args:
        folder: the pictures.
        name: of the export.
        source: 'strokes'; 'labels', the arrays in real/train; or 'masks', the indexed PNG files.

    Returns:
        Classes, strokes, and arrays of labels by the picture's name.

    Raises:
        ValueError: there is no such export, or it is damaged.
    """
    out = export_folder(folder, name)
    if name not in list_exports(folder):
        raise ValueError(f'there is no export {name!r}; there are {", ".join(list_exports(folder)) or "none"}')
    try:
        content = json.loads((out / 'classes.json').read_text('utf-8'))
        classes = [Class(**entry) for entry in content['classes']]
        if source == 'strokes':
            entries = json.loads((out / 'strokes.json').read_text('utf-8'))['strokes']
            return classes, [parse_stroke(entry) for entry in entries], {}
        pattern = 'real/train/*.npy' if source == 'labels' else 'masks/*.png'
        return classes, [], dict(_arrays(folder, out.glob(pattern), content['pictures'], len(classes)))
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(f'the export {name} is damaged ({error!r})') from error


def _arrays(
    folder: PictureFolder, files: Iterator[Path], sources: Mapping[str, str], classes: int
) -> Iterator[tuple[str, np.ndarray]]:
    sizes = {picture.name: picture.size for picture in folder.usable()}
    for file in files:
        if not is_inside(file, folder.path):
            raise ValueError(f'{file.name} is a link to a file outside of the folder')
        picture = sources[file.stem]
        labels = np.load(file, allow_pickle=False) if file.suffix == '.npy' else np.array(Image.open(file))
        if picture not in sizes:
            continue  # it is no longer in the folder
        if labels.shape != sizes[picture] or labels.dtype.kind not in 'iu':
            raise ValueError(f'{file.name}: labels {labels.shape} do not fit {picture} of {sizes[picture]} pixels')
        if ((labels != UNLABELLED) & ((labels < 0) | (labels >= classes))).any():
            raise ValueError(f'{file.name}: a label is none of the {classes} classes')
        yield picture, labels.astype(np.uint8)


def unique_stems(pictures: Sequence[Picture]) -> dict[Picture, str]:
    """Names without suffix; with it where several pictures differ in it alone."""
    stems = [picture.path.stem for picture in pictures]
    return {
        picture: stem if stems.count(stem) == 1 else picture.name.replace('.', '_')
        for picture, stem in zip(pictures, stems, strict=True)
    }


def write_indexed(path: Path, labels: np.ndarray, classes: Sequence[Class]) -> None:
    """Write labels (H, W) as an indexed PNG in the colours of the classes."""
    image = Image.fromarray(labels)
    palette = [value for entry in classes for value in entry.rgb]
    image.putpalette(palette + [255] * (768 - len(palette)))
    with whole_file(path) as partial:
        image.save(partial, 'PNG')


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1), 'utf-8')


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, is in a folder."""
    return path.resolve().is_relative_to(folder)
