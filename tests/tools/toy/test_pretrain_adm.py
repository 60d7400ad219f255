import torch
from diffusers import DDPMPipeline
from PIL import Image

from diffseg.diffusion.extractor import DiffusionExtractor


def test_the_folder_is_an_ordinary_pipeline(load_tool, tmp_path, monkeypatch):
    tool = load_tool('toy/pretrain_adm')
    small = {'block_out_channels': (8, 8, 8, 8), 'norm_num_groups': 4, 'attention_head_dim': 4}
    monkeypatch.setattr(tool, 'UNET', {**tool.UNET, **small})
    monkeypatch.setattr(tool, 'sample_sheet', lambda unet: Image.new('RGB', (8, 8)))  # 50 steps
    folder = tmp_path / 'tiny-adm'
    options = ['--images', '8', '--steps', '2', '--batch', '2', '--save-every', '1']
    tool.main(['--out', str(folder), '--work-dir', str(tmp_path), *options])

    pipeline = DDPMPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.beta_schedule == 'linear'
    trained = torch.load(tmp_path / 'unet.pt', weights_only=True)
    assert [step for step, *_ in trained['curve']] == [1, 2]
    features = DiffusionExtractor(folder, ['adm-0', 'adm-11'], [50])(torch.zeros(1, 3, 64, 64))
    assert [tuple(maps.shape) for maps in features.values()] == [(1, 1, 8, 8, 8), (1, 1, 8, 64, 64)]
    assert {path.name for path in folder.glob('*.png')} == {'curve.png', 'samples.png'}
    assert '--images 8 --steps 2' in (folder / 'README.md').read_text()
