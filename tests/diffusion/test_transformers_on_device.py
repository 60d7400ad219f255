"""Transformers on an accelerator: no tensor strays to the host, and no call waits for the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from fake_device import HostWaitsError, fake_device, on_device
from torch._subclasses.fake_tensor import DataDependentOutputException

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.options import group_options

OPTIONS = {
    'noise, of members in micro-batches': {
        'ensemble': 3,
        'micro_batch': 2,
        'dtype': 'bfloat16',
        'timesteps': [260, 500],
    },
    'clean, with discarded channels': {'trajectory': 'clean', 'discard': [1]},
    'inversion': {'trajectory': {'type': 'inversion', 'steps': 4}, 'timesteps': [-1]},
}

WAIT = ('lumina2', 'qwen-image', 'z-image')  # whose layout of tokens depends on the length of each prompt


@pytest.fixture
def run(pipeline_folder: Callable[[str], Path]) -> Callable[..., None]:
    """Read two images of an odd size on the fake device: `run(kind, **options)`."""

    def read(kind: str, **options) -> None:
        options = {'timesteps': [260], 'check_finite': False, **options}
        prompts = None if kind == 'dit' else ['a horse', 'two dogs']
        extractor = DiffusionExtractor(
            pipeline_folder(kind), ['vit-block0-mod', 'vit-block1-out'], prompt=prompts or '', **group_options(options)
        )
        with fake_device(extractor) as to_device:
            activations = extractor(to_device(torch.zeros(2, 3, 64, 70)), prompts)
        assert on_device(activations)
        assert [len(x) for x in activations.values()] == [2, 2]

    return read


@pytest.mark.parametrize('kind', [kind for kind in tiny_pipelines.KINDS if kind not in WAIT])
def test_every_kind(run: Callable, kind: str):
    run(kind)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('kind', ['flux', 'hunyuan-dit'])
def test_every_way_of_extraction(run: Callable, kind: str, options: dict):
    run(kind, **options)


@pytest.mark.parametrize('kind', WAIT)
def test_prompts_of_different_lengths_are_waited_for(run: Callable, kind: str):
    with pytest.raises((HostWaitsError, DataDependentOutputException)):
        run(kind)


@pytest.mark.parametrize('kind', ['flux', 'pixart-sigma'])
def test_generating(pipeline_folder: Callable[[str], Path], kind: str):
    trajectory = {'type': 'generation', 'steps': 2, **({} if kind == 'flux' else {'spacing': 'trailing'})}
    timestep = 1000 if kind == 'flux' else 999
    extractor = DiffusionExtractor(
        pipeline_folder(kind), ['vit-block1-out'], [timestep], trajectory=trajectory, runtime={'check_finite': False}
    )
    with fake_device(extractor):
        assert on_device(extractor.generate((64, 96)))
