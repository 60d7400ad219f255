"""The table of extraction's throughput."""

import numpy as np
from PIL import Image


def test_rates_and_their_ratio(load_tool, tiny_pipeline, tmp_path, capsys):
    for i in range(3):
        Image.fromarray(np.full((64, 64, 3), i, np.uint8)).save(tmp_path / f'{i}.png')
    options = f'--model {tiny_pipeline} --layers up-level2-repeat0-res-out --size 32 --batch 2 --repeat 2 --device cpu'
    main = load_tool('analysis/benchmark_extraction').main
    assert main([str(tmp_path), *options.split()]) == 0
    *_, head, _, row = capsys.readouterr().out.splitlines()
    names, cells = ([cell.strip() for cell in line.strip('|').split('|')] for line in (head, row))
    result = dict(zip(names, cells, strict=True))
    assert [result[name] for name in ('images', 'size', 'batch', 'workers')] == ['3', '32x32', '2', '0']
    low, high = map(float, result['all ratios'].split(', '))
    assert 0 < low <= float(result['ratio']) <= high
    (tmp_path / '1.png').write_bytes(b'')
    assert main([str(tmp_path), *options.split()]) == 2
    assert '1 of 3 images cannot be used; the first: ' in capsys.readouterr().err
