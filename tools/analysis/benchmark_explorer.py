"""Measure the explorer's page in Chromium, on pictures and descriptors of noise.

    python tools/analysis/benchmark_explorer.py
    python tools/analysis/benchmark_explorer.py --pictures 10 --cells 48 --channels 1280 --listed 200

Prints how long it takes from a moved pointer until the heat maps of all other pictures are drawn, as the page's own
clock (performance.now()) has it, beside the products of descriptors alone, which read each of them once; how long
the classifier of strokes takes; and how long frames take while a list of pictures is scrolled, beside those of a page
at rest. Needs Playwright and Chromium.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import diffseg  # noqa: F401  registers its parts
from diffseg.benchmarking import machine, print_table, table_head
from diffseg.web.features import Choice, Descriptors, FeatureStore
from diffseg.web.pictures import Picture, PictureFolder
from diffseg.web.server import serving
from diffseg.web.session import Session, recommended
from diffseg.web.strokes import Class

MODEL = Path(__file__).resolve().parents[2] / 'demo' / 'tiny-sd'
SIZE = 256  # of pictures
FRAMES = """async ([count, step]) => {
    const times = [];
    for (let i = 0; i < count; i += 1) {
        if (step) scrollBy(0, step);
        times.push(await new Promise(requestAnimationFrame));
    }
    return times;
}"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pictures', type=int, default=10, help='that a point is matched in')
    parser.add_argument('--cells', type=int, default=48, help='of a side')
    parser.add_argument('--channels', type=int, default=1280)
    parser.add_argument('--moves', type=int, default=60, help='of the pointer')
    parser.add_argument('--fits', type=int, default=5, help='of the classifier')
    parser.add_argument('--listed', type=int, default=200, help='pictures in the list that is scrolled')
    parser.add_argument('--frames', type=int, default=120, help='of scrolling')
    parser.add_argument('--browser', default='/usr/bin/chromium')
    return parser.parse_args(argv)


def noise_store(cells: int, channels: int) -> type[FeatureStore]:
    """A store of descriptors of noise, of `cells` x `cells` cells."""

    class NoiseStore(FeatureStore):
        def extract(self, choice: Choice, picture: Picture) -> Descriptors:
            generator = torch.Generator().manual_seed(int(picture.id, 16) % 2**31)
            return Descriptors.of([torch.randn(1, channels, cells, cells, generator=generator)])

    return NoiseStore


def open_session(folder: Path, pictures: int, store: type[FeatureStore]) -> Session:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for number in range(pictures):
        Image.fromarray(np.roll(pixels, number, axis=1)).save(folder / f'{number:04d}.jpg')
    layers, timesteps = recommended(str(MODEL))
    return Session(PictureFolder(folder), {'model': str(MODEL), 'layers': layers, 'timesteps': timesteps}, store=store)


def open_page(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={'width': 1440, 'height': 1000})
    page.goto(address)
    page.wait_for_selector('.tile')
    page.wait_for_selector('#progress[hidden]', state='attached', timeout=300_000)
    return page


def hover(page: Page, moves: int) -> list[float]:
    """Milliseconds of each hovered point."""
    box = page.locator('#stage-image').bounding_box()
    page.mouse.move(box['x'] + 5, box['y'] + 5)
    page.wait_for_selector('.heat')
    page.evaluate("performance.clearMeasures('heat maps')")
    for number in range(moves):
        before = page.evaluate("performance.getEntriesByName('heat maps').length")
        x, y = ((number * step % 97 + 1) / 99 for step in (31, 53))
        page.mouse.move(box['x'] + x * box['width'], box['y'] + y * box['height'])
        deadline = time.monotonic() + 10
        while page.evaluate("performance.getEntriesByName('heat maps').length") == before:
            if time.monotonic() > deadline:
                raise TimeoutError('no heat maps within ten seconds')
            page.wait_for_timeout(40)
    entries = page.evaluate(
        "performance.getEntriesByName('heat maps').map((entry) => [entry.duration, entry.detail.pictures])"
    )
    return [duration for duration, _ in entries]


def products(session: Session, repeat: int) -> list[float]:
    """Milliseconds of the products of all pictures' descriptors with one vector."""
    cells = [session.features.get(session.choice, picture).cells for picture in session.folder.usable()[1:]]
    query = cells[0][0]
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        for part in cells:
            part @ query
        times.append(1000 * (time.perf_counter() - started))
    return times


def fits(session: Session, repeat: int) -> list[float]:
    """Milliseconds of fitting to four strokes on each picture, and of comparing all pictures."""
    classes = [Class(str(label), '#000000') for label in range(4)]
    session.annotations.set_classes(classes, [None] * len(classes))
    for picture in session.folder.usable():
        for label in range(len(classes)):
            y = (label + 0.5) * SIZE / len(classes)
            session.annotations.add(picture.name, label, 4, [(SIZE / 8, y), (SIZE * 7 / 8, y)])
    session.fit()  # computes components
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        session.fit()
        times.append(1000 * (time.perf_counter() - started))
    return times


def frames(page: Page, count: int, step: int) -> list[float]:
    """Milliseconds between frames."""
    times = page.evaluate(FRAMES, [count, step])
    return [after - before for before, after in pairwise(times)]


def summary(label: str, times: Sequence[float]) -> tuple[dict[str, Any], str]:
    """What is written of some durations, and the line of the table."""
    ordered = sorted(times)
    high = ordered[round(0.95 * (len(ordered) - 1))]
    row = {
        'what': label,
        'number': len(times),
        'median': statistics.median(times),
        '95 %': high,
        'longest': ordered[-1],
    }
    cells = [f'{value:.1f}' if isinstance(value, float) else str(value) for value in row.values()]
    return row, f'| {" | ".join(cells)} |'


def measure(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=['--no-sandbox'])
        session = open_session(Path(folder, 'few'), args.pictures + 1, noise_store(args.cells, args.channels))
        try:
            with serving(session) as address:
                label = f'{args.pictures} pictures of {args.cells} x {args.cells} x {args.channels}'
                yield summary(f'heat maps, {label}', hover(open_page(browser, address), args.moves))
                yield summary(f'products alone, {label}', products(session, args.moves))
            count = 4 * len(session.folder.usable())
            yield summary(f'classifier of {count} strokes and scores of all pictures', fits(session, args.fits))
        finally:
            session.close()
        session = open_session(Path(folder, 'many'), args.listed, noise_store(16, 64))
        try:
            with serving(session) as address:
                page = open_page(browser, address)
                yield summary('frames at rest', frames(page, args.frames, 0))
                yield summary(f'frames while {args.listed} pictures are scrolled', frames(page, args.frames, 25))
        finally:
            session.close()
        browser.close()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    title = f'{machine("cpu")}, {torch.get_num_threads()} threads; milliseconds'
    return print_table(title, table_head(['', 'number', 'median', '95 %', 'longest']), measure(args), None)


if __name__ == '__main__':
    raise SystemExit(main())
