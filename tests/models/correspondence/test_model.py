"""CorrespondenceModel on hand-made pairs, and on the published loss."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from safetensors.torch import load_file
from simulated_device import simulated_device, uploads
from torch import nn

from diffseg.models import CorrespondenceModel
from diffseg.models.correspondence import ConvDescriptorHead, DescriptorHead
from diffseg.models.correspondence.heads import points_to_cells
from diffseg.models.correspondence.model import DescriptorStore
from diffseg.structures import PairSample

LAYER = 'up-level3-repeat0-vit-block0-self-k'  # 32 channels, stride 8
CONCAT = {'type': 'ConcatNeck', 'levels': [[32]], 'timesteps': 1, 'output_sizes': [16]}
AGGREGATION = {
    'type': 'AggregationNeck',
    'levels': [[32]],
    'timesteps': 1,
    'out_channels': 16,
    'num_groups': 4,
    'output_sizes': [16],
}


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., CorrespondenceModel]:
    """Build a model on one layer of the tiny pipeline; `options` override its fields."""

    def build(backbone: dict | None = None, **options) -> CorrespondenceModel:
        init_default_scope('mmseg')
        torch.manual_seed(0)
        defaults = {'type': 'DiffusionBackbone', 'model': str(tiny_pipeline), 'layers': [LAYER], 'timesteps': [50]}
        return MODELS.build({'type': 'CorrespondenceModel', 'backbone': {**defaults, **(backbone or {})}, **options})

    return build


def make_image(seed: int, height: int = 64, width: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=generator) * 255
    return nn.functional.interpolate(coarse, (height, width), mode='bilinear')[0].to(torch.uint8)


def make_batch(*pairs: tuple[int, int], height: int = 64, width: int = 80, visible: bool = True) -> dict:
    """Pairs of numbered images, collated; originals are twice as large as what is loaded."""
    batch = {'inputs': {'image0': [], 'image1': []}, 'data_samples': []}
    for number, pair in enumerate(pairs):
        size = (2 * height, 2 * width)
        meta = {'category': 'horse', 'pair_id': str(number), 'variations': {}}
        for view, image in enumerate(pair):
            batch['inputs'][f'image{view}'].append(make_image(image, height, width))
            meta |= {f'img_path{view}': str(image), f'ori_shape{view}': size, f'img_shape{view}': (height, width)}
        points = torch.tensor([[0.0, 0.0], [2 * width - 1, 2 * height - 1], [51.0, 77.0], [90.0, 20.0]])
        sample = PairSample(metainfo=meta, keypoints0=points, keypoints1=points.clone())
        sample.visible = torch.tensor([True, True, True, False]) & visible
        sample.bbox0 = sample.bbox1 = torch.tensor([0.0, 0.0, 2 * width, 2 * height])
        batch['data_samples'].append(sample)
    return batch


def predictions(model: CorrespondenceModel, batch: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return [sample.pred_keypoints1 for sample in model.eval().test_step(batch)]


# ---- loss


def test_loss_is_that_of_hyperfeatures(reference):
    folder = reference('hyperfeatures')
    values, inputs = load_file(folder / 'expected.safetensors'), load_file(folder / 'inputs.safetensors')
    source, target = values['hyperfeature']
    cells = [points_to_cells(inputs[f'{side}_points_yx'].flip(1), (8, 8), (8, 8)) for side in ('source', 'target')]
    loss = DescriptorHead().loss(source, target, *cells)
    torch.testing.assert_close(loss, values['loss'], rtol=1e-5, atol=0)


def test_points_to_cells_scales_cuts_and_rounds():
    points = torch.tensor([[0.0, 0], [99, 49], [12.5, 37.4], [37.5, 0]])
    assert points_to_cells(points, (50, 100), (4, 8)).tolist() == [0, 31, 3 * 8 + 1, 3]


def test_loss_of_a_batch_is_the_mean_over_its_pairs(make: Callable):
    model = make().train()
    single = [
        model.loss(**model.data_preprocessor(make_batch(pair), True))['loss_match'].item() for pair in ((1, 2), (3, 4))
    ]
    both = model.loss(**model.data_preprocessor(make_batch((1, 2), (3, 4)), True))['loss_match'].item()
    assert both == pytest.approx(sum(single) / 2, rel=1e-4)


@pytest.mark.parametrize(
    'options',
    [
        {'head': {'type': 'ConvDescriptorHead', 'in_channels': 32, 'out_channels': 16}, 'neck': CONCAT},
        {'neck': AGGREGATION, 'head': {'type': 'DescriptorHead', 'learn_logit_scale': True}},
    ],
    ids=['GDF', 'DHF'],
)
def test_every_trainable_parameter_moves_in_one_step(make: Callable, options: dict):
    model = make(**options).train()
    optim_wrapper = build_optim_wrapper(model, {'optimizer': {'type': 'SGD', 'lr': 0.1}})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    logs = model.train_step(make_batch((1, 2)), optim_wrapper)
    assert logs['loss'] > 0
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    # the mixing weights of a single layer and timestep are one, whatever the parameter
    assert before and still == [name for name in before if 'mixing_weights' in name]


def test_pairs_without_visible_keypoints_have_no_loss(make: Callable):
    model = make(neck=AGGREGATION).train()
    loss = model.loss(**model.data_preprocessor(make_batch((1, 2), visible=False), True))['loss_match']
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_logit_scale_is_a_constant_or_learned():
    fixed, learned = DescriptorHead(), ConvDescriptorHead(4, learn_logit_scale=True)
    assert fixed.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert list(fixed.parameters()) == [] and fixed.state_dict() == {}
    assert {name for name, _ in learned.named_parameters()} == {'logit_scale', 'conv.weight'}


# ---- prediction


@pytest.mark.parametrize('options', [{}, {'match_size': 40}, {'neck': CONCAT}, {'store_dtype': 'float16'}])
def test_an_image_matches_itself(make: Callable, options: dict):
    batch = make_batch((1, 1))
    (samples,) = predictions(make(**options), batch)
    sample = batch['data_samples'][0]
    assert samples.dtype == torch.float64
    keypoints = sample.keypoints0[sample.visible].double()
    assert keypoints[1].tolist() == [159, 127]  # a corner: from the middle of its cell on, all pixels are alike
    if 'match_size' not in options:
        assert torch.equal(samples[[0, 2]], keypoints[[0, 2]])
    errors = (samples - keypoints).abs()
    assert errors[[0, 2]].max() <= 4 and errors[1].max() <= 9  # pixels for matching are 3.2 to 4 wide, half a cell 4


@pytest.mark.parametrize('options', [{}, {'match_size': 40}, {'unit': 'cells', 'window': 3, 'temperature': 0.02}])
def test_cycle_error_is_the_distance_after_matching_there_and_back(make: Callable, options: dict):
    model = make(cycle_error=True, **options).eval()
    batch = make_batch((1, 2))
    with torch.no_grad():
        (sample,) = model.test_step(batch)
        ((source, target),) = model.encode_pairs(model.data_preprocessor(batch)['inputs'], [sample])
    assert sample.cycle_error.shape == (3,) and sample.cycle_error.dtype == torch.float64
    returned = PairSample(metainfo={'ori_shape0': sample.ori_shape1, 'ori_shape1': sample.ori_shape0})
    returned.keypoints0, returned.visible = sample.pred_keypoints1, torch.ones(3, dtype=torch.bool)
    back = model.match(target, source, returned)
    origins = sample.keypoints0[sample.visible].double()
    if 'match_size' in options:  # points are matched from whole pixels of 4 x 3.2
        scale = origins.new_tensor([4, 3.2])
        origins = (origins / scale).clamp(max=39).round() * scale
    torch.testing.assert_close(sample.cycle_error, (back - origins).norm(dim=1))
    assert sample.cycle_error.max() > 1 and model.protocol['cycle_error']


def test_cycle_error_of_an_image_and_itself_is_zero(make: Callable):
    model = make(cycle_error=True).eval()
    with torch.no_grad():
        same, none = model.test_step(make_batch((1, 1))) + model.test_step(make_batch((1, 2), visible=False))
    assert same.cycle_error[[0, 2]].tolist() == [0, 0]
    assert none.cycle_error.shape == (0,)


def mirrored_batch(rows: list[int]) -> dict:
    """A pair of an image and its mirror image; `rows` are what mirroring makes of its keypoints."""
    batch = make_batch((1, 1))
    batch['inputs']['image1'] = [image.flip(-1) for image in batch['inputs']['image0']]
    batch['data_samples'][0].set_metainfo({'img_path1': '1, mirrored by hand'})
    batch['data_samples'][0].mirror_rows = torch.tensor(rows)
    return batch


def test_poses_are_aligned_where_mutual_neighbours_are_closer(make: Callable):
    model = make(align_pose=True).eval()
    left, right = torch.tensor([51.0, 77.0]), torch.tensor([30.0, 40.0])
    batch = mirrored_batch([2, -1, 0, 3])
    batch['data_samples'][0].keypoints0[0] = right
    with torch.no_grad():
        (sample,) = model.test_step(batch)
    width = torch.tensor([159.0, 0.0])
    aligned = sample.pred_keypoints1_aligned
    assert torch.equal(aligned[0], (width - left * torch.tensor([1, -1])).double())  # where its counterpart is
    assert torch.equal(aligned[2], (width - right * torch.tensor([1, -1])).double())
    assert torch.equal(aligned[1], sample.pred_keypoints1[1])  # its counterpart is not in the pair
    assert not torch.equal(aligned, sample.pred_keypoints1)
    assert model.protocol['align_pose'] == 'mutual neighbours'


def test_a_source_in_the_pose_of_the_target_is_not_mirrored(make: Callable):
    model = make(align_pose=True).eval()
    batch = make_batch((1, 1))
    batch['data_samples'][0].mirror_rows = torch.tensor([2, 1, 0, 3])
    with torch.no_grad():
        (sample,) = model.test_step(batch)
        assert torch.equal(sample.pred_keypoints1_aligned, sample.pred_keypoints1)
        with pytest.raises(ValueError, match=r"pair 0 of category 'horse' .* set align_pose=False"):
            model.test_step(make_batch((1, 2)))


def test_only_visible_keypoints_are_matched_and_there_may_be_none(make: Callable):
    (samples,) = predictions(make(), make_batch((1, 2), visible=False))
    assert samples.shape == (0, 2)


def test_each_image_is_encoded_once(make: Callable):
    model = make()
    sizes = []
    model.backbone.register_forward_hook(lambda module, args, maps: sizes.append(len(args[0])))
    model.eval()
    with torch.no_grad():
        together = model.test_step(make_batch((1, 2), (2, 3), (1, 1)))
        apart = [model.test_step(make_batch(pair))[0] for pair in ((3, 1), (1, 2), (2, 4))]
    assert sum(sizes) == 4 and sizes[0] == 3
    assert torch.equal(together[0].pred_keypoints1, apart[1].pred_keypoints1)
    predictions(model, make_batch((1, 2)))
    assert sum(sizes) == 6  # the next evaluation starts anew


@pytest.mark.parametrize('path', ['missing', None])
def test_images_without_a_path_are_not_taken_for_one_another(make: Callable, path: str | None):
    """As data sets of in-memory images give them: each is encoded, and none is kept for the next pair."""
    batch = make_batch((1, 2), (3, 4))
    for sample in batch['data_samples']:
        for view in (0, 1):
            sample.pop(f'img_path{view}') if path == 'missing' else sample.set_metainfo({f'img_path{view}': None})
    model = make()
    expected, found = predictions(make(), make_batch((1, 2), (3, 4))), predictions(model, batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert len(model.store) == 0


def test_what_is_kept_does_not_change_predictions(make: Callable):
    batches = [(1, 2), (2, 3), (3, 1), (1, 2)]
    kept, not_kept = make().eval(), make(store_gb=0).eval()
    with torch.no_grad():
        for pair in batches:
            ours, theirs = (model.test_step(make_batch(pair))[0].pred_keypoints1 for model in (kept, not_kept))
            assert torch.equal(ours, theirs)
    assert len(kept.store) == 3 and len(not_kept.store) == 0


def test_loading_weights_forgets_descriptors_and_protocol(make: Callable):
    model = make(neck=AGGREGATION).eval()
    with torch.no_grad():
        model.test_step(make_batch((1, 2)))
        before = model.protocol
        state = {name: 2 * x if 'conv1.weight' in name else x for name, x in model.state_dict().items()}
        model.load_state_dict(state)
    assert len(model.store) == 0
    different = {key for key in before if before[key] != model.protocol[key]}
    assert different == {'weights'}


def test_the_store_forgets_what_was_used_longest_ago():
    store = DescriptorStore(max_bytes=2 * 40)
    for key in 'ab':
        store.put(key, torch.zeros(10))
    assert store.get('a') is not None
    store.put('c', torch.zeros(10))
    assert store.get('b') is None and store.get('a') is not None and store.get('c') is not None
    store.put('d', torch.zeros(21))
    assert len(store) == 0


def test_images_of_several_sizes(make: Callable):
    batches = make_batch((1, 2)), make_batch((3, 4), height=48, width=64)
    model = make()
    alone = [predictions(model, batch)[0] for batch in batches]
    mixed = {
        'inputs': {view: batches[0]['inputs'][view] + batches[1]['inputs'][view] for view in ('image0', 'image1')},
        'data_samples': [*make_batch((1, 2))['data_samples'], *make_batch((3, 4), height=48, width=64)['data_samples']],
    }
    for ours, theirs in zip(predictions(model, mixed), alone, strict=True):
        assert torch.equal(ours, theirs)


def test_prompts_follow_the_category(make: Callable, monkeypatch: pytest.MonkeyPatch):
    model = make(prompt='a photo of a {category}').eval()
    seen = []
    monkeypatch.setattr(model.backbone.extractor, '_choose', spy(model.backbone.extractor._choose, seen))
    batch = make_batch((1, 2), (1, 2))
    batch['data_samples'][1].set_metainfo({'category': 'dog'})
    with torch.no_grad():
        descriptors = model(**model.data_preprocessor(batch))
    assert seen == [['a photo of a horse', 'a photo of a horse', 'a photo of a dog', 'a photo of a dog']]
    fixed = make(backbone={'prompt': 'a photo of a horse'}).eval()
    with torch.no_grad():
        expected = fixed(**fixed.data_preprocessor(make_batch((1, 2))))
    torch.testing.assert_close(descriptors[0], expected[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(descriptors[1][0], expected[0][0], rtol=1e-3, atol=1e-3)
    assert (model.protocol['prompt'], fixed.protocol['prompt']) == ('a photo of a {category}', ['a photo of a horse'])


def spy(function: Callable, seen: list) -> Callable:
    def call(prompts, *args):
        seen.append(prompts)
        return function(prompts, *args)

    return call


def test_damaged_and_completed_samples_are_left_as_they_are(make: Callable):
    batch = make_batch((1, 2), (1, 2))
    known = torch.ones(3, 2, dtype=torch.float64)
    batch['data_samples'][0].pred_keypoints1 = known
    batch['inputs']['image0'][1] = batch['inputs']['image1'][1] = None
    meta = {'pair_id': '1', 'category': 'horse', 'damaged': 'b.jpg: cannot be read'}
    batch['data_samples'][1] = PairSample(metainfo=meta)
    model = make().eval()
    with torch.no_grad():
        first, second = model.test_step(batch)
    assert first.pred_keypoints1 is known and 'pred_keypoints1' not in second
    assert len(model.store) == 0
    assert first.protocol == second.protocol == model.protocol


def test_protocol_says_what_predictions_depend_on(make: Callable):
    backbone = {'ensemble': 2, 'seed': 7, 'input_size': 64}
    protocol = make(backbone=backbone, match_size=224, window=5).protocol
    assert protocol['ties'] == 'first in row order'
    assert protocol['match_size'] == 224 and (protocol['window'], protocol['temperature']) == (5, 0.04)
    assert protocol['draws'] == [{'noise': 'seeded', 'seed': 7, 'ensemble': 2}]
    assert protocol['input_size'] == (64, 64)
    assert protocol['model']['layers'] == [LAYER]
    assert protocol['weights'].startswith('sha256:')


def test_on_an_accelerator(make: Callable):
    model = make(neck=AGGREGATION)
    expected = predictions(model, make_batch((1, 2), (2, 3)))
    with simulated_device() as device:
        samples = predictions(model.to(device), make_batch((1, 2), (2, 3)))
        loss = model.train().loss(**model.data_preprocessor(make_batch((1, 2)), True))['loss_match']
        loss.backward()
        assert all(parameter.grad.device == device for parameter in model.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(samples, expected, strict=True))


def test_descriptors_that_were_just_computed_stay_on_the_device(make: Callable):
    model = make(store_dtype='float16').eval()
    model.encode = lambda images, prompts: images[:, :, ::16, ::16]
    with simulated_device() as device, torch.no_grad():
        uploads.clear()
        for pair, uploaded in (((1, 2), 0), ((1, 3), 1)):
            batch = make_batch(pair)
            inputs = {view: [image.float().to(device) for image in images] for view, images in batch['inputs'].items()}
            uploads.clear()
            (descriptors,) = model.encode_pairs(inputs, batch['data_samples'])
            assert uploads == [(3, 4, 5)] * uploaded
            assert {(x.device, x.dtype) for x in descriptors} == {(device, torch.float16)}
        assert {maps.device.type for maps in model.store._maps.values()} == {'cpu'}


def test_errors(make: Callable):
    with pytest.raises(ValueError, match='match_size is 0'):
        make(match_size=0)
    with pytest.raises(ValueError, match="unit is 'cell'; it is 'pixels' or 'cells'"):
        make(unit='cell')
    with pytest.raises(ValueError, match='store_dtype'):
        make(store_dtype='int8')
    model = make(backbone={'layers': [LAYER, 'mid-vit-out']}).eval()
    with pytest.raises(ValueError, match='backbone returns 2 maps'), torch.no_grad():
        model.test_step(make_batch((1, 2)))
    with pytest.raises(ValueError, match='mode'):
        model({}, [], mode='train')
