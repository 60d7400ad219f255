"""Training parts of the UNet with mmengine's optimizers: learning rates, lower precision, checkpoints."""

from pathlib import Path

import pytest
import torch
from gpu import DEVICES
from mmengine.optim import build_optim_wrapper
from mmengine.runner import save_checkpoint
from tiny_mmseg import batch, build_segmentor
from torch import nn

KINDS = {
    'pattern': {'frozen': False, 'trainable': ['up_blocks.1.*', 'time_embedding.*']},
    'lora': {'lora': {'r': 4}},
    'lora beside bfloat16': {'lora': {'r': 4}, 'dtype': 'bfloat16'},
}
OPTIMIZER = {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.01}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest, tiny_pipeline: Path) -> nn.Module:
    """A segmentor on a UNet that is trained in part."""
    return build_segmentor(tiny_pipeline, backbone=request.param).train()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_learning_rates_by_paramwise_cfg(model: nn.Module):
    paramwise_cfg = {'custom_keys': {'backbone.extractor.network': {'lr_mult': 0.1, 'decay_mult': 0.0}}}
    groups = build_optim_wrapper(model, {'optimizer': OPTIMIZER, 'paramwise_cfg': paramwise_cfg}).optimizer.param_groups
    found = {id(p): (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    names = dict(model.named_parameters())
    assert len(found) == sum(len(group['params']) for group in groups) == len(names)
    for name, parameter in names.items():
        slow = name.startswith('backbone.extractor.network.')
        assert found[id(parameter)] == pytest.approx((1e-4, 0.0) if slow else (1e-3, 0.01)), name


@pytest.mark.parametrize('device', DEVICES)
def test_a_step_under_autocast(model: nn.Module, device: str):
    """Gradients reach everything that is trained, in single precision and near those without autocast."""
    model.to(device)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            data = model.data_preprocessor(batch(0, 1), training=True)
            losses = model(**data, mode='loss')
        losses['decode.loss_ce'].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    full, lower = gradients
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in lower.values())
    a, b = (torch.cat([x.flatten() for name, x in each.items() if '.network.' in name]) for each in gradients)
    assert torch.cosine_similarity(a, b, dim=0) > 0.8 and full.keys() == lower.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_steps_under_amp(model: nn.Module, dtype: str):
    model.cuda()
    config = {'type': 'AmpOptimWrapper', 'dtype': dtype, 'optimizer': OPTIMIZER}
    optim_wrapper = build_optim_wrapper(model, config)
    before, buffers = trained(model), {name: x.clone() for name, x in model.backbone.named_buffers()}
    for index in range(4):  # the first may only lower the scale of the loss
        losses = model.train_step(batch(2 * index, 2 * index + 1), optim_wrapper)
        assert losses['loss'].isfinite()
    assert [name for name, x in trained(model).items() if torch.equal(x, before[name])] == []
    assert all(torch.equal(x, buffers[name]) for name, x in model.backbone.named_buffers())


def test_checkpoints_hold_what_is_trained_and_no_more(model: nn.Module, tmp_path: Path):
    save_checkpoint({'state_dict': model.state_dict()}, str(tmp_path / 'a.pth'))
    state = torch.load(tmp_path / 'a.pth')['state_dict']
    inside = {name for name in state if name.startswith('backbone.extractor.')}
    assert inside == {f'backbone.{name}' for name, _ in model.backbone.named_parameters()}
    size = sum(x.numel() * x.element_size() for x in state.values())
    assert (tmp_path / 'a.pth').stat().st_size < size + 2048 * (len(state) + 1)  # a zip file
