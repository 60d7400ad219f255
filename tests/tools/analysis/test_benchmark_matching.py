"""The benchmark of matching: both procedures give the same, and it prints a table."""

import json

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analysis/benchmark_matching')


def test_published_matching_finds_the_same(tool):
    source, target = torch.randn(2, 16, 6, 6)
    points = torch.tensor([[0, 0], [10, 20], [39, 29]])
    ours = tool.match_points(source, target, points, (30, 40), (30, 40))
    theirs = tool.published_matches(source, target, points, (30, 40))
    similarity = F.normalize(F.interpolate(target[None], (30, 40), mode='bilinear')[0], dim=0)
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):  # at the borders, pixels of the same descriptor
        torch.testing.assert_close(similarity[:, a[1], a[0]], similarity[:, b[1], b[0]])


def test_matching(tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tool, 'in_subprocess', lambda _, case: tool.measure(case))
    options = f'6 8 --channels 16 --image-size 30 40 --repeat 1 --device cpu --json {tmp_path / "m.json"}'
    assert tool.main(options.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith('| cells | channels | image | keypoints | ms |')
    assert [line.split('|')[1:5] for line in lines[4:]] == [[f' {n} ', ' 16 ', ' 30 x 40 ', ' 10 '] for n in (6, 8)]
    for row in json.loads((tmp_path / 'm.json').read_text()):
        assert row['measured']['ratio'] > 0 and row['measured']['same'] <= 10
        assert row['measured']['difference'] < 1e-6
