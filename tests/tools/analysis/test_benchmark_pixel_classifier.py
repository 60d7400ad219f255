import pytest


def test_small(load_tool, capsys):
    tool = load_tool('analysis/benchmark_pixel_classifier')
    arguments = '--images 2 --maps 3@4 5@2 --size 32 --classes 4 --iterations 3 --device cpu'
    result = tool.main(arguments.split())
    assert result['maps kept (GB)'] == pytest.approx(2 * (3 * 16 + 5 * 4) * 2e-9)
    assert result['published maps (GB)'] == pytest.approx(2 * 8 * 32 * 32 * 4e-9)
    assert result['peak memory (GB)'] > 0.01
    assert '2 images, 8 channels, 4 classes, 32x32' in capsys.readouterr().out
