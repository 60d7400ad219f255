import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffseg.models.propagation import decode_joints, decode_mask, encode_joints, encode_mask
from diffseg.models.propagation.labels import stretch


def test_masks_agree_with_the_published_code(reference):
    values = load_file(reference('propagation') / 'propagation.safetensors')
    for soft, labels in zip(values['soft'], values['labels_x8'], strict=True):
        assert torch.equal(decode_mask(soft, labels.shape, labels.shape), labels)


@pytest.mark.parametrize('size', [(480, 854), (97, 61)])
def test_masks_are_resized_as_pillow_does_it(size):
    mask = torch.randint(5, size, dtype=torch.uint8)
    mask[0, 0] = 4
    cells = (60, 104)
    expected = torch.from_numpy(np.array(Image.fromarray(mask.numpy()).resize(cells[::-1], Image.Resampling.NEAREST)))
    labels = encode_mask(mask, cells)
    assert labels.shape == (5, *cells) and torch.equal(labels.sum(0), torch.ones(cells))
    assert torch.equal(labels.argmax(0), expected)
    decoded = decode_mask(labels, cells, size)
    expected = np.array(Image.fromarray(expected.numpy()).resize(size[::-1], Image.Resampling.NEAREST))
    assert torch.equal(decoded, torch.from_numpy(expected))


def test_a_mask_survives_being_labels(drawn_mask):
    mask = drawn_mask(96, 160)
    decoded = decode_mask(encode_mask(mask, (24, 40)), (96, 160), (96, 160))
    assert decoded.dtype == torch.uint8
    for k in range(3):
        assert (decoded[mask == k] == k).float().mean() > 0.9


def test_void_is_background_and_what_no_cell_holds_is_never_predicted():
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:8] = 255
    mask[8:, :8] = 1
    mask[0, 15] = 3
    labels = encode_mask(mask, (4, 4))
    assert labels.shape == (4, 4, 4)
    assert torch.equal(labels.sum((1, 2)), torch.tensor([12.0, 4, 0, 0]))
    assert set(decode_mask(labels, (16, 16), (16, 16)).unique().tolist()) == {0, 1}


def test_labels_are_stretched_each_by_itself():
    labels = torch.stack([torch.tensor([[0.2, 0.4]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])])
    assert stretch(labels).flatten(1).tolist() == [[0, 1], [0, 0], [1, 1]]


def test_an_object_that_fills_the_frame_stays():
    labels = encode_mask(torch.ones(16, 24, dtype=torch.uint8), (4, 6))
    assert (decode_mask(labels, (16, 24), (16, 24)) == 1).all()


def test_joints_survive_being_labels():
    size, cells = (240, 320), (40, 40)
    joints = torch.rand(50, 2) * torch.tensor([300.0, 220.0]) + 5
    labels = encode_joints(joints, size, cells)
    assert labels.shape == (50, *cells) and torch.equal(labels.amax((1, 2)), torch.ones(50))
    cell = torch.tensor([320 / 40, 240 / 40])
    assert ((decode_joints(labels, size) - joints).abs() < 0.75 * cell).all()


def test_a_joint_is_a_gaussian_around_its_nearest_cell():
    labels = encode_joints(torch.tensor([[9.6, 16.0]]), (40, 40), (10, 10))[0]  # cell (2.4, 4)
    assert labels[4, 2] == 1
    assert labels[4, 1] == labels[4, 3] == labels[3, 2] == labels[5, 2] == pytest.approx(np.exp(-2))
    assert labels[4, 0] == pytest.approx(np.exp(-8)) and labels[4, 4] == labels[6, 2] == 0
    assert labels.count_nonzero() == 16


def test_joints_are_the_mean_of_three_cells_and_none_where_there_is_no_label():
    soft = torch.zeros(2, 10, 20)
    soft[0, 3, 4], soft[0, 3, 5], soft[0, 5, 4], soft[0, 9, 19] = 0.5, 0.3, 0.2, 0.1
    assert decode_joints(soft, (20, 60)).tolist() == [pytest.approx([4.3 * 3, 3.4 * 2]), [-1, -1]]
    outside = encode_joints(torch.tensor([[-9.0, 5.0], [5.0, 90.0]]), (20, 60), (10, 20))
    assert outside.count_nonzero() == 0
