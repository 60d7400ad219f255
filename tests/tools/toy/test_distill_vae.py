from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from diffseg.diffusion.extractor import DiffusionExtractor

TEACHER = Path(__file__).parents[3] / 'demo/tiny-sd'


@pytest.fixture
def run(load_tool, monkeypatch, tmp_path):
    """Run the tool for a number of small steps; the folder of the student."""
    tool = load_tool('toy/distill_vae')
    monkeypatch.setattr(tool, 'TEST_IMAGES', 16)

    def run(steps: int) -> Path:
        out = tmp_path / 'student'
        paths = ['--out', str(out), '--work-dir', str(tmp_path), '--teacher', str(TEACHER)]
        tool.main([*paths, '--images', '8', '--steps', str(steps), '--batch', '4', '--save-every', '6'])
        return out

    return run


def test_the_student_takes_the_place_of_the_vae(run):
    folder = run(12)
    stored = torch.load(folder.parent / 'student.pt', weights_only=True)
    losses = [value for _, _, value in stored['curve']]
    assert len(losses) == 2 and losses[1] < losses[0]
    student = AutoencoderTiny.from_pretrained(folder)
    assert student.config.scaling_factor == 1 and student.config.latent_channels == 4
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    extractor = DiffusionExtractor(TEACHER, ['up-level1-upsampler-out'], [50], weights={'vae': folder}, prompt='a dog')
    with torch.no_grad():
        latents = student.encode(images).latents
        torch.testing.assert_close(extractor.encode(images), latents)
        assert latents.shape == (1, 4, 16, 24) and student.decode(latents).sample.shape == images.shape
    assert {path.name for path in folder.glob('*.png')} == {'curves.png', 'reconstructions.png'}
    assert '--images 8 --steps 12' in (folder / 'README.md').read_text()
