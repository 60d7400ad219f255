"""Matching, classification, export and prediction with the demo's model on toy horses."""

import json
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer import mean_iou, open_session, save
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from PIL import Image
from strokes import CLASSES, draw_stroke, merge_parts

from diffseg.datasets import ScarceDataset
from diffseg.datasets.toy import KEYPOINTS
from diffseg.models.correspondence import match_points
from diffseg.web.session import recommended
from diffseg.web.strokes import UNLABELLED, Class

ROOT = Path(__file__).resolve().parents[2]
PAINTED = 3


def paint(session, horses) -> None:
    """Twelve strokes: one for each of four classes on three pictures."""
    session.annotations.set_classes([Class(*entry) for entry in CLASSES], [None] * len(CLASSES))
    for number in range(PAINTED):
        for label in range(len(CLASSES)):
            points = draw_stroke(merge_parts(horses[number].mask) == label)
            session.annotations.add(f'horse_{number}.png', label, 1.0, points)


def test_a_picture_matches_itself_and_its_mirror_image_at_the_mirrored_point(tmp_path, horses, open_folder):
    folder = save(tmp_path, horses[:1])
    Image.fromarray(horses[0].image[:, ::-1]).save(folder / 'mirrored.png')
    session = open_folder(folder)
    source, mirrored = session.folder.usable()
    for x, y in [(20, 30), (40.5, 25), (33, 41)]:
        itself, other = session.match(session.choice, source, [(x, y)], [source, mirrored])
        assert itself.point == pytest.approx((x, y), abs=1) and itself.score == pytest.approx(1, abs=0.01)
        assert itself.mutual and itself.similarity.shape == (256,)
        assert other.score < itself.score
    mean = session.match(session.choice, source, [(20, 30), (22, 30)], [source])[0]
    assert mean.point == pytest.approx((21, 30), abs=2)


def test_matches_are_those_of_the_upsampled_maps(session):
    source, *targets = session.folder.usable()
    get = session.features.get
    for point in [(20, 30), (40, 25)]:
        found = session.match(session.choice, source, [point], targets)
        for target, match in zip(targets, found, strict=True):
            maps = get(session.choice, source).map, get(session.choice, target).map
            exact = match_points(*maps, torch.tensor([point]), source.size, target.size)[0]
            if np.abs(np.array(match.point) - exact.numpy()).max() > 6:  # another cell is as good
                continue
            assert match.point == pytest.approx(exact.tolist(), abs=1)
    assert sum(match.mutual for match in found) in range(1, len(found) + 1)


def test_a_keypoint_is_found_on_other_horses(session, horses):
    source, *targets = session.folder.usable()
    distances = []
    for name in ('eye', 'withers', 'tail base', 'chest'):
        index = KEYPOINTS.index(name)
        matches = session.match(session.choice, source, [np.clip(horses[0].keypoints[index], 0, 63)], targets)
        distances += [
            np.linalg.norm(match.point - horse.keypoints[index])
            for match, horse in zip(matches, horses[1:], strict=True)
            if match.mutual and horse.facing == horses[0].facing
        ]
    assert len(distances) >= 4 and np.median(distances) < 6  # pixels of 64


def test_points_outside_and_unknown_layers_are_refused(session):
    source = session.folder.usable()[0]
    with pytest.raises(ValueError, match='which has 64 x 64 pixels'):
        session.match(session.choice, source, [(64, 3)], [source])
    with pytest.raises(ValueError, match='no-such-layer'):
        session.features.choose(['no-such-layer'], [50])
    with pytest.raises(ValueError, match='1000'):
        session.features.choose(['up-level1-upsampler-out'], [1000])
    with pytest.raises(ValueError, match='no fixed number of channels'):
        session.features.choose(['up-level2-repeat0-vit-block0-self-map'], [50])
    with pytest.raises(KeyError, match='reload'):
        session.features.by_id('x')


def test_other_layers_are_read_with_the_same_network_and_coloured_jointly(session):
    choice = session.features.choose(['up-level1-upsampler-out'], [50])
    deadline = threading.Event()
    while len(session.features.ready(choice)) < len(session.folder.usable()):
        assert not deadline.wait(0.02) and not session.features.choices()[choice].errors
    colours = session.colours(choice)
    assert {x.shape for x in colours.values()} == {(3, 8, 8)} and len(colours) == len(session.folder.usable())
    assert all(0 <= x.min() and x.max() <= 1 for x in colours.values())
    assert torch.stack(list(colours.values())).std(dim=(0, 2, 3)).min() > 0.1
    assert session.features.by_id(choice.id) == choice != session.choice


def test_what_was_extracted_is_read_from_disk_later(tmp_path, horses, cache, open_folder):
    folder = save(tmp_path, horses[:2])
    first = open_folder(folder)
    again = open_folder(folder, memory=1)  # a descriptor alone is more
    counts = again.features.backbone.cache.counts
    assert counts.misses == 0 and counts.hits >= 2
    for picture in again.folder.usable():
        a, b = (s.features.get(s.choice, picture).cells for s in (first, again))
        assert torch.equal(a, b)
    assert counts.misses == 0


def test_a_broken_picture_does_not_stop_the_others(tmp_path, horses, cache):
    folder = save(tmp_path, horses[:2])
    data = (folder / 'horse_0.png').read_bytes()
    session = open_session(folder, cache)
    try:
        added = [session.add(name, data) for name in ('broken.png', 'late.png')]
        added[0].path.write_bytes(data[:-40])
        progress = session.features.choices()[session.choice]
        while len(progress.done) + len(progress.errors) < 4:
            threading.Event().wait(0.02)
            progress = session.features.choices()[session.choice]
        assert added[1].id in progress.done
        assert added[0].id in progress.done or 'broken.png' in progress.errors[added[0].id]
    finally:
        session.close()


def test_twelve_strokes_on_three_pictures_segment_the_others(session, horses):
    assert session.masks(session.folder.usable()) == []
    paint(session, horses)
    fitted = session.fit()
    assert fitted['present'] == [0, 1, 2, 3] and fitted['seconds'] < 5  # measured: a tenth of a second
    pictures = session.folder.usable()
    unseen = pictures[PAINTED:]
    assert fitted['next'] in [picture.id for picture in unseen]
    assert fitted['scores'][fitted['next']] == max(fitted['scores'][picture.id] for picture in unseen)
    predicted = [session._mask(picture) for picture in unseen]
    truths = [merge_parts(horse.mask) for horse in horses[PAINTED:]]
    score = mean_iou(predicted, truths, 4)
    assert score > 40, score
    shown, uncertainty = session.masks(unseen[:1])[0]
    assert shown.shape == uncertainty.shape == (96, 96) and uncertainty.min() >= 0
    assert session.fit()['scores'] == fitted['scores']  # the same strokes, the same classifier
    for stroke in session.annotations.of('horse_0.png'):
        session.annotations.remove(stroke.id)
    assert session.fit()['scores'] != fitted['scores']


def test_one_class_gives_no_masks(session, horses):
    session.annotations.set_classes([Class('a', '#000000'), Class('b', '#ffffff')], [None, None])
    session.annotations.add('horse_0.png', 1, 2, [[3, 3]])
    assert session.fit()['scores'] == {}
    assert session.masks(session.folder.usable()) == []


def test_an_export_trains_with_mmseg_predicts_and_comes_back(session, horses):
    with pytest.raises(ValueError, match='nothing is painted'):
        session.export('first')
    paint(session, horses)
    classes = [*session.annotations.classes[:-1], Class('legs\', "x" \\n', CLASSES[-1][1])]  # names are not trusted
    session.annotations.set_classes(classes, range(len(classes)))
    out = session.export('first')
    for name in ('../elsewhere', '', 'a/b', '.hidden', 'x' * 65):
        with pytest.raises(ValueError, match='is no name of an export'):
            session.export(name)
    truth = {number: session.annotations.raster(f'horse_{number}.png', (64, 64)) for number in range(PAINTED)}
    assert sorted(path.name for path in (out / 'real/train').iterdir()) == [
        f'horse_{number}.{suffix}' for number in range(PAINTED) for suffix in ('npy', 'png')
    ]
    for number, labels in truth.items():
        assert np.array_equal(np.load(out / f'real/train/horse_{number}.npy'), labels)
        assert set(np.unique(labels)) == {0, 1, 2, 3, UNLABELLED}
    horse_21 = ScarceDataset('toy', str(out), 'real/train', pipeline=[])  # the layout is the published one
    assert len(horse_21) == PAINTED
    masks = sorted((out / 'masks').iterdir())
    assert len(masks) == len(horses)
    with Image.open(masks[-1]) as mask:
        assert mask.mode == 'P' and mask.getpalette()[3:6] == [0xE8, 0x55, 0x3A]
        assert np.array_equal(np.array(mask), session._mask(session.folder.usable()[-1]))

    misses = session.features.backbone.cache.counts.misses
    train = runpy.run_path(str(ROOT / 'tools' / 'train.py'))['main']
    options = ['train_cfg.max_iters=40', 'default_hooks.checkpoint.interval=40', 'default_hooks.logger.interval=20']
    train([str(out / 'config.py'), '--cfg-options', *options])
    checkpoint = out / 'work_dir' / 'iter_40.pth'
    model = init_model(Config.fromfile(out / 'config.py'), str(checkpoint), device='cpu')
    assert session.features.backbone.cache.counts.misses == misses
    assert model.backbone.cache.path == session.features.backbone.cache.path

    predictor = session.predictor
    names = 'exports/first/config.py', 'exports/first/work_dir/iter_40.pth'
    assert names[0] in predictor.files(('.py',)) and names[1] in predictor.files(('.pth',))
    loaded = predictor.load(*names)
    assert loaded['classes'] == [entry.name for entry in classes] and loaded['palette'][1] == [0xE8, 0x55, 0x3A]
    predicted = [predictor.mask(picture) for picture in session.folder.usable()[PAINTED:]]
    assert mean_iou(predicted, [merge_parts(horse.mask) for horse in horses[PAINTED:]], 4) > 33
    expected = inference_model(predictor._model, horses[-1].image[..., ::-1].copy()).pred_sem_seg.data[0]
    assert np.array_equal(predicted[-1], expected)
    assert predictor._model.backbone.cache.counts.misses == 0  # the explorer's features were there
    for config, checkpoint in [('/etc/passwd', names[1]), ('../x.py', names[1]), (names[0], '../../x.pth')]:
        with pytest.raises(ValueError, match='not among the files'):
            predictor.load(config, checkpoint)

    strokes = session.annotations.strokes
    session.annotations.replace_all([], [], {})
    session.import_labels('first', 'strokes')
    assert [s.points for s in session.annotations.strokes] == [s.points for s in strokes]
    assert session.annotations.classes == classes
    session.import_labels('first', 'labels')
    assert not session.annotations.strokes
    assert np.array_equal(session.annotations.raster('horse_1.png', (64, 64)), truth[1])
    assert session.fit()['present'] == [0, 1, 2, 3]
    session.import_labels('first', 'masks')
    assert len(session.annotations.painted()) == len(horses)
    with pytest.raises(ValueError, match='there is no export'):
        session.import_labels('other', 'strokes')
    (out / 'classes.json').write_text('{}')
    with pytest.raises(ValueError, match='is damaged'):
        session.import_labels('first', 'labels')


def test_recommended_layers(tmp_path, tiny_pipeline):
    layers, timesteps = recommended(str(ROOT / 'demo' / 'tiny-sd'))
    assert timesteps == [100] and 'up-level2-repeat0-vit-block0-self-q' in layers
    assert recommended(str(tiny_pipeline)) == (
        [
            'up-level1-repeat1-vit-block0-cross-q',
            'up-level1-repeat2-res-out',
            'up-level2-repeat1-vit-block0-cross-q',
            'up-level3-repeat0-vit-block0-self-k',
        ],
        [50],
    )
    (tmp_path / 'layers.json').write_text(json.dumps({'layers': ['x']}))
    with pytest.raises(ValueError, match='has no "layers"'):
        recommended(str(tmp_path))
