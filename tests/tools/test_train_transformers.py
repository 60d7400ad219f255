"""Transformers of every family, from a prompt to the test of a trained head: tools/train.py and tools/test.py."""

import json
from pathlib import Path

import pytest
import tiny_pipelines
from mmengine.runner import CheckpointLoader
from tiny_mmseg import run_tool, segmentor_config, write_experiment

from diffseg.diffusion import pipeline_prompts

SIZE = 32, 64


def transformer_segmentor(folder: Path, kind: str, channels: int, prompts: Path) -> dict:
    """A segmentor that reads the second block of a transformer."""
    return segmentor_config(
        folder,
        backbone={
            'layers': ['vit-block1-out'],
            'timesteps': [100],
            'channels': [channels],
            'prompt': '1' if kind == 'dit' else 'a photo of a horse',
            'cache_dir': str(prompts),
        },
        data_preprocessor={
            'type': 'SegDataPreProcessor',
            'mean': [127.5] * 3,
            'std': [127.5] * 3,
            'bgr_to_rgb': True,
            'size': SIZE,
            'seg_pad_val': 255,
        },
        neck=None,
        decode_head={
            'type': 'FCNHead',
            'in_channels': channels,
            'in_index': 0,
            'channels': 8,
            'num_convs': 1,
            'concat_input': False,
            'num_classes': 3,
            'norm_cfg': {'type': 'BN'},
            'align_corners': False,
        },
    )


@pytest.mark.parametrize('kind', tiny_pipelines.KINDS)
def test_prompt_to_trained_head(kind, pipeline_folder, tmp_path, monkeypatch):
    folder = pipeline_folder(kind)
    width = {'pixart-alpha': 24, 'pixart-sigma': 24, 'hunyuan-dit': 16, 'dit': 16, 'sana': 16, 'auraflow': 16}
    channels = width.get(kind, 16 if kind.startswith('sd3') else 32)
    config = write_experiment(tmp_path, transformer_segmentor(folder, kind, channels, tmp_path / 'prompts'), SIZE, 2)
    run_tool('train', config, '--work-dir', tmp_path / 'train')
    checkpoint = tmp_path / 'train' / 'iter_2.pth'

    state = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')['state_dict']
    assert {name.split('.')[0] for name in state} == {'backbone', 'decode_head'}
    assert [name for name in state if name.startswith('backbone.')] == ['backbone._extra_state']
    stored = json.loads(bytes(state['backbone._extra_state'].tolist()))
    assert stored['prompt'] == [transformer_segmentor(folder, kind, 1, tmp_path)['backbone']['prompt']]
    assert all(x.isfinite().all() for x in state.values())

    (log,) = (tmp_path / 'train').glob('*/vis_data/scalars.json')
    validated = json.loads(log.read_text().splitlines()[-1])
    monkeypatch.setattr(pipeline_prompts, '_load_encoder', None)  # embeddings are kept
    tested = run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'test')
    assert tested['mIoU'] == validated['mIoU'] > 0
