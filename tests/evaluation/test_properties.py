"""What holds of PCK, and of J and F, whatever is drawn; F against distances instead of dilations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from diffseg.evaluation import correct_keypoints, pck
from diffseg.evaluation.davis import TOLERANCE, boundary, boundary_accuracy, region_similarity

properties = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sides = st.integers(1, 90)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any)


def draw_pairs(seed: int, counts: list[int]) -> list[torch.Tensor]:
    """Which keypoints are correct, of pairs with so many."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator) > 0.4 for count in counts]


@properties
@given(seeds, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from([0.25, 2.0, 64.0]), st.integers(1, 20))
def test_correct_keypoints(seed, one, other, scale, count):
    points = 100 * torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    low, high = sorted((one, other))
    correct = correct_keypoints(*points, 50, low)
    assert (correct <= correct_keypoints(*points, 50, high)).all()
    assert correct.equal(correct_keypoints(*points.flip(0), 50, low))
    assert correct.equal(correct_keypoints(*(scale * points), scale * 50, low))
    assert correct.equal(correct_keypoints(*points.flip(2), 50, low))
    assert correct_keypoints(points[0], points[0], 50, low).all()


@properties
@given(seeds, lengths, st.randoms(use_true_random=False))
def test_means_over_pairs(seed, counts, random):
    pairs = draw_pairs(seed, counts)
    figures = {mean: pck(pairs, mean) for mean in ('point', 'image')}
    each = [100 * pair.double().mean().item() for pair in pairs if len(pair)]
    for figure in figures.values():
        assert min(each) - 1e-9 <= figure <= max(each) + 1e-9
    assert figures['point'] == pytest.approx(100 * sum(int(pair.sum()) for pair in pairs) / sum(counts))
    assert pck(pairs, 'category', ['cat'] * len(pairs)) == pytest.approx(figures['point'])
    assert pck(pairs, 'category', list(map(str, range(len(pairs))))) == pytest.approx(figures['image'])
    shuffled = random.sample(pairs, len(pairs))
    for mean, figure in figures.items():
        assert pck(shuffled, mean) == pytest.approx(figure)
        assert pck([*pairs, torch.empty(0, dtype=torch.bool)], mean) == pytest.approx(figure)


def draw_masks(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks (H, W) of coarse random cells, of which the second is moved a little; either may be empty."""
    rng = np.random.default_rng(seed)
    cells = rng.random((height // 7 + 1, width // 7 + 1)) > rng.random()
    mask = np.kron(cells, np.ones((7, 7), bool))[:height, :width]
    return mask, np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1)) & (rng.random() > 0.1)


@properties
@given(seeds, sides, sides)
def test_region_similarity(seed, height, width):
    truth, guess = draw_masks(seed, height, width)
    value = region_similarity(truth, guess)
    assert 0 <= value <= 1 and region_similarity(truth, truth) == 1
    assert value == region_similarity(guess, truth) == region_similarity(truth[::-1], guess[::-1])
    assert (value == 1) == np.array_equal(truth, guess)
    void = truth != guess
    assert region_similarity(truth, guess, void) == 1


@properties
@given(seeds, sides, sides)
def test_boundary_accuracy(seed, height, width):
    truth, guess = draw_masks(seed, height, width)
    value = boundary_accuracy(truth, guess)
    assert 0 <= value <= 1 and boundary_accuracy(truth, truth) == 1
    assert value == pytest.approx(boundary_accuracy(guess, truth))
    assert value == pytest.approx(boundary_accuracy(truth.T, guess.T))
    assert value == pytest.approx(by_distance(boundary(truth), boundary(guess)))


def by_distance(truth: np.ndarray, guess: np.ndarray) -> float:
    """F of boundaries: which pixels of one are how far from the nearest one of the other."""
    if not truth.any() or not guess.any():
        return float(truth.any() == guess.any())
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    precision = (distance_transform_edt(~truth)[guess] <= radius).mean()
    recall = (distance_transform_edt(~guess)[truth] <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
