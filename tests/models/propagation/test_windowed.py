from collections import deque

import pytest
import torch
from safetensors import safe_open
from torch.autograd.profiler import profile

from diffseg.models.propagation.windowed import propagate_labels

CHANNELS = 16


def masked_matrix(target, context, labels, topk, radius, temperature):
    """Every cell of the context with every cell of the target, in double precision, zeroed outside of windows."""
    h, w = target.shape[1:]
    unit = [torch.nn.functional.normalize(x.double().flatten(1), dim=0) for x in (target, *context)]  # (C, h*w)
    y, x = torch.cartesian_prod(torch.arange(h), torch.arange(w)).T
    window = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    weights = torch.cat([(u.T @ unit[0] / temperature).exp() * window for u in unit[1:]])  # (n*h*w, h*w)
    weights[weights < weights.topk(min(topk, len(weights)), dim=0).values[-1]] = 0
    weights /= weights.sum(0)
    return (torch.cat([label.double().flatten(1) for label in labels], dim=1) @ weights).unflatten(1, (h, w))


def random_frames(n, channels, h, w):
    common = torch.randn(channels, h, w)  # so that windows have something to find
    return common + 0.5 * torch.randn(channels, h, w), common + 0.5 * torch.randn(n, channels, h, w)


@pytest.mark.parametrize('chunk', [1, 3000, 2**24])
@pytest.mark.parametrize(
    ('n', 'h', 'w', 'radius', 'topk'),
    [
        (4, 11, 19, 3, 7),
        (1, 1, 1, 0, 1),
        (2, 9, 1, 2, 3),
        (3, 10, 7, 0, 2),  # only the same place in each frame
        (3, 10, 7, 0, 5),  # fewer cells in a window than count
        (1, 8, 17, 1, 9),  # fewer at the borders alone
        (2, 6, 5, 40, 15),  # a window that holds the map
        (2, 4, 5, 2, 1000),  # more than there are
    ],
)
def test_the_same_as_the_masked_matrix(n, h, w, radius, topk, chunk):
    target, context = random_frames(n, 16, h, w)
    labels = torch.rand(n, 3, h, w).softmax(1)
    found = propagate_labels(target, context, labels, topk, radius, 0.2, chunk)
    expected = masked_matrix(target, context, labels, topk, radius, 0.2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(h, w))


@pytest.mark.parametrize('chunk', [1, 2**24])
@pytest.mark.parametrize('topk', [1, 4, 30])
def test_cells_as_similar_as_the_last_one_all_count(topk, chunk):
    context = torch.randint(2, (3, 4, 9, 12)) * 2.0 - 1  # cosines are multiples of 0.5, exactly
    context = context.repeat(2, 1, 1, 1)
    target, labels = context[0].roll(1, 2), torch.rand(6, 2, 9, 12)
    found = propagate_labels(target, context, labels, topk, 2, 0.25, chunk)
    expected = masked_matrix(target, context, labels, topk, 2, 0.25)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_agrees_with_the_published_code(reference):
    with safe_open(reference('propagation') / 'propagation.safetensors', 'pt') as file:
        frames, first, soft = (file.get_tensor(name) for name in ('frames', 'first', 'soft'))
        settings = file.metadata()
    options = int(settings['topk']), int(settings['radius']), float(settings['temperature'])
    previous = deque(maxlen=int(settings['previous_frames']))
    for frame, expected in zip(frames[1:], soft, strict=True):
        context, labels = zip((frames[0], first), *previous, strict=True)
        found = propagate_labels(frame, context, labels, *options)
        assert (found - expected).norm() / expected.norm() < 1e-5
        previous.append((frame, found))


def test_neither_layout_nor_precision_of_descriptors_nor_kind_of_labels_matters():
    target, context = (x.half() for x in random_frames(2, 16, 9, 10))
    labels = torch.randint(2, (2, 3, 9, 10), dtype=torch.bool)
    expected = propagate_labels(target.float(), context.float(), labels.float(), 5, 3, 0.1)
    assert torch.equal(propagate_labels(target, list(context), list(labels), 5, 3, 0.1), expected)
    last = context.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(propagate_labels(target, last, labels, 5, 3, 0.1), expected)
    torch.testing.assert_close(propagate_labels(4 * target, context / 2, labels, 5, 3, 0.1), expected)


def test_small_temperatures_do_not_overflow():
    target, context = random_frames(2, 16, 9, 10)
    labels = propagate_labels(target, context, torch.rand(2, 3, 9, 10), 5, 3, 1e-3)
    assert labels.isfinite().all()


def peak_bytes(n: int, h: int, w: int, chunk: int) -> int:
    """What is allocated at most at any time, on top of what was there."""
    target, context = random_frames(n, CHANNELS, h, w)
    labels = torch.rand(n, 2, h, w)
    with profile(use_cpu=True, profile_memory=True) as recorded:
        propagate_labels(target, context, labels, 5, 2, 0.2, chunk)
    held = peak = 0
    for event in recorded.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    return peak


@pytest.mark.parametrize(('n', 'h', 'w'), [(5, 6, 6), (40, 6, 6), (5, 24, 12)])
def test_memory_is_bounded_for_any_number_of_frames_and_any_resolution(n, h, w):
    chunk = 1250
    similarities = 3 * chunk  # these, which of them to drop, the weights
    maps = (2 * CHANNELS + n + 2) * h * w  # the target twice, norms, the result
    assert peak_bytes(n, h, w, chunk) < 4 * (similarities + maps) < 4 * n * (h * w) ** 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'context': []}, '0 frames of context and labels of 2'),
        ({'labels': torch.ones(1, 3, 4, 5)}, '2 frames of context and labels of 1'),
        ({'context': torch.ones(2, 8, 4, 6)}, r'\(8, 4, 6\).*\(8, 4, 5\)'),
        ({'labels': torch.ones(2, 3, 5, 4)}, r'\(3, 5, 4\).*\(4, 5\)'),
        ({'topk': 0}, 'topk is 0'),
        ({'radius': -1}, 'radius is -1'),
        ({'temperature': 0.0}, 'temperature is 0'),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {'context': torch.ones(2, 8, 4, 5), 'labels': torch.ones(2, 3, 4, 5)}
    with pytest.raises(ValueError, match=message):
        propagate_labels(torch.ones(8, 4, 5), **{**good, 'topk': 1, 'radius': 1, 'temperature': 0.1, **change})
