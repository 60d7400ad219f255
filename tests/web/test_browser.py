"""The explorer's page in headless Chromium."""

import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from explorer import mean_iou, open_session, save, wait
from PIL import Image
from strokes import CLASSES, draw_stroke, merge_parts

from diffseg.datasets.toy import KEYPOINTS
from diffseg.web.server import serving

playwright = pytest.importorskip('playwright.sync_api', reason="Playwright is missing: pip install '.[dev]'")
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if CHROMIUM is None:
    pytest.skip('there is no Chromium: apt-get install chromium', allow_module_level=True)

VIEWS = 'match', 'features', 'segment', 'predict'
PAINTED = 3
TIMEOUT = 30_000  # ms


@pytest.fixture(scope='module')
def browser() -> Iterator:
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.fixture
def served(tmp_path: Path, horses, cache: Path) -> Iterator[SimpleNamespace]:
    """A session on toy horses, and its page's address."""
    with torch.random.fork_rng():
        rows = [(f'up-level{i}-upsampler-out', t, i * 10 + t / 100) for i in (2, 1, 0) for t in (50, 100)]
        ranking = [{'rank': 1, 'activation': name, 'timestep': t, 'PCK': score} for name, t, score in rows]
        (tmp_path / 'ranking.json').write_text(json.dumps({'ranking': ranking}))
        session = open_session(save(tmp_path / 'pictures', horses), cache, search=tmp_path)
        wait(session)
        try:
            with serving(session) as address:
                yield SimpleNamespace(session=session, address=address, folder=tmp_path / 'pictures')
        finally:
            session.close()


@pytest.fixture
def open_page(browser, served) -> Iterator[Callable]:
    """`open_page(**options)` is a page; it must have had no error, and no request to another host, at its end."""
    contexts, wrong, allowed = [], [], []

    def opened(expected: tuple[str, ...] = (), **options):
        context = browser.new_context(**{'viewport': {'width': 1440, 'height': 900}, **options})
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        allowed.extend(expected)
        page = context.new_page()
        page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda error: wrong.append(str(error)))
        page.on('request', lambda r: None if r.url.startswith((served.address, 'blob:')) else wrong.append(r.url))
        page.goto(served.address)
        page.wait_for_selector('.tile')
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in wrong if not any(part in text for part in allowed)] == []


def position(page, point) -> tuple[float, float]:
    """Where a pixel of the selected picture of 64 x 64 is on the screen."""
    box = page.locator('#stage-image').bounding_box()
    x, y = (np.asarray(point, float) + 0.5) / 64
    return box['x'] + x * box['width'], box['y'] + y * box['height']


def found_points(page) -> dict[str, tuple[float, float]]:
    """The marked match, in pixels, of each picture by name."""
    marks = page.evaluate(
        """() => [...document.querySelectorAll('.tile')].filter((tile) => tile.querySelector('.found')).map((tile) => [
            tile.querySelector('.name').textContent, parseFloat(tile.querySelector('.found').style.left),
            parseFloat(tile.querySelector('.found').style.top)])"""
    )
    return {name: (x / 100 * 64 - 0.5, y / 100 * 64 - 0.5) for name, x, y in marks}


def paint(page, horse) -> None:
    """A stroke of each class on the selected picture, with the mouse."""
    labels = merge_parts(horse.mask)
    for label in range(len(CLASSES)):
        page.get_by_label(f'Paint {CLASSES[label][0]}').check()
        start, end = (position(page, point) for point in draw_stroke(labels == label))
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(*end, steps=4)
        page.mouse.up()


def add_classes(page, names) -> None:
    for name in names:
        page.fill('#segment-new', name)
        page.press('#segment-new', 'Enter')
        page.get_by_label(f'Paint {name}').wait_for()


def test_a_clicked_keypoint_is_found_in_other_pictures(open_page, horses):
    page = open_page()
    page.mouse.move(*position(page, (30, 30)))
    page.wait_for_selector('.heat canvas.overlay:not([hidden])')
    eye = KEYPOINTS.index('eye')
    page.mouse.click(*position(page, horses[0].keypoints[eye]))
    page.wait_for_selector('.stage .pin')
    page.get_by_text(f'of {len(horses) - 1} matches are mutual').wait_for()
    found = found_points(page)
    assert len(found) == len(horses) - 1
    distances = [np.linalg.norm(found[f'horse_{i}.png'] - horses[i].keypoints[eye]) for i in range(1, len(horses))]
    assert np.median(distances) < 6, distances  # of 64 pixels
    assert '⇄' in page.inner_text('.score.mutual >> nth=0')
    page.mouse.move(*position(page, (3, 60)))
    assert found_points(page) == found  # it is pinned
    page.focus('#stage')
    page.keyboard.press('Escape')
    page.wait_for_selector('.found', state='detached')
    assert page.evaluate("performance.getEntriesByName('heat maps').length") >= 1


def test_strokes_become_masks_an_export_and_a_trained_model(open_page, served, horses):
    page = open_page(('willReadFrequently',))  # the test looks at pixels
    page.click('#tab-segment')
    add_classes(page, [name for name, _ in CLASSES])
    for number in range(PAINTED):
        paint(page, horses[number])
        page.click('#next')
    page.get_by_text('Fitted to 12 strokes').wait_for()
    page.keyboard.press('u')  # nothing is painted on this picture
    page.click('#previous')
    page.click('#segment-undo')
    page.get_by_text('Fitted to 11 strokes').wait_for()
    page.click('#segment-redo')
    page.get_by_text('Fitted to 12 strokes').wait_for()
    page.wait_for_selector('.tile:last-child canvas.overlay:not([hidden])')
    page.reload()  # every stroke was saved as it was made
    page.get_by_text('Fitted to 12 strokes').wait_for()
    page.click('#segment-next')
    assert page.inner_text('#stage-name') in [f'horse_{i}.png' for i in range(PAINTED, len(horses))]

    page.fill('#segment-name', 'by-hand')
    page.click('#segment-export')
    page.get_by_text('Written to exports/by-hand').wait_for()
    out = served.folder / 'exports' / 'by-hand'
    masks = [np.array(Image.open(out / f'masks/horse_{i}.png')) for i in range(PAINTED, len(horses))]
    score = mean_iou(masks, [merge_parts(horse.mask) for horse in horses[PAINTED:]], len(CLASSES))
    assert score > 40, score

    train = runpy.run_path(str(Path(__file__).parents[2] / 'tools/train.py'))['main']
    options = ['train_cfg.max_iters=30', 'default_hooks.checkpoint.interval=30', 'log_level=ERROR']
    train([str(out / 'config.py'), '--cfg-options', *options])
    page.click('#tab-predict')
    page.wait_for_selector('#predict-load:not([disabled])')
    page.click('#predict-load')
    page.wait_for_selector('#stage-overlay:not([hidden])')

    def opaque() -> int:
        return page.evaluate(
            """() => { const c = document.getElementById('stage-overlay');
            const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);
            return data.filter((value, i) => i % 4 == 3 && value).length; }"""
        )

    assert page.locator('.legend li').count() == len(CLASSES) and opaque() == 64 * 64
    page.locator('.legend').get_by_label('background').uncheck()
    assert 0 < opaque() < 64 * 64
    page.get_by_role('button', name='None').click()
    assert opaque() == 0


def test_two_choices_of_layers_are_coloured_side_by_side(open_page, served, horses):
    page = open_page()
    page.click('#tab-features')
    page.wait_for_selector('.card:last-child canvas[data-colours^=B]:not([hidden])')
    page.get_by_text('304 channels, stride 4').wait_for()
    assert page.locator('.cards canvas:not([hidden])').count() == 2 * len(horses)
    assert page.locator('#layer-A option').count() > 150
    page.get_by_role('button', name='Take up-level2-upsampler-out at 50 as B').click()
    page.get_by_text('64 channels, stride 4').wait_for()
    assert page.input_value('#layer-B') == 'up-level2-upsampler-out' and page.input_value('#timestep-B') == '50'
    box = page.locator('.ranking').bounding_box()  # layers in order of execution, timesteps from 50
    page.mouse.click(box['x'] + box['width'] - 4, box['y'] + 4)
    page.get_by_text('96 channels, stride 16').wait_for()
    assert page.input_value('#layer-A') == 'up-level0-upsampler-out' and page.input_value('#timestep-A') == '100'
    page.wait_for_selector('.card:last-child canvas[data-colours^=A]:not([hidden])')
    page.get_by_role('button', name='Match with B').click()
    page.get_by_text('up-level2-upsampler-out@50').wait_for()
    page.mouse.move(*position(page, (20, 30)))
    page.wait_for_selector('.found')


def test_everything_is_done_with_the_keyboard(open_page, served):
    page = open_page()
    press = page.keyboard.press
    press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    press('Tab')
    assert page.evaluate('document.activeElement.id') == 'tab-match'
    for _ in range(3):
        press('Tab')
        if page.evaluate('document.activeElement.id') == 'stage':
            break
    assert page.evaluate('document.activeElement.id') == 'stage'
    assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    press('ArrowRight')
    page.wait_for_selector('.found')
    before = page.inner_text('#match-summary')
    press('ArrowDown')
    press('ArrowRight')
    page.wait_for_selector(f'#match-summary:not(:text-is("{before}"))')
    press('Enter')
    page.wait_for_selector('.pin')
    press('Escape')
    press('PageDown')
    assert page.inner_text('#stage-name') == 'horse_1.png'
    page.focus('#tab-match')
    press('ArrowRight')
    press('ArrowRight')
    assert page.evaluate('document.activeElement.id') == 'tab-segment'
    page.focus('#segment-new')
    for name in ('one', 'two'):
        page.keyboard.type(name)
        press('Enter')
        page.get_by_label(f'Paint {name}').wait_for()
    page.focus('#stage')
    for key in ('1', 'ArrowUp', 'Space', '2', 'ArrowDown', 'ArrowDown'):
        press(key)
    page.keyboard.down('Shift')
    press('ArrowDown')
    press('ArrowDown')
    page.keyboard.up('Shift')
    page.get_by_text('Fitted to 2 strokes').wait_for()
    strokes = served.session.annotations.strokes
    assert [stroke.label for stroke in strokes] == [0, 1] and strokes[0].picture == 'horse_1.png'
    assert len(strokes[0].points) == 1 and strokes[1].points[0][1] < strokes[1].points[-1][1]
    press('u')
    press('e')
    press('Space')
    page.wait_for_selector('#segment-erase[aria-pressed=true]')
    page.wait_for_timeout(500)
    assert [stroke.label for stroke in served.session.annotations.strokes] == [0, None]


@pytest.mark.parametrize(('width', 'scheme'), [(390, 'dark'), (1440, 'light')])
def test_nothing_is_wider_than_the_window(open_page, width, scheme):
    page = open_page(viewport={'width': width, 'height': 844}, color_scheme=scheme)
    for view in VIEWS:
        page.click(f'#tab-{view}')
        if view == 'features':
            page.wait_for_selector('.cards canvas:not([hidden])')
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.get_attribute(f'#tab-{view}', 'aria-selected') == 'true'
    assert page.evaluate('document.documentElement.dataset.theme') == scheme
    unlabelled = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select')].filter((e) => !e.closest('[hidden]')
            && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert unlabelled == []


def test_refused_pictures_and_other_origins_leave_all_tabs_alive(open_page, served, tmp_path, horses):
    first = open_page(('400 (Bad Request)', '413', '403', 'Failed to load resource', 'data:text/html', 'CORS'))
    second = open_page()
    Image.fromarray(horses[0].image).save(tmp_path / '<img src=x onerror=alert(1)>.png')
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    (tmp_path / 'large.png').write_bytes(b'0' * 200_001)
    for name, message in (('broken.png', 'cannot be read as a picture'), ('large.png', 'are taken')):
        first.set_input_files('#files', tmp_path / name)
        first.get_by_text(message).first.wait_for()
    first.set_input_files('#files', tmp_path / '<img src=x onerror=alert(1)>.png')
    first.get_by_text('is no name of a picture').wait_for()
    Image.fromarray(horses[0].image).save(tmp_path / 'new & <i>.png'.replace('<i>', 'i'))
    first.set_input_files('#files', tmp_path / 'new & i.png')
    second.wait_for_selector('#count:text-is("8 pictures")')
    classes = len(served.session.annotations.classes)
    first.goto('data:text/html,<title>another page</title>')
    outcome = first.evaluate(
        """async (address) => { try { const r = await fetch(address + 'api/classes', {method: 'PUT', body:
            '{"classes": [{"name": "x", "colour": "#ffffff", "former": null}]}'}); return r.status; }
            catch (error) { return 'refused'; } }""",
        served.address,
    )
    assert outcome == 'refused' and len(served.session.annotations.classes) == classes
    second.click('#tab-segment')
    add_classes(second, ['<b>bold</b>'])
    assert second.locator('.class b').count() == 0 and served.session.annotations.classes[0].name == '<b>bold</b>'


def test_an_empty_folder_says_what_to_do(browser, tmp_path, horses, cache):
    (tmp_path / 'empty').mkdir()
    session = open_session(tmp_path / 'empty', cache)
    try:
        with serving(session) as address:
            page = browser.new_page()
            page.goto(address)
            page.get_by_text('No pictures here yet.').wait_for()
            for view in VIEWS:
                page.click(f'#tab-{view}')
            page.click('#tab-match')
            page.set_input_files('#files', save(tmp_path, horses[:1]) / 'horse_0.png')
            page.wait_for_selector('.tile')
            page.wait_for_selector('#count:text-is("1 picture")')
            assert not page.is_visible('#empty') and page.is_visible('#stage')
            page.close()
    finally:
        session.close()


def test_strokes_of_one_tab_appear_in_another(open_page, served, horses):
    first, second = open_page(), open_page()
    for page in (first, second):
        page.click('#tab-segment')
    add_classes(first, [name for name, _ in CLASSES])
    paint(first, horses[0])
    second.get_by_text('Fitted to 4 strokes').wait_for()
    second.click('#segment-undo')
    first.get_by_text('Fitted to 3 strokes').wait_for()
    assert len(served.session.annotations.strokes) == 3
