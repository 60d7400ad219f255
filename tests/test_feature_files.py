"""Images are listed, and features written, locally and behind fsspec alike."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from diffseg.feature_files import (
    check_configuration,
    features_from_bytes,
    find_images,
    header,
    is_complete,
    write_features,
)
from diffseg.files import locate

CONTENT = {'b.jpg': b'b', 'a/x.png': b'ax', 'a/deep/x.PNG': b'adx', 'a/x.npy': b'', '.hidden/x.png': b'', '.x.png': b''}
NAMES = ['a/deep/x.PNG', 'a/x.png', 'b.jpg']
CONFIGURATION = {'timesteps': [50], 'size': [64, 64]}


@pytest.fixture
def memory():
    fs = MemoryFileSystem()
    yield fs
    fs.rm('/', recursive=True)


def save_photos(kind: str, folder: Path, memory: MemoryFileSystem) -> tuple[str, str]:
    """Make the files of `CONTENT`; returns the URL of their folder, and what is recorded as root."""
    if kind == 'zip':
        with zipfile.ZipFile(folder / 'photos.zip', 'w') as archive:
            for name, content in CONTENT.items():
                archive.writestr(f'photos/{name}', content)
        return (f'zip://photos::{folder}/photos.zip',) * 2
    if kind == 'memory':
        memory.pipe({f'/photos/{name}': content for name, content in CONTENT.items()})
        return 'memory://photos', 'memory:///photos'
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / 'link.png').symlink_to('nothing.png')
    return (f'{folder}/a/..' if kind == 'folder' else f'file://{folder}'), str(folder)


@pytest.mark.parametrize('kind', ['folder', 'file', 'zip', 'memory'])
def test_a_folder_is_searched_wherever_it_is(kind, tmp_path, memory):
    url, expected = save_photos(kind, tmp_path, memory)
    items, others, root = find_images(url)
    assert [item.name for item in items] == NAMES and others == {'.npy': 1} and root == expected
    assert [item.content() for item in pickle.loads(pickle.dumps(items))] == [CONTENT[name] for name in NAMES]
    states = [item.state() for item in items]
    assert len(set(states)) == 3
    type(items[0].fs).clear_instance_cache()
    assert [item.state() for item in find_images(url)[0]] == states, 'of another process as well'


def test_a_list_names_paths_and_urls(tmp_path, memory):
    save_photos('memory', tmp_path, memory)
    memory.pipe_file('/photos/list.txt', b'b.jpg\n\n a/x.png\nmemory://photos/b.jpg\n')
    items, _, root = find_images('memory://photos/list.txt')
    assert [item.name for item in items] == ['a/x.png', 'b.jpg'] and root == 'memory:///photos'
    (tmp_path / 'list.txt').write_text('memory://photos/a/x.png')
    assert find_images(f'{tmp_path}/list.txt', 'memory://')[0][0].name == 'photos/a/x.png'
    for root in (None, 'memory://photos/b'):
        with pytest.raises(ValueError, match=r'/photos/a/x.png lies outside .*; set --root'):
            find_images(f'{tmp_path}/list.txt', root)
    with pytest.raises(ValueError, match='no images in memory://photos/none'):
        memory.makedirs('/photos/none')
        find_images('memory://photos/none')


@pytest.mark.parametrize('protocol', ['', 'memory://'])
def test_a_file_is_what_its_header_says_and_whole(protocol, tmp_path, memory):
    url, _ = save_photos('zip', tmp_path, memory)
    item = find_images(url)[0][1]
    metadata = header(item, CONFIGURATION)
    assert metadata['source'] == 'a/x.png' and metadata['source_state'] == item.state()
    fs, folder = locate(f'{protocol}{tmp_path}/out')
    path = item.output(folder)
    assert path == f'{tmp_path}/out/a/x.png.safetensors' and not is_complete(fs, path, metadata)
    activations = {'layer': torch.randn(1, 3, 2, 2).half(), 'empty': torch.zeros(1, 0, 2, 2)}
    write_features(f'{protocol}{path}', activations, metadata | {'input_size': '64x64'})
    assert is_complete(fs, path, metadata) and not is_complete(fs, path, header(item, CONFIGURATION | {'size': None}))
    data = fs.cat_file(path)
    stored, read = features_from_bytes(data)
    torch.testing.assert_close(stored, activations, rtol=0, atol=0)
    assert read == metadata | {'input_size': '64x64'}
    for damaged in (data[:-1], data[:50], b'', b'[3]' * 9, (3).to_bytes(8, 'little') + b'{}}'):
        fs.pipe_file(path, damaged)
        assert not is_complete(fs, path, metadata)


@pytest.mark.parametrize('protocol', ['', 'memory://'])
def test_configurations_are_recorded_and_compared(protocol, tmp_path, memory):
    out = f'{protocol}{tmp_path}/out'
    for _ in range(2):
        check_configuration(out, CONFIGURATION)
    with pytest.raises(ValueError, match=r'another configuration \(size: \[64, 64\] there, None here\)'):
        check_configuration(out, CONFIGURATION | {'size': None})
