"""The benchmark of label propagation: both procedures give the same, and it prints a table."""

import json

import pytest
import torch


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analysis/benchmark_propagation')


def test_published_propagation_finds_the_same(tool):
    target, context, labels = torch.randn(8, 6, 9), torch.randn(3, 8, 6, 9), torch.rand(3, 2, 6, 9)
    ours = tool.propagate_labels(target, context, labels, 5, 2, 0.2)
    torch.testing.assert_close(tool.masked_matrix(target, context, labels, 5, 2, 0.2), ours)


def test_a_cell_whose_last_similarity_is_not_unique_is_undecided(tool):
    target, context = torch.randn(8, 1, 1).expand(8, 3, 3), torch.randn(1, 8, 3, 3)
    context[0, :, 2] = 5 * context[0, :, 0]  # other lengths, the same cosines
    margins = [tool.margin(target, context, 1, 1, topk, 1) for topk in range(1, 9)]
    assert sum(each < tool.ROUNDING for each in margins) == 3


def test_propagation(tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tool, 'in_subprocess', lambda _, case: tool.measure(case))
    options = f'--cells 8 12 --frames 2 --channels 16 --repeat 1 --device cpu --json {tmp_path / "p.json"}'
    assert tool.main(options.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith('| cells | frames | channels | ms | published ms | ratio |')
    assert lines[4].split('|')[1:4] == [' 8 x 12 ', ' 2 + 1 ', ' 16 ']
    (row,) = json.loads((tmp_path / 'p.json').read_text())
    assert row['measured']['difference'] < 1e-5 and row['measured']['same'] == 1
