"""Tests whose body runs on the CPU in the suite, and on a GPU with `pytest -m gpu`."""

import pytest
import torch

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]
DEVICES = ['cpu', pytest.param('cuda', marks=GPU)]
