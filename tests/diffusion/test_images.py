"""Image files: the same pixels whatever the format, and nothing damaged passes."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffseg.diffusion.images import image_size, read_image, resize_images


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def test_values_and_order(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    image = read_image(tmp_path / 'a.png')
    assert image.shape == (3, 6, 10) and image_size(tmp_path / 'a.png') == (6, 10)
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)


def test_resize_is_pillows_bicubic(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    expected = np.asarray(Image.fromarray(pixels).resize((4, 3), Image.Resampling.BICUBIC)) / 127.5 - 1
    np.testing.assert_allclose(read_image(tmp_path / 'a.png', (3, 4)).permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize('size', [(48, 15), (60, 50), (10, 10), (30, 24)])
def test_tensors_are_resized_as_pillow_resizes_files(size):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 24, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    levels = (resize_images(images, size, 'bicubic')[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(levels - expected).max() < 1.01 and np.abs(levels - expected).mean() < 0.05
    assert resize_images(images, size).equal(torch.nn.functional.interpolate(images, size, mode='bilinear'))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
    upright = read_image(tmp_path / 'a.png')
    assert tuple(upright.shape[1:]) == image_size(tmp_path / 'a.png') == ((10, 6) if orientation > 4 else (6, 10))
    if orientation == 6:  # to be turned by 90 degrees clockwise
        np.testing.assert_allclose(upright.permute(1, 2, 0).numpy(), np.rot90(pixels, -1) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', '1'])
def test_other_modes_become_rgb(tmp_path, pixels, mode):
    path = tmp_path / ('a.tif' if mode == 'CMYK' else 'a.png')
    Image.fromarray(pixels).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 6, 10) and -1 <= image.min() and image.max() <= 1


def test_damage_is_refused(tmp_path, pixels):
    whole, cut = tmp_path / 'whole.jpg', tmp_path / 'cut.jpg'
    Image.fromarray(pixels.repeat(20, 0).repeat(20, 1)).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / 'text.png').write_text('not an image')
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    refused = {'cut.jpg': 'truncated', 'text.png': 'cannot', 'deep.png': '8 bits', 'no.png': 'cannot'}
    for name, message in refused.items():
        with pytest.raises(ValueError, match=f'{name}.*{message}'):
            read_image(tmp_path / name)
    assert image_size(cut) == image_size(whole), 'the header alone is read'
    with pytest.raises(ValueError, match=r'text\.png'):
        image_size(tmp_path / 'text.png')
    assert torch.is_tensor(read_image(whole))
