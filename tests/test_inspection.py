import pytest
import torch
from torch import nn

from diffseg.inspection import load_weights


@pytest.mark.parametrize(
    ('content', 'error', 'message'),
    [
        (b'not a checkpoint', OSError, r'weights\.pth is no checkpoint, or a damaged one'),
        ({'state_dict': {'weight': torch.zeros(3, 3)}}, ValueError, r'weights\.pth does not fit model\.py'),
        ({'state_dict': {'weight': 'text'}}, ValueError, r'weights\.pth does not fit model\.py'),
    ],
)
def test_weights_that_cannot_be_loaded(tmp_path, content, error, message):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(error, match=message):
        load_weights(nn.Linear(2, 2, bias=False), path, 'model.py')


def test_weights_are_loaded(tmp_path):
    layer = nn.Linear(2, 2)
    torch.save({'state_dict': nn.Linear(2, 2).state_dict() | {'bias': torch.ones(2)}}, tmp_path / 'weights.pth')
    load_weights(layer, tmp_path / 'weights.pth', 'model.py')
    assert layer.bias.tolist() == [1, 1]
