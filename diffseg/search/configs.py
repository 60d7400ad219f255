"""Configs of models that use the activations selected by a search."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diffseg.diffusion.sites import Site

from .grid import Candidate

# options of an AggregationNeck that do not depend on the activations
NECK_OPTIONS = ('type', 'out_channels', 'num_groups', 'resize')


def segmentation_model(
    model: Mapping[str, Any], candidates: Sequence[Candidate], sites: Mapping[str, Site]
) -> dict[str, Any]:
    """A segmentor's config with its activations replaced.

    A head that takes several maps gets a level for each stride, fine -> coarse; one that takes a single map gets all of
    them in one level, of the size of the finest map. An `AggregationNeck` keeps its width and has a bottleneck for each
    candidate (unlike Diffusion Hyperfeatures, which shares those of a layer over timesteps); a `ConcatNeck` stays a
    `ConcatNeck`. Without a neck the head gets the maps themselves, fine -> coarse.

    Args:
        model: config of an `EncoderDecoder` with a `DiffusionBackbone`.
        candidates: selected activations and timesteps.
        sites: of the backbone's UNet.

    Raises:
        ValueError: the model is of another kind, has no neck where one is needed, or a candidate is attention, whose
            channels depend on the image.
    """
    model = copy.deepcopy(dict(model))
    neck, head = model.get('neck'), model['decode_head']
    if neck is not None and neck['type'] not in ('AggregationNeck', 'ConcatNeck'):
        raise ValueError(f'the neck is a {neck["type"]}; a config can be made with AggregationNeck, ConcatNeck or none')
    if neck is None and len(candidates) > 1 and _takes_one_map(head):
        raise ValueError(f'{head["type"]} takes one map, not {len(candidates)}; put a ConcatNeck into the config')
    channels = _channels(candidates, sites)
    strides = {candidate: sites[candidate.layer].stride for candidate in candidates}
    ordered = sorted(candidates, key=strides.__getitem__)
    if neck is None:
        levels = [[candidate] for candidate in ordered]
    elif _takes_one_map(head):
        levels = [ordered]
    else:
        levels = [[c for c in ordered if strides[c] == stride] for stride in sorted(set(strides.values()))]
    widths = [[channels[candidate] for candidate in level] for level in levels]
    outputs = [sum(level) for level in widths]
    if neck is not None and neck['type'] == 'AggregationNeck':
        outputs = [neck['out_channels']] * len(levels)
        model['neck'] = _aggregation(neck, levels, widths)
    elif neck is not None:
        model['neck'] = {'type': 'ConcatNeck', 'levels': widths}
    model['backbone'] = _backbone(model['backbone'], ordered, channels)
    auxiliary = model.get('auxiliary_head') or []
    for any_head in [head, *([auxiliary] if isinstance(auxiliary, Mapping) else auxiliary)]:
        _connect(any_head, outputs)
    return model


def correspondence_model(
    model: Mapping[str, Any],
    candidates: Sequence[Candidate],
    sites: Mapping[str, Site],
    output_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """The config of a model that matches with these activations.

    An `AggregationNeck` is kept, with a bottleneck for each candidate. Otherwise the model is zero-shot: each
    activation is resized, L2-normalised in every cell and concatenated, so that the cosine of two cells is the mean of
    the candidates' cosines.

    Args:
        model: config of a `CorrespondenceModel` with a `DiffusionBackbone`; other necks are removed, and the head with
            them.
        candidates: selected activations and timesteps.
        sites: of the backbone's UNet.
        output_size: side or (height, width) in cells; by default that of the finest map.

    Raises:
        ValueError: the model is of another kind, or a candidate is attention, whose channels depend on the image.
    """
    model = copy.deepcopy(dict(model))
    channels = _channels(candidates, sites)
    model['backbone'] = _backbone(model['backbone'], candidates, channels)
    widths = [list(channels.values())]
    if (neck := model.get('neck')) is not None and neck['type'] == 'AggregationNeck':
        model['neck'] = _aggregation(neck, [candidates], widths)
    else:
        model['neck'] = {'type': 'ConcatNeck', 'levels': widths, 'normalize': True}
        model.pop('head', None)
    if output_size is not None:
        model['neck']['output_sizes'] = [output_size]
    return model


def _aggregation(
    neck: Mapping[str, Any], levels: Sequence[Sequence[Candidate]], widths: list[list[int]]
) -> dict[str, Any]:
    """The config of an `AggregationNeck` for other levels."""
    options = {key: neck[key] for key in NECK_OPTIONS if key in neck}
    names = [list(map(str, level)) for level in levels]
    return {**options, 'levels': widths, 'timesteps': 1, 'layer_names': names, 'timestep_names': ['own']}


def _channels(candidates: Sequence[Candidate], sites: Mapping[str, Site]) -> dict[Candidate, int]:
    if unknown := [str(candidate) for candidate in candidates if sites[candidate.layer].channels is None]:
        raise ValueError(f'{", ".join(unknown)} have as many channels as the image has cells; select others')
    return {candidate: sites[candidate.layer].channels for candidate in candidates}


def _backbone(
    backbone: Mapping[str, Any], candidates: Sequence[Candidate], channels: Mapping[Candidate, int]
) -> dict[str, Any]:
    if backbone['type'] != 'DiffusionBackbone':
        raise ValueError(f'the backbone is a {backbone["type"]}; activations are selected for a DiffusionBackbone')
    replaced = ('layers', 'channels', 'timesteps', 'attention_maps', 'attention_mode')
    return {
        **{key: value for key, value in backbone.items() if key not in replaced},
        'layers': list(map(str, candidates)),
        'channels': [channels[candidate] for candidate in candidates],
    }


def _takes_one_map(head: Mapping[str, Any]) -> bool:
    return isinstance(head['in_channels'], int)


def _connect(head: dict[str, Any], outputs: Sequence[int]) -> None:
    """Set `in_channels` and `in_index` of a head: for all maps, or for the one that it takes."""
    if _takes_one_map(head):
        head['in_index'] = min(head.get('in_index', -1), len(outputs) - 1)
        head['in_channels'] = outputs[head['in_index']]
    else:
        head['in_index'] = list(range(len(outputs)))
        head['in_channels'] = list(outputs)
