import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from diffseg.models import VoteTTAModel


class Segmentor(torch.nn.Module):
    """Returns what it is given."""

    def test_step(self, data):
        return data['data_samples']


def predict(votes, flip, truth=None):
    sample = SegDataSample(seg_logits=PixelData(data=torch.tensor(votes)), metainfo={'img_path': 'a.png', **flip})
    if truth is not None:
        sample.set_data({'gt_sem_seg': PixelData(data=torch.tensor(truth))})
    return [sample]


def test_votes_are_added_and_the_smallest_of_equals_wins():
    model = MODELS.build({'type': 'VoteTTAModel', 'module': Segmentor()})
    assert isinstance(model, VoteTTAModel)
    first = [[[6.0, 5.0]], [[4.0, 5.0]], [[0.0, 0.0]]]  # three classes, a row of two pixels
    second = [[[0.0, 5.0]], [[3.0, 5.0]], [[7.0, 0.0]]]
    samples = [predict(first, {}, truth=[[[1, 2]]]), predict(second, {'flip': True, 'flip_direction': 'horizontal'})]
    (merged,) = model.test_step({'inputs': [[None], [None]], 'data_samples': samples})
    assert merged.seg_logits.data.tolist() == [[[6, 10]], [[7, 10]], [[7, 0]]]
    assert merged.pred_sem_seg.data.tolist() == [[[1, 0]]]  # the mean of softmax has class 2 in the first pixel
    assert (merged.gt_sem_seg.data.tolist(), merged.img_path) == ([[[1, 2]]], 'a.png')


def test_classes_of_a_side_are_swapped_where_the_image_is_flipped():
    model = VoteTTAModel(module=Segmentor(), swapped_by_flip=[(0, 2)])
    votes = [[[3.0]], [[1.0]], [[0.0]]]
    flips = ({'flip': False, 'flip_direction': None}, {'flip': True, 'flip_direction': 'horizontal'})
    samples = [predict(votes, flips[0]), predict(votes[::-1], flips[1])]
    (merged,) = model.test_step({'inputs': [[None], [None]], 'data_samples': samples})
    assert merged.seg_logits.data.tolist() == [[[6]], [[2]], [[0]]]
