"""Keypoints stay on their pixels: dots are drawn at the keypoints and looked for after the transform."""

import numpy as np
import pytest
import torch
from mmseg.registry import TRANSFORMS
from PIL import Image

import diffseg  # noqa: F401
from diffseg.datasets import DamagedFile

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=np.uint8)
SHAPES = (20, 30), (40, 24)  # (height, width)
POINTS = (  # (x, y); the last is hidden in the second image
    np.array([[3, 4], [25, 10], [14, 18], [0, 0]], dtype=np.float32),
    np.array([[20, 30], [5, 6], [23, 39], [11, 12]], dtype=np.float32),
)


@pytest.fixture
def pair():
    results = {
        'category': 'dog', 'pair_id': '0', 'variations': {}, 'visible': np.array([True, True, True, False]),
        'keypoint_ids': [0, 1, 5, 7], 'swaps': ((0, 1), (5, 6)),
    }  # fmt: skip
    for view, (shape, points) in enumerate(zip(SHAPES, POINTS, strict=True)):
        pixels = np.full((*shape, 3), 90, dtype=np.uint8)
        for colour, (x, y) in zip(COLOURS, points.astype(int), strict=True):
            pixels[y, x] = colour
        results |= {
            f'img_path{view}': f'{view}.png',
            f'image{view}': Image.fromarray(pixels),
            f'keypoints{view}': points.copy(),
            f'bbox{view}': np.array([2, 3, 17, 19], dtype=np.float32),
            f'ori_shape{view}': shape,
            f'img_shape{view}': shape,
        }
    return results


def apply(pair, name, **options):
    """The transform's results; what came in stays as it is."""
    return TRANSFORMS.build({'type': name, **options})(dict(pair))


def colours_at_keypoints(results, view, rows):
    pixels = np.asarray(results[f'image{view}'])
    return [tuple(pixels[int(y), int(x)]) for x, y in results[f'keypoints{view}'][rows]]


def test_flip_by_hand(pair):
    flipped = apply(pair, 'RandomFlipPair', prob=1.0)
    assert flipped['keypoints0'].tolist() == [[26, 4], [4, 10], [15, 18], [29, 0]]  # 29 - x
    assert flipped['bbox0'].tolist() == [13, 3, 28, 19]
    assert flipped['keypoint_ids'] == [1, 0, 6, 7]
    assert flipped['visible'].tolist() == pair['visible'].tolist()
    for view in (0, 1):
        assert colours_at_keypoints(flipped, view, range(4)) == [tuple(colour) for colour in COLOURS]
        assert flipped[f'keypoints{view}'].dtype == flipped[f'bbox{view}'].dtype == np.float32
    untouched = apply(pair, 'RandomFlipPair', prob=0.0)
    assert untouched['keypoints0'] is pair['keypoints0']


def test_two_flips_are_the_identity(pair):
    twice = apply(apply(pair, 'RandomFlipPair', prob=1.0), 'RandomFlipPair', prob=1.0)
    assert twice['keypoint_ids'] == pair['keypoint_ids']
    for view in (0, 1):
        assert np.array_equal(twice[f'image{view}'], pair[f'image{view}'])
        assert np.array_equal(twice[f'keypoints{view}'], pair[f'keypoints{view}'])
        assert np.array_equal(twice[f'bbox{view}'], pair[f'bbox{view}'])


@pytest.mark.parametrize('seed', range(4))
def test_flip_of_one_image_matches_left_with_right(pair, seed):
    np.random.seed(seed)
    flipped = apply(pair | {'visible': np.ones(4, dtype=bool)}, 'RandomFlipPair', prob=1.0, views='one')
    (view,) = [v for v in (0, 1) if not np.array_equal(flipped[f'image{v}'], pair[f'image{v}'])]
    assert np.array_equal(flipped[f'keypoints{1 - view}'], pair[f'keypoints{1 - view}'])
    # 0 and 1 change places; 5 would be matched with 6, which the pair lacks; 7 is its own partner
    assert flipped['visible'].tolist() == [True, True, False, True]
    assert colours_at_keypoints(flipped, view, [0, 1]) == [tuple(COLOURS[1]), tuple(COLOURS[0])]
    once_hidden = apply(pair, 'RandomFlipPair', prob=1.0, views='one')
    assert once_hidden['visible'].tolist() == [True, True, False, False]


def test_flip_of_one_image_needs_to_know_left_and_right(pair):
    for change in ({'swaps': None}, {'keypoint_ids': None}):
        with pytest.raises(ValueError, match=r"category 'dog' does not say .* mirror both"):
            apply(pair | change, 'RandomFlipPair', prob=1.0, views='one')
        apply(pair | change, 'RandomFlipPair', prob=1.0)
    with pytest.raises(ValueError, match="views is 'all', choose 'both' or 'one'"):
        apply(pair, 'RandomFlipPair', views='all')


@pytest.mark.parametrize('seed', range(20))
def test_crop_keeps_points_on_their_pixels(pair, seed):
    np.random.seed(seed)
    cropped = apply(pair, 'RandomCropPair', scale=(0.3, 0.9))
    assert cropped['visible'].any() and not cropped['visible'][3]
    for view in (0, 1):
        height, width = cropped[f'ori_shape{view}']
        assert (height, width) == cropped[f'img_shape{view}'] == cropped[f'image{view}'].size[::-1]
        assert 0.25 * SHAPES[view][0] < height < 0.95 * SHAPES[view][0]
        points = cropped[f'keypoints{view}']
        shift = POINTS[view] - points
        assert (shift == shift[0]).all() and (shift == shift.round()).all()
        inside = (points >= 0).all(axis=1) & (points < (width, height)).all(axis=1)
        assert (inside | ~cropped['visible']).all()
        assert colours_at_keypoints(cropped, view, inside) == [tuple(colour) for colour in COLOURS[inside]]
        x1, y1, x2, y2 = cropped[f'bbox{view}']
        assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
        if shift[0, 0] < 2 and width > 17 - shift[0, 0]:
            assert (x1, x2) == (2 - shift[0, 0], 17 - shift[0, 0])
    both = [
        (cropped[f'keypoints{view}'] >= 0).all(axis=1)
        & (cropped[f'keypoints{view}'] < cropped[f'ori_shape{view}'][::-1]).all(axis=1)
        for view in (0, 1)
    ]
    assert (cropped['visible'] == (both[0] & both[1] & pair['visible'])).all()


def test_crop_of_the_whole_image_changes_nothing(pair):
    cropped = apply(pair, 'RandomCropPair', scale=(1.0, 1.0))
    for view in (0, 1):
        assert np.array_equal(cropped[f'image{view}'], pair[f'image{view}'])
        assert np.array_equal(cropped[f'keypoints{view}'], pair[f'keypoints{view}'])
    hidden = pair | {'visible': np.zeros(4, dtype=bool)}
    assert not apply(hidden, 'RandomCropPair')['visible'].any()
    with pytest.raises(ValueError, match=r'scale is \(0, 2\), expected 0 < lowest'):
        apply(pair, 'RandomCropPair', scale=(0, 2))


def test_resize_leaves_points_where_they_are(pair):
    resized = apply(pair, 'ResizePair', size=(60, 90))
    assert resized['img_shape0'] == resized['img_shape1'] == (60, 90)
    assert [resized[f'ori_shape{view}'] for view in (0, 1)] == list(SHAPES)
    assert np.array_equal(resized['keypoints1'], POINTS[1])
    expected = pair['image0'].resize((90, 60), Image.Resampling.BICUBIC)
    assert np.array_equal(resized['image0'], expected)
    assert np.array_equal(
        apply(pair, 'ResizePair', size=16, interpolation='bilinear')['image0'],
        pair['image0'].resize((16, 16), Image.Resampling.BILINEAR),
    )
    kept = apply(pair, 'ResizePair', size=60, keep_ratio=True)
    assert (kept['img_shape0'], kept['img_shape1']) == ((40, 60), (60, 36))
    rounded = apply(pair, 'ResizePair', size=60, keep_ratio=True, divisor=7)
    assert (rounded['img_shape0'], rounded['img_shape1']) == ((42, 63), (63, 35))
    for name in ('RandomFlipPair', 'RandomCropPair'):
        with pytest.raises(ValueError, match='put ResizePair after'):
            apply(resized, name, **({'prob': 1.0} if 'Flip' in name else {}))
    with pytest.raises(ValueError, match="interpolation is 'nearest'"):
        apply(pair, 'ResizePair', size=16, interpolation='nearest')


def test_colours_change_and_points_do_not(pair):
    np.random.seed(0)
    changed = apply(pair, 'ColourJitterPair')
    for view in (0, 1):
        assert changed[f'image{view}'].size == pair[f'image{view}'].size
        assert not np.array_equal(changed[f'image{view}'], pair[f'image{view}'])
        assert changed[f'keypoints{view}'] is pair[f'keypoints{view}']
    same = apply(pair, 'ColourJitterPair', brightness=0, contrast=0, saturation=0)
    assert np.array_equal(same['image0'], pair['image0'])
    darker = apply(pair, 'ColourJitterPair', brightness=1, contrast=0, saturation=0)
    factors = [np.asarray(darker[f'image{view}'])[1, 1, 0] / 90 for view in (0, 1)]
    assert factors[0] != factors[1] and all(0 <= factor <= 2 for factor in factors)
    with pytest.raises(ValueError, match='contrast is 3, expected 0 to 1'):
        apply(pair, 'ColourJitterPair', contrast=3)


def test_pack(pair):
    packed = apply(apply(pair, 'ResizePair', size=(10, 12)), 'PackPair')
    image = packed['inputs']['image1']
    assert image.dtype == torch.uint8 and image.shape == (3, 10, 12) and image.is_contiguous()
    sample = packed['data_samples']
    assert torch.equal(sample.keypoints1, torch.from_numpy(POINTS[1]))
    assert sample.visible.tolist() == [True, True, True, False]
    assert (sample.ori_shape1, sample.img_shape1) == ((40, 24), (10, 12))


def test_load(tmp_path, pair):
    paths = {f'img_path{view}': str(tmp_path / f'{view}.png') for view in (0, 1)}
    for view in (0, 1):
        pair[f'image{view}'].save(paths[f'img_path{view}'])
    loaded = apply(paths, 'LoadPair')
    assert np.array_equal(loaded['image1'], pair['image1'])
    assert loaded['ori_shape0'] == loaded['img_shape0'] == (20, 30)
    with pytest.raises(DamagedFile, match=r'1\.png: has height and width \(40, 24\), its annotation says \(24, 40\)'):
        apply(paths | {'ori_shape1': (24, 40)}, 'LoadPair')
    (tmp_path / '0.png').write_bytes(b'')
    with pytest.raises(DamagedFile, match=r'0\.png: cannot be read'):
        apply(paths, 'LoadPair')


def test_a_sample_says_what_mirroring_makes_of_its_keypoints(pair):
    assert apply(pair, 'PackPair')['data_samples'].mirror_rows.tolist() == [1, 0, -1, 3]  # 5 becomes 6, which is absent
    assert apply({**pair, 'swaps': ()}, 'PackPair')['data_samples'].mirror_rows.tolist() == [0, 1, 2, 3]
    for unknown in ('swaps', 'keypoint_ids'):
        assert 'mirror_rows' not in apply({**pair, unknown: None}, 'PackPair')['data_samples']


def test_selected_keypoints_alone_are_visible(pair):
    selected = apply(pair, 'SelectKeypointsPair', keypoint_ids=[1, 7, 8])
    assert selected['visible'].tolist() == [False, True, False, False]
    assert pair['visible'].tolist() == [True, True, True, False]
    assert apply(selected, 'PackPair')['data_samples'].keypoint_ids.tolist() == [0, 1, 5, 7]
    with pytest.raises(ValueError, match='does not say which keypoints it has'):
        apply({**pair, 'keypoint_ids': None}, 'SelectKeypointsPair', keypoint_ids=[1])
