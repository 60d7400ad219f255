"""Operations that are counted."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from diffseg.benchmarking import LiveMemory, Operations, executed, in_subprocess


def test_counts_are_exact_on_known_operations():
    linear, conv = torch.nn.Linear(8, 16), torch.nn.Conv2d(4, 6, 3, padding=1, stride=2)
    assert executed(lambda: linear(torch.randn(5, 8))) == 2 * 5 * 8 * 16
    assert executed(lambda: conv(torch.randn(2, 4, 8, 8))) == 2 * 2 * 6 * 4 * 9 * 4 * 4
    query, key = torch.randn(2, 3, 64, 8), torch.randn(2, 3, 7, 8)
    attention = 2 * 2 * 2 * 3 * 64 * 7 * 8
    with torch.no_grad():
        assert executed(lambda: F.scaled_dot_product_attention(query, key, key)) == attention
        with Operations() as operations:
            F.scaled_dot_product_attention(query.to('meta'), key.to('meta'), key.to('meta'))
    assert operations.total() == attention


def test_needed_operations_are_those_with_a_path_to_the_wanted():
    x, w = torch.empty(4, 8, device='meta'), torch.empty(8, 8, device='meta')
    with Operations() as operations:
        a = x @ w
        b = a.view(2, 2, 8).transpose(0, 1).reshape(4, 8) @ w
        c = a @ w
        c.add_(b @ w)
    cost = 2 * 4 * 8 * 8
    assert operations.total() == 4 * cost
    assert operations.needed([a]) == cost
    assert operations.needed([b]) == 2 * cost
    assert operations.needed([c]) == 4 * cost
    assert operations.needed([a, b]) == 2 * cost


@dataclass
class Case:
    number: int


def test_a_case_is_measured_in_a_process_of_its_own(tmp_path):
    tool = tmp_path / 'tool.py'
    code = 'print("a log"); option, case = sys.argv[1:]; print(json.dumps([option, 12 // json.loads(case)["number"]]))'
    tool.write_text(f'import json, sys; {code}')
    assert in_subprocess(tool, Case(3)) == ['--case', 4]
    with pytest.raises(RuntimeError, match=r'Case\(number=0\) ended with status 1'):
        in_subprocess(tool, Case(0))


def test_live_memory_is_what_is_referred_to_and_its_peak():
    with LiveMemory() as memory:
        x = torch.zeros(100)
        y = x.view(10, 10) + 1  # a view takes none
        assert (memory.live, memory.peak) == (800, 800)
        del x
        assert (memory.live, memory.peak) == (400, 800)
        assert y.sum().item() == 100
    assert memory.peak == 800
