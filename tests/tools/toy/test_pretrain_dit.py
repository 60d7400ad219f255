from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image

VAE = Path(__file__).parents[3] / 'demo/tiny-sd'
SMALL = {'num_layers': 2, 'num_attention_heads': 2, 'attention_head_dim': 8, 'cross_attention_dim': 16}


@pytest.fixture
def tool(load_tool, monkeypatch):
    """The tool, whose networks are small."""
    return make_small(load_tool('toy/pretrain_dit'), monkeypatch)


def make_small(module, patch):
    patch.setattr(module, 'TRANSFORMER', {**module.TRANSFORMER, **SMALL, 'caption_channels': 16})
    patch.setattr(module, 'TEXT_ENCODER', {**module.TEXT_ENCODER, 'd_model': 16, 'd_kv': 8, 'num_heads': 2})
    patch.setattr(module, 'sample_sheet', lambda pipeline, **_: Image.new('RGB', (8, 8)))  # 50 steps
    return module


def run(module, work_dir, images=8):
    """Run the tool for a few small steps; the folder of the model."""
    out = work_dir / 'tiny-dit'
    paths = ['--out', str(out), '--work-dir', str(work_dir), '--vae', str(VAE)]
    module.main([*paths, '--images', str(images), '--steps', '4', '--batch', '4', '--save-every', '2'])
    return out


@pytest.fixture(scope='module')
def whole(load_tool, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    torch.set_num_threads(1)  # as in each test, which comes later; sums of other parts round differently
    with pytest.MonkeyPatch.context() as patch:
        return run(make_small(load_tool('toy/pretrain_dit'), patch), tmp_path_factory.mktemp('whole'))


def test_the_folder_is_an_ordinary_pipeline(whole):
    pipeline = PixArtSigmaPipeline.from_pretrained(whole)
    assert len(pipeline.tokenizer('a photo of a giraffe').input_ids) == 6  # one for each word, and the end
    for caption in ('a photo of an elephant', 'a photo of a zebra'):
        ids = pipeline.tokenizer(caption).input_ids
        assert pipeline.tokenizer.decode(ids, skip_special_tokens=True) == caption
        assert pipeline.tokenizer.unk_token_id not in ids
    assert pipeline.scheduler.config.flow_shift == 1
    pipeline.set_progress_bar_config(disable=True)
    options = {'num_inference_steps': 1, 'use_resolution_binning': False, 'output_type': 'np'}
    assert pipeline('a photo of a dog', **options).images.shape == (1, 64, 64, 3)
    assert {path.name for path in whole.glob('*.png')} == {'curves.png', 'samples.png'}
    assert '--images 8 --steps 4' in (whole / 'README.md').read_text()


def test_an_interrupted_run_gives_the_same_weights_and_curve(whole, tool, tmp_path, monkeypatch):
    save = tool.Trainer.save

    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool.Trainer, 'save', save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tool, tmp_path)
    stopped = run(tool, tmp_path)
    for name in ('transformer/diffusion_pytorch_model.safetensors', 'text_encoder/model.safetensors', 'curves.png'):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_latents_are_computed_once(tool, tmp_path, monkeypatch):
    encoded = []
    encode = tool.encode_corpus
    monkeypatch.setattr(tool, 'encode_corpus', lambda vae, images, device: (
        encoded.append(len(images)), encode(vae, images, device))[1])  # fmt: skip
    run(tool, tmp_path)
    run(tool, tmp_path)
    (tmp_path / 'transformer.pt').unlink()
    run(tool, tmp_path, images=10)
    assert encoded == [8, 10]
