"""The explorer's command line: it serves a page, and refuses what would be unsafe."""

import os
import re
import signal
import time
from pathlib import Path

import httpx2
import pytest
from explorer import MODEL, draw_horses, save
from processes import forkserver, run_tool

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'explore.py'


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('explore')


def test_it_serves_until_it_is_interrupted(tmp_path):
    folder, output = save(tmp_path / 'pictures', draw_horses(1)), tmp_path / 'output'
    arguments = [str(folder), '--model', str(MODEL), '--no-browser', '--port', '0', '--device', 'cpu']
    server = forkserver().Process(target=run_tool, args=(TOOL, output, arguments))
    server.start()
    try:
        while not (output.exists() and (opened := re.search(r'open (http://127.0.0.1:\d+/) ', output.read_text()))):
            assert server.is_alive()
            time.sleep(0.05)
        address = opened[1]
        assert '<main' in httpx2.get(address).text
        assert [p['name'] for p in httpx2.get(f'{address}api/state').json()['pictures']] == ['horse_0.png']
        assert httpx2.get(address, headers={'Host': 'evil.example'}).status_code == 421
    finally:
        os.kill(server.pid, signal.SIGINT)
        server.join(timeout=30)
    assert server.exitcode == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--host', '0.0.0.0'], 'give --token'),
        (['--host', '0.0.0.0', '--token', 'short'], 'at least 16'),
        (['--layers', 'no-such-layer'], 'no-such-layer'),
        (['--search', 'nowhere'], 'ranking.json'),
        (['--port', '1', '--host', '203.0.113.1', '--token', 'x' * 16], 'choose another --port'),
    ],
)
def test_errors(tool, tmp_path, capsys, options, message):
    assert tool.main([str(tmp_path), '--model', MODEL, '--no-browser', *options]) == 2
    assert message in capsys.readouterr().err


def test_no_such_folder(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path / 'nowhere'), '--model', MODEL]) == 2
    assert 'is not a folder' in capsys.readouterr().err


def test_the_network_input_has_the_size_of_the_model_unless_told_otherwise(tool):
    def size(*options):
        args = tool.parse_args(['pictures', '--model', MODEL, *options])
        return tool.backbone_config(args, ['unet-out'], [50])['input_size']

    assert size() == (64, 64) and size('--size', '128x96') == (128, 96) and size('--size', 'own') is None
    assert os.environ.get('DIFFSEG_TOKEN') is None
