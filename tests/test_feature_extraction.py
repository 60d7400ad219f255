"""Many images to files: the same values whatever the batch and the process, and no failure stops the others."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from fake_device import HostWaitsError, fake_device
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from torch import Tensor, nn

from diffseg import feature_extraction
from diffseg.diffusion.images import read_image, scale_pixels
from diffseg.feature_extraction import StoredActivations, batches, default_workers, extract_features, start_fork_server
from diffseg.feature_files import features_from_bytes, find_images, header
from diffseg.files import locate, write_bytes

SIDES = [(8, 8), (8, 12), (8, 8), (8, 8), (8, 12), (8, 8), (4, 4)]
NAMES = [f'{i}.png' for i in range(len(SIDES))]


class Pixels(nn.Module):
    """Two activations of images: their values, and the inverse of their mean, which is infinite for mid-grey ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if min(images.shape[-2:]) < 8:
            raise ValueError('too small')
        self.shapes.append(tuple(images.shape))
        values = (images * self.weight)[:, None]  # (B, 1, 3, H, W)
        return {'values': values, 'inverse': 1 / values.mean((2, 3, 4), keepdim=True)}


def encoded(height: int, width: int, seed: int) -> bytes:
    buffer = BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, 'png')
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    for i, (side, name) in enumerate(zip(SIDES, NAMES, strict=True)):
        (tmp_path / 'photos' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'photos' / name).write_bytes(encoded(*side, i))
    return tmp_path / 'photos'


@pytest.fixture
def memory():
    fs = MemoryFileSystem()
    yield fs
    fs.rm('/', recursive=True)


def extract(extractor: nn.Module, source, out='memory://out', **options) -> dict[str, str | None]:
    headers = {item: header(item, {'timesteps': [50]}) for item in find_images(source)[0]}
    return {item.name: failure for item, failure in extract_features(extractor, headers, *locate(out), **options)}


def grouped(sizes: str, length: int) -> list[str]:
    """Batches of images whose sizes are letters; a dot is no image."""
    samples = [(i, '.' if size == '.' else np.zeros(ord(size))) for i, size in enumerate(sizes)]
    groups = batches(samples, length)
    return [images if isinstance(images, str) else ''.join(sizes[i] for i in members) for members, images in groups]


def test_images_of_one_size_share_a_batch_and_none_waits_forever(monkeypatch):
    assert grouped('abac', 1) == ['a', 'b', 'a', 'c']
    assert grouped('ab.abaccb', 2) == ['.', 'aa', 'bb', 'cc', 'a', 'b']
    monkeypatch.setattr(feature_extraction, 'LOOK_AHEAD', 1)
    assert grouped('abbcbcc', 2) == ['bb', 'a', 'cc', 'b', 'c'], 'three are too many, and the first is the oldest'


def test_values_do_not_depend_on_the_batch(photos, memory):
    extractor = Pixels()
    failures = extract(extractor, photos, batch=3, dtype=torch.float32)
    assert failures == dict.fromkeys(NAMES) | {'6.png': 'too small'}
    assert sorted(extractor.shapes) == [(1, 3, 8, 8), (2, 3, 8, 12), (3, 3, 8, 8)]
    for name, (height, width) in zip(NAMES[:6], SIDES, strict=False):
        stored, metadata = features_from_bytes(memory.cat_file(f'/out/{name}.safetensors'))
        assert torch.equal(stored['values'][0], read_image(photos / name))
        assert metadata['source'] == name and metadata['input_size'] == f'{height}x{width}'
    assert len(memory.find('/out')) == 6


def test_failures_are_named_and_stop_nothing_else(photos, memory, monkeypatch):
    Image.fromarray(np.uint8([[[127, 127, 127], [128, 128, 128]]])).resize((8, 8), 0).save(photos / '0.png')
    (photos / '1.png').write_bytes(encoded(8, 12, 1)[:200])
    monkeypatch.setattr(feature_extraction, 'write_bytes', refuse('2.png', '5.png'))
    failures = extract(Pixels(), photos, batch=4)
    assert {name for name, failure in failures.items() if failure is None} == {'3.png', '4.png'}
    assert memory.find('/out') == ['/out/3.png.safetensors', '/out/4.png.safetensors']
    assert failures['0.png'].startswith('NaN or infinity in inverse in float16; store in float32')
    assert '1.png: cannot be read as an image' in failures['1.png'] and failures['5.png'] == 'quota exceeded'


def refuse(*names: str):
    """`write_bytes` for a store that does not take the files of these images."""

    def write(fs, path, data):
        if any(name in path for name in names):
            raise OSError('quota exceeded')
        write_bytes(fs, path, data)

    return write


def test_a_store_that_takes_nothing_ends_the_run(photos, memory, monkeypatch):
    monkeypatch.setattr(feature_extraction, 'REFUSED', 3)
    monkeypatch.setattr(feature_extraction, 'write_bytes', refuse('.png'))
    with pytest.raises(OSError, match=r'3 files in a row could not be written; the last: 2\.png: quota exceeded'):
        extract(Pixels(), photos, size=(8, 8))


def test_processes_decode_the_same(photos, memory, tmp_path):
    with zipfile.ZipFile(tmp_path / 'photos.zip', 'w') as archive:
        for name in NAMES:
            archive.write(photos / name, name)
        archive.writestr('broken.png', b'no image')
    start_fork_server()
    failures = extract(Pixels(), f'zip://::{tmp_path}/photos.zip', size=(9, 11), dtype=torch.float32, workers=1)
    assert failures.pop('broken.png').startswith('broken.png: cannot be read as an image')
    assert failures == dict.fromkeys(NAMES)
    for name in NAMES:
        stored, _ = features_from_bytes(memory.cat_file(f'/out/{name}.safetensors'))
        assert torch.equal(stored['values'][0], read_image(photos / name, (9, 11)))


@pytest.mark.parametrize(
    ('cores', 'images', 'device', 'workers'),
    [(2, 99, 'cuda', 0), (2, 10**6, 'cuda', 1), (64, 250, 'cuda', 2), (64, 10**6, 'cuda', 8), (64, 10**6, 'cpu', 0)],
)
def test_workers_are_as_many_as_are_of_use(cores, images, device, workers, monkeypatch):
    monkeypatch.setattr(feature_extraction.os, 'sched_getaffinity', lambda process: range(cores), raising=False)
    assert default_workers(images, device) == workers


def test_nothing_but_the_copy_of_activations_waits_for_a_device():
    extractor = Pixels()
    with fake_device(extractor) as to_device:
        images = scale_pixels(to_device(torch.zeros(2, 3, 8, 12, dtype=torch.uint8)))
        activations = StoredActivations.convert(extractor(images), torch.float16)
        assert activations.finite.device.type == 'cuda' and activations.finite.shape == (2, 2)
        with pytest.raises(HostWaitsError):
            activations.finite.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_gpu_gives_the_same(photos, memory):
    for out, extractor in (('memory://cpu', Pixels()), ('memory://cuda', Pixels().cuda())):
        assert extract(extractor, photos, out, batch=2)['5.png'] is None
    for path in memory.find('/cpu'):
        expected, stored = (features_from_bytes(memory.cat_file(x))[0] for x in (path, path.replace('cpu', 'cuda')))
        assert torch.equal(stored['values'], expected['values'])
        torch.testing.assert_close(stored['inverse'], expected['inverse'], rtol=1e-2, atol=0)
