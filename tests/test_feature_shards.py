"""Images in shards are read around what is damaged, and shards of features say what they hold."""

import io
import tarfile

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from diffseg.feature_files import Item, features_to_bytes
from diffseg.feature_shards import Features, list_features, list_files, read_features, read_pictures, shard_to_bytes

MEMBERS = {'a/0.png': b'zero', 'a/0.txt': b'label', '1.JPG': b'one' * 300, '2.png': b'two'}
WHOLE = [('s.tar/a/0.png', b'zero'), ('s.tar/1.JPG', b'one' * 300), ('s.tar/2.png', b'two')]


def tar(members=MEMBERS):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w') as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def read(tmp_path):
    def read(data, done=(), name='s.tar'):
        (tmp_path / name).write_bytes(data)
        return list(read_pictures(LocalFileSystem(), str(tmp_path / name), name, set(done)))

    return read


def test_members_of_a_tar_file(read):
    assert [picture[:2] for picture in read(tar())] == WHOLE
    assert [picture[:2] for picture in read(tar(), done=['s.tar/1.JPG'])] == [WHOLE[0], WHOLE[2]]
    assert read(tar({})) == []


def test_what_is_damaged_is_an_error_behind_all_else(read):
    start = 3 * 1024 + 512  # of 2.png, behind three members of a block of header and one, one, and two of content
    assert tar()[start : start + 5] == b'2.png'
    cut_content, cut_header, cut_end = tar()[: start - 700], tar()[:start], tar()[: start + 1024]
    damaged = tar()[:start] + b'x' * 512 + tar()[start + 512 :]
    for data, left in (
        (cut_content, 1),
        (cut_header, 2),
        (damaged, 2),
        (cut_end, 3),
        (b'no tar file' * 99, 0),
        (b'', 0),
    ):
        *pictures, failure = read(data)
        assert [picture[:2] for picture in pictures] == WHOLE[:left]
        assert failure.name == 's.tar' and failure.content is None and 's.tar: cannot be read (' in failure.error


def test_a_name_twice_is_an_image_once(read):
    first, second = tar({'0.png': b'first'}), tar({'0.png': b'second'})
    picture, failure = read(first[:1024] + second)
    assert picture == ('s.tar/0.png', b'first', None)
    assert failure.name == 's.tar/0.png' and failure.content is None and 'before' in failure.error


def test_an_image_file_holds_itself(read):
    assert [picture[:2] for picture in read(b'zero', name='0.png')] == [('0.png', b'zero')]
    assert read(b'zero', name='0.png', done=['0.png']) == []


def features(name):
    return Features(name, 'state', features_to_bytes({'layer': torch.full((1, 2, 3, 4), 5.0)}, {'source': name}))


def test_shards_are_listed_and_read_back(tmp_path):
    (tmp_path / 'features-1.tar').write_bytes(shard_to_bytes([features('s.tar/0.png'), features('1.jpg')], '.tar'))
    (tmp_path / 'features-2.tar').write_bytes(shard_to_bytes([features('s.tar/2.png')], '.tar'))
    (tmp_path / '.features-3.tar.0.partial').write_bytes(b'half')
    assert list_features(tmp_path) == dict.fromkeys(['s.tar/0.png', '1.jpg', 's.tar/2.png'], 'state')
    for name, activations, metadata in read_features(tmp_path):
        assert metadata == {'source': name}
        torch.testing.assert_close(activations, {'layer': torch.full((1, 2, 3, 4), 5.0)})
    with tarfile.open(tmp_path / 'features-1.tar') as archive:
        assert archive.getnames() == ['__index__', 's.tar/0.png.safetensors', '1.jpg.safetensors']
    assert list_features(tmp_path / 'nothing') == {}


def test_a_folder_of_other_or_repeated_features_is_refused(tmp_path):
    (tmp_path / 'features-1.tar').write_bytes(shard_to_bytes([features('1.jpg')], '.tar'))
    (tmp_path / 'features-2.tar').write_bytes((tmp_path / 'features-1.tar').read_bytes())
    with pytest.raises(ValueError, match=r'features-2\.tar holds 1\.jpg, which is in another'):
        list_features(tmp_path)
    for data in (tar(), b'half'):
        (tmp_path / 'features-2.tar').write_bytes(data)
        with pytest.raises(ValueError, match=r'features-2\.tar is no shard of features'):
            list_features(tmp_path)


def test_what_is_left_to_read(tmp_path):
    items = []
    for name in ('0.png', '1.png', 'deep/s.tar', 'gone.png'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'x')
        items.append(Item(LocalFileSystem(), str(path), name))
    states = {item.name: item.state() for item in items}
    path.unlink()
    shard = states['deep/s.tar']
    done = {'1.png': states['1.png'], 'deep/s.tar/a/7.png': shard, 'of/another/list.png': 'state'}
    files, failures = list_files(items, done)
    assert [(file.name, file.done) for file in files] == [('0.png', []), ('deep/s.tar', ['deep/s.tar/a/7.png'])]
    assert [name for name, _ in failures] == ['gone.png']
    (tmp_path / '1.png').write_bytes(b'another')
    with pytest.raises(ValueError, match=r'1\.png has changed'):
        list_files(items, done)
