"""Tests for diffseg.search.pck."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

import diffseg.search.pck as search_pck
from diffseg.evaluation import correct_keypoints, pck
from diffseg.search import Candidate
from diffseg.search.pck import JointPCK, PairPCK
from diffseg.structures import PairSample

SIZE, SHIFT = 48, 8
PLANTED, NOISE, FLAT, COARSE = (Candidate(name, 50) for name in ('planted', 'noise', 'flat', 'coarse'))


@pytest.fixture
def model():
    """A model whose matching is used, and nothing else."""
    init_default_scope('mmseg')
    MODELS.register_module(name='SearchTestBackbone', module=nn.Identity, force=True)
    return MODELS.build({'type': 'CorrespondenceModel', 'backbone': {'type': 'SearchTestBackbone'}})


def pair(seed: int) -> tuple[PairSample, dict]:
    """Points that move to the right, and maps of which one follows."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(8, SIZE - 16, (7, 2), generator=generator).float()
    visible = torch.arange(7) > 1
    meta = {'ori_shape0': (SIZE, SIZE), 'ori_shape1': (SIZE, SIZE)}
    sample = PairSample(metainfo=meta)
    sample.keypoints0, sample.visible = points, visible
    sample.keypoints1 = points + torch.tensor([SHIFT, 0])
    sample.bbox1 = torch.tensor([0.0, 0, SIZE - 8, SIZE])
    source = torch.randn(16, 12, 12, generator=generator)
    maps = {
        NOISE: tuple(torch.randn(2, 8, 12, 12, generator=generator)),
        PLANTED: (source, source.roll(SHIFT // 4, dims=2)),
        FLAT: (torch.ones(4, 6, 6), torch.ones(4, 6, 6)),
        COARSE: tuple(torch.randn(2, 8, 3, 3, generator=generator)),
    }
    return sample, maps


def test_planted_candidate_is_best_and_exactly_right(model):
    measure = PairPCK(model)
    reductions = [measure.reduce(*pair(seed)) for seed in range(4)]
    scores = {c: measure.score(reductions, [c]) for c in (NOISE, PLANTED, FLAT, COARSE)}
    assert max(scores, key=scores.get) == PLANTED and scores[PLANTED] == 100 > scores[NOISE]
    assert reductions[0][NOISE].shape == (5,)  # those visible
    with pytest.raises(ValueError, match='2 candidates'):
        measure.score(reductions, [PLANTED, NOISE])


def test_maps_of_different_channels_are_not_matched(model):
    sample, maps = pair(0)
    maps[FLAT] = (torch.rand(9, 3, 3), torch.rand(16, 4, 4))  # self-attention of images of different sizes
    assert set(PairPCK(model).reduce(sample, maps)) == {NOISE, PLANTED, COARSE}


@pytest.mark.parametrize('chosen', [(PLANTED,), (NOISE, COARSE), (NOISE, FLAT, COARSE, PLANTED)])
def test_candidates_together_are_a_normalised_concatenation(model, monkeypatch, chosen):
    """Exactly that of ConcatNeck and match_points, if nothing is rounded."""
    monkeypatch.setattr(search_pck, 'KEPT', torch.float64)
    measure = JointPCK(model)
    pairs = [pair(seed) for seed in range(6)]
    reductions = [measure.reduce(*pair) for pair in pairs]
    levels = [[maps[0].shape[0] for maps in (pairs[0][1][c] for c in chosen)]]
    neck = MODELS.build({'type': 'ConcatNeck', 'levels': levels, 'output_sizes': [12], 'normalize': True})
    correct = []
    for sample, maps in pairs:
        source, target = (neck([maps[c][view][None] for c in chosen])[0][0] for view in (0, 1))
        truth = sample.keypoints1[sample.visible]
        correct.append(correct_keypoints(model.match(source, target, sample), truth, SIZE))
    assert measure.score(reductions, chosen) == pytest.approx(pck(correct, 'image'), abs=1e-9)


def test_rounding_hardly_matters(model, monkeypatch):
    pairs = [pair(seed) for seed in range(6)]
    measure = JointPCK(model)
    rounded = measure.score([measure.reduce(*pair) for pair in pairs], [PLANTED, NOISE])
    monkeypatch.setattr(search_pck, 'KEPT', torch.float64)
    assert rounded == pytest.approx(measure.score([measure.reduce(*pair) for pair in pairs], [PLANTED, NOISE]), abs=4)


def test_a_pair_without_keypoints_does_not_count(model):
    sample, maps = pair(0)
    full = {measure: [measure.reduce(sample, maps)] for measure in (PairPCK(model), JointPCK(model))}
    sample.visible = torch.zeros(7, dtype=torch.bool)
    for measure, reductions in full.items():
        more = [*reductions, measure.reduce(sample, maps)]
        assert measure.score(more, [NOISE]) == measure.score(reductions, [NOISE])
