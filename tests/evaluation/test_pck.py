import json

import pytest
import torch
from safetensors.torch import load_file

from diffseg.evaluation import PCKMetric, correct_keypoints, pck
from diffseg.evaluation.pck import accuracy_over_coverage, aligned_figures, format_coverage_table, format_table, score
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
    assert pck(correct, 'category', ['a', 'b', 'b']) == pytest.approx((75 + 0) / 2)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: pck([], 'image'), 'no keypoint'),
        (lambda: pck([torch.ones(1)], 'median'), 'median'),
        (lambda: pck([torch.ones(1)], 'category'), 'category of each pair'),
        (lambda: score([make_sample_record()], bases=['box']), "base is 'box'"),
        (lambda: PCKMetric(bases=['box']), 'box'),
        (lambda: correct_keypoints(torch.zeros(2, 2), torch.zeros(3, 2), 1), 'shape'),
        (lambda: correct_keypoints(torch.zeros(2, 2), torch.zeros(2, 2), 0), 'extent'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def make_sample(pair_id, category, predicted, target, bbox=(0, 0, 100, 50), size=(300, 200), **changes):
    """What the metric is given of one pair: the fields and meta information of a PairSample."""
    visible = torch.tensor([True] * len(target) + [False])
    sample = {
        'pair_id': pair_id,
        'category': category,
        'pred_keypoints1': torch.tensor(predicted, dtype=torch.float64).reshape(-1, 2),
        'keypoints1': torch.tensor([*target, (-1, -1)], dtype=torch.float32),
        'visible': visible,
        'bbox1': torch.tensor(bbox, dtype=torch.float32),
        'ori_shape0': (300, 200),
        'ori_shape1': size,
        'img_shape0': (64, 64),
        'img_shape1': (64, 64),
        'variations': {'mirror': 1},
        'protocol': {'match_size': 224, 'weights': 'sha256:0'},
    }
    return {**sample, **changes}


def make_sample_record():
    return {'pair_id': '0', 'category': 'cow', 'predicted': [[0, 0]], 'target': [[0, 0]], 'bbox': [0, 0, 1, 1]}


def evaluate(metric, samples):
    metric.dataset_meta = {'dataset': 'SPair-71k', 'split': 'test', 'list': 'Layout/large/test.txt', 'box': 'object'}
    metric.process({}, samples)
    return metric.evaluate(len(samples))


# Thresholds 0.1 of the box, 10 pixels, and of the image, 30 pixels.
HAND_MADE = [
    make_sample('0', 'cow', [(10, 10), (50, 55), (70, 99)], [(10, 10), (50, 66), (40, 99)]),  # 0, 11, 30 pixels off
    make_sample('1', 'cow', [(10, 20)], [(10, 30)]),  # 10
    make_sample('2', 'dog', [(0, 0)], [(30, 40)]),  # 50
    make_sample('3', 'dog', [], []),
]


def test_hand_made_case():
    figures = evaluate(PCKMetric(thresholds=[0.1]), HAND_MADE)
    expected = {
        'PCK@0.1-bbox/point': 2 / 5,
        'PCK@0.1-bbox/image': (1 / 3 + 1 + 0) / 3,
        'PCK@0.1-bbox/category': (2 / 4 + 0) / 2,
        'PCK@0.1-img/point': 4 / 5,
        'PCK@0.1-img/image': (1 + 1 + 0) / 3,
        'PCK@0.1-img/category': (1 + 0) / 2,
    }
    assert figures == {**{name: pytest.approx(100 * value) for name, value in expected.items()}, 'damaged': 0}


def test_all_figures_are_exactly_100_for_perfect_predictions():
    points = [(3.5, 7.25), (199, 299)]
    figures = evaluate(PCKMetric(), [make_sample(str(i), 'cow', points, points) for i in range(3)])
    assert figures.pop('damaged') == 0
    assert len(figures) == 4 * 2 * 3 and set(figures.values()) == {100}


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match='there is no pair to evaluate'):
        PCKMetric().compute_metrics([])


def test_damaged_pairs_are_counted_and_do_not_count():
    damaged = {'pair_id': '9', 'category': 'cat', 'damaged': 'cat.jpg: cannot be read', 'protocol': {}}
    with_damaged = evaluate(PCKMetric(), [*HAND_MADE, damaged])
    assert with_damaged == {**evaluate(PCKMetric(), HAND_MADE), 'damaged': 1}
    with pytest.raises(ValueError, match=r'none of the 1 pairs .* cat.jpg'):
        evaluate(PCKMetric(), [damaged])


def test_pairs_of_some_categories_alone(tmp_path):
    path = tmp_path / 'pck.json'
    damaged = {'pair_id': '9', 'category': 'dog', 'damaged': 'dog.jpg: cannot be read', 'protocol': {}}
    figures = evaluate(PCKMetric(out_file=str(path), categories=['c*'], prefix='c'), [*HAND_MADE, damaged])
    assert figures == {f'c/{name}': value for name, value in evaluate(PCKMetric(), HAND_MADE[:2]).items()}
    protocol = json.loads(path.read_text())['protocol']
    assert protocol['categories'] == ['c*'] and protocol['pairs'] == 2
    with pytest.raises(ValueError, match=r"no pair has a category that matches \['cat'\]"):
        evaluate(PCKMetric(categories=['cat']), HAND_MADE)


def test_some_keypoints_alone(tmp_path):
    path = tmp_path / 'pck.json'
    samples = [make_sample('0', 'cow', [(0, 0), (50, 0), (9, 0)], [(0, 0), (0, 0), (0, 0)])]
    samples[0]['keypoint_ids'] = torch.tensor([4, 7, 2, 9])  # the last is not visible
    figures = {
        ids: evaluate(PCKMetric(keypoint_ids=ids, out_file=str(path)), samples)['PCK@0.1-bbox/point']
        for ids in ((4, 2), (7, 9), (4, 7))
    }
    assert figures == {(4, 2): 100, (7, 9): 0, (4, 7): 50}
    result = json.loads(path.read_text())
    assert result['protocol']['keypoint_ids'] == [4, 7] and result['predictions'][0]['predicted'] == [[0, 0], [50, 0]]
    with pytest.raises(ValueError, match='pair 0 does not say which keypoints it has'):
        evaluate(PCKMetric(keypoint_ids=[4]), HAND_MADE)


def test_table_has_a_row_for_each_category_and_all_means():
    metric = PCKMetric(thresholds=[0.1], bases=['bbox'])
    metric.process({}, HAND_MADE)
    figures = score(metric.results, [0.1], ['bbox'])
    rows = [line.strip('| ').split('|') for line in format_table(figures, [0.1], ['bbox']).splitlines() if '|' in line]
    assert [(row[0].strip(), row[1].split()) for row in rows] == [
        ('PCK /point /image', ['@0.1-bbox']),
        ('cow', ['50.00', '66.67']),
        ('dog', ['0.00', '0.00']),
        ('all pairs', ['40.00', '44.44']),
        ('mean of categories', ['25.00', '33.33']),
    ]


def test_result_file_holds_protocol_figures_and_predictions(tmp_path):
    path = tmp_path / 'results' / 'pck.json'
    damaged = {
        'pair_id': '9',
        'category': 'cat',
        'damaged': 'cat.jpg: cannot be read',
        'protocol': HAND_MADE[0]['protocol'],
    }
    figures = evaluate(PCKMetric(out_file=str(path)), [*HAND_MADE, damaged])
    result = json.loads(path.read_text())
    protocol = result['protocol']
    assert protocol['versions'].keys() == {'diffseg', 'diffusers', 'mmengine', 'mmseg', 'torch', 'transformers'}
    assert {key: value for key, value in protocol.items() if key != 'versions'} == {
        'dataset': 'SPair-71k',
        'split': 'test',
        'protocol': None,
        'list': 'Layout/large/test.txt',
        'box': 'object',
        'categories': None,
        'keypoint_ids': None,
        'pairs': 5,
        'damaged': 1,
        'loaded_size': [64, 64],
        'match_size': 224,
        'weights': 'sha256:0',
        'thresholds': [0.01, 0.05, 0.1, 0.15],
        'bases': ['bbox', 'img'],
        'confidence': None,
        'coverages': None,
        'selection_on_test': False,
    }
    assert result['damaged'] == ['cat.jpg: cannot be read']
    assert score(result['predictions']) == result['figures']
    assert {**result['figures']['all'], 'damaged': 1} == figures
    assert result['predictions'][1]['predicted'] == [[10, 20]]


@pytest.mark.parametrize(
    ('shapes', 'expected'),
    [
        ({'img_shape0': (300, 200), 'img_shape1': (300, 200)}, None),
        ({'img_shape1': (32, 64)}, 'varies'),
        ({}, [64, 64]),
    ],
)
def test_loaded_size(tmp_path, shapes, expected):
    samples = [make_sample('0', 'cow', [(0, 0)], [(0, 0)], **shapes)]
    evaluate(PCKMetric(out_file=str(tmp_path / 'pck.json')), samples)
    assert json.loads((tmp_path / 'pck.json').read_text())['protocol']['loaded_size'] == expected


def test_agrees_with_dift_on_real_pairs(reference):
    """Every figure that DIFT's script prints."""
    expected = json.loads((reference('spair-scores') / 'expected.json').read_text())['dift']
    figures = score(match_real_pairs(reference))
    for name, value in expected.items():
        group, _, mean = name.partition(' per ')
        found = figures[group.lower()][f'PCK@0.1-bbox/{mean.removesuffix(" PCK@0.1")}']
        assert round(found, 2) == value


@pytest.mark.parametrize('load_size', [224, 512])
def test_agrees_with_hyperfeatures_on_real_pairs(reference, load_size):
    expected = json.loads((reference('spair-scores') / 'expected.json').read_text())[f'dhf_load{load_size}']
    figures = score(match_real_pairs(reference, load_size))['all']
    for base in ('img', 'bbox'):
        assert figures[f'PCK@0.1-{base}/point'] == pytest.approx(expected[f'pck_{base}'], abs=1e-9)


def match_real_pairs(reference, load_size=None):
    """Records of the six real pairs, matched at the original sizes as DIFT does, or as Diffusion Hyperfeatures does."""
    folder = reference('spair-scores')
    data = folder.parents[1] / 'SPair-71k-mini'
    maps = load_file(folder / 'descriptors.safetensors')
    records = []
    for path in sorted((data / 'PairAnnotation/test').glob('*.json')):
        pair = json.loads(path.read_text())
        source, target = (maps[pair[f'{side}_imname']] for side in ('src', 'trg'))
        originals = [(pair[f'{side}_imsize'][1], pair[f'{side}_imsize'][0]) for side in ('src', 'trg')]
        points, sizes, scale = torch.tensor(pair['src_kps']).double(), originals, torch.ones(2)
        if load_size is not None:
            source, target = (torch.nn.functional.interpolate(x, 64, mode='bilinear') for x in (source, target))
            sizes = [(load_size, load_size)] * 2
            points = (points * load_size / torch.tensor(originals[0][::-1])).clamp(0, load_size - 1).round()
            scale = torch.tensor(originals[1][::-1]).double() / load_size
        predicted = match_points(source[0], target[0], points, *sizes) * scale
        records.append(
            {
                'pair_id': path.stem,
                'category': pair['category'],
                'predicted': predicted.tolist(),
                'target': pair['trg_kps'],
                'bbox': pair['trg_bndbox'],
                'size': originals[1],
            }
        )
    return records


def test_accuracy_over_coverage_by_hand():
    correct = torch.tensor([False, True, True, False])
    curve = accuracy_over_coverage(correct, torch.tensor([4.0, 1.0, 3.0, 2.0]))  # right, wrong, right, wrong
    torch.testing.assert_close(curve, torch.tensor([100, 50, 200 / 3, 50], dtype=torch.float64))
    ties = accuracy_over_coverage(correct, torch.tensor([1.0, 0.0, 1.0, 0.0]))  # half of each two is right
    assert ties.tolist() == [50, 50, 50, 50]
    order = torch.tensor([2, 0, 3, 1])
    errors = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert torch.equal(accuracy_over_coverage(correct, errors), accuracy_over_coverage(correct[order], errors[order]))
    with pytest.raises(ValueError, match='expected'):
        accuracy_over_coverage(correct, errors[:2])


def test_figures_of_coverages(tmp_path):
    path = tmp_path / 'pck.json'
    cycles = [[0.0, 6.0, 3.0], [9.0], [30.0], []]  # in pixels of source images of 300 x 200
    samples = [{**sample, 'cycle_error': torch.tensor(c)} for sample, c in zip(HAND_MADE, cycles, strict=True)]
    options = {'thresholds': [0.1], 'bases': ['bbox'], 'confidence': 'cycle_error'}
    figures = evaluate(PCKMetric(out_file=str(path), coverages=[0.2, 0.6], **options), samples)
    # by confidence: right, wrong, wrong, right, wrong
    assert figures['PCK@0.1-bbox/coverage0.2'] == 100
    assert figures['PCK@0.1-bbox/coverage0.6'] == pytest.approx(100 / 3)
    assert figures['PCK@0.1-bbox/coverage-area'] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5) / 5)
    result = json.loads(path.read_text())
    assert result['predictions'][0]['cycle_error'] == pytest.approx([0, 0.02, 0.01])
    assert (result['protocol']['confidence'], result['protocol']['coverages']) == ('cycle_error', [0.2, 0.6])
    assert result['figures']['dog']['PCK@0.1-bbox/coverage-area'] == 0
    assert score(result['predictions'], [0.1], ['bbox'], [0.2, 0.6]) == result['figures']
    table = format_coverage_table(result['figures'], [0.2, 0.6], [0.1], ['bbox'])
    assert [cell.strip() for cell in table.splitlines()[3].strip('|').split('|')] == [
        'PCK@0.1-bbox', '100.00', '33.33', '40.00', '54.67',
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r'pair 0 has no cycle errors.*cycle_error=True'):
        evaluate(PCKMetric(**options), HAND_MADE)
    with pytest.raises(ValueError, match="confidence is 'cosine'"):
        PCKMetric(confidence='cosine')
    with pytest.raises(ValueError, match=r'coverages are \(1.5,\)'):
        PCKMetric(coverages=[1.5])


def test_figures_with_pose_alignment_are_apart(tmp_path):
    path = tmp_path / 'pck.json'
    perfect = [{**s, 'pred_keypoints1_aligned': s['keypoints1'][s['visible']].double()} for s in HAND_MADE]
    options = {'thresholds': [0.1], 'bases': ['bbox']}
    figures = evaluate(PCKMetric(out_file=str(path), **options), perfect)
    plain = evaluate(PCKMetric(**options), HAND_MADE)
    assert figures == plain | {f'{name}+aligned': 100 for name in plain if name != 'damaged'}
    result = json.loads(path.read_text())
    assert score(result['predictions'], **options) == result['figures']
    assert set(aligned_figures(result['figures'])['dog'].values()) == {100}
    assert aligned_figures({'all': plain}) is None
