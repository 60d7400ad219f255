"""Tests for what tests leave behind."""

import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from isolation import isolated
from mmengine.logging import MessageHub, MMLogger, print_log
from mmengine.registry import MODELS, DefaultScope
from torch import nn


def test_log_handlers_do_not_outlive_the_captured_output(capsys: pytest.CaptureFixture, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch, isolated():
        with (tmp_path / 'captured.txt').open('w') as captured:
            patch.setattr(sys, 'stdout', captured)
            logger = MMLogger.get_instance('test', log_file=str(tmp_path / 'log.txt'))
            print_log('within', 'current')
    print_log('after', 'current')
    assert (tmp_path / 'captured.txt').read_text().endswith('within\n')
    assert capsys.readouterr().out.endswith('after\n')
    assert logger.handlers[1].stream is None  # closed
    assert capsys.readouterr().err == ''  # where logging writes its own errors


def test_loggers_and_instances():
    known, handler = logging.getLogger('diffseg'), logging.NullHandler()
    with isolated():
        for logger in (known, logging.getLogger('diffseg.a.test'), logging.root):
            logger.addHandler(handler)
            logger.setLevel(logging.CRITICAL)
        MessageHub.get_instance('test')
        DefaultScope.get_instance('test', scope_name='mmseg')
    for logger in (known, logging.getLogger('diffseg.a.test'), logging.root):
        assert logger.level < logging.CRITICAL and handler not in logger.handlers
    assert not MessageHub.check_instance_created('test') and DefaultScope.get_current_instance() is None


def test_registries():
    known = MODELS.get('Linear')
    with isolated():
        MODELS.register_module('IsolationTest', module=nn.Identity)
        MODELS.register_module('Linear', module=nn.Identity, force=True)
    assert MODELS.get('IsolationTest') is None and MODELS.get('Linear') is known


def test_the_rest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('DIFFSEG_TEST', 'before')
    draws = []
    for _ in range(2):
        with isolated():
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
            os.environ['DIFFSEG_TEST'] = os.environ['DIFFSEG_TEST_2'] = 'within'
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
    assert draws[0] == draws[1]
    assert os.environ['DIFFSEG_TEST'] == 'before' and 'DIFFSEG_TEST_2' not in os.environ
    assert torch.get_default_dtype() == torch.float32 and not torch.are_deterministic_algorithms_enabled()
