import json

import pytest
import torch
from safetensors.torch import load_file

from diffseg.evaluation import correct_keypoints, pck
from diffseg.models.correspondence import match_points


def test_identity_is_perfect():
    points = torch.randint(0, 50, (7, 2))
    assert correct_keypoints(points, points, extent=1, alpha=0).all()
    assert pck([torch.ones(3, dtype=torch.bool)], 'image') == 100


def test_threshold_is_inclusive():
    target = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    predicted = torch.tensor([[3.0, 4.0], [3.0, 4.1]])
    assert correct_keypoints(predicted, target, extent=50, alpha=0.1).tolist() == [True, False]


def test_image_and_point_means_differ():
    correct = [torch.tensor([True, True, True, False]), torch.tensor([False]), torch.tensor([], dtype=torch.bool)]
    assert pck(correct, 'image') == pytest.approx(37.5)
    assert pck(correct, 'point') == pytest.approx(60)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: pck([], 'image'), 'no keypoint'),
        (lambda: pck([torch.ones(1)], 'median'), 'median'),
        (lambda: correct_keypoints(torch.zeros(2, 2), torch.zeros(3, 2), 1), 'shape'),
        (lambda: correct_keypoints(torch.zeros(2, 2), torch.zeros(2, 2), 0), 'extent'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_agrees_with_dift_on_real_pairs(reference):
    folder = reference('spair-scores')
    data = folder.parents[1] / 'SPair-71k-mini'
    maps = load_file(folder / 'descriptors.safetensors')
    expected = json.loads((folder / 'expected.json').read_text())['dift']
    scores = {}
    for path in sorted((data / 'PairAnnotation/test').glob('*.json')):
        pair = json.loads(path.read_text())
        sizes = [(pair[f'{side}_imsize'][1], pair[f'{side}_imsize'][0]) for side in ('src', 'trg')]
        matches = match_points(
            maps[pair['src_imname']][0], maps[pair['trg_imname']][0], torch.tensor(pair['src_kps']), *sizes
        )
        x1, y1, x2, y2 = pair['trg_bndbox']
        scores[pair['category']] = correct_keypoints(matches, torch.tensor(pair['trg_kps']), max(x2 - x1, y2 - y1))
    for category, correct in scores.items():
        assert round(pck([correct], 'point'), 2) == expected[f'{category} per point PCK@0.1']
    for mean in ('image', 'point'):
        assert round(pck(list(scores.values()), mean), 2) == expected[f'All per {mean} PCK@0.1']
