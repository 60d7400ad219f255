"""Metrics, hooks and drawing where a preprocessor has brought samples to an accelerator: the same as on the CPU."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import videos
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample
from simulated_device import DEVICE, SimulatedTensor, simulated_device

from diffseg.datasets import DAVISDataset, JHMDBDataset, LoadVideo
from diffseg.engine import ResumableTestHook, VideoResultHook
from diffseg.evaluation import (
    DAVISMetric,
    HomographyMetric,
    JHMDBMetric,
    PCKMetric,
    ScarceIoUMetric,
)
from diffseg.structures import HomographySample, PairSample, VideoSample
from diffseg.visualization import colour_labels, grid, heat_map, match_lines, mixing_figure, outline, overlay, pca_rgb


def test_the_simulated_device_is_as_strict_as_a_gpu():
    with simulated_device() as device:
        x = torch.arange(6.0).view(2, 3).to(device)
        assert isinstance(x, SimulatedTensor) and x.device == DEVICE
        assert (x + torch.ones(2, 3, device=device))[1].tolist() == [4, 5, 6]
        for stray in (lambda: x + torch.ones(2, 3), lambda: np.asarray(x), lambda: x.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                stray()
        assert x.cpu().numpy().tolist() == x.tolist()


def pair_sample(_: Path) -> PairSample:
    points = torch.tensor([[3.0, 4.0], [20.0, 10.0], [7.0, 9.0]])
    sizes = {f'{kind}_shape{view}': (30, 40) for kind in ('img', 'ori') for view in (0, 1)}
    sample = PairSample(metainfo={'pair_id': 'a', 'category': 'cat', **sizes})
    visible = torch.tensor([True, False, True])
    predicted = points[visible].double() + torch.tensor([[0.0, 0.5], [9.0, 9.0]])
    box = torch.tensor([0.0, 0.0, 20.0, 20.0])
    sample.set_data({'keypoints1': points, 'visible': visible, 'bbox1': box, 'pred_keypoints1': predicted})
    return sample


def homography_sample(_: Path) -> HomographySample:
    points = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)) * 50
    sizes = {f'{kind}_shape{view}': (60, 60) for kind in ('img', 'ori') for view in (0, 1)}
    sample = HomographySample(metainfo={'pair_id': 'a', 'sequence': 'v_a', 'keypoint_source': 'sift', **sizes})
    moved = torch.eye(3, dtype=torch.float64)
    moved[0, 2] = 5
    matches = torch.stack([torch.arange(12), torch.arange(12)], dim=1)
    shifted = points + torch.tensor([5.0, 0.0])
    sample.set_data({'keypoints0': points, 'keypoints1': shifted, 'homography': moved, 'pred_matches': matches})
    return sample


def joints_sample(_: Path) -> VideoSample:
    joints = torch.tensor([[10.0, 20.0], [70.0, 100.0]]).repeat(4, 1, 1)
    sample = VideoSample(metainfo={'video_id': 'a'})
    sample.set_data({'joints': joints, 'pred_joints': joints + torch.tensor([9.0, 0.0])})
    return sample


def masks_sample(folder: Path) -> VideoSample:
    root = videos.write_davis(folder, videos=1)
    sample = DAVISDataset(str(root), pipeline=[LoadVideo(size=(32, 32))])[0]['data_samples']
    sample.pred_masks = sample.first_mask[None].repeat(5, 1, 1)
    return sample


def classes_sample(_: Path) -> SegDataSample:
    labels = torch.arange(16).view(1, 4, 4) % 3
    sample = SegDataSample()
    sample.set_data({'gt_sem_seg': PixelData(data=labels), 'pred_sem_seg': PixelData(data=labels.flip(2))})
    return sample


@pytest.mark.parametrize(
    ('metric', 'make_sample'),
    [
        (PCKMetric, pair_sample),
        (HomographyMetric, homography_sample),
        (JHMDBMetric, joints_sample),
        (DAVISMetric, masks_sample),
        (ScarceIoUMetric, classes_sample),
    ],
)
def test_metrics(metric: type[BaseMetric], make_sample: Callable[[Path], BaseDataElement], tmp_path: Path):
    def evaluate(sample: BaseDataElement) -> dict[str, float]:
        evaluator = Evaluator(metric())
        evaluator.dataset_meta = {'classes': 'abc'}
        evaluator.process([sample])
        return evaluator.evaluate(1)

    sample = make_sample(tmp_path)
    with simulated_device() as device:
        moved = sample.to(device)
        assert any(isinstance(value, SimulatedTensor | PixelData) for value in moved.values())
        assert evaluate(moved) == evaluate(sample)


@pytest.mark.parametrize('labels', ['masks', 'joints'])
def test_files_of_videos(labels: str, tmp_path: Path):
    if labels == 'masks':
        dataset = DAVISDataset(str(videos.write_davis(tmp_path, videos=1)), pipeline=[LoadVideo(size=(32, 32))])
        predicted = torch.ones(5, 32, 44, dtype=torch.uint8)
    else:
        predicted = torch.from_numpy(videos.write_jhmdb(tmp_path))
        dataset = JHMDBDataset(str(tmp_path), 'test.txt', pipeline=[LoadVideo(size=(32, 32))])
    written = []
    with simulated_device() as device:
        for where in (torch.device('cpu'), device):
            batch = videos.batch_of(dataset)
            (sample,) = batch['data_samples']
            sample.set_data({f'pred_{labels}': predicted})
            runner = SimpleNamespace(work_dir=str(tmp_path / where.type))
            VideoResultHook(strip=3).after_test_iter(runner, 0, batch, [sample.to(where)])
            files = sorted(path for path in Path(runner.work_dir).rglob('*') if path.is_file())
            written.append({str(path.relative_to(runner.work_dir)): path.read_bytes() for path in files})
    assert len(written[0]) > 1 and written[0] == written[1]


def test_predictions_that_are_kept(tmp_path: Path):
    hook = ResumableTestHook()
    hook._file = (tmp_path / 'predictions').open('w')
    with simulated_device() as device:
        hook.after_test_iter(None, 0, None, [pair_sample(tmp_path).to(device)])
    hook._file.close()
    assert '"pred_keypoints1": [[3.0, 4.5], [16.0, 18.0]]' in (tmp_path / 'predictions').read_text()


def test_drawing():
    picture, labels = torch.rand(3, 24, 32), torch.arange(48).view(6, 8) % 4
    points, weights, maps = 20 * torch.rand(4, 2), torch.rand(2, 3), torch.rand(5, 6, 8)
    correct = torch.tensor([True, False, True, True])
    with simulated_device() as device:
        drawn = []
        for where in (torch.device('cpu'), device):
            p, n, xy, w, m, c = (x.to(where) for x in (picture, labels, points, weights, maps, correct))
            images = [
                grid([[heat_map(m[0]), *pca_rgb([m]), overlay(p, colour_labels(n), mask=n > 1)]], cell=32),
                grid([[overlay(p, p.flip(2)), outline(p, xy, (255, 0, 0))]], cell=32),
                match_lines((p, p), (xy, xy), c, height=24),
            ]
            drawn.append([image.tobytes() for image in images])
            assert mixing_figure(w, [1, 2], ['a', 'b', 'c']).axes
    assert drawn[0] == drawn[1]
