"""The model of the demo is what its card says."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from quadrupeds import draw_sample

from diffseg.datasets.toy import SPECIES
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import decode
from diffseg.diffusion.loading import load_vae, meta_network
from diffseg.diffusion.sites import sites
from diffseg.evaluation import correct_keypoints, pck
from diffseg.models.correspondence import match_points

FOLDER = Path(__file__).parents[1] / 'demo/tiny-sd'


def to_tensor(sample) -> torch.Tensor:
    return torch.from_numpy(sample.image).permute(2, 0, 1).float() / 127.5 - 1


def test_it_is_an_ordinary_small_pipeline_with_the_names_of_sd15():
    files = [path for path in FOLDER.rglob('*') if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert not [path for path in files if path.suffix in ('.bin', '.pt', '.pth', '.ckpt')]
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    assert list(sites(pipeline.unet)) == list(sites(meta_network('sd15')))


def test_the_vae_reconstructs_unseen_pictures():
    images = torch.stack([to_tensor(draw_sample(77, index)) for index in range(32)])
    vae = AutoencoderKL.from_pretrained(FOLDER, subfolder='vae')
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * (decoded - images).div(2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() >= 26


def test_the_tiny_vae_gives_nearly_the_same_latents_and_pictures():
    folder = FOLDER.with_name('tiny-sd-taesd')
    assert sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) <= 2**19
    images = torch.stack([to_tensor(draw_sample(77, index)) for index in range(16)])
    exact, tiny = (
        DiffusionExtractor(FOLDER, ['unet-in'], [50], prompt='a dog', vae_sample='mode', weights={'vae': vae})
        for vae in (None, folder)
    )
    with torch.no_grad():
        expected, latents = exact.encode(images), tiny.encode(images)
        decoded = decode(load_vae(FOLDER, vae=folder), latents)
    assert (latents - expected).square().mean() < 0.02 * expected.var()
    assert -10 * (decoded - images).div(2).square().mean().log10() >= 24


def test_pretraining_makes_parts_alike():
    scores = {}
    for random in ((), ('unet',)):
        extractor = DiffusionExtractor(FOLDER, ['up-level2-repeat1-vit-out'], [50], weights={'random': random})
        hits = []
        for number in range(16):
            species = SPECIES[number % 4]
            pair = [draw_sample(78, 2 * number + i, species=species) for i in range(2)]
            with torch.no_grad():
                source, target = extractor(torch.stack([to_tensor(each) for each in pair]))['up-level2-repeat1-vit-out']
            seen = torch.from_numpy(pair[0].visible & pair[1].visible)
            points, truth = (torch.from_numpy(each.keypoints).long()[seen] for each in pair)
            matches = match_points(source[0], target[0], points, (64, 64), (64, 64))
            x1, y1, x2, y2 = pair[1].bbox
            hits.append(correct_keypoints(matches, truth, max(x2 - x1, y2 - y1)))
        scores[random] = pck(hits, 'point')
    assert scores[()] > 2 * scores[('unet',)]
