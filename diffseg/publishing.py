"""Write what a segmentor has learned, with a model card, for `diffseg.pretrained` to load."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from torch import Tensor

import diffseg
from diffseg.diffusion.presets import PRESETS
from diffseg.files import whole_file
from diffseg.inspection import read_training_checkpoint, stored_config
from diffseg.pretrained import CARD, CONFIG, FORMAT, TUPLE, VERSION, WEIGHTS, check_types, members

EXTRA_STATE = '_extra_state'  # end of the names of fingerprints in a state dict
LABEL_LOADERS = ('LoadAnnotations', 'LoadLabelArray')
# of a backbone, which say nothing about the trained model
RUN_OPTIONS = ('cache', 'cache_dir', 'check_fingerprint', 'compile', 'devices', 'gradient_checkpointing', 'offload')


def publish(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base_model: Sequence[str] | None = None,
    license: str | None = None,
    results: str | Path | None = None,
) -> list[Path]:
    """Write what a checkpoint of mmengine has learned for `DiffusionSegmentor.from_pretrained`, with a model card.

    Args:
        checkpoint: of a segmentor with frozen backbones of this package.
        out: folder; files of these names are replaced.
        base_model: preset or hub id of the frozen network, one for each member of an ensemble, where the config names
            a local copy; its fingerprint is checked when the segmentor is loaded.
        license: identifier for the card, such as 'apache-2.0'.
        results: JSON file of `tools/test.py` with the figures for the card; by default the newest one in the folder of
            the checkpoint that was written by a test of it.

    Returns:
        The files.

    Raises:
        OSError: the checkpoint or the results cannot be read.
        ValueError: the checkpoint is no segmentor's, has no config or classes, or its model reads local files that the
            folder would not hold.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    state = read_training_checkpoint(checkpoint)
    try:
        config, tensors = describe(state, base_model)
        figures = read_figures(checkpoint, results)
    except ValueError as error:
        raise ValueError(f'{checkpoint}: {error}') from error
    text = json.dumps(encode_tuples(config), indent=1)
    card = model_card(config, stored_config(state), state['meta'], figures, license)
    with whole_file(out / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={'format': 'pt'})
    for name, content in ((CONFIG, text), (CARD, card)):
        with whole_file(out / name) as partial:
            partial.write_text(content)
    return [out / name for name in (CONFIG, WEIGHTS, CARD)]


def describe(
    checkpoint: Mapping[str, Any], base_model: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `config.json`, and the tensors, of a training checkpoint.

    Raises:
        ValueError: see `publish`.
    """
    settings = stored_config(checkpoint)
    model, meta = settings['model'], checkpoint['meta'].get('dataset_meta') or {}
    if not {'backbone', 'decode_head'} <= model.keys():
        raise ValueError(
            f'its model is a {model.get("type")} without backbone and decode_head; only segmentors are published'
        )
    if missing := [key for key in ('classes', 'palette') if not meta.get(key)]:
        raise ValueError(f'its dataset_meta has no {" and no ".join(missing)}, which a data set of mmseg gives')
    check_types(model, 'model')
    model['auxiliary_head'] = None
    given = iter(base_model or [])
    backbones = members(model['backbone'])
    for backbone in (model['backbone'], *backbones):
        for option in RUN_OPTIONS:
            backbone.pop(option, None)
    for backbone in backbones:
        backbone['model'] = next(given, None) or portable_name(backbone['model'])
    if unused := list(given):
        raise ValueError(f'more base models than the backbone has: {", ".join(unused)}')
    options = [{key: value for key, value in backbone.items() if key != 'model'} for backbone in backbones]
    if files := sorted(set(local_files([{**model, 'backbone': None}, options]))):
        raise ValueError(
            f'its model reads {", ".join(files)}, which a published folder does not hold; put them on the hub, name '
            f'them by their ids in the config, and train with that'
        )
    state = {key: value for key, value in checkpoint['state_dict'].items() if not key.startswith('auxiliary_head.')}
    fingerprints = {key: json.loads(bytes(x.tolist())) for key, x in state.items() if key.endswith(EXTRA_STATE)}
    if not fingerprints:
        raise ValueError('its backbone has no fingerprint, so that it is not one of diffseg')
    config = {
        'format': FORMAT,
        'version': VERSION,
        'diffseg': diffseg.__version__,
        'model': model,
        'pipeline': inference_pipeline(settings),
        'classes': list(meta['classes']),
        'palette': [list(map(int, colour)) for colour in meta['palette']],
        'fingerprints': fingerprints,
    }
    return config, {key: x.detach().cpu().contiguous() for key, x in state.items() if key not in fingerprints}


def inference_pipeline(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The test pipeline without the loading of labels.

    Raises:
        ValueError: there is none, or it does not begin with an image file.
    """
    data = settings.get('test_dataloader') or {}
    dataset = data.get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    pipeline = dataset.get('pipeline') or settings.get('test_pipeline')
    if not pipeline or pipeline[0]['type'] != 'LoadImageFromFile':
        raise ValueError('its test pipeline does not begin with LoadImageFromFile')
    return [dict(transform) for transform in pipeline if transform['type'] not in LABEL_LOADERS]


def is_local(model: str) -> bool:
    """Whether a model is a folder or file, not a preset or hub id."""
    return model not in PRESETS and Path(model).expanduser().exists()


def portable_name(model: str) -> str:
    """A preset or hub id as it is; of a folder or file the name alone, after './'."""
    return f'./{Path(model).resolve().name}' if is_local(model) or model.startswith(('/', '.', '~')) else model


def local_files(config: Any) -> Iterator[str]:
    """Existing files and folders that a config names."""
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            yield from local_files(value)
    elif isinstance(config, str) and ('/' in config or '.' in config) and Path(config).expanduser().exists():
        yield config


def encode_tuples(value: Any) -> Any:
    """Make tuples distinguishable from lists in JSON."""
    if isinstance(value, Mapping):
        return {key: encode_tuples(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [encode_tuples(entry) for entry in value]}
    return [encode_tuples(entry) for entry in value] if isinstance(value, list) else value


def read_figures(checkpoint: Path, results: str | Path | None) -> tuple[str, dict[str, float]] | None:
    """Figures of a test, with the name of their file; None if no test of the checkpoint is known.

    Raises:
        ValueError: `results` is no such file.
    """
    if results is not None:
        found = numbers(Path(results))
        if not found:
            raise ValueError(f'{results} has no figures; tools/test.py writes them to WORK_DIR/TIME/TIME.json')
        return Path(results).name, found
    for folder in sorted((path for path in checkpoint.parent.iterdir() if path.is_dir()), reverse=True):
        path, config = folder / f'{folder.name}.json', folder / 'vis_data/config.py'
        if path.is_file() and config.is_file() and f"{checkpoint.name}'\n" in config.read_text():
            return path.name, numbers(path)
    return None


def numbers(path: Path) -> dict[str, float]:
    """The figures in a JSON file of a test, without its times.

    Raises:
        ValueError: it is not JSON of one object.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f'{path} has no figures')
    times = ('time', 'data_time')
    return {key: value for key, value in content.items() if isinstance(value, int | float) and key not in times}


def model_card(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    meta: Mapping[str, Any],
    figures: tuple[str, Mapping[str, float]] | None,
    license: str | None,
) -> str:
    """The model card: YAML front matter and Markdown."""
    backbones = members(config['model']['backbone'])
    names = [backbone['model'] for backbone in backbones]
    data = dataset_of(settings.get('train_dataloader'))
    repositories = [PRESETS[name].repo_id if name in PRESETS else name for name in names if not name.startswith('./')]
    front = ModelCardData(
        license=license,
        library_name='diffseg',
        pipeline_tag='image-segmentation',
        base_model=[name for name in repositories if name] or None,
        tags=['diffseg', 'mmsegmentation', 'semantic-segmentation', 'diffusion-features'],
    )
    local = [name.removeprefix('./') for name in names if name.startswith('./')]
    places = [f'path/to/{name.removeprefix("./")}' if name.startswith('./') else name for name in names]
    given = f', model={(places[0] if len(places) == 1 else places)!r}' if local else ''
    length = f'{meta["epoch"]} epochs' if meta.get('epoch') else f'{meta.get("iter", "?")} iterations'
    rows = {
        'frozen network': ', '.join(name.removeprefix('./') for name in names) + (' (local)' if local else ''),
        'layers': '; '.join(', '.join(f'`{layer}`' for layer in backbone.get('layers', ())) for backbone in backbones),
        'timesteps': '; '.join(str(backbone['timesteps']) for backbone in backbones if backbone.get('timesteps')),
        'prompt': '; '.join(f'`{backbone["prompt"]}`' for backbone in backbones if backbone.get('prompt')),
        'neck, head': f'{(config["model"].get("neck") or {}).get("type", "none")}, '
        f'{config["model"]["decode_head"]["type"]}',
        'training data': text_of(data),
        'training': f'{length}, {text_of(optimizer_of(settings))}, seed {meta.get("seed")}',
        'test data': text_of(dataset_of(settings.get('test_dataloader'))),
        'metric': text_of(settings.get('test_evaluator')),
        'test mode': (config['model'].get('test_cfg') or {}).get('mode', 'whole'),
        'written by': f'diffseg {config["diffseg"]}, mmengine {meta.get("mmengine_version")}',
    }
    fingerprint = json.dumps(config['fingerprints'], indent=1)
    return '\n'.join(
        [
            '---',
            front.to_yaml(),
            '---',
            '',
            f'# {config["model"]["decode_head"]["type"]} on activations of {" and ".join(Path(x).name for x in names)}',
            '',
            f'Semantic segmentation into {len(config["classes"])} classes. The frozen network is not in this '
            f'repository: it is loaded from its own source, and its fingerprint is compared.',
            '',
            '```python',
            'import diffseg',
            '',
            f"segmentor = diffseg.DiffusionSegmentor.from_pretrained('FOLDER or HUB/ID'{given})",
            "mask = segmentor.segment('picture.jpg')  # (H, W), indices into segmentor.classes",
            '```',
            '',
            f'Classes: {", ".join(config["classes"])}.',
            '',
            '## Data and protocol',
            '',
            '| | |',
            '|---|---|',
            *(f'| {key} | {value} |' for key, value in rows.items() if value),
            '',
            '## Figures',
            '',
            *figure_lines(figures),
            '',
            '## Fingerprint',
            '',
            '```json',
            fingerprint,
            '```',
            '',
        ]
    )


def figure_lines(figures: tuple[str, Mapping[str, float]] | None) -> list[str]:
    """The table of figures of the model card."""
    if figures is None:
        return ['No test of this checkpoint is known.']
    name, values = figures
    rows = [f'| {key} | {value:.4g} |' for key, value in values.items()]
    return [f'Of the test data above, from {name} of `tools/test.py`:', '', '| | |', '|---|---|', *rows]


def dataset_of(dataloader: Mapping[str, Any] | None) -> dict[str, Any]:
    """What identifies the data of a data loader, without paths outside of its folder."""
    dataset = (dataloader or {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    known = {key: value for key, value in dataset.items() if key != 'pipeline' and value is not None}
    if 'data_root' in known:
        known['data_root'] = Path(known['data_root']).name
    return known


def optimizer_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer and batch size."""
    optimizer = (settings.get('optim_wrapper') or {}).get('optimizer', {})
    return {**optimizer, 'batch_size': (settings.get('train_dataloader') or {}).get('batch_size')}


def text_of(config: Any) -> str:
    """A config in a line: its type, then its options."""
    if isinstance(config, list | tuple):
        return '; '.join(map(text_of, config))
    if not config:
        return ''
    options = [f'{key} {value}' for key, value in config.items() if key != 'type']
    return ', '.join([*([config['type']] if 'type' in config else []), *options])
