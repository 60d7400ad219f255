"""Prune a trained AggregationNeck to the pairs of layer and timestep with the largest mixing weights.

    python tools/convert/prune.py CONFIG CHECKPOINT --keep 3 --out work_dirs/pruned

From any trained model with a DiffusionBackbone and an AggregationNeck this makes a config and a checkpoint. The
backbone of the new config reads the remaining layers and timesteps; where these are not all combined, the neck's option
`kept` lists the pairs that are mixed. Levels keep their sizes. The checkpoint has the bottlenecks of the remaining
layers and the mixing weights of the remaining pairs, renormalised; all other weights are unchanged. So the model can be
tested at once, or trained further with `load_from`.

Prints the share of the weight that each level keeps, and the floating-point operations of backbone and neck for an
image, before and after (counted on the meta device, as `benchmark.py --count-only` does).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.benchmarking import executed
from diffseg.command_line import parse_size
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.sites import resolve
from diffseg.inspection import aggregation_necks, available_sites, read_training_checkpoint
from diffseg.models.necks import AggregationNeck

Pair = tuple[int, int]  # indices of a timestep and of a layer of its level
# options of the backbone that change its weights, and hardly the number of operations
WEIGHTS = (
    *('cache', 'conditioner', 'frozen', 'lora', 'lora_weights', 'network_weights', 'textual_inversion', 'trainable'),
)


def find_neck(model: Mapping[str, Any]) -> str:
    """Name of the AggregationNeck that directly follows the DiffusionBackbone of a model config.

    Raises:
        ValueError: the model has another backbone, other timesteps per layer, or no such neck.
    """
    backbone = model.get('backbone', {})
    if backbone.get('type') != 'DiffusionBackbone':
        raise ValueError(f'only a DiffusionBackbone can be pruned; the backbone of the model is {backbone.get("type")}')
    if timed := [layer for layer in backbone['layers'] if '@' in layer]:
        raise ValueError(f'layers with timesteps of their own cannot be pruned: {", ".join(timed)}')
    names = [
        name
        for name, neck in aggregation_necks(model)
        if name in ('neck', 'neck.necks.0') and neck['type'] == 'AggregationNeck'  # those derived have more weights
    ]
    if not names:
        raise ValueError('the model has no AggregationNeck directly after its backbone')
    return names[0]


def choose(weights: Sequence[Tensor], keep: int, overall: bool = False) -> list[list[Pair]]:
    """Select the pairs of the largest weights; those of a level are sorted by timestep, then by layer.

    Args:
        weights: of each level, with shape (T, L); zero where there is no pair.
        keep: how many pairs to keep.
        overall: `keep` counts the pairs of all levels together, at least one of each; otherwise of every level.

    Raises:
        ValueError: `keep` exceeds the number of pairs, or is below the number of levels (`overall`).
    """
    ranked = []  # of each level (weight, (timestep, layer)), the best first
    for table in weights:
        pairs = [(value, (t, i)) for t, row in enumerate(table.tolist()) for i, value in enumerate(row) if value > 0]
        ranked.append(sorted(pairs, key=lambda pair: -pair[0]))
    fewest, most = (len(ranked), sum(map(len, ranked))) if overall else (1, min(map(len, ranked)))
    if not fewest <= keep <= most:
        where = f'{len(ranked)} levels together' if overall else 'the smallest level'
        raise ValueError(f'cannot keep {keep} pairs: {where} can have {fewest} to {most}')
    if not overall:
        return [sorted(pair for _, pair in pairs[:keep]) for pairs in ranked]
    rest = [(value, level, pair) for level, pairs in enumerate(ranked) for value, pair in pairs[1:]]
    kept = [[pairs[0][1]] for pairs in ranked]
    for _, level, pair in sorted(rest, key=lambda entry: -entry[0])[: keep - len(ranked)]:
        kept[level].append(pair)
    return [sorted(pairs) for pairs in kept]


def prune_backbone(backbone: Mapping[str, Any], layers: Sequence[int], steps: Sequence[int]) -> dict[str, Any]:
    """The config of a backbone that reads only these of its layers and timesteps."""
    backbone = dict(backbone)
    for key, indices in (('layers', layers), ('channels', layers), ('timesteps', steps)):
        if backbone.get(key) is not None:
            backbone[key] = [backbone[key][i] for i in indices]
    return backbone


def prune_neck(
    neck: Mapping[str, Any], pairs: Sequence[Sequence[Pair]], strides: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The config of a neck that mixes only these pairs of each level and takes no other layers and timesteps.

    Args:
        neck: config of the trained neck.
        pairs: kept pairs of each level.
        strides: of the maps of each level of the trained neck.
    """
    neck = dict(neck)
    steps = used(0, chain(*pairs))
    for key in ('levels', 'layer_names'):
        if neck.get(key) is not None:
            neck[key] = [[level[i] for i in used(1, kept)] for level, kept in zip(neck[key], pairs, strict=True)]
    if neck.get('timestep_names') is not None:
        neck['timestep_names'] = [neck['timestep_names'][t] for t in steps]
    neck['timesteps'] = len(steps)
    neck['kept'] = [[[steps.index(t) for t, i in kept if i == layer] for layer in used(1, kept)] for kept in pairs]
    if all(len(indices) == len(steps) for indices in chain(*neck['kept'])):
        del neck['kept']
    if not neck.get('output_sizes'):
        factors = neck.get('enlarge') or [1] * len(pairs)
        neck['enlarge'] = [
            factor * min(level[i] for i in used(1, kept)) // min(level)
            for factor, level, kept in zip(factors, strides, pairs, strict=True)
        ]
        if set(neck['enlarge']) == {1}:
            del neck['enlarge']
    return neck


def used(position: int, pairs: Iterable[Pair]) -> list[int]:
    """The timesteps (position 0) or layers (position 1) in some pairs."""
    return sorted({pair[position] for pair in pairs})


def prune_neck_weights(
    old: AggregationNeck, new: AggregationNeck, pairs: Sequence[Sequence[Pair]]
) -> dict[str, Tensor]:
    """The state of the new neck, from that of the old one."""
    for source, target, kept in zip(old.levels, new.levels, pairs, strict=True):
        order = [tuple(pair) for pair in source.mixed.nonzero().tolist()]
        target.mixing_weights.data = source.mixing_weights.data[[order.index(pair) for pair in kept]]
        for bottleneck, layer in zip(target.bottleneck_layers, used(1, kept), strict=True):
            bottleneck.load_state_dict(source.bottleneck_layers[layer].state_dict())
    return new.state_dict()


def prune_backbone_weights(
    state: Mapping[str, Tensor], backbone: Mapping[str, Any], layers: Sequence[int], steps: Sequence[int]
) -> dict[str, Tensor]:
    """State of the pruned backbone in a checkpoint: its fingerprint, and the trained tensors that are still needed."""
    fingerprint = json.loads(bytes(state['_extra_state'].tolist()))
    fingerprint['layers'] = [fingerprint['layers'][i] for i in layers]
    fingerprint['timesteps'] = [fingerprint['timesteps'][t] for t in steps]
    extra_state = torch.tensor(list(json.dumps(fingerprint).encode()), dtype=torch.uint8)
    trained = {name: tensor for name, tensor in state.items() if name != '_extra_state'}
    if trained:  # only the built backbone tells which of it is still needed
        needed = MODELS.build(dict(backbone)).state_dict()
        trained = {name: tensor for name, tensor in trained.items() if name in needed}
    return {'_extra_state': extra_state, **trained}


def operations(backbone: Mapping[str, Any], neck: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Floating-point operations for one image of `size` (height, width), without weights."""
    options = {key: value for key, value in backbone.items() if key not in WEIGHTS}
    configs = load_config(backbone['model'], revision=backbone.get('revision'), config=backbone.get('config'))
    options |= {'random': [configs.part, 'vae'], 'prompt': placeholder_conditioning(configs.network)}
    with torch.device('meta'):
        network = nn.Sequential(MODELS.build(options), MODELS.build(dict(neck)))
    images = torch.empty(1, 3, *size, device='meta')
    with torch.no_grad():
        return executed(lambda: network(images))


def submodule_state(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state dict of the submodule with this name, from that of the model."""
    prefix = f'{name}.'
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_neck(config: Mapping[str, Any], state: Mapping[str, Tensor], layers: int) -> AggregationNeck:
    """The trained neck behind a backbone of some layers."""
    neck = MODELS.build(dict(config))
    if (maps := sum(map(len, neck.channels))) != layers:
        raise ValueError(
            f'the neck mixes {maps} maps, and the backbone has {layers} layers; maps of aggregated attention cannot be '
            f'pruned'
        )
    try:
        neck.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f'the checkpoint does not fit the config: {error}') from error
    return neck


def run(args: argparse.Namespace) -> None:
    init_default_scope('mmseg')
    cfg = Config.fromfile(args.config)
    checkpoint = read_training_checkpoint(args.checkpoint)
    state = checkpoint.get('state_dict', checkpoint)
    name = find_neck(cfg.model)
    configs = {'backbone': dict(cfg.model.backbone), name: dict(aggregation_necks(cfg.model))[name]}
    all_layers, all_steps = (configs['backbone'][key] for key in ('layers', 'timesteps'))
    neck = load_neck(configs[name], submodule_state(state, name), len(all_layers))
    available, trained_size = available_sites(configs['backbone']['model'], configs['backbone'].get('revision'))

    tables = [table.weights for table in neck.mixing_weights()]
    pairs = choose(tables, args.keep, args.overall)
    counter = iter(range(len(all_layers)))
    layer_indices = [[next(counter) for _ in level] for level in neck.channels]  # of each level, into all_layers
    layers = [level[i] for level, kept in zip(layer_indices, pairs, strict=True) for i in used(1, kept)]
    steps = used(0, chain(*pairs))
    sites = [available[layer] for layer in resolve(all_layers, available)]
    strides = [[sites[index].stride for index in level] for level in layer_indices]

    backbone = prune_backbone(configs['backbone'], layers, steps)
    pruned_configs = {'backbone': backbone, name: prune_neck(configs[name], pairs, strides)}
    pruned_neck = MODELS.build(pruned_configs[name])
    parts = {
        'backbone': prune_backbone_weights(submodule_state(state, 'backbone'), backbone, layers, steps),
        name: prune_neck_weights(neck, pruned_neck, pairs),
    }
    pruned = {key: value for key, value in state.items() if not key.startswith(tuple(f'{part}.' for part in parts))}
    pruned |= {f'{part}.{key}': value for part, tensors in parts.items() for key, value in tensors.items()}
    for variable in ('layers', 'levels', 'timesteps'):  # of the config file, outdated by the pruned model
        cfg.pop(variable, None)
    cfg.model.backbone = backbone
    if name == 'neck':
        cfg.model.neck = pruned_configs[name]
    else:
        cfg.model.neck.necks[0] = pruned_configs[name]

    for level, (table, kept) in enumerate(zip(tables, pairs, strict=True)):
        share = sum(table[pair].item() for pair in kept)
        print(f'level {level}: {len(kept)} of {int((table > 0).sum())} pairs, with {share:.1%} of the weight')
    for table in pruned_neck.mixing_weights():
        print(table)
    print(f'{len(all_layers)} layers -> {len(layers)}, {len(all_steps)} timesteps -> {len(steps)}')
    size = args.size or trained_size
    before, after = (operations(c['backbone'], c[name], size) for c in (configs, pruned_configs))
    print(
        f'backbone and neck at {size[0]} x {size[1]} pixels: {before / 1e9:.4g} GFLOP -> {after / 1e9:.4g} GFLOP '
        f'({after / before:.1%})'
    )
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f'{Path(args.config).stem}-keep{args.keep}'
    cfg.dump(f'{stem}.py')
    torch.save({'meta': {**checkpoint.get('meta', {}), 'cfg': cfg.pretty_text}, 'state_dict': pruned}, f'{stem}.pth')
    print(f'{stem}.py\n{stem}.pth')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--keep', type=int, required=True, metavar='K', help='pairs of every level')
    parser.add_argument('--overall', action='store_true', help='K pairs of all levels together, one or more of each')
    parser.add_argument('--out', type=Path, required=True, help='folder to write config and checkpoint to')
    parser.add_argument('--size', type=parse_size, metavar='H[xW]', help='of the image (default: that of the model)')
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
