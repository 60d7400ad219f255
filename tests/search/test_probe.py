"""Tests for diffseg.search.probe."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from quadrupeds import draw_sample
from torch import Tensor

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.search import Candidate
from diffseg.search.grid import Reduction
from diffseg.search.probe import LinearProbe, draw_pixels, fit_ridge

MODEL = Path(__file__).resolve().parents[2] / 'demo' / 'tiny-sd'
GOOD, OTHER, NOISE = (Candidate(name, 50) for name in ('good', 'other', 'noise'))
CLASSES = 4


def picture(labels: Tensor) -> SegDataSample:
    return SegDataSample(gt_sem_seg=PixelData(data=labels[None]))


def make_labels(seed: int, height: int = 24, width: int = 32) -> Tensor:
    """Blocks of four classes, some pixels unlabelled."""
    labels = torch.randint(CLASSES, (height // 4, width // 4), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels[:2] = 255
    return labels


def make_reductions(probe: LinearProbe, pictures: int = 6, noise: float = 0.3) -> list[Reduction]:
    """`GOOD` tells the lower two classes from the upper two, `OTHER` the odd from the even ones."""
    reductions = []
    for seed in range(pictures):
        labels, generator = make_labels(seed), torch.Generator().manual_seed(seed)
        classes = labels.clamp(max=CLASSES - 1)
        maps = {GOOD: (classes // 2)[None].float(), OTHER: (classes % 2)[None].float(), NOISE: torch.zeros(1, 1, 1)}
        maps = {
            name: x.expand(5, 24, 32) + noise * torch.randn(5, 24, 32, generator=generator) for name, x in maps.items()
        }
        reductions.append(probe.reduce(picture(labels), maps))
    return reductions


# ---- pixels


def test_as_many_pixels_of_each_class_are_drawn():
    labels = make_labels(0)
    labels[-1, -3:] = 7  # a class smaller than what is drawn
    drawn, areas = draw_pixels(labels, 16)
    assert len(set(drawn.tolist())) == len(drawn)
    drawn_labels = labels.flatten()[drawn]
    for label in labels.unique().tolist():
        assert (drawn_labels == label).sum() == {255: 0, 7: 3}.get(label, 16)
        if label != 255:
            assert areas[drawn_labels == label].sum() == pytest.approx((labels == label).sum().item(), rel=1e-5)
    assert torch.equal(draw_pixels(labels, 16)[0], drawn)


def test_maps_are_sampled_as_mmseg_upsamples():
    x, labels = torch.randn(3, 5, 7), make_labels(0, 24, 40)
    upsampled = F.interpolate(x[None], (24, 40), mode='bilinear', align_corners=False)[0]
    found = LinearProbe(pixels=9).reduce(picture(labels), {GOOD: x})[GOOD]
    expected = upsampled.flatten(1)[:, draw_pixels(labels, 9)[0]].T
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


def test_a_picture_without_labels_is_left_out():
    assert LinearProbe().reduce(picture(torch.full((8, 8), 255)), {GOOD: torch.randn(3, 4, 4)}) == {}


# ---- regression


def least_squares(x: np.ndarray, y: np.ndarray, w: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression by numpy: the penalty as further rows, and a column of ones that has none."""
    centred = x - (w[:, None] * x).sum(0) / w.sum()
    penalty = ridge * np.mean((w[:, None] * centred**2).sum(0))
    channels = x.shape[1]
    rows = np.concatenate(
        [np.sqrt(w)[:, None] * np.c_[x, np.ones(len(x))], np.sqrt(penalty) * np.eye(channels, channels + 1)]
    )
    values = np.concatenate([np.sqrt(w)[:, None] * y, np.zeros((channels, y.shape[1]))])
    solution = np.linalg.lstsq(rows, values, rcond=None)[0]
    return solution[:-1], solution[-1]


@pytest.mark.parametrize('ridge', [0, 0.1])
def test_ridge_regression_is_that_of_numpy(ridge: float):
    x, y, w = torch.randn(50, 6).double() + 2, torch.randn(50, 3).double(), torch.rand(50).double()
    wx = w[:, None] * x
    fitted = fit_ridge(wx.T @ x, wx.T @ y, wx.sum(0), (w[:, None] * y).sum(0), w.sum(), ridge)
    for ours, theirs in zip(fitted, least_squares(x.numpy(), y.numpy(), w.numpy(), ridge), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('candidates', [[GOOD], [OTHER, NOISE, GOOD]])
def test_the_score_is_that_of_plain_regressions(candidates: list[Candidate]):
    probe = LinearProbe(folds=2)
    reductions = make_reductions(probe, noise=1)
    x = np.concatenate([np.concatenate([r[c].double().numpy() for c in candidates], 1) for r in reductions])
    labels = torch.cat([r['labels'] for r in reductions]).numpy()
    areas = torch.cat([r['areas'] for r in reductions]).double().numpy()
    fold = np.repeat(np.arange(6) % 2, [len(r['labels']) for r in reductions])
    x = x - np.average(x, 0, areas)
    x /= np.sqrt(np.average(x**2, 0, areas))
    weights = areas / np.sqrt(np.bincount(labels, areas))[labels]
    confusion = np.zeros((CLASSES, CLASSES))
    for part in range(2):
        fit, test = fold != part, fold == part
        a, b = least_squares(x[fit], np.eye(CLASSES)[labels[fit]], weights[fit], probe.ridge)
        np.add.at(confusion, (labels[test], (x[test] @ a + b).argmax(1)), areas[test])
    hits = np.diag(confusion)
    expected = 100 * np.mean(hits / (confusion.sum(0) + confusion.sum(1) - hits))
    assert probe.score(reductions, candidates) == pytest.approx(expected, abs=1e-9)


# ---- scores


def test_candidates_that_complement_each_other():
    probe = LinearProbe(folds=3)
    reductions = make_reductions(probe)
    single = {c: probe.score(reductions, [c]) for c in (GOOD, OTHER, NOISE)}
    assert single[NOISE] < min(single[GOOD], single[OTHER]) and max(single.values()) < 50
    together = probe.score(reductions, [GOOD, OTHER])
    assert together == pytest.approx(100, abs=5)
    assert probe.score(reductions, [OTHER, GOOD]) == together
    assert LinearProbe(folds=3).score(reductions, [GOOD, OTHER]) == together
    assert probe.score(reductions[:4], [GOOD]) == LinearProbe(folds=3).score(reductions[:4], [GOOD]) != single[GOOD]


def test_samples_of_one_picture_are_in_one_fold():
    """Else noise that both have would be learned from one and found in the other."""
    probe = LinearProbe(pixels=4, folds=2)
    twice = [reduction for reduction in make_reductions(probe) for _ in range(2)]
    alone = twice[::2]
    assert probe.score(twice, [NOISE]) == pytest.approx(probe.score(alone, [NOISE]), abs=1e-9)


def test_a_map_that_says_nothing():
    probe = LinearProbe()
    reductions = [{**r, GOOD: torch.full_like(r[GOOD], 3)} for r in make_reductions(probe)]
    assert 0 < probe.score(reductions, [GOOD]) < 100 / CLASSES  # all pixels are of the largest class


def test_too_few_pictures():
    probe = LinearProbe()
    with pytest.raises(ValueError, match='2 pictures cannot be divided into 5 folds'):
        probe.score(make_reductions(probe, pictures=2), [GOOD])


def test_it_ranks_as_trained_heads_do():
    """Activations of the demo's four levels, 9.76, 22.24, 31.82 and 22.06 when trained, and twelve together, 42.40."""
    layers = [f'up-level{level}-repeat{repeat}-res-increment' for level in range(4) for repeat in range(3)]
    extractor, probe, reductions = DiffusionExtractor(str(MODEL), layers, [50]), LinearProbe(), []
    candidates = [Candidate(layer, 50) for layer in layers]
    for index in range(30):
        drawn = draw_sample(0, index)
        image = torch.from_numpy(drawn.image.transpose(2, 0, 1).copy())[None] / 127.5 - 1
        maps = {Candidate(layer, 50): x[0, 0] for layer, x in extractor(image).items()}
        reductions.append(probe.reduce(picture(torch.from_numpy(drawn.mask).long()), maps))
    first, *middle, last = (probe.score(reductions, [candidates[i]]) for i in (2, 5, 11, 8))
    assert first < min(middle) - 5 and max(middle) < last
    assert probe.score(reductions, candidates) > last + 5
