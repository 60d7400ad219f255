from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import videos
from PIL import Image

from diffseg.datasets import DAVISDataset, JHMDBDataset, LoadVideo
from diffseg.engine import VideoResultHook
from diffseg.engine.hooks.video_results import draw_joints, write_video
from diffseg.masks import davis_palette, read_mask


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return np.stack(frames)


@pytest.fixture
def run_hook(tmp_path):
    def run(dataset, **predictions):
        batch = videos.batch_of(dataset)
        for sample in batch['data_samples']:
            sample.set_data(predictions)
        runner = SimpleNamespace(work_dir=str(tmp_path / 'work'))
        VideoResultHook(strip=3).after_test_iter(runner, 0, batch, batch['data_samples'])
        return tmp_path / 'work/videos'

    return run


def test_masks_video_and_strip(tmp_path, run_hook):
    root = videos.write_davis(tmp_path, videos=1)
    masks = torch.zeros(5, 32, 44, dtype=torch.uint8)
    masks[:, 8:24, 10:30] = torch.arange(5)[:, None, None]
    out = run_hook(DAVISDataset(str(root), pipeline=[LoadVideo(short_side=64)]), pred_masks=masks)

    for t in range(5):
        path = out / f'masks/video-0/{t:05d}.png'
        assert (read_mask(path, (32, 44)) == masks[t].numpy()).all()
        assert Image.open(path).getpalette() == davis_palette().ravel().tolist()
    played = frames_of(out / 'overlays/video-0.mp4')
    assert played.shape == (5, 32, 44, 3)
    inside = played[:, 10:22, 12:28].astype(float).mean(axis=(1, 2))  # (5, 3)
    assert inside[1, 0] - inside[0, 0] < inside[1, 0] - inside[1, 1]  # object 1 is red, frame 0 has none
    assert inside[1].argmax() == 0
    assert inside[2].argmax() == 1
    strip = Image.open(out / 'strips/video-0.png')
    assert strip.width > 3 * 44


def test_joints(tmp_path, run_hook):
    joints = torch.from_numpy(videos.write_jhmdb(tmp_path))
    out = run_hook(JHMDBDataset(str(tmp_path), 'test.txt', pipeline=[LoadVideo(size=(40, 40))]), pred_joints=joints)
    assert len(frames_of(out / 'overlays/walk/one.mp4')) == 4
    assert (out / 'strips/walk/one.png').is_file()
    assert not (out / 'masks').exists()


def test_joints_that_are_missing_are_not_drawn():
    picture = torch.zeros(3, 30, 40)
    joints = torch.tensor([[10.0, 12.0], [-1.0, -1.0]])
    drawn = draw_joints(picture, joints)
    assert drawn[:, 12, 10].tolist() == [1, 0, 0]
    assert drawn[:, :, 20:].max() == drawn[:, 20:].max() == 0


def test_odd_sizes_lose_a_line(tmp_path):
    write_video(tmp_path / 'odd.mp4', [torch.rand(3, 33, 45)] * 3, fps=5)
    assert frames_of(tmp_path / 'odd.mp4').shape == (3, 32, 44, 3)


def test_a_video_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match='cannot be written'):
        write_video(tmp_path / 'missing/a.mp4', [torch.rand(3, 32, 32)], fps=5)
