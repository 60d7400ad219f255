"""Take the screenshots of docs/explorer.md: draw toy pictures, paint strokes, train a head, look at all four views.

    python tools/analysis/explorer_screenshots.py docs/images
    python tools/analysis/explorer_screenshots.py work_dirs/narrow --width 390 --dark

Needs Playwright and Debian's chromium (or another one: --browser).
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.web.pictures import PictureFolder
from diffseg.web.server import serving
from diffseg.web.session import Session, recommended

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / 'tools/toy'), str(ROOT / 'tools')]
from quadrupeds import draw_sample  # noqa: E402
from strokes import CLASSES, draw_stroke, merge_parts  # noqa: E402
from train import main as train  # noqa: E402

MODEL = ROOT / 'demo' / 'tiny-sd'
PAINTED = 3
SETTLED = 1500  # ms


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder for explorer-VIEW.png')
    parser.add_argument('--width', type=int, default=1440)
    parser.add_argument('--height', type=int, default=900)
    parser.add_argument('--dark', action='store_true')
    parser.add_argument('--pictures', type=int, default=16)
    parser.add_argument('--browser', default='/usr/bin/chromium')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        samples = [draw_sample(0, 6_000_000 + i, 256, 'horse') for i in range(args.pictures)]
        pictures = Path(folder, 'horses')
        pictures.mkdir()
        for number, sample in enumerate(samples):
            Image.fromarray(sample.image).save(pictures / f'horse_{number:02d}.png')
        layers, timesteps = recommended(str(MODEL))
        backbone = {'model': str(MODEL), 'layers': layers, 'timesteps': timesteps, 'input_size': (64, 64)}
        session = Session(PictureFolder(pictures), backbone | {'interpolation': 'bicubic'})
        try:
            with serving(session) as address, sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=args.browser, args=['--no-sandbox'])
                page = browser.new_page(
                    viewport={'width': args.width, 'height': args.height},
                    color_scheme='dark' if args.dark else 'light',
                    has_touch=args.width < 600,
                )
                page.goto(address)
                page.wait_for_selector('.tile:not(.waiting)')
                page.wait_for_selector('#progress[hidden]', state='attached', timeout=300_000)
                for view in (match, features, segment):
                    view(page, samples)
                    shoot(page, args.out / f'explorer-{view.__name__}.png')
                session.export('horses')
                out = pictures / 'exports' / 'horses'
                train([str(out / 'config.py'), '--cfg-options', 'log_level=WARNING'])
                predict(page, out)
                shoot(page, args.out / 'explorer-predict.png')
                browser.close()
        finally:
            session.close()


def match(page: Page, samples: Sequence) -> None:
    eye = samples[0].keypoints[0]
    page.mouse.click(*on_stage(page, eye))


def features(page: Page, samples: Sequence) -> None:
    page.click('#tab-features')
    page.wait_for_selector('.cards canvas:not([hidden])')


def segment(page: Page, samples: Sequence) -> None:
    page.click('#tab-segment')
    for name, _ in CLASSES:
        page.fill('#segment-new', name)
        page.press('#segment-new', 'Enter')
        page.get_by_label(f'Paint {name}').wait_for()
    for number in range(PAINTED):
        labels = merge_parts(samples[number].mask)
        for label in range(len(CLASSES)):
            page.focus('#stage')
            page.keyboard.press(str(label + 1))
            start, end = (on_stage(page, point) for point in draw_stroke(labels == label))
            page.mouse.move(*start)
            page.mouse.down()
            page.mouse.move(*end, steps=8)
            page.mouse.up()
        page.wait_for_timeout(SETTLED)
        if number < PAINTED - 1:
            page.click('#next')


def predict(page: Page, out: Path) -> None:
    page.click('#tab-predict')
    page.wait_for_selector('#predict-load:not([disabled])')
    page.click('#predict-load')
    page.wait_for_selector('.legend input', timeout=60_000)


def on_stage(page: Page, point: Sequence[float]) -> tuple[float, float]:
    """Where a pixel of the selected picture of 256 x 256 is on the screen."""
    page.evaluate("document.getElementById('stage').scrollIntoView({block: 'nearest'})")
    box = page.locator('#stage-image').bounding_box()
    x, y = (np.asarray(point, float) + 0.5) / 256
    return box['x'] + x * box['width'], box['y'] + y * box['height']


def shoot(page: Page, path: Path) -> None:
    page.wait_for_timeout(2 * SETTLED)
    page.evaluate('scrollTo(0, 0)')
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.thumbnail((1080, image.height))
        image.convert('RGB').quantize(256).save(path, optimize=True)
    print(path)


if __name__ == '__main__':
    main()
