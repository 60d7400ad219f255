"""Tests for diffseg.search.engine."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffseg.search import Candidate
from diffseg.search.engine import Draw, Samples, Store, order, peak_images, rank, select_shard, walk

A, B, C = (Candidate(name, 50) for name in 'abc')


def chain(length: int, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs of neighbours in a row of pictures, shuffled."""
    pairs = [(i, i + 1) for i in range(length)]
    random.Random(seed).shuffle(pairs)
    return pairs


@pytest.mark.parametrize('budget', [0, 2, 5, 1000])
def test_walk_gives_the_same_whatever_is_kept(budget):
    samples = [random.Random(seed).choices(range(12), k=2) for seed in range(40)]
    made = []

    def make(position, view):
        made.append(samples[position][view])
        return f'maps of {made[-1]}'

    values = list(walk(samples, make, lambda x: 1, budget))
    assert values == [[f'maps of {image}' for image in images] for images in samples]
    if budget >= peak_images(samples):
        assert len(made) == len(set(made))


def test_pairs_that_share_images_come_together():
    pairs = chain(50)
    indices = order(pairs)
    assert sorted(indices) == list(range(50))
    assert peak_images([pairs[i] for i in indices]) <= 3 < peak_images(pairs)


def test_order_of_samples_that_share_nothing_is_kept():
    assert order([(i,) for i in range(5)]) == list(range(5))
    assert order([(), (1, 1), ()]) == [0, 1, 2]


def test_images_are_identified_by_their_paths():
    infos = [{'img_path0': 'a', 'img_path1': 'b'}, {'damaged': 'c: cannot be read'}, {'category': 'cat'}]
    samples = Samples(SimpleNamespace(get_data_info=infos.__getitem__), None)
    assert samples.images(0) == (('a', None), ('b', None)) and samples.images(1) == ()
    with pytest.raises(ValueError, match='sample 2 of SimpleNamespace has no img_path'):
        samples.images(2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 12))
def test_shards_make_a_whole_and_are_equally_long(count, number):
    draws = [Draw(i, 0) for i in range(count)]
    shards = [select_shard(draws, (i, number)) for i in range(number)]
    assert [draw for shard in shards for draw in shard] == draws
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=12), st.integers(0, 9))
def test_samples_are_complete_in_any_order_and_memory(samples, budget):
    positions = order(samples)
    assert sorted(positions) == list(range(len(samples)))
    ordered = [samples[i] for i in positions]
    assert list(walk(ordered, lambda i, view: ordered[i][view], lambda _: 1, budget)) == ordered


def test_what_is_stored_comes_back(tmp_path):
    draws = [Draw(7, 0), Draw(3, 1)]
    store = Store(tmp_path, draws, [A, B, C], {'seeds': 2})
    reduction = {
        A: torch.rand(3, 2),
        'labels': torch.arange(4),
        C: torch.rand(3, 2),
        B: torch.rand(5).half(),
        'number': torch.tensor(3),
    }
    assert store.missing() == draws
    store.write(draws[1], reduction)
    assert store.missing() == draws[:1]
    store.write(draws[0], {A: torch.zeros(0, dtype=torch.bool)})
    again = Store(tmp_path, draws, [A, B, C], {'seeds': 2})
    assert set(again[1]) == set(reduction) and len(again[1]) == 5
    for key, x in reduction.items():
        assert torch.equal(again[1][key], x) and again[1][key].dtype == x.dtype
    assert B not in again[0] and again[0][A].shape == (0,)
    assert len(list(again)) == 2
    with pytest.raises(ValueError, match=r'another search, which differs in seeds, candidates'):
        Store(tmp_path, draws, [A, B], {'seeds': 1})


def test_what_could_not_be_read_or_measured_is_left_out(tmp_path):
    class Mean:
        def score(self, reductions, candidates):
            return float(torch.cat([reduction[candidates[0]].flatten() for reduction in reductions]).mean())

    draws = [Draw(i, 0) for i in range(3)]
    store = Store(tmp_path, draws, [A, B, C], {})
    store.write(draws[0], {A: torch.tensor(1.0), B: torch.tensor(4.0), C: torch.tensor(9.0)})
    store.write(draws[1], {})  # damaged
    store.write(draws[2], {A: torch.tensor(2.0), B: torch.tensor(0.0)})
    assert rank(store, Mean()) == [(B, 2.0), (A, 1.5)]
    store = Store(tmp_path / 'sizes', draws[:2], [A, B], {})
    for draw, channels in zip(draws, (3, 4), strict=False):
        store.write(draw, {A: torch.ones(5 - channels, 2), B: torch.ones(5, channels)})
    assert rank(store, Mean()) == [(A, 1.0)]
    empty = Store(tmp_path / 'empty', draws[:1], [A], {})
    empty.write(draws[0], {})
    with pytest.raises(ValueError, match='none of the samples could be read'):
        rank(empty, Mean())
