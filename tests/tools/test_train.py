"""tools/train.py and tools/test.py, and mmseg's own unmodified scripts, on one tiny config."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader, Runner
from tiny_mmseg import run_tool, segmentor_config, write_experiment


@pytest.fixture(scope='module')
def config(tiny_pipeline, tmp_path_factory) -> Path:
    """A config of a tiny segmentor and three images."""
    folder = tmp_path_factory.mktemp('train')
    return write_experiment(folder, segmentor_config(tiny_pipeline, backbone={'cache_dir': str(folder / 'prompts')}))


RUN_SCRIPTS = """
import runpy, sys

for script, *arguments in eval(sys.argv[1]):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name='__main__')
"""


def run_mmseg(*commands: tuple[str | Path, ...]) -> None:
    """Run scripts that the installed mmsegmentation carries, one after the other in a process of their own."""
    import mmseg

    scripts = Path(mmseg.__file__).parent / '.mim' / 'tools'
    arguments = [[str(scripts / f'{tool}.py'), *map(str, options)] for tool, *options in commands]
    done = subprocess.run([sys.executable, '-c', RUN_SCRIPTS, repr(arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def log_of(checkpoint: Path) -> tuple[int, list[float]]:
    """How many iterations a checkpoint has seen, and the loss of each."""
    content = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    losses, _ = content['message_hub']['log_scalars']['train/loss'].data
    return content['meta']['iter'], losses.tolist()


def check_resumed(work_dir: Path) -> None:
    (half, losses), (full, all_losses) = (log_of(work_dir / f'iter_{i}.pth') for i in (2, 4))
    assert (half, full) == (2, 4)
    assert len(all_losses) == 4 and all_losses[:2] == losses


def test_train_resume_and_test(config, tmp_path):
    run_tool('train', config, '--work-dir', tmp_path)
    resume = ('--resume', '--cfg-options', 'train_cfg.max_iters=4', 'load_from=elsewhere.pth')
    run_tool('train', config, '--work-dir', tmp_path, *resume)
    check_resumed(tmp_path)

    metrics = run_tool('test', config, tmp_path / 'iter_4.pth', '--work-dir', tmp_path / 'test')
    assert run_tool('test', config, tmp_path / 'iter_4.pth', '--work-dir', tmp_path / 'again') == metrics
    assert 0 < metrics['mIoU'] < 100


def test_a_run_that_began_with_other_weights_is_resumed_from_its_own_checkpoint(config, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: configs.append(cfg) or SimpleNamespace(train=lambda: None))
    arguments = config, '--work-dir', tmp_path, '--cfg-options', 'load_from=pretrained.pth'
    run_tool('train', *arguments, '--resume')  # nothing was saved yet
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    run_tool('train', *arguments, '--resume')
    run_tool('train', *arguments, 'resume=True')  # what a config says keeps mmengine's meaning
    choices = [(bool(cfg.get('resume')), cfg.load_from) for cfg in configs]
    assert choices == [(False, 'pretrained.pth'), (True, None), (True, 'pretrained.pth')]


@pytest.mark.parametrize(
    ('wrapper', 'broadcast'),
    [
        ({'find_unused_parameters': True}, False),
        ({'type': 'MMDistributedDataParallel', 'broadcast_buffers': True}, True),
        ({'type': 'MMFullyShardedDataParallel'}, None),
    ],
)
def test_frozen_buffers_are_not_sent_around_unless_a_config_says_so(config, tmp_path, monkeypatch, wrapper, broadcast):
    configs = []
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: configs.append(cfg) or SimpleNamespace(train=lambda: None))
    changed = tmp_path / 'wrapped.py'
    changed.write_text(f'{config.read_text()}\nmodel_wrapper_cfg = {wrapper!r}\n')
    run_tool('train', changed, '--work-dir', tmp_path)
    assert configs[0].model_wrapper_cfg.get('broadcast_buffers') == broadcast


@pytest.mark.skipif(
    MODULE2PACKAGE['mmseg'] != 'mmsegmentation', reason='onedl-mmengine finds mmseg:: only once diffseg is imported'
)
def test_mmseg_scripts_resume_and_test(config, tmp_path):
    run_tool('train', config, '--work-dir', tmp_path)
    run_mmseg(
        ('train', config, '--work-dir', tmp_path, '--resume', '--cfg-options', 'train_cfg.max_iters=4'),
        ('test', config, tmp_path / 'iter_4.pth', '--work-dir', tmp_path / 'test'),
    )
    check_resumed(tmp_path)

    found = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    metrics = run_tool('test', config, tmp_path / 'iter_4.pth', '--work-dir', tmp_path / 'own')
    assert {name: found[name] for name in metrics} == metrics
