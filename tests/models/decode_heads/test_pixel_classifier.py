import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmseg.registry import MODELS
from tiny_mmseg import CHANNELS, CLASSES, batch, build_segmentor
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffseg.models.decode_heads.pixel_classifier import (
    EarlyStop,
    MLPEnsemble,
    PixelClassifierHead,
    js_uncertainty,
    member_losses,
    most_uncertain,
    vote,
)

IN_CHANNELS = [3 * channels for level in CHANNELS for channels in level]  # three timesteps


def head_config(**options):
    return {
        'type': 'PixelClassifierHead',
        'in_channels': IN_CHANNELS,
        'num_classes': CLASSES,
        'num_members': 3,
        **options,
    }


def separate(ensemble, member):
    """One member as DatasetDDPM writes it."""
    layers = []
    for i, linear in enumerate(ensemble.linears):
        layers.append(nn.Linear(*linear.weight.shape[1:]))
        with torch.no_grad():
            layers[-1].weight.copy_(linear.weight[member].T)
            layers[-1].bias.copy_(linear.bias[member, 0])
        if i < len(ensemble.norms):
            layers += [nn.ReLU(), nn.BatchNorm1d(linear.weight.shape[2])]
    return nn.Sequential(*layers)


def test_vote_is_the_mode_and_ties_go_to_the_smallest():
    logits = torch.randn(50, 4, 6)  # (P, N, n): with four votes, ties are frequent
    assert vote(logits).argmax(dim=-1).equal(logits.argmax(dim=-1).mode(dim=-1).values)
    choices = torch.tensor([3, 1, 1, 3])
    assert vote(F.one_hot(choices, 6).float()).tolist() == [0, 2, 0, 2, 0, 0]


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, *(x.nbytes for x in tree_leaves(made) if isinstance(x, torch.Tensor)), 0)
        return made


def test_votes_take_no_more_memory_than_logits_and_all_logits_are_never_held():
    logits = torch.randn(64, 10, 21)  # (P, N, n)
    with Largest() as largest:
        vote(logits)
    assert largest.nbytes <= logits.nbytes
    head = MODELS.build(head_config(in_channels=[4], num_members=10, num_classes=21, hidden=(4, 4))).eval()
    with Largest() as largest, torch.no_grad():
        votes = head([torch.randn(1, 4, 8, 8)], (16, 16))
    assert votes.sum(dim=1).eq(10).all()
    assert largest.nbytes <= votes.nbytes


def test_uncertainty():
    same = torch.randn(5, 1, 4).expand(5, 3, 4)
    torch.testing.assert_close(js_uncertainty(same), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(js_uncertainty(100 * torch.eye(4)), torch.tensor(math.log(4)))
    certain = torch.tensor([[100.0, 0.0], [0.0, 0.0]])  # H(3/4, 1/4) - log(2) / 2
    by_hand = -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - math.log(2) / 2
    torch.testing.assert_close(js_uncertainty(certain), torch.tensor(by_hand))
    picture = torch.arange(200.0).view(2, 10, 10)
    assert most_uncertain(picture).tolist() == [94.5, 194.5]


@pytest.mark.parametrize('classes, hidden', [(29, [128, 32]), (30, [256, 128])])
def test_published_shape_and_initialisation(classes, hidden):
    head = PixelClassifierHead([40, 24], classes)
    linears = head.ensemble.linears
    assert [tuple(linear.weight.shape) for linear in linears] == [
        (10, 64, hidden[0]),
        (10, *hidden),
        (10, hidden[1], classes),
    ]
    for linear in linears:
        assert linear.weight.mean().abs() < 1e-3
        torch.testing.assert_close(linear.weight.std().item(), 0.02, rtol=0.05, atol=0)
        assert not linear.bias.any()


def test_members_are_networks_of_their_own():
    ensemble = MLPEnsemble(3, 7, [6, 5], 4)
    networks = [separate(ensemble, member) for member in range(3)]
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-2)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-2) for network in networks]
    for _ in range(5):
        x, y = torch.randn(9, 3, 7), torch.randint(4, (9, 3))
        losses = member_losses(ensemble(x), y)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        for i, (network, each) in enumerate(zip(networks, optimizers, strict=True)):
            loss = F.cross_entropy(network(x[:, i]), y[:, i])
            torch.testing.assert_close(losses[i], loss, rtol=1e-4, atol=1e-5)
            each.zero_grad()
            loss.backward()
            each.step()
    x = torch.randn(8, 3, 7)
    logits = ensemble.eval()(x)
    for i, network in enumerate(networks):
        torch.testing.assert_close(logits[:, i], network.eval()(x[:, i]), rtol=1e-3, atol=1e-4)


def test_held_members_do_not_change():
    ensemble = MLPEnsemble(3, 7, [6, 5], 4)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-2)

    def step(held):
        before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
        with ensemble.holding(held):
            optimizer.zero_grad()
            member_losses(ensemble(torch.randn(9, 3, 7)), torch.randint(4, (9, 3))).sum().backward()
            optimizer.step()
        after = ensemble.state_dict()
        return torch.stack([(before[name] != after[name]).flatten(1).any(dim=1) for name in before])

    assert step(torch.zeros(3, dtype=torch.bool)).all()
    assert step(torch.tensor([False, True, False])).all(dim=0).tolist() == [True, False, True]
    assert not step(torch.tensor([False, True, False]))[:, 1].any()


def test_early_stop():
    rule = EarlyStop(2)
    for losses in ([3.0, 3.0], [2.0, 3.0], [2.5, 2.0], [2.5, 1.0]):
        rule.update(torch.tensor(losses), patience=2)
    assert rule.best.tolist() == [2, 1] and rule.stale.tolist() == [2, 0] and not rule.stopped.any()
    rule.update(torch.tensor([2.0, 0.5]), patience=2)  # as good as the best one is no better
    assert rule.stopped.tolist() == [True, False]
    rule.update(torch.tensor([0.0, 0.6]), patience=2)
    assert rule.stopped.tolist() == [True, False]


@pytest.mark.parametrize('resize', ['bilinear', 'nearest', ['nearest', 'nearest', 'bilinear']])
def test_logits_are_those_of_upsampled_maps(resize):
    head = PixelClassifierHead([3, 2, 4], 5, num_members=3, resize=resize).eval()
    for name, tensor in head.ensemble.state_dict().items():
        tensor.copy_(torch.rand_like(tensor) + 0.5 if 'var' in name else torch.randn_like(tensor))
    maps = [torch.randn(2, channels, *size) for channels, size in ((3, (3, 5)), (2, (6, 10)), (4, (3, 5)))]
    modes = [resize] * 3 if isinstance(resize, str) else resize
    same = [F.interpolate(x, (6, 10)) if mode == 'nearest' else x for x, mode in zip(maps, modes, strict=True)]
    features = torch.cat([F.interpolate(x, (12, 20), mode='bilinear') for x in same], dim=1).permute(0, 2, 3, 1)
    with torch.no_grad():
        expected = torch.stack([separate(head.ensemble, i)[0](features) for i in range(3)], dim=-2)
        expected = head.ensemble.after_first(expected.flatten(0, 2)).view(2, 12, 20, 3, 5)
        found = head.pixel_logits(maps, (12, 20))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_votes_at_another_size_are_repeated():
    head = PixelClassifierHead([3], 5, output_size=(4, 6)).eval()
    maps = [torch.randn(1, 3, 2, 2)]
    votes = head.predict(maps, [{'img_shape': (8, 18)}], {})
    assert votes.shape == (1, 5, 8, 18)
    assert (votes.sum(dim=1) == 10).all()
    assert votes[:, :, ::2, ::3].equal(head(maps))
    assert head.uncertainty(maps).shape == (1,)


@pytest.mark.parametrize(
    'test_cfg',
    [{'mode': 'whole'}, {'mode': 'slide', 'crop_size': (64, 64), 'stride': (32, 32)}],
    ids=['whole', 'slide'],
)
def test_an_ordinary_head_of_a_segmentor(tiny_pipeline, test_cfg):
    model = build_segmentor(
        tiny_pipeline, neck=None, decode_head=ConfigDict(head_config()), test_cfg=ConfigDict(test_cfg)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = model.data_preprocessor(batch(0, 1), training=True)
    losses = model(**data, mode='loss')
    assert losses.keys() == {'decode.loss_ce', 'decode.acc_seg'}
    torch.testing.assert_close(losses['decode.loss_ce'].item(), 3 * math.log(CLASSES), rtol=0.05, atol=0)
    losses['decode.loss_ce'].backward()
    optimizer.step()
    assert [name for name, parameter in model.named_parameters() if parameter.equal(before[name])] == []

    model.eval()
    with torch.no_grad():
        samples = model.test_step(batch(0, 1))
    for sample in samples:
        votes, labels = sample.seg_logits.data, sample.pred_sem_seg.data
        assert votes.shape == (CLASSES, 64, 96)
        torch.testing.assert_close(votes.sum(dim=0), torch.full((64, 96), 3.0))
        assert labels[0].equal(votes.argmax(dim=0))

    twin = build_segmentor(tiny_pipeline, seed=1, neck=None, decode_head=ConfigDict(head_config()))
    twin.load_state_dict(model.state_dict(), strict=True)
    for name, tensor in twin.decode_head.state_dict().items():
        assert tensor.equal(model.decode_head.state_dict()[name])


def test_a_neck_before_it_is_trained():
    head = MODELS.build(head_config(in_channels=[4], num_classes=CLASSES))
    maps = [torch.randn(2, 4, 8, 12, requires_grad=True)]
    head.loss(maps, batch(0, 1)['data_samples'], {})['loss_ce'].backward()
    assert maps[0].grad.any()


def test_batch_without_labels():
    head = MODELS.build(head_config(in_channels=[4]))
    samples = batch(0, 1)['data_samples']
    for sample in samples:
        sample.gt_sem_seg.data[:] = 255
    losses = head.loss([torch.randn(2, 4, 8, 12)], samples, {})
    losses['loss_ce'].backward()
    assert losses['loss_ce'] == 0


def test_wrong_maps():
    head = MODELS.build(head_config(in_channels=[4, 6]))
    with pytest.raises(ValueError, match=r'\[4, 6\].*\[4, 5\]'):
        head([torch.randn(1, 4, 2, 2), torch.randn(1, 5, 2, 2)])
    with pytest.raises(ValueError, match='more maps than the 1'):
        head([torch.randn(1, 4, 2, 2)])
