"""Activations of many images to files: images are decoded, and files are written, while the device computes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from fsspec import AbstractFileSystem
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_pixels, scale_pixels
from diffseg.feature_files import Item, features_to_bytes
from diffseg.files import write_bytes

WORKERS = 8  # at most, unless more are requested
IMAGES_PER_WORKER = 100  # a process starts in about the time in which it decodes so many
LOOK_AHEAD = 8  # batches of images that wait for others of their size
WRITERS = 16  # threads, most of whose time is the latency of a remote store
PENDING = 2**28  # bytes of activations beyond a batch that wait to be written
REFUSED = 2 * WRITERS  # files in a row after which a store is taken to accept none


def default_workers(images: int, device: torch.device | str) -> int:
    """Number of processes that decode so many images for a device: at most half of the processor's cores.

    None decode a few images, nor images for the processor itself, whose cores all compute.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return 0 if torch.device(device).type == 'cpu' else min(WORKERS, cores // 2, images // IMAGES_PER_WORKER)


def start_fork_server(modules: Sequence[str] = ()) -> None:
    """Start the process of which workers are forks, without waiting until it has imported what they need.

    Forks of this process itself, which has threads, could wait forever for a lock that one of these held.

    Args:
        modules: What the script imports, which workers import too.
    """
    multiprocessing.get_context('forkserver').set_forkserver_preload([__name__, *modules])
    multiprocessing.forkserver.ensure_running()


class Decoder(Dataset):
    """Turns an image into its 8-bit values (H, W, 3), or into the reason why it cannot be read.

    Arrays pass from process to process through pipes; tensors would need as much shared memory, which containers limit.
    """

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size

    def __getitem__(self, item: Item) -> tuple[Item, np.ndarray | str]:
        try:
            return item, read_pixels(item.path, self.size, item.content()).permute(1, 2, 0).numpy()
        except (OSError, ValueError) as error:
            return item, str(error)


def decode(
    items: Iterable[Item], size: tuple[int, int] | None, device: torch.device, workers: int = 0, ahead: int = 0
) -> Iterator[tuple[Item, np.ndarray | str]]:
    """Decode images in order.

    Args:
        items: The images.
        size: (height, width) to resize to; None keeps the size of each image.
        device: For which images are decoded; if it is a CUDA device, a thread receives them from the processes.
        workers: Number of processes, see `start_fork_server`; 0 decodes in this one, when the caller asks for an image.
        ahead: Number of images that processes decode before they are asked for, at least two each.

    Yields:
        An image and its values (H, W, 3), uint8, or the reason why it cannot be read.
    """
    options = {}
    if workers:
        options = {
            'multiprocessing_context': 'forkserver',
            'worker_init_fn': _depend_on_parent,
            'prefetch_factor': max(2, -(-ahead // workers)),
        }
    yield from DataLoader(
        Decoder(size),
        sampler=items,
        batch_size=None,
        collate_fn=tuple,  # arrays, not tensors
        num_workers=workers,
        pin_memory=device.type == 'cuda',  # for its thread, which takes what comes from the workers
        **options,
    )


def _depend_on_parent(worker: int) -> None:
    """Leave Ctrl-C, which all processes of a terminal get, to the process that started the workers, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Unlike DataLoader's own watch, which is on the parent in the system's sense: the fork server."""
    multiprocessing.parent_process().join()
    os._exit(1)


def batches(
    samples: Iterable[tuple[Item, np.ndarray | str]], length: int
) -> Iterator[tuple[list[Item], list[np.ndarray]] | tuple[Item, str]]:
    """Group images of one size, which need not be neighbours.

    At most `LOOK_AHEAD` batches of images wait for others of their size; if they are more, those of the size that has
    waited longest are a batch.

    Yields:
        Images and their values (H, W, 3) of one size, at most `length`; and what is no image as it comes.
    """
    waiting: dict[tuple[int, ...], tuple[list[Item], list[np.ndarray]]] = {}  # the first has waited longest
    count = 0
    for item, pixels in samples:
        if isinstance(pixels, str):
            yield item, pixels
            continue
        members, images = waiting.setdefault(pixels.shape, ([], []))
        members.append(item)
        images.append(pixels)
        count += 1
        full = pixels.shape if len(members) == length else next(iter(waiting)) if count > LOOK_AHEAD * length else None
        if full is not None:
            batch = waiting.pop(full)
            count -= len(batch[0])
            yield batch
    yield from waiting.values()


def make_extractor(device: str, options: Mapping[str, Any]) -> DiffusionExtractor:
    """Make an extractor on a device that leaves the check of values to `StoredActivations`.

    Args:
        device: Of the extractor.
        options: Of `DiffusionExtractor`, without `runtime`.
    """
    return DiffusionExtractor(**options, runtime={'device': device, 'check_finite': False}).to(device)


class StoredActivations(NamedTuple):
    """Of a batch: values (B, T, C, h, w) of each layer as they are stored, and which are finite, (B, L)."""

    values: dict[str, Tensor]
    finite: Tensor

    @classmethod
    def convert(cls, activations: Mapping[str, Tensor], dtype: torch.dtype) -> 'StoredActivations':
        """Convert what an extractor returns, on its device."""
        values = {name: x.to(dtype).contiguous() for name, x in activations.items()}
        # the largest magnitude, which NaN is too, takes a tenth of the time of `isfinite` of each value
        finite = torch.stack([x.abs().amax((1, 2, 3, 4)) for x in values.values()], 1).isfinite()  # (B, L)
        return cls(values, finite)

    def image(self, index: int) -> dict[str, Tensor]:
        """Values (T, C, h, w) of an image.

        Raises:
            FloatingPointError: There is a NaN or an infinity.
        """
        wrong = [name for name, finite in zip(self.values, self.finite[index].tolist(), strict=True) if not finite]
        if wrong:
            dtype = str(self.values[wrong[0]].dtype).removeprefix('torch.')
            raise FloatingPointError(
                f'NaN or infinity in {", ".join(wrong)} in {dtype}; store in float32 (--save-dtype), and if that does '
                'not help, compute in bfloat16 or float32 (--dtype)'
            )
        return {name: x[index] for name, x in self.values.items()}

    def to_host(self) -> tuple['StoredActivations', torch.cuda.Event | None]:
        """A copy on the CPU, which is complete when the event has happened."""
        if not self.finite.is_cuda:
            return StoredActivations({name: x.cpu() for name, x in self.values.items()}, self.finite.cpu()), None
        tensors = [*self.values.values(), self.finite]
        copies = [torch.empty_like(x, device='cpu', pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.finite.device))
        *values, finite = copies
        return StoredActivations(dict(zip(self.values, values, strict=True)), finite), event


def upload_pixels(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Batch values (H, W, 3) as a network's input (B, 3, H, W) on a device, without waiting for it."""
    pixels = torch.empty(len(images), *images[0].shape, dtype=torch.uint8, pin_memory=device.type == 'cuda')
    np.stack(images, out=pixels.numpy())  # (B, H, W, 3)
    pixels = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return scale_pixels(pixels.contiguous())


def extract_features(
    extractor: DiffusionExtractor,
    headers: Mapping[Item, Mapping[str, str]],
    store: AbstractFileSystem,
    folder: str,
    *,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float16,
    batch: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Item, str | None]]:
    """Write the activations of images to `Item.output`.

    If it is interrupted, files that are being written are finished first.

    Args:
        extractor: With `check_finite` off, which would wait for the device: what is stored is checked.
        headers: The images in the order in which they are read, and the metadata of their files, see `header`.
        store: File system to write to.
        folder: Path there.
        size: (height, width) to resize images to; None keeps the size of each.
        dtype: To store.
        batch: Number of images of one size in one forward pass.
        workers: Number of processes that decode images, see `start_fork_server`; 0 is none.

    Yields:
        Each image when its file is written, or with the reason why there is none.

    Raises:
        OSError: Nothing can be written any more.
    """
    device = next(extractor.parameters()).device
    pending: deque[tuple[Item, Future[None], int]] = deque()
    waiting = refused = 0  # bytes; and files in a row

    def write(
        item: Item, index: int, activations: StoredActivations, copied: torch.cuda.Event | None, side: str
    ) -> None:
        if copied is not None:
            copied.synchronize()
        data = features_to_bytes(activations.image(index), {**headers[item], 'input_size': side})
        write_bytes(store, item.output(folder), data)

    def written(limit: int) -> Iterator[tuple[Item, str | None]]:
        """The oldest files, until the others take no more than this number of bytes."""
        nonlocal waiting, refused
        while pending and (pending[0][1].done() or waiting > limit):
            item, future, nbytes = pending.popleft()
            waiting -= nbytes
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            refused = refused + 1 if isinstance(error, OSError) else 0
            if refused == REFUSED:
                raise OSError(
                    f'{refused} files in a row could not be written; the last: {item.name}: {error}'
                ) from error
            yield item, None if error is None else str(error)

    with ThreadPoolExecutor(WRITERS) as writers:
        for members, images in batches(decode(headers, size, device, workers, 2 * batch), batch):
            if isinstance(images, str):
                yield members, images
                continue
            try:
                with torch.inference_mode():
                    activations = StoredActivations.convert(extractor(upload_pixels(images, device)), dtype)
                    activations, copied = activations.to_host()
            except ValueError as error:  # of all images of this size
                yield from ((item, str(error)) for item in members)
                continue
            yield from written(PENDING)
            side = 'x'.join(map(str, images[0].shape[:2]))
            nbytes = sum(x[0].nbytes for x in activations.values.values())
            for i, item in enumerate(members):
                pending.append((item, writers.submit(write, item, i, activations, copied, side), nbytes))
                waiting += nbytes
        yield from written(-1)
