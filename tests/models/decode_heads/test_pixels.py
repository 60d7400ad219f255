import pytest
import torch
from torch.nn import functional as F

from diffseg.models.decode_heads.pixels import LabelledPixels, sample_pixels, upsample

SIZES = [(3, 5), (6, 10), (3, 5), (7, 4)]
SIZE = (12, 19)


@pytest.fixture
def maps():
    return [torch.randn(2, channels, *size) for channels, size in zip((3, 2, 1, 4), SIZES, strict=True)]


@pytest.mark.parametrize('resize', ['bilinear', 'nearest'])
def test_sampled_pixels_are_those_of_upsampled_maps(maps, resize):
    maps = maps[:3] if resize == 'nearest' else maps
    finest = (6, 10)
    whole = torch.cat([upsample(x, SIZE, finest, resize) for x in maps], dim=1)  # (B, C, H, W)
    if resize == 'bilinear':
        expected = [F.interpolate(x, SIZE, mode='bilinear') for x in maps]
    else:
        repeated = torch.cat([F.interpolate(x, finest) for x in maps], dim=1)
        expected = [F.interpolate(repeated, SIZE, mode='bilinear')]
    torch.testing.assert_close(whole, torch.cat(expected, dim=1))

    pixels = torch.randint(2 * SIZE[0] * SIZE[1], (5, 4))
    last = [x.permute(0, 2, 3, 1) for x in maps]
    found = sample_pixels(last, pixels, SIZE, resize)
    torch.testing.assert_close(found, whole.permute(0, 2, 3, 1).flatten(0, 2)[pixels])
    half = sample_pixels([x.half() for x in last], pixels, SIZE, resize)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, rtol=0, atol=4e-3)


def test_maps_are_resized_each_in_its_way(maps):
    last = [x.permute(0, 2, 3, 1) for x in maps[:3]]
    pixels = torch.randint(2 * SIZE[0] * SIZE[1], (5, 4))
    expected = [sample_pixels(last, pixels, SIZE, mode).split([3, 2, 1], dim=-1) for mode in ('nearest', 'bilinear')]
    found = sample_pixels(last, pixels, SIZE, ['nearest', 'nearest', 'bilinear'])
    assert found.equal(torch.cat([*expected[0][:2], expected[1][2]], dim=-1))
    with pytest.raises(ValueError, match='each of 3'):
        sample_pixels(last, pixels, SIZE, ['nearest'])


def test_maps_larger_than_labels(maps):
    pixels = torch.arange(2 * 2 * 3)
    found = sample_pixels([maps[1].permute(0, 2, 3, 1)], pixels, (2, 3))
    expected = F.interpolate(maps[1], (2, 3), mode='bilinear').permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(found, expected)


def test_gradient_reaches_the_maps(maps):
    x = maps[0].requires_grad_()
    sample_pixels([x.permute(0, 2, 3, 1)], torch.arange(2 * SIZE[0] * SIZE[1]), SIZE).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(2.0 * 3 * SIZE[0] * SIZE[1]))


def test_labelled_pixels():
    labels = torch.randint(4, (2, 6, 8)).byte()
    labels[0, :3] = 255
    data = LabelledPixels([torch.randn(2, 3, 4, 5)], labels, 4)
    assert len(data) == 2 * 48 - 24
    order = data.permutations(seed=1, epoch=0, members=3, batch_size=10)
    assert order.shape == (7, 10, 3)
    assert all(len(each.unique()) == 70 for each in order.flatten(0, 1).unbind(1))
    assert (labels.flatten()[order.long()] != 255).all()
    assert order.equal(data.permutations(1, 0, 3, 10))
    for other in (data.permutations(2, 0, 3, 10), data.permutations(1, 1, 3, 10), order.roll(1, dims=2)):
        assert (order == other).float().mean() < 0.1
    features, truth = data.sample(order[0])
    assert features.shape == (10, 3, 5)
    assert truth.equal(labels.flatten()[order[0].long()].long())


def test_bad_labels():
    maps, labels = [torch.randn(1, 2, 2, 3)], torch.full((1, 4, 4), 255)
    with pytest.raises(ValueError, match='all 16 pixels'):
        LabelledPixels(maps, labels, 4)
    labels[0, 0, 0] = 4
    with pytest.raises(ValueError, match='label 4 is no class of 4'):
        LabelledPixels(maps, labels, 4)
    with pytest.raises(ValueError, match='bicubic'):
        sample_pixels(maps, torch.zeros(1, dtype=torch.long), (4, 4), 'bicubic')
