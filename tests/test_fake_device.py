"""What the fake accelerator refuses and lets pass."""

import pytest
import torch
from fake_device import DEVICE, HostWaitsError, fake_device, on_device
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

REFUSED = {
    'item': (lambda x: x.sum().item(), DataDependentOutputException),
    'list': (lambda x: x.tolist(), DataDependentOutputException),
    'condition': (lambda x: 1 if x.any() else 0, DataDependentOutputException),
    'mask': (lambda x: x[x > 0], HostWaitsError),
    'nonzero': (lambda x: x.nonzero(), HostWaitsError),
    'copy to the host': (lambda x: x.cpu(), HostWaitsError),
    'array': (lambda x: x.cpu().numpy(), HostWaitsError),
    'constant of the host': (lambda x: torch.as_tensor(0.5, device=x.device), HostWaitsError),
    'list as index': (lambda x: x[[0, 1]], HostWaitsError),
    'index of the host': (lambda x: x[:, torch.tensor([0, 1])], HostWaitsError),
    'tensor of the host': (lambda x: x + torch.ones(3, 4), RuntimeError),
    'tensor of the host as output': (lambda x: torch.zeros(3, 4).copy_(x), HostWaitsError),
    'blocking copy to the device': (lambda x: x + torch.ones(3, 4).to(x.device), HostWaitsError),
}


@pytest.mark.parametrize(('function', 'error'), REFUSED.values(), ids=REFUSED)
def test_what_a_device_refuses_or_waits_for(function, error):
    with fake_device() as to_device, pytest.raises(error):
        function(to_device(torch.rand(3, 4)))


ALLOWED = {
    'asynchronous copy': lambda x: x + torch.ones(3, 4).to(x.device, non_blocking=True),
    'scalar': lambda x: x * 2 + torch.full((), 0.5, device=x.device),
    'view': lambda x: x[None, 1:, ..., ::2],
    'rows': lambda x: x[torch.arange(2, device=x.device)],
    'rows and columns': lambda x: x[torch.arange(2, device=x.device), torch.arange(2, device=x.device)],
    'columns': lambda x: x[..., torch.ones(5, 2, dtype=torch.long, device=x.device), None],
    'one row': lambda x: x[-1, torch.arange(2, device=x.device)],
}


@pytest.mark.parametrize('function', ALLOWED.values(), ids=ALLOWED)
def test_what_passes_has_the_shape_that_it_has_on_the_host(function):
    expected = function(torch.rand(3, 4)).shape
    with fake_device() as to_device:
        result = function(to_device(torch.rand(3, 4)))
    assert result.shape == expected and on_device(result)


def test_values_are_assigned():
    with fake_device() as to_device:
        x = to_device(torch.rand(3, 4))
        x[1:, 0] = 0
        x[torch.arange(2, device=x.device)] = torch.ones(4, device=x.device)
        with pytest.raises(RuntimeError, match='expand'):
            x[1:, 0] = torch.ones(3, device=x.device)
        x[x > 0] = 0
        for assigned in (
            lambda: x.__setitem__([0, 1], 0),
            lambda: x.__setitem__(x > 0, x.sum()),
            lambda: x.__setitem__(0, torch.ones(4)),
        ):
            with pytest.raises(HostWaitsError):
                assigned()
        assert x.device == DEVICE


def test_copies_that_are_waited_for_can_be_allowed():
    with fake_device(waits=True) as to_device:
        assert to_device(torch.ones(2)).cpu().device.type == 'cpu'
        with pytest.raises(DataDependentOutputException):
            to_device(torch.ones(2)).tolist()


def test_modules_are_on_the_device_and_then_as_before():
    shared = nn.Linear(3, 3)
    module = nn.Sequential(shared, nn.BatchNorm1d(3), shared).eval()
    weight = shared.weight
    with fake_device(module) as to_device:
        assert on_device([*module.parameters(), *module.buffers()]) and len(list(module.parameters())) == 4
        assert on_device(module(to_device(torch.rand(2, 3))))
        assert all(map(on_device, to_device({'a': [torch.ones(1)], 'b': (torch.ones(2), None)}).values()))
    assert module[2].weight is weight and weight.requires_grad and weight.device.type == 'cpu'
    assert torch.isfinite(module(torch.rand(2, 3))).all()


def test_modules_are_as_before_after_an_error():
    module = nn.Linear(3, 3)
    with pytest.raises(ZeroDivisionError), fake_device(module):
        assert 1 / 0
    assert module.weight.device.type == 'cpu'
