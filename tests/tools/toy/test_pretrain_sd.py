import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffseg.diffusion.extractor import DiffusionExtractor

BATCHES = ('--vae-batch', '4', '--unet-batch', '4')
SMALL = {'block_out_channels': (8, 8, 8, 8), 'cross_attention_dim': 16, 'attention_head_dim': 2, 'norm_num_groups': 4}


@pytest.fixture
def tool(load_tool, monkeypatch):
    """The tool, whose networks and tests are small."""
    return make_small(load_tool('toy/pretrain_sd'), monkeypatch)


def make_small(module, patch):
    patch.setattr(module, 'UNET', {**module.UNET, **SMALL})
    patch.setattr(module, 'TEXT_ENCODER', {**module.TEXT_ENCODER, 'hidden_size': 16, 'num_attention_heads': 2})
    patch.setattr(module, 'TEST_IMAGES', 16)
    patch.setattr(module, 'REQUIRED_PSNR', 0.0)
    patch.setattr(module, 'sample_sheet', lambda pipeline, **_: Image.new('RGB', (8, 8)))  # 50 steps of UNet
    return module


def run(module, work_dir):
    """Run the tool on a few small steps; the folder of the model."""
    out = work_dir / 'tiny-sd'
    paths = ['--out', str(out), '--work-dir', str(work_dir)]
    module.main([*paths, '--images', '16', '--vae-steps', '4', '--unet-steps', '4', '--save-every', '2', *BATCHES])
    return out


@pytest.fixture(scope='module')
def whole(load_tool, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    torch.set_num_threads(1)  # as in each test, which comes later; sums of other parts round differently
    with pytest.MonkeyPatch.context() as patch:
        return run(make_small(load_tool('toy/pretrain_sd'), patch), tmp_path_factory.mktemp('whole'))


def test_the_folder_is_an_ordinary_pipeline(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole)
    assert len(pipeline.tokenizer('a photo of a giraffe').input_ids) == 7  # two special tokens and one for each word
    for caption in ('a photo of an elephant', 'a photo of a zebra'):
        ids = pipeline.tokenizer(caption).input_ids
        assert pipeline.tokenizer.decode(ids, skip_special_tokens=True) == caption
        assert len(ids) <= pipeline.tokenizer.model_max_length
    features = DiffusionExtractor(whole, ['dift-1'], [50], prompt='a photo of a dog')(torch.zeros(1, 3, 64, 64))
    assert features['up-level1-upsampler-out'].shape == (1, 1, 8, 8, 8)
    assert {path.name for path in whole.glob('*.png')} == {'curves.png', 'reconstructions.png', 'samples.png'}
    assert '--vae-steps 4 --unet-steps 4' in (whole / 'README.md').read_text()


def test_an_interrupted_run_gives_the_same_weights(whole, tool, tmp_path, monkeypatch):
    save = tool.Trainer.save

    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool.Trainer, 'save', save_and_stop)
    for _ in range(2):  # once in either stage
        with pytest.raises(KeyboardInterrupt):
            run(tool, tmp_path)
    stopped = run(tool, tmp_path)
    for part in ('unet', 'vae', 'text_encoder'):
        name = next(path.name for path in (whole / part).glob('*.safetensors'))
        assert (whole / part / name).read_bytes() == (stopped / part / name).read_bytes(), part


def test_a_blurred_vae_is_not_built_upon(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'REQUIRED_PSNR', 60.0)
    with pytest.raises(SystemExit, match=r'60\.0 dB are needed'):
        run(tool, tmp_path)


def test_a_model_is_trained_further(whole, tool, tmp_path):
    out = tmp_path / 'further'
    paths = ['--out', str(out), '--work-dir', str(tmp_path), '--continue-from', str(whole)]
    tool.main([*paths, '--images', '16', '--collages', '4', '--unet-steps', '2', '--save-every', '2', *BATCHES])
    weights = [
        [load_file(next((folder / part).glob('*.safetensors'))) for folder in (whole, out)]
        for part in ('vae', 'unet', 'text_encoder')
    ]
    distances = [max(float((a[name].float() - b[name].float()).abs().max()) for name in a) for a, b in weights]
    assert distances[0] == 0
    assert all(0 < distance < 1e-2 for distance in distances[1:]), distances
    card = (out / 'README.md').read_text()
    assert f'--images 16 --continue-from {whole} --collages 4 --unet-steps 2' in card
    assert '16 pictures drawn by `tools/toy/quadrupeds.py` and, for UNet and text encoder, 4 by' in card
    assert f'those of `{whole}`, then 2 steps' in card
