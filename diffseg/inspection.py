"""Read backbones and necks from configs and checkpoints without building whole models."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from diffseg.diffusion.layer_sets import Reading, split_timesteps
from diffseg.diffusion.loading import load_config, meta_network, reason_of
from diffseg.diffusion.sites import Site, aggregates, default_scale_factor, resolve, sites

if TYPE_CHECKING:
    from diffseg.models.necks import MixingWeights


# AggregationNeck and the necks derived from it
AGGREGATION_NECKS = ('AggregationNeck', 'GatedAggregationNeck', 'OrderedAggregationNeck', 'UpsamplingNeck')
PACKED_SAMPLE_SIZE = 128  # cells of the latent of a 1024 pixel image; configurations of packed networks do not say it


def available_sites(model: str, revision: str | None = None) -> tuple[dict[str, Site], tuple[int, int]]:
    """All sites of a model, and the image size that it was trained on."""
    config = load_config(model, revision=revision)
    network = meta_network(model, revision=revision)
    factor = config.vae_scale_factor if config.vae else default_scale_factor(network)
    side = config.network.get('sample_size', PACKED_SAMPLE_SIZE) * factor
    return sites(network, factor), (side, side)


def dataset_configs(config: Any) -> Iterator[Any]:
    """Configs of the data sets inside the wrappers and concatenations of a data set's config."""
    inner = config.get('datasets') or [config[key] for key in ('dataset',) if key in config]
    for child in inner:
        yield from dataset_configs(child)
    if not inner:
        yield config


def backbone_configs(config: Any) -> Iterator[dict[str, Any]]:
    """Configs of all DiffusionBackbones in a config, at any depth."""
    if isinstance(config, dict):
        if config.get('type') == 'DiffusionBackbone':
            yield config
        else:
            for value in config.values():
                yield from backbone_configs(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from backbone_configs(value)


def backbone_maps(backbone: Mapping[str, Any], available: Mapping[str, Site]) -> list[Site]:
    """Output maps of a DiffusionBackbone: names, strides, and channels of all timesteps together."""
    categories, mode = backbone.get('attention_maps', ()), backbone.get('attention_mode', 'concat')
    tokens = count_tokens(backbone.get('conditioner', {}))
    attention = {site.name: site for site, _ in aggregates(available, categories, mode, tokens)}
    available = {**available, **attention}
    readings, every = split_timesteps(backbone['layers'], backbone.get('timesteps'))
    readings = [Reading(*resolve([layer], available), timesteps) for layer, timesteps in readings]
    readings += [Reading(name, every) for name in attention if name not in dict(readings)]
    maps = []
    for reading in readings:
        site = available[reading.layer]
        channels = site.channels and site.channels * len(reading.timesteps)
        maps.append(replace(site, name=reading.label(every), channels=channels))
    return maps


def count_tokens(conditioner: Mapping[str, Any]) -> int | None:
    """Number of tokens of a conditioner; None for a text prompt, whose tokens are not counted here."""
    from diffseg.models.backbones.conditioners import class_names

    if 'dataset' in conditioner:
        return len(class_names(conditioner['dataset']))
    return conditioner.get('num_prompts') or len(conditioner.get('classes', ())) or None


def read_training_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of mmengine with its tensors on the CPU.

    Raises:
        OSError: the file does not exist or is not a checkpoint.
    """
    try:
        checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger='silent')
    except FileNotFoundError as error:
        raise FileNotFoundError(f'no checkpoint at {path}') from error
    except Exception as error:  # torch raises many types on damaged files
        raise OSError(
            f'{path} is no checkpoint, or a damaged one: torch.load reads no tensors in it ({reason_of(error)})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise OSError(f'{path} is no checkpoint: it holds a {type(checkpoint).__name__} instead of a state dict')
    return checkpoint


def load_weights(model: nn.Module, path: str | Path, config: str | Path) -> None:
    """Load the weights of a checkpoint of mmengine into a model, strictly.

    Args:
        model: built from a config.
        path: of the checkpoint.
        config: path of the config, for errors.

    Raises:
        OSError: the file does not exist or is not a checkpoint.
        ValueError: the weights do not fit the model.
    """
    checkpoint = read_training_checkpoint(path)
    state = checkpoint.get('state_dict', checkpoint)
    try:
        load_state_dict(model, state, strict=True, logger='silent')
    except (RuntimeError, AttributeError) as error:  # the second for values that are no tensors
        raise ValueError(f'{path} does not fit {config}: {error}') from error


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a checkpoint, which is Python code: only literals and `dict(...)` are evaluated.

    Raises:
        ValueError: no config with a model in the checkpoint, or other code in it.
    """
    text = checkpoint.get('meta', {}).get('cfg')
    if text is None:
        raise ValueError('the checkpoint holds no config')
    assignments = [statement for statement in ast.parse(text).body if isinstance(statement, ast.Assign)]
    config = {getattr(statement.targets[0], 'id', None): _literal(statement.value) for statement in assignments}
    if 'model' not in config:
        raise ValueError('the config in the checkpoint has no model')
    return config


def stored_model(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`model` of the config in a checkpoint.

    Raises:
        ValueError: as `stored_config` does.
    """
    try:
        return stored_config(checkpoint)['model']
    except ValueError as error:
        raise ValueError(f'{error}; give CONFIG as well') from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
        entries: dict[str, Any] = {}
        for argument in node.args:
            entries |= _literal(argument)
        return entries | {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        elements = [_literal(element) for element in node.elts]
        return elements if isinstance(node, ast.List) else tuple(elements)
    return ast.literal_eval(node)


def aggregation_necks(config: Any, name: str = '') -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name in the model and the config of every AggregationNeck, of those derived from it as well."""
    if isinstance(config, Mapping):
        if config.get('type') in AGGREGATION_NECKS:
            yield name, dict(config)
        parts = config.items()
    elif isinstance(config, list | tuple):
        parts = enumerate(config)
    else:
        return
    for key, part in parts:
        yield from aggregation_necks(part, f'{name}.{key}' if name else str(key))


def read_mixing_weights(
    checkpoint: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[tuple[str, 'MixingWeights']]:
    """Yield the name and the mixing weights of each level of every AggregationNeck.

    Raises:
        ValueError: the model has no AggregationNeck, or its weights are not in the checkpoint.
    """
    from mmseg.registry import MODELS  # imported here, so that the rest works without the mm packages

    necks = list(aggregation_necks(model))
    if not necks:
        raise ValueError('the model has no AggregationNeck')
    state = checkpoint.get('state_dict', checkpoint)
    for name, config in necks:
        neck = MODELS.build(config)
        prefix = f'{name}.'
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        try:
            neck.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f'the checkpoint does not fit {name} in the config: {error}') from error
        for level, table in enumerate(neck.mixing_weights()):
            yield f'{name}, level {level}', table
