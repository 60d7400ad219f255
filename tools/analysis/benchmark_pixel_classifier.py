"""Measure memory and time of training a `PixelClassifierHead`, by default at the size of Ours-XL on Horse-21.

    python tools/analysis/benchmark_pixel_classifier.py
    python tools/analysis/benchmark_pixel_classifier.py --images 50 --maps 1280@32 640@64 --classes 30

Maps and labels are random, no diffusion model is loaded. *Published* is the size of the maps that the released code of
DatasetDDPM and GDF stores: every map upsampled to the labels, in float32. It is computed; their peak is twice as much.
Peak memory is that of the whole process on the CPU (the kernel's high-water mark of the resident set), or of tensors on
CUDA. It includes the prediction of one picture.
"""

import argparse
import resource
import time
from collections.abc import Sequence

import torch

from diffseg.devices import default_device
from diffseg.models.decode_heads.pixel_classifier import PixelClassifierHead, member_losses
from diffseg.models.decode_heads.pixels import LabelledPixels


def parse_map(text: str) -> tuple[int, int]:
    """1280@32 -> channels, side."""
    channels, side = text.split('@')
    return int(channels), int(side)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=30)
    parser.add_argument(
        '--maps',
        nargs='+',
        type=parse_map,
        default=[(640, 64), (640, 64), (1280, 32), (1280, 32)],
        metavar='CHANNELS@SIDE',
        help='(default: 640@64 640@64 1280@32 1280@32)',
    )
    parser.add_argument('--size', type=int, default=256, help='side of the labels (default: %(default)s)')
    parser.add_argument('--classes', type=int, default=21)
    parser.add_argument('--iterations', type=int, default=300)
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    shapes = [(args.images, side, side, channels) for channels, side in args.maps]
    maps = [torch.empty(shape, dtype=torch.float16, device=args.device).normal_() for shape in shapes]
    labels = torch.randint(args.classes, (args.images, args.size, args.size), device=args.device)
    data = LabelledPixels(maps, labels, args.classes)
    head = PixelClassifierHead([channels for channels, _ in args.maps], args.classes, output_size=args.size)
    head.to(args.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    order = data.permutations(0, 0, head.ensemble.members, head.num_pixels)
    start = time.perf_counter()
    for pixels in order[: args.iterations]:
        features, targets = data.sample(pixels)
        losses = member_losses(head.ensemble(features), targets)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    losses.sum().item()  # waits for the device
    trained = time.perf_counter()
    with torch.no_grad():
        head.eval()([x[:1].permute(0, 3, 1, 2).float() for x in maps]).sum().item()
    predicted = time.perf_counter()

    on_gpu = args.device.startswith('cuda')
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    channels = sum(channels for channels, _ in args.maps)
    result = {
        'maps kept (GB)': sum(x.nbytes for x in maps) / 1e9,
        'peak memory (GB)': peak / 1e9,
        'published maps (GB)': args.images * channels * args.size**2 * 4 / 1e9,
        'iteration (ms)': 1e3 * (trained - start) / len(order[: args.iterations]),
        'prediction (ms/image)': 1e3 * (predicted - trained),
    }
    print(f'{args.images} images, {channels} channels, {args.classes} classes, {args.size}x{args.size}, {args.device}')
    print('\n'.join(f'{name}: {value:.2f}' for name, value in result.items()))
    return result


if __name__ == '__main__':
    main()
