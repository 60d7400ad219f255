"""Tests for diffseg.cache, and for the cache of a DiffusionBackbone."""

import copy
import inspect
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from cache_worker import ENTRY, IMAGES, compute, die_in_writing, make_images, use, write_on
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import MODELS
from processes import forkserver
from tiny_mmseg import LAYERS, backbone_config, sample, segmentor_config
from torch import Tensor, nn

from diffseg.cache import (
    DTYPES,
    DamagedEntryError,
    FeatureCache,
    build_cache,
    entry_size,
    format_size,
    parse_size,
    read_entry,
)
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.options import GROUPS
from diffseg.models import DiffusionBackbone


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the cache logs."""
    found = []
    monkeypatch.setattr('diffseg.cache.print_log', lambda message, *_: found.append(message))
    return found


def never(images: Tensor) -> list[Tensor]:
    pytest.fail(f'{len(images)} images computed that are in the cache')


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- what hits and what misses


def test_an_image_hits_at_any_place_in_any_batch(tmp_path: Path):
    images = make_images(4)
    first = FeatureCache(tmp_path).fetch(images, {'seed': 0}, compute)
    cache = FeatureCache(tmp_path)
    again = cache.fetch(images[[2, 0, 2]], {'seed': 0}, never)
    assert same(again, tuple(x[[2, 0, 2]] for x in first))
    assert (cache.counts.hits, cache.counts.misses) == (3, 0)


def test_what_is_missing_is_computed_in_one_call(tmp_path: Path):
    cache, images, calls = FeatureCache(tmp_path, 'float32'), make_images(5), []
    cache.fetch(images[[1, 3]], {}, compute)
    maps = cache.fetch(images, {}, lambda x: calls.append(x) or compute(x))
    assert len(calls) == 1 and torch.equal(calls[0], images[[0, 2, 4]])
    assert same(maps, tuple(compute(images)))
    assert (cache.counts.hits, cache.counts.misses) == (2, 5)


def test_what_is_each_images_own_is_in_its_key_and_computed_with(tmp_path: Path):
    def add(images: Tensor, own: list[int]) -> list[Tensor]:
        calls.append(own)
        return [images + torch.tensor(own)[:, None, None, None]]

    cache, images, calls = FeatureCache(tmp_path, 'float32'), make_images(1).expand(3, -1, -1, -1), []
    cache.fetch(images[:1], {}, add, per_image=[2])
    (maps,) = cache.fetch(images, {}, add, per_image=[1, 2, 3])
    assert calls == [[2], [1, 3]]
    assert torch.equal(maps, images + torch.tensor([1, 2, 3])[:, None, None, None])


def test_key_is_that_of_everything(tmp_path: Path):
    cache, image = FeatureCache(tmp_path), make_images(1)
    context = {'timesteps': [50, 100], 'prompt': 'a horse'}
    changed = image.clone()
    changed[0, 2, 15, 15] = torch.nextafter(changed[0, 2, 15, 15], torch.tensor(2.0))
    keys = [
        *cache.keys(image, context),
        *cache.keys(image.flip(-1), context),
        *cache.keys(changed, context),
        *cache.keys(image.transpose(2, 3), context),
        *cache.keys(image.view(1, 3, 8, 32), context),
        *cache.keys(image.view(torch.int32), context),
        *cache.keys(torch.cat([image, torch.zeros(1, 1, 16, 16)], dim=1), context),
        *cache.keys(torch.cat([image, torch.ones(1, 1, 16, 16)], dim=1), context),
        *cache.keys(image, {**context, 'timesteps': [50, 101]}),
        *cache.keys(image, {**context, 'seed': 1}),
        *FeatureCache(tmp_path, 'int8').keys(image, context),
    ]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        keys += cache.keys(image, context)
    assert len(set(keys)) == len(keys)
    reordered = {key: context[key] for key in reversed(context)}
    assert cache.keys(image.to(memory_format=torch.channels_last), reordered) == keys[:1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.dictionaries(st.text(), st.integers(), max_size=3))
def test_keys_are_those_of_images_and_context_alone(numbers: list[int], context: dict[str, int]):
    """Equal keys are those of equal images, at any place in any batch; every change of the context changes all."""
    cache, images = FeatureCache('unused'), make_images(4, size=4)
    single = [cache.keys(images[[i]], context)[0] for i in range(4)]
    assert len(set(single)) == 4
    assert cache.keys(images[numbers], context) == [single[i] for i in numbers]
    assert cache.keys(images[numbers], dict(reversed(context.items()))) == [single[i] for i in numbers]
    for changed in ({**context, 'more': 'x'}, {key: value + 1 for key, value in context.items()} or {'': 0}):
        assert not set(cache.keys(images, changed)) & set(single)
    assert not set(cache.keys(images, context, per_image=[[]] * 4)) & set(single)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 10**15))
def test_a_formatted_size_is_the_size_to_three_digits(size: int):
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.005)


# ---- storage


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('image_dtype', [torch.float32, torch.bfloat16])
def test_first_and_later_runs_agree(tmp_path: Path, dtype: str, image_dtype: torch.dtype):
    images = make_images(3).to(image_dtype)
    cold = FeatureCache(tmp_path, dtype).fetch(images, {}, compute)
    assert same(cold, FeatureCache(tmp_path, dtype).fetch(images, {}, never))
    assert all(x.dtype == image_dtype and not x.requires_grad for x in cold)


@pytest.mark.parametrize(('dtype', 'error'), [('float32', 0.0), ('float16', 2**-11), ('bfloat16', 2**-8)])
def test_floats_are_rounded_to_nearest(tmp_path: Path, dtype: str, error: float):
    images = make_images(3)
    for found, exact in zip(FeatureCache(tmp_path, dtype).fetch(images, {}, compute), compute(images), strict=True):
        assert ((found - exact).abs() <= error * exact.abs() + 1e-7 * bool(error)).all()


def test_int8_is_off_by_half_a_step_of_its_channel(tmp_path: Path):
    x = torch.randn(2, 5, 7, 9) * torch.tensor([1e-6, 1.0, 300.0, 1e9, 0.0])[:, None, None]  # (B, C, h, w)
    (maps,) = FeatureCache(tmp_path, 'int8').fetch(make_images(2), {}, lambda _: [x])
    largest = x.abs().amax((-2, -1), keepdim=True)
    assert ((maps - x).abs() <= largest / 254 * (1 + 1e-4)).all()
    assert not torch.equal(maps, x)


@pytest.mark.parametrize(
    ('dtype', 'value', 'message'),
    [
        ('float16', 7e4, r"up-level0 has a value of 7e\+04, which float16 cannot represent; .* dtype 'bfloat16'"),
        ('bfloat16', float('nan'), 'up-level0 has a value of nan'),
        ('int8', float('inf'), 'up-level0 has a value of inf'),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path: Path, dtype: str, value: float, message: str):
    def overflow(images: Tensor) -> list[Tensor]:
        maps = compute(images)
        maps[1][1, 2, 3, 0] = value
        return maps

    with pytest.raises(ValueError, match=message):
        FeatureCache(tmp_path, dtype).fetch(make_images(2), {}, overflow, ['unet-in', 'up-level0'])
    assert not list(FeatureCache(tmp_path).entries())


@pytest.mark.parametrize('dtype', DTYPES)
def test_size_is_known_beforehand(tmp_path: Path, dtype: str):
    cache, images = FeatureCache(tmp_path, dtype), make_images(2, size=128)
    maps = cache.fetch(images, {}, compute)
    estimate = 2 * entry_size([tuple(x.shape[1:]) for x in maps], dtype)
    assert cache.size() == sum(path.stat().st_size for path in cache.entries())
    assert estimate == pytest.approx(cache.size(), rel=0.01)


def test_gradients_are_refused(tmp_path: Path):
    images = make_images(1).requires_grad_()
    with pytest.raises(ValueError, match='switch the cache off'):
        FeatureCache(tmp_path).fetch(images, {}, compute)
    with torch.no_grad():
        FeatureCache(tmp_path).fetch(images, {}, compute)


def test_counts_are_logged_now_and_then(tmp_path: Path, messages: list[str]):
    cache, images = FeatureCache(tmp_path), make_images(50, size=4)
    for _ in range(21):
        copy.deepcopy(cache).fetch(images, {}, compute)
    assert messages == [
        f'feature cache {tmp_path}: 50 hits, 50 misses, 0 evicted, 0 damaged',
        f'feature cache {tmp_path}: 950 hits, 50 misses, 0 evicted, 0 damaged',
    ]


# ---- damage


def test_no_flipped_bit_and_no_truncation_goes_unseen(tmp_path: Path):
    cache = FeatureCache(tmp_path, 'int8')
    cache.fetch(make_images(1), {}, lambda _: [torch.randn(1, 2, 3, 2)])
    (path,) = cache.entries()
    data = path.read_bytes()
    damaged = [data[:n] for n in range(len(data))] + [data + b'\0', bytes(len(data))]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DamagedEntryError, match='damaged'):
            read_entry(path)
    path.write_bytes(data)
    read_entry(path)


def test_a_damaged_entry_is_reported_and_computed_anew(tmp_path: Path, messages: list[str]):
    cache, images = FeatureCache(tmp_path), make_images(3)
    expected = cache.fetch(images, {}, compute)
    first, second, _ = paths = [cache._path(key) for key in cache.keys(images, {})]
    first.write_bytes(paths[2].read_bytes())  # another image's entry
    second.write_bytes(second.read_bytes()[:-1])
    calls = []
    maps = cache.fetch(images, {}, lambda x: calls.append(len(x)) or compute(x))
    assert calls == [2] and same(maps, expected)
    assert cache.counts.damaged == 2
    assert [str(path) in message for path, message in zip(paths[:2], messages, strict=True)] == [True, True]
    assert same(cache.fetch(images, {}, never), expected)


# ---- limit


def test_limit_is_kept_and_what_was_used_last_stays(tmp_path: Path):
    cache, images = FeatureCache(tmp_path, 'float32', max_size=5 * ENTRY), make_images(20)
    cache.fetch(images[:1], {}, compute)
    for i in range(1, 20):
        cache.fetch(images[[i]], {}, compute)
        assert cache.size() <= 5 * ENTRY
        time.sleep(0.01)  # file systems tell times that are a few ms apart
        cache.fetch(images[[0, i]], {}, never)
    assert cache.counts.misses == 20 and cache.counts.evicted == 20 - len(list(cache.entries()))
    cache.fetch(images[[19]], {}, never)
    assert len(list(cache.entries())) >= 3


def test_prune_deletes_what_was_used_longest_ago(tmp_path: Path):
    cache, images = FeatureCache(tmp_path), make_images(3)
    cache.fetch(images, {}, compute)
    for age, key in enumerate(cache.keys(images, {})):
        os.utime(cache._path(key), (1e9 - age, 1e9 - age))
    cache.prune(cache.size() - 1)
    cache.fetch(images[:2], {}, never)
    cache.prune(0)
    assert cache.size() == 0 and cache.counts.evicted == 3
    FeatureCache(tmp_path / 'absent').prune(0)


def test_an_entry_larger_than_the_limit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r'an entry of 1\.\d+ kB exceeds max_size=1 kB'):
        FeatureCache(tmp_path, max_size='1 kB').fetch(make_images(1), {}, compute)


def test_sizes():
    assert [parse_size(size) for size in (12, '500', '1.5GB', '20 tb', '7kB')] == [12, 500, 1.5e9, 20e12, 7e3]
    assert [format_size(size) for size in (0, 999, 53_300_000_000)] == ['0 B', '999 B', '53.3 GB']
    for wrong in ('20G', 'GB', '', '-3', 0, '1e9'):
        with pytest.raises(ValueError, match='is not a size; give bytes, or a number with B, kB, MB, GB, TB'):
            parse_size(wrong)


def test_configs(tmp_path: Path):
    assert build_cache(None) is None
    assert build_cache(str(tmp_path)).dtype == 'float16'
    cache = build_cache({'path': tmp_path, 'dtype': 'int8', 'max_size': '1GB'})
    assert (cache.path, cache.dtype, cache.max_size) == (tmp_path, 'int8', 10**9)
    with pytest.raises(ValueError, match="'float8'; it is one of float16"):
        build_cache({'path': tmp_path, 'dtype': 'float8'})


# ---- several processes


@pytest.fixture(scope='module')
def processes() -> multiprocessing.context.BaseContext:
    """Starts processes."""
    return forkserver()


def test_processes_share_a_folder(processes, tmp_path: Path):
    workers = [processes.Process(target=use, args=(tmp_path, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    cache = FeatureCache(tmp_path, 'float32')
    assert 0 < cache.size() <= IMAGES * ENTRY // 2
    for path in cache.entries():
        read_entry(path)


def test_killed_at_random_moments(processes, tmp_path: Path, messages: list[str]):
    delays = random.Random(0)
    for _ in range(6):
        worker = processes.Process(target=write_on, args=(tmp_path,))
        known = len(list(FeatureCache(tmp_path).entries()))
        worker.start()
        while worker.is_alive() and len(list(FeatureCache(tmp_path).entries())) == known:
            time.sleep(0.001)
        time.sleep(0.05 * delays.random())
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
    cache = FeatureCache(tmp_path, max_size='6MB')
    assert len([read_entry(path) for path in cache.entries()]) >= 6
    cache.fetch(make_images(24, size=256), {}, compute)
    cache.fetch(make_images(24, size=256), {}, compute)
    assert cache.size() <= 6e6 and messages == []


def test_killed_before_an_entry_is_in_its_place(processes, tmp_path: Path):
    worker = processes.Process(target=die_in_writing, args=(tmp_path,))
    worker.start()
    worker.join(timeout=120)
    assert worker.exitcode == -signal.SIGKILL
    cache = FeatureCache(tmp_path)
    (partial,) = (tmp_path / '.partial').iterdir()
    assert partial.stat().st_size > 0 and not list(cache.entries())
    cache.fetch(make_images(1), {}, compute)
    cache.fetch(make_images(1), {}, never)
    assert partial.exists() and cache.counts.damaged == 0  # its process might still be writing
    os.utime(partial, (time.time() - 4000,) * 2)
    FeatureCache(tmp_path).fetch(make_images(2), {}, compute)
    assert not list((tmp_path / '.partial').iterdir())


def test_entries_are_written_without_the_lock_and_put_in_place_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    locked, states = [], []

    @contextmanager
    def lock():
        locked.append(True)
        yield
        locked.clear()

    def record(name: str, function: Callable) -> Callable:
        return lambda *args: (states.append((name, bool(locked))), function(*args))[1]

    cache = FeatureCache(tmp_path)
    monkeypatch.setattr(cache, '_lock', lock)
    monkeypatch.setattr(Path, 'write_bytes', record('write', Path.write_bytes))
    monkeypatch.setattr('os.replace', record('replace', os.replace))
    cache.fetch(make_images(2), {}, compute)
    assert states == [('write', False), ('replace', True)] * 2


# ---- in the backbone


@pytest.fixture
def make(tiny_pipeline: Path, tmp_path: Path) -> Callable[..., DiffusionBackbone]:
    """Build the backbone of `tiny_mmseg` with a cache and other options."""

    def build(**options) -> DiffusionBackbone:
        return MODELS.build(backbone_config(tiny_pipeline, **{'cache': str(tmp_path / 'cache'), **options}))

    return build


def images_64(batch: int = 2) -> Tensor:
    return make_images(batch, size=64)


def test_backbone_reads_what_it_has_computed(make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    exact = {'path': str(tmp_path / 'cache'), 'dtype': 'float32'}
    expected = make(cache=None)(images_64())
    assert same(make(cache=exact)(images_64()), expected)
    backbone = make(cache=exact)
    monkeypatch.setattr(backbone.extractor, 'forward', never)
    for mode in (True, False):
        assert same(backbone.train(mode)(images_64()), expected)
    with torch.inference_mode():
        assert same(backbone(images_64()), expected)
    assert same(copy.deepcopy(backbone)(images_64()), expected)
    assert backbone.cache.counts.hits == 8


def test_flipped_image_misses(make: Callable):
    backbone = make()
    backbone(images_64())
    backbone(images_64().flip(-1))
    assert (backbone.cache.counts.hits, backbone.cache.counts.misses) == (0, 4)


def test_mixed_precision_has_entries_of_its_own(make: Callable):
    backbone = make()
    backbone(images_64())
    for _ in range(2):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert {x.dtype for x in backbone(images_64())} == {torch.float32}
    assert (backbone.cache.counts.hits, backbone.cache.counts.misses) == (2, 4)


CHANGES = {
    'prompt': 'a horse',
    'timesteps': [50, 261, 501],
    'seed': 1,
    'layers': LAYERS[::-1],
    'ensemble': 2,
    'trajectory': 'clean',
    'dtype': 'bfloat16',
    'vae_sample': 'mode',
    'attention_maps': ['up_cross'],
    'input_size': 64,
}


def test_every_option_has_entries_of_its_own(make: Callable):
    backbones = [make(), *(make(**{name: value}) for name, value in CHANGES.items())]
    keys = [backbone.cache.keys(images_64(1), backbone._cache_context())[0] for backbone in backbones]
    assert len(set(keys)) == len(CHANGES) + 1
    assert make().cache.keys(images_64(1), make()._cache_context()) == keys[:1]


@pytest.mark.parametrize('prompts', [None, ['a horse', 'a dog']], ids=['prompt of the backbone', 'prompts of the call'])
def test_another_text_encoder_has_entries_of_its_own(make: Callable, tiny_pipeline: Path, tmp_path: Path, prompts):
    other = tiny.change_text_encoder(Path(shutil.copytree(tiny_pipeline, tmp_path / 'other')))
    first, second = make(prompt='a horse'), make(model=str(other), prompt='a horse')
    maps = first(images_64(), prompts)
    assert not same(second(images_64(), prompts), maps)
    assert (second.cache.counts.hits, second.cache.counts.misses) == (0, 2)
    moved = make(model=shutil.copytree(tiny_pipeline, tmp_path / 'moved'), prompt='a horse')
    assert same(moved(images_64(), prompts), maps) and moved.cache.counts.hits == 2


def test_what_no_weight_tells_has_entries_of_its_own(make: Callable):
    backbone = make()
    contexts = [backbone._cache_context()]
    backbone.extractor.network.register_to_config(attention_head_dim=8)
    contexts.append(backbone._cache_context())
    backbone.extractor.parts.vae_config = {**backbone.extractor.parts.vae_config, 'scaling_factor': 1.0}
    contexts.append(backbone._cache_context())
    backbone.extractor.vae.to(torch.bfloat16)
    contexts.append(backbone._cache_context())
    keys = [backbone.cache.keys(images_64(1), context)[0] for context in contexts]
    assert len(set(keys)) == 4


def test_every_option_of_the_extractor_is_in_the_key_or_does_not_matter(make: Callable):
    options = set(inspect.signature(DiffusionExtractor.__init__).parameters) - {'self', *GROUPS}
    options |= {field.name for group in GROUPS.values() for field in fields(group)}
    # the values of the weights are fingerprinted
    weights = {'model', 'revision', 'variant', 'config', 'network_weights', 'vae', 'random'}
    speed = {'attention', 'vae_slicing', 'micro_batch', 'compile', 'gradient_checkpointing'}
    recorded = {*make()._cache_context(), 'label', 'max_sequence_length'}  # the last two as what is made of prompts
    # which are recorded if there are such
    recorded |= {'transform', 'embedded_guidance', 'discard', 'average_draws', 'memory_format', 'quantization'}
    assert options - weights - speed - {'check_finite', 'cache_dir', 'device'} - recorded == set()


def test_checkpoints_know_nothing_of_it(make: Callable):
    cached, plain = make(), make(cache=None)
    cached.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(cached.get_extra_state(), plain.get_extra_state())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'noise': 'random'}, "noise='random' gives other maps in each call"),
        ({'train_noise': 'random'}, "train_noise='random' gives other maps in each call"),
        ({'frozen': False}, r'extractor\.network\..* is trained, so that maps change'),
        ({'lora': {'r': 2}}, r'extractor\.network\..*lora.* is trained, so that maps change'),
        ({'cache': {'path': 'x', 'max_size': '20 gigs'}}, 'is not a size'),
    ],
)
def test_what_cannot_be_cached_is_refused(make: Callable, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_parameters_that_come_later_are_refused(make: Callable):
    backbone = make()
    backbone.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r'adapter\.weight is trained'):
        backbone(images_64())


class Losses(Hook):
    """Keeps the loss of each iteration."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.values.append(outputs['loss'].item())


def train(model: dict, work_dir: Path) -> tuple[list[float], nn.Module]:
    """Two epochs of two iterations."""
    losses = Losses()
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader={
            'batch_size': 2,
            'dataset': [sample(index) for index in range(4)],
            'sampler': {'type': 'InfiniteSampler', 'shuffle': True},
            'collate_fn': {'type': 'pseudo_collate'},
        },
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 4},
        optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1e-2}},
        custom_hooks=[losses],
        default_scope='mmseg',
        log_level='ERROR',
        randomness={'seed': 0},
        experiment_name=work_dir.name,
    )
    runner.train()
    return losses.values, runner.model


def test_training_takes_the_same_course_cold_and_warm(tiny_pipeline: Path, tmp_path: Path):
    model = segmentor_config(tiny_pipeline, {'cache': {'path': str(tmp_path / 'cache'), 'dtype': 'int8'}})
    cold, first = train(model, tmp_path / 'cold')
    warm, second = train(model, tmp_path / 'warm')
    assert len(set(cold)) == 4 and warm == cold
    assert same(tuple(first.state_dict().values()), tuple(second.state_dict().values()))
    assert (first.backbone.cache.counts.hits, first.backbone.cache.counts.misses) == (4, 4)
    assert (second.backbone.cache.counts.hits, second.backbone.cache.counts.misses) == (8, 0)
    exact, _ = train(segmentor_config(tiny_pipeline), tmp_path / 'without')
    assert cold == pytest.approx(exact, rel=0.05)
