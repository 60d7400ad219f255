import pickle

import cv2
import numpy as np
import pytest
import torch
import videos
from PIL import Image
from scipy.io import savemat

from diffseg.datasets import DAVISDataset, JHMDBDataset, LoadVideo
from diffseg.masks import davis_palette, write_mask


def davis(root, **load):
    return DAVISDataset(str(root), pipeline=[LoadVideo(**(load or {'short_side': 32}))], test_mode=True)


def jhmdb(root):
    return JHMDBDataset(str(root), 'test.txt', pipeline=[LoadVideo(size=(40, 40))], test_mode=True)


@pytest.fixture
def root(tmp_path):
    return videos.write_davis(tmp_path)


def test_a_davis_sample(root):
    dataset = davis(root, short_side=64, divisor=16)
    batch = videos.batch_of(dataset)
    (frames, _), (sample, other) = batch['inputs']['frames'], batch['data_samples']
    assert (sample.video_id, other.video_id) == ('video-0', 'video-1')
    assert (sample.ori_shape, sample.img_shape, sample.num_frames) == ((32, 44), (64, 80), 5)  # 88 -> 80
    assert sample.frame_names == ['00000', '00001', '00002', '00003', '00004']
    assert [path[-9:] for path in sample.annotation_paths] == [f'{name}.png' for name in sample.frame_names]
    assert sample.first_mask.dtype == torch.uint8
    assert sample.first_mask.unique(return_counts=True)[1].tolist() == [32 * 44 - 220, 120, 100]
    picture = cv2.imread(str(root / 'JPEGImages/480p/video-0/00002.jpg'))
    expected = cv2.resize(picture, (80, 64))[..., ::-1]
    assert (frames[2].permute(1, 2, 0).numpy() == expected).all()
    assert len(list(frames)) == len(frames) == 5


@pytest.mark.parametrize(
    ('original', 'resized'), [((480, 854), (480, 832)), ((854, 480), (832, 480)), ((96, 160), (480, 800))]
)
def test_size_of_the_published_protocol(tmp_path, original, resized):
    Image.new('RGB', original[::-1]).save(tmp_path / '0.png')
    result = LoadVideo(short_side=480)({'video_id': '', 'frame_paths': [str(tmp_path / '0.png')]})
    assert result['data_samples'].img_shape == resized


@pytest.mark.parametrize(('original', 'resized'), [((480, 854), (544, 960)), ((854, 480), (960, 544))])
def test_size_by_the_longer_side(tmp_path, original, resized):
    Image.new('RGB', original[::-1]).save(tmp_path / '0.png')
    load = LoadVideo(long_side=960, divisor=16)
    result = load({'video_id': '', 'frame_paths': [str(tmp_path / '0.png')]})
    assert result['data_samples'].img_shape == resized


def test_frames_travel_as_paths(root):
    frames = davis(root)[0]['inputs']['frames']
    content = pickle.dumps(frames)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content)[1], frames[1])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda r: (r / 'JPEGImages/480p/video-1/00002.jpg').unlink(), r'video-1: frame 00002 is missing between'),
        (lambda r: (r / 'JPEGImages/480p/video-1/00004.jpg').unlink(), r'JPEGImages.*has no 00004, but there is'),
        (lambda r: (r / 'Annotations/480p/video-0/00000.png').unlink(), r'Annotations.*has no 00000, but there is'),
        (lambda r: (r / 'ImageSets/2017/val.txt').write_text('\n'), 'lists no video'),
        (lambda r: (r / 'ImageSets/2017/val.txt').write_text('bear'), r'480p/bear: has no frames'),
        (lambda r: (r / 'ImageSets/2017/val.txt').unlink(), r'val.txt is missing'),
    ],
)
def test_davis_folders_that_do_not_fit(root, change, message):
    change(root)
    with pytest.raises(ValueError, match=message):
        davis(root)


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (
            lambda path: write_mask(path, np.ones((16, 22), np.uint8)),
            r'00000.png: has height and width \(16, 22\), its',
        ),
        (lambda path: Image.new('RGB', (44, 32)).save(path), "mode 'RGB', expected an indexed image"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), 'cannot be read as a mask'),
        (lambda path: write_mask(path, np.zeros((32, 44), np.uint8)), 'has no object'),
    ],
)
def test_first_masks_that_cannot_be_used(root, spoil, message):
    spoil(root / 'Annotations/480p/video-0/00000.png')
    with pytest.raises(ValueError, match=message):
        davis(root)[0]


def test_frames_of_two_sizes_or_damaged(root):
    Image.new('RGB', (44, 30)).save(root / 'JPEGImages/480p/video-0/00003.jpg')
    (root / 'JPEGImages/480p/video-0/00004.jpg').write_bytes(b'')
    frames = davis(root)[0]['inputs']['frames']
    with pytest.raises(ValueError, match=r'00003.jpg: has height and width \(30, 44\), the first frame has'):
        frames[3]
    with pytest.raises(ValueError, match=r'00004.jpg: cannot be read'):
        frames[4]


def test_wrong_arguments(root):
    with pytest.raises(ValueError, match="split is 'test'"):
        DAVISDataset(str(root), 'test')
    with pytest.raises(
        ValueError, match=r'short_side is 480, long_side is None, size is \(320, 320\); give one of them'
    ):
        LoadVideo(short_side=480, size=(320, 320))


def test_a_jhmdb_sample(tmp_path):
    joints = videos.write_jhmdb(tmp_path)
    (tmp_path / 'Rename_Images/walk/one/00005.png').write_bytes(b'behind the last annotation')
    sample = jhmdb(tmp_path)[0]['data_samples']
    assert (sample.video_id, sample.num_frames, sample.img_shape) == ('walk/one', 4, (40, 40))
    assert np.allclose(sample.joints, joints, atol=1e-4)
    assert torch.equal(sample.first_joints, sample.joints[0])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda r: (r / 'test.txt').unlink(), 'cannot be read as a list'),
        (lambda r: (r / 'test.txt').write_text(''), 'lists no video'),
        (lambda r: (r / 'test.txt').write_text('frames joints.mat 3'), 'expected FRAMES_FOLDER JOINTS_FILE, got'),
        (lambda r: (r / 'Rename_Images/walk/one/00002.png').unlink(), 'frame 00002 is missing'),
        (lambda r: (r / 'Rename_Images/walk/one/00004.png').unlink(), r'has 3 frames, .*joints.mat annotates 4'),
        (lambda r: savemat(r / 'joints.mat', {'pos': 1}), 'has no variable "pos_img"'),
        (lambda r: savemat(r / 'joints.mat', {'pos_img': np.ones((2, 13, 4))}), r'has shape \(2, 13, 4\), expected'),
        (lambda r: savemat(r / 'joints.mat', {'pos_img': np.full((2, 15, 4), np.nan)}), 'not finite'),
        (lambda r: (r / 'joints.mat').write_bytes(b'MATLAB'), 'cannot be read as a MATLAB file'),
    ],
)
def test_jhmdb_folders_that_do_not_fit(tmp_path, change, message):
    videos.write_jhmdb(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        jhmdb(tmp_path)


def test_palette():
    palette = davis_palette()
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[[9, 22, 255]].tolist() == [[191, 0, 0], [22] * 3, [255] * 3]
