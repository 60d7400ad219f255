import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffseg.diffusion.extractor import DiffusionExtractor

SMALL = {'block_out_channels': (8, 8, 8, 8), 'cross_attention_dim': 16, 'attention_head_dim': 2, 'norm_num_groups': 4}


@pytest.fixture
def pretrain(load_tool, tmp_path, monkeypatch):
    """`pretrain(name, *options)` runs the tool on a few small steps and returns the folder; its module is `.tool`."""
    module = load_tool('pretrain_tiny_sd')
    monkeypatch.setattr(module, 'UNET', {**module.UNET, **SMALL})
    monkeypatch.setattr(module, 'TEXT_ENCODER', {**module.TEXT_ENCODER, 'hidden_size': 16, 'num_attention_heads': 2})
    monkeypatch.setattr(module, 'TEST_IMAGES', 16)
    monkeypatch.setattr(module, 'REQUIRED_PSNR', 0.0)
    monkeypatch.setattr(module, 'sample_sheet', lambda pipeline, **_: Image.new('RGB', (8, 8)))  # 50 steps of UNet

    def run(name, *options):
        out = tmp_path / name / 'tiny-sd'
        paths = ['--out', str(out), '--work-dir', str(tmp_path / name)]
        module.main([*paths, '--images', '16', '--vae-steps', '4', '--unet-steps', '4', '--save-every', '2', *options])
        return out

    run.tool = module
    return run


def test_the_folder_is_an_ordinary_pipeline(pretrain):
    folder = pretrain('model')
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert len(pipeline.tokenizer('a photo of a giraffe').input_ids) == 7  # two special tokens and one for each word
    for caption in ('a photo of an elephant', 'a photo of a zebra'):
        ids = pipeline.tokenizer(caption).input_ids
        assert pipeline.tokenizer.decode(ids, skip_special_tokens=True) == caption
        assert len(ids) <= pipeline.tokenizer.model_max_length
    features = DiffusionExtractor(folder, ['dift-1'], [50], prompt='a photo of a dog')(torch.zeros(1, 3, 64, 64))
    assert features['up-level1-upsampler-out'].shape == (1, 1, 8, 8, 8)
    assert {path.name for path in folder.glob('*.png')} == {'curves.png', 'reconstructions.png', 'samples.png'}
    assert '--vae-steps 4 --unet-steps 4' in (folder / 'README.md').read_text()


def test_an_interrupted_run_gives_the_same_weights(pretrain, monkeypatch):
    whole = pretrain('whole')
    trainer = pretrain.tool.Trainer
    save = trainer.save

    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, 'save', save_and_stop)
    for _ in range(2):  # once in either stage
        with pytest.raises(KeyboardInterrupt):
            pretrain('stopped')
    stopped = pretrain('stopped')
    for part in ('unet', 'vae', 'text_encoder'):
        name = next(path.name for path in (whole / part).glob('*.safetensors'))
        assert (whole / part / name).read_bytes() == (stopped / part / name).read_bytes(), part


def test_a_blurred_vae_is_not_built_upon(pretrain, monkeypatch):
    monkeypatch.setattr(pretrain.tool, 'REQUIRED_PSNR', 60.0)
    with pytest.raises(SystemExit, match=r'60\.0 dB are needed'):
        pretrain('model')
