"""The gaps that `diffseg.compat` fills, and that it fills nothing else."""

import os
import pickle
import subprocess
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import checkpoint
from mmengine.utils.dl_utils import mmcv_full_available
from mmseg.registry import MODELS

from diffseg import compat


class Reduced:
    """Pickles as the call `function(*args)`."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self) -> None:
        """Pickle wants what it calls to be callable."""


@pytest.fixture
def save(tmp_path):
    compat.allow_checkpoints()  # onedl-mmengine withdraws what it shares with this after each of its own loads

    def write(content) -> str:
        torch.save(content, tmp_path / 'checkpoint.pth')
        return str(tmp_path / 'checkpoint.pth')

    return write


def test_every_mmseg_model_registers():
    import mmseg.models  # noqa: F401

    assert {'EncoderDecoder', 'UPerHead', 'PointHead', 'CCHead', 'PSAHead', 'FocalLoss'} <= set(MODELS.module_dict)
    assert len(MODELS.module_dict) > 90


@pytest.mark.skipif(mmcv_full_available(), reason='mmcv has its own ops')
@pytest.mark.parametrize('head', ['CCHead', 'PSAHead'])
def test_heads_that_need_compiled_ops_say_so(head):
    with pytest.raises(RuntimeError, match='Please install'):
        MODELS.build(dict(type=head, in_channels=4, channels=4, num_classes=2, mask_size=(2, 2)))


@pytest.mark.parametrize('present', ['mmcv._ext', 'mmcv.ops'])
def test_present_ops_are_left_alone(monkeypatch, present):
    monkeypatch.delitem(sys.modules, 'mmcv.ops', raising=False)
    module = ModuleType(present)
    module.__spec__ = ModuleSpec(present, loader=None)
    monkeypatch.setitem(sys.modules, present, module)
    compat.provide_ops()
    assert sys.modules.get('mmcv.ops') is (module if present == 'mmcv.ops' else None)


def test_an_mmengine_that_allows_its_classes_is_left_alone(monkeypatch):
    allowed = []
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', allowed.extend)
    monkeypatch.setattr(torch.serialization, 'get_safe_globals', lambda: [HistoryBuffer])
    compat.allow_checkpoints()
    assert allowed == []


@pytest.mark.parametrize('align_corners', [False, True])
def test_point_sample_is_linear_in_position(align_corners):
    height, width = 4, 6
    ramp = torch.arange(width).float().expand(2, 3, height, width)  # the value is the column's index
    points = torch.rand(2, 5, 2) * 0.6 + 0.2
    expected = points[..., 0] * (width - 1) if align_corners else points[..., 0] * width - 0.5
    sampled = compat.point_sample(ramp, points, align_corners)
    assert sampled.shape == (2, 3, 5)
    torch.testing.assert_close(sampled, expected[:, None].expand(2, 3, 5))
    on_grid = compat.point_sample(ramp, points[:, None], align_corners)
    torch.testing.assert_close(on_grid, sampled[:, :, None])  # (2, 3, 1, 5)


def test_sigmoid_focal_loss_is_the_published_formula():
    logits, target = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 255])
    p = logits.detach().sigmoid().numpy()
    expected = -0.75 * p**3 * np.log(1 - p)
    for i in range(3):
        expected[i, i] = -0.25 * (1 - p[i, i]) ** 3 * np.log(p[i, i])
    loss = compat.sigmoid_focal_loss(logits, target, 3.0, 0.25, None, 'none')
    np.testing.assert_allclose(loss.detach(), expected)
    weight = torch.tensor([1.0, 2.0, 3.0])
    weighted = compat.sigmoid_focal_loss(logits[:3], target[:3], 3.0, 0.25, weight, 'sum')
    np.testing.assert_allclose(weighted.detach(), (expected[:3] * weight[:, None].numpy()).sum())
    mean = compat.sigmoid_focal_loss(logits, target, 3.0)
    np.testing.assert_allclose(mean.detach(), expected.sum() / 5)
    mean.backward()
    assert logits.grad.isfinite().all() and (logits.grad != 0).all()


def test_sigmoid_focal_loss_without_focus_is_cross_entropy():
    logits = torch.tensor([[100.0, -100.0]], requires_grad=True)  # neither the loss nor its gradient overflows
    loss = compat.sigmoid_focal_loss(logits, torch.tensor([1]), gamma=0.0, alpha=0.5)
    torch.testing.assert_close(loss, torch.tensor(100.0))
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5]]))


def test_a_training_log_is_read_safely(save):
    hub = MessageHub('test_a_training_log_is_read_safely')
    for value, count in ((1.0, 2), (4.0, 4)):
        hub.update_scalar('loss', value, count)
    hub.update_info('best', np.float32(0.5))
    hub.update_info('seen', np.int64(3))
    state = torch.load(save(hub.state_dict()), weights_only=True)
    loss = state['log_scalars']['loss']
    assert (loss.current(), loss.min(), loss.max()) == (4, 1, 4)
    assert loss.statistics('mean') == 5 / 6  # the sum of values by the sum of counts
    assert (state['runtime_info']['best'], state['runtime_info']['seen']) == (0.5, 3)


MEAN = Reduced(getattr, HistoryBuffer, 'mean')
REFUSED = {
    'command': Reduced(os.system, 'true'),
    'builtin': Reduced(eval, '1'),
    'constructor': Reduced(getattr, HistoryBuffer, '__init__'),
    'other method': Reduced(getattr, HistoryBuffer, 'update'),
    'globals of a statistic': Reduced(getattr, MEAN, '__globals__'),
    'of an instance': Reduced(getattr, HistoryBuffer(), 'mean'),
    'of another class': Reduced(getattr, torch.Tensor, 'mean'),
    'of an array': Reduced(getattr, np.ndarray, 'tofile'),
    'name in bytes': Reduced(getattr, HistoryBuffer, b'mean'),
    'call of a statistic': Reduced(MEAN, HistoryBuffer([1], [1])),
    'inside an array': np.array([Reduced(os.system, 'true')]),
    'structured array': np.zeros(1, dtype=[('field', 'f8')]),
}


@pytest.mark.parametrize('payload', REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused(save, payload):
    path = save({'state_dict': {}, 'payload': payload})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.skipif(
    hasattr(checkpoint, 'get_torch_safe_globals'),
    reason='onedl-mmengine falls back to weights_only=False, unless TORCH_FORCE_WEIGHTS_ONLY_LOAD=1 is set',
)
def test_a_refused_checkpoint_runs_nothing(save, tmp_path):
    path = save({'payload': Reduced(os.mkdir, str(tmp_path / 'ran'))})
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load_checkpoint(torch.nn.Linear(1, 1), path)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('installed', 'name'),
    [
        ({'mmsegmentation'}, 'mmsegmentation'),
        ({'onedl-mmsegmentation'}, 'onedl-mmsegmentation'),
        ({'mmsegmentation', 'onedl-mmsegmentation'}, 'mmsegmentation'),
    ],
)
def test_mmseg_configs_are_found_under_the_installed_name(monkeypatch, installed, name):
    monkeypatch.setitem(compat.MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    monkeypatch.setattr(compat, 'distributions', lambda name: [name] if name in installed else [])
    compat.name_fork()
    assert compat.MODULE2PACKAGE['mmseg'] == name


START = """
import warnings

issued, warn = [], warnings.warn
warnings.warn = lambda message, *args, **kwargs: issued.append(message) or warn(message, *args, **kwargs)

import diffseg, mmseg.models
from mmengine.visualization import Visualizer
from mmseg.registry import HOOKS

Visualizer.get_instance('visualizer')
HOOKS.build({'type': 'SegVisualizationHook'})
print(*issued)
"""


def test_warnings_at_every_start_are_hidden():
    done = subprocess.run([sys.executable, '-c', START], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    issued, shown = (
        [message for message in (*compat.HARMLESS, compat.WITHOUT_OPS) if message in text]
        for text in (done.stdout, done.stderr)
    )
    assert issued and not shown


def test_a_filter_of_the_user_comes_first():
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        warnings.simplefilter('always')  # as `python -W always` has it before anything is imported
        compat.hide_warnings()
        for message in (*compat.HARMLESS, compat.WITHOUT_OPS):
            warnings.warn(message, stacklevel=1)
    assert len(shown) == len(compat.HARMLESS) + 1
