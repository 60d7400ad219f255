"""What the tests of the cache compute, and what they do in other processes."""

import os
import random
import signal
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffseg.cache import FeatureCache

IMAGES = 12
ENTRY = 1500  # bytes, more than an entry of `compute` takes


def make_images(count: int = IMAGES, size: int = 16, seed: int = 0) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def compute(images: Tensor) -> list[Tensor]:
    """Two maps (B, 6, H/2, W/2) and (B, 3, H/4, W/4)."""
    half = F.avg_pool2d(images, 2)
    return [torch.cat([half, 100 * half.square()], dim=1), F.avg_pool2d(half, 2)]


def use(folder: Path, seed: int) -> None:
    """Fetch batches in an order of this process's own, from a cache that holds half of the images."""
    torch.set_num_threads(1)
    cache = FeatureCache(folder, 'float32', max_size=IMAGES * ENTRY // 2)
    images, order = make_images(), random.Random(seed)
    for _ in range(50):
        chosen = images[order.sample(range(IMAGES), 3)]
        for found, expected in zip(cache.fetch(chosen, {}, compute), compute(chosen), strict=True):
            assert torch.equal(found, expected)
    assert cache.counts.hits and cache.counts.misses and cache.counts.evicted and not cache.counts.damaged


def write_on(folder: Path) -> None:
    """Write entries of 300 kB until the process is killed."""
    torch.set_num_threads(1)
    cache = FeatureCache(folder, max_size='6MB')
    seed = os.getpid()
    while True:
        cache.fetch(make_images(1, size=256, seed=seed), {}, compute)
        seed += 1


def die_in_writing(folder: Path) -> None:
    """Be killed when an entry is written and not yet in its place."""
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    FeatureCache(folder).fetch(make_images(1), {}, compute)
