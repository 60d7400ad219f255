"""PixelClassifierLoop against the published procedure written out, and killed and resumed."""

import copy
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner
from PIL import Image
from processes import forkserver
from torch import nn
from torch.nn import functional as F

import diffseg  # noqa: F401

ROOT = Path(__file__).parents[2]
CLASSES, MEMBERS, SIDE, PICTURES = 4, 3, 8, 3
ADAM = {'type': 'Adam', 'lr': 1e-3, 'eps': 1e-2}  # a small eps makes steps out of rounding errors
PATIENCE = 8


@pytest.fixture(scope='module')
def configure(tiny_pipeline, tmp_path_factory):
    """`configure(**options)` is a config on three pictures whose classes are their brightness, with noise."""
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('data')
    folder = root / 'real/train'
    folder.mkdir(parents=True)
    for i in range(PICTURES):
        labels = np.kron(generator.integers(CLASSES, size=(4, 4), dtype=np.uint8), np.ones((2, 2), dtype=np.uint8))
        pixels = 60 * labels[..., None] + generator.integers(40, size=(SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
        labels[0, : 3 * i] = 255
        np.save(folder / f'{i}.npy', labels)

    def build(work_dir, **options):
        dataset = {
            'type': 'ScarceDataset',
            'category': 'toy',
            'data_root': str(root),
            'split': 'real/train',
            'pipeline': [{'type': 'LoadImageFromFile'}, {'type': 'LoadLabelArray'}, {'type': 'PackSegInputs'}],
        }
        cfg = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py')
        cfg.merge_from_dict(
            {
                'model': {
                    'type': 'EncoderDecoder',
                    'data_preprocessor': {
                        'type': 'SegDataPreProcessor',
                        'mean': [127.5] * 3,
                        'std': [127.5] * 3,
                        'bgr_to_rgb': True,
                        'size_divisor': 1,
                    },
                    'test_cfg': {'mode': 'whole'},
                    'backbone': {
                        'type': 'DiffusionBackbone',
                        'model': str(tiny_pipeline),
                        'layers': ['down-level0-repeat0-res-out', 'down-level1-repeat0-res-out'],
                        'timesteps': [10],
                    },
                    'decode_head': {
                        'type': 'PixelClassifierHead',
                        'in_channels': [32, 32],
                        'num_classes': CLASSES,
                        'num_members': MEMBERS,
                        'hidden': (6, 5),
                        'num_pixels': 8,
                    },
                },
                'train_dataloader': {
                    'batch_size': 2,
                    'num_workers': 0,
                    'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                    'dataset': dataset,
                },
                'train_cfg': {
                    'type': 'PixelClassifierLoop',
                    'max_epochs': 5,
                    'patient_epochs': 2,
                    'patience': PATIENCE,
                    'dtype': 'float32',
                },
                'optim_wrapper': {'type': 'OptimWrapper', 'optimizer': ADAM},
                'default_hooks': {
                    'logger': {'type': 'LoggerHook', 'interval': 100},
                    'checkpoint': {'type': 'CheckpointHook', 'by_epoch': True, 'interval': 1, 'max_keep_ckpts': 2},
                },
                'work_dir': str(work_dir),
                **options,
            }
        )
        return cfg

    return build


@pytest.fixture(scope='module')
def undisturbed(configure, tmp_path_factory):
    """A finished run, and the head it began with."""
    torch.manual_seed(0)
    runner = Runner.from_cfg(configure(tmp_path_factory.mktemp('whole')))
    head = copy.deepcopy(runner.model.decode_head)
    runner.train()
    return runner, head


def published(head, loop, seed):
    """The networks of DatasetDDPM one after the other, on the features of all pixels, and how long each was trained."""
    maps, _, labels = loop.extract()
    features = [F.interpolate(x.permute(0, 3, 1, 2), labels.shape[1:], mode='bilinear') for x in maps]
    features = torch.cat(features, dim=1).permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, C)
    networks, iterations = [], []
    for member in range(MEMBERS):
        layers = []
        for linear in head.ensemble.linears:
            layers += [nn.Linear(*linear.weight.shape[1:]), nn.ReLU(), nn.BatchNorm1d(linear.weight.shape[2])]
            layers[-3].weight.data = linear.weight[member].detach().T.clone()
            nn.init.zeros_(layers[-3].bias)
        networks.append(nn.Sequential(*layers[:-2]))
        batches = (
            (epoch, pixels.long())
            for epoch in range(5)
            for pixels in loop.data.permutations(seed, epoch, MEMBERS, 8)[..., member]
        )
        iterations.append(train(networks[-1], features, labels.flatten().long(), batches))
    return networks, iterations


def train(network, features, labels, batches):
    optimizer = torch.optim.Adam(network.parameters(), lr=ADAM['lr'], eps=ADAM['eps'])
    best, stale, iterations = torch.inf, 0, 0
    for epoch, pixels in batches:
        loss = F.cross_entropy(network(features[pixels]), labels[pixels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        iterations += 1
        if epoch > 1:
            best, stale = (loss.item(), 0) if loss.item() < best else (best, stale + 1)
        if stale > PATIENCE:
            break
    return iterations


def test_the_published_procedure(undisturbed):
    runner, head = undisturbed
    loop, trained = runner.train_loop, runner.model.decode_head.eval()
    networks, iterations = published(head, loop, runner.seed)

    epoch = (PICTURES * SIDE**2 - 9) // 8
    assert loop.epoch_length == epoch
    assert trained.early_stop.stopped.all()
    assert 2 * epoch < min(iterations) < max(iterations) < 5 * epoch and len(set(iterations)) > 1
    assert loop.iter == loop.max_iters == max(iterations)
    members, _ = runner.message_hub.log_scalars['train/members'].data
    assert members.sum() == sum(iterations)
    x = torch.randn(7, MEMBERS, 64)
    for member, network in enumerate(networks):
        torch.testing.assert_close(trained.ensemble(x)[:, member], network.eval()(x[:, member]), rtol=1e-3, atol=1e-3)


def leaves(tree, path=''):
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f'{path}/{key}')
    else:
        yield path, tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def read(folder):
    """Weights and moments of the last checkpoint, as bytes."""
    path = Path((folder / 'last_checkpoint').read_text())
    content = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    return path.name, content['meta']['iter'], dict(leaves({key: content[key] for key in ('state_dict', 'optimizer')}))


def test_resumed_within_an_epoch(configure, undisturbed, tmp_path):
    hook = {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 7, 'save_last': True}
    cfg = configure(tmp_path, resume=True, **{'default_hooks.checkpoint': hook})
    for iterations in (30, 50):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(Stop(iterations))
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    runner = Runner.from_cfg(cfg)
    runner.train()
    expected = undisturbed[0]
    assert runner.iter == expected.iter
    for found, truth in ((runner.model, expected.model), (runner.optim_wrapper, expected.optim_wrapper)):
        assert dict(leaves(found.state_dict())) == dict(leaves(truth.state_dict()))


class Stop(Hook):
    """Interrupt after an iteration, before it can be saved."""

    priority = 'HIGHEST'

    def __init__(self, iterations):
        self.iterations = iterations

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iterations:
            raise KeyboardInterrupt


def test_killed_and_resumed(configure, undisturbed, tmp_path):
    context = forkserver()
    configure(tmp_path / 'run').dump(tmp_path / 'config.py')
    with pytest.MonkeyPatch.context() as patch:
        script = str(ROOT / 'tools/train.py')
        patch.setattr(sys, 'argv', [script, str(tmp_path / 'config.py'), '--resume'])
        process = context.Process(target=runpy.run_path, args=(script,), kwargs={'run_name': '__main__'})
        process.start()
        while process.is_alive() and not (tmp_path / 'run/epoch_1.pth').exists():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    cfg = configure(tmp_path / 'run', resume=True)
    Runner.from_cfg(cfg).train()
    activations = read(tmp_path / 'run')
    assert activations == read(Path(undisturbed[0].work_dir))
    Runner.from_cfg(cfg).train()  # a finished training is left alone
    assert read(tmp_path / 'run') == activations


def test_validated_at_the_end(configure, tmp_path):
    cfg = configure(tmp_path)
    options = {
        'val_dataloader': {**cfg.train_dataloader, 'batch_size': 1},
        'val_cfg': {'type': 'ValLoop'},
        'val_evaluator': {'type': 'ScarceIoUMetric'},
        'train_cfg.val_interval': 100,
    }
    runner = Runner.from_cfg(configure(tmp_path, **options))
    runner.train()
    values, _ = runner.message_hub.log_scalars['val/scarce/mIoU'].data
    assert len(values) == 1 and 0 < values[0] < 100


@pytest.mark.parametrize(
    'options, message',
    [
        ({'train_dataloader.sampler': {'type': 'InfiniteSampler'}}, 'InfiniteSampler has no end'),
        (
            {'model.neck': {'type': 'AggregationNeck', 'levels': [[32, 32]], 'timesteps': 1, 'out_channels': 128}},
            'would be trained',
        ),
        ({'model.decode_head.num_pixels': 1000}, '183 labelled pixels are fewer'),
        ({'model.decode_head.num_classes': 3}, 'label 3 is no class of 3'),
    ],
)
def test_errors(configure, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(configure(tmp_path, **options)).train()
