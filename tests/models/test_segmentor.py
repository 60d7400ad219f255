"""DiffusionBackbone and the necks inside mmseg's EncoderDecoder, under mmengine's runner."""

from pathlib import Path

import pytest
import torch
from ddp_worker import train_as_one_of_two
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmseg.registry import MODELS
from processes import forkserver
from tiny_mmseg import CLASSES, batch, build_segmentor, sample, segmentor_config
from torch import nn

from diffseg.diffusion.loading import meta_network
from diffseg.models import AggregationNeck

SGD = {'type': 'SGD', 'lr': 0.1}


def logits(model: nn.Module, *indices: int) -> torch.Tensor:
    """Test-time logits (B, classes, H, W)."""
    with torch.no_grad():
        results = model.eval().test_step(batch(*indices))
    return torch.stack([result.seg_logits.data for result in results])


def test_every_trainable_parameter_moves_in_one_step(tiny_pipeline: Path):
    model = build_segmentor(tiny_pipeline).train()
    optim_wrapper = build_optim_wrapper(model, {'optimizer': SGD})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
    model.train_step(batch(0, 1), optim_wrapper)
    assert before and [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.backbone.named_buffers())


@pytest.mark.parametrize('paramwise_cfg', [None, {'custom_keys': {'backbone': {'lr_mult': 0.1}}, 'norm_decay_mult': 0}])
def test_optimizers_never_see_the_frozen_network(tiny_pipeline: Path, paramwise_cfg: dict | None):
    model = build_segmentor(tiny_pipeline)
    config = {'optimizer': {**SGD, 'weight_decay': 0.1}, 'paramwise_cfg': paramwise_cfg}
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    seen = {parameter for group in groups for parameter in group['params']}
    assert seen == {*model.neck.parameters(), *model.decode_head.parameters()}


@pytest.mark.parametrize('init_cfg', [None, {'type': 'Kaiming', 'layer': ['Conv2d', 'Linear']}])
def test_init_weights_of_the_segmentor_leaves_the_network(tiny_pipeline: Path, init_cfg: dict | None):
    model = build_segmentor(tiny_pipeline, init_cfg=init_cfg)
    before = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
    model.init_weights()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.backbone.named_buffers())


@pytest.mark.parametrize(
    'test_cfg',
    [{'mode': 'whole'}, {'mode': 'slide', 'crop_size': (48, 48), 'stride': (32, 32)}],
    ids=['whole', 'slide'],
)
def test_testing_gives_the_same_bits_twice(tiny_pipeline: Path, test_cfg: dict):
    model = build_segmentor(tiny_pipeline, test_cfg=test_cfg)
    first = logits(model, 0, 1)
    assert first.shape == (2, CLASSES, 64, 96) and torch.equal(first, logits(model, 0, 1))
    torch.testing.assert_close(first[1:], logits(model, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('neck', 'in_channels'),
    [
        (None, [96, 96, 192, 192]),
        ({'type': 'FPN', 'in_channels': [96, 96, 192, 192], 'out_channels': 16, 'num_outs': 4}, [16] * 4),
        ({'type': 'ConcatNeck', 'levels': [[32, 32], [64, 64]], 'timesteps': 3}, [192, 384]),
    ],
    ids=['none', 'FPN', 'ConcatNeck'],
)
def test_any_neck_and_head_can_follow(tiny_pipeline: Path, neck: dict | None, in_channels: list[int]):
    head = {
        'type': 'UPerHead',
        'in_channels': in_channels,
        'in_index': list(range(len(in_channels))),
        'pool_scales': (1, 2),
        'channels': 8,
        'num_classes': CLASSES,
        'align_corners': False,
    }
    model = build_segmentor(tiny_pipeline, neck=neck, decode_head=head)
    losses = model.train_step(batch(0, 1), build_optim_wrapper(model, {'optimizer': SGD}))
    assert losses['loss'].isfinite()
    assert logits(model, 0).shape == (1, CLASSES, 64, 96)


def test_mixed_precision(tiny_pipeline: Path):
    model = build_segmentor(tiny_pipeline).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.loss(**model.data_preprocessor(batch(0, 1), training=True))
    losses['decode.loss_ce'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def make_runner(folder: Path, work_dir: Path, max_iters: int = 2, **options) -> Runner:
    """A runner of a few iterations, with a moving average of the weights."""
    loader = {
        'batch_size': 2,
        'dataset': [sample(index) for index in range(4)],
        'sampler': {'type': 'InfiniteSampler', 'shuffle': False},
        'collate_fn': {'type': 'pseudo_collate'},
    }
    return Runner(
        model=segmentor_config(folder),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': max_iters},
        optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1e-2}},
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 2}},
        custom_hooks=[{'type': 'EMAHook', 'begin_iter': 1, 'momentum': 0.1}],
        default_scope='mmseg',
        log_level='ERROR',
        randomness={'seed': 0},
        experiment_name='test',
        **options,
    )


def test_runner_checkpoint_is_small_loads_strictly_and_tests_to_the_same_bits(tiny_pipeline: Path, tmp_path: Path):
    runner = make_runner(tiny_pipeline, tmp_path)
    network = {name: buffer.clone() for name, buffer in runner.model.backbone.named_buffers()}
    runner.train()
    assert all(torch.equal(buffer, network[name]) for name, buffer in runner.model.backbone.named_buffers())

    checkpoint = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    for state in (checkpoint['state_dict'], checkpoint['ema_state_dict']):
        (key,) = (key for key in state if 'backbone' in key)
        assert key.endswith('backbone._extra_state')
    trained = sum(parameter.numel() for parameter in runner.model.parameters())
    assert (tmp_path / 'iter_2.pth').stat().st_size < 4 * 4 * trained + 300_000  # weights, average, AdamW's two moments

    first, second = (build_segmentor(tiny_pipeline, seed=seed) for seed in (1, 2))
    for model in (first, second):
        model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert torch.equal(logits(first, 0, 1), logits(second, 0, 1))

    resumed = make_runner(tiny_pipeline, tmp_path, max_iters=3, load_from=str(tmp_path / 'iter_2.pth'), resume=True)
    resumed.train()
    assert resumed.iter == 3


def test_sdxl_checkpoint_is_under_one_percent_of_one_with_the_unet_inside():
    with torch.device('meta'):
        neck = AggregationNeck([[640, 640], [1280, 1280]], timesteps=3, out_channels=512)
        head = {'type': 'FCNHead', 'in_channels': [512, 512], 'in_index': [0, 1], 'input_transform': 'resize_concat'}
        head = MODELS.build({**head, 'channels': 256, 'num_convs': 1, 'num_classes': 150})
        unet = meta_network('sdxl')
    trained = sum(4 * parameter.numel() for module in (neck, head) for parameter in module.parameters())  # float32
    frozen = sum(2 * parameter.numel() for parameter in unet.parameters())  # float16, as published
    assert (trained, frozen) == (34_669_192, 5_134_927_368)
    assert trained < 0.01 * (trained + frozen)


def test_two_processes_train_the_same_model(tiny_pipeline: Path, tmp_path: Path):
    context = forkserver()
    processes = [context.Process(target=train_as_one_of_two, args=(i, tiny_pipeline, tmp_path)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f'rank{rank}.pt') for rank in range(2))
    start = build_segmentor(tiny_pipeline).state_dict()
    moved = [key for key, value in first.items() if value.is_floating_point() and not torch.equal(value, start[key])]
    assert first.keys() == second.keys() == start.keys()
    parameters = [key for key in first if 'running' not in key and 'num_batches' not in key and 'extra' not in key]
    assert set(parameters) <= set(moved)
    assert all(torch.equal(first[key], second[key]) for key in parameters)
