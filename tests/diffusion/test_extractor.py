import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gpu import DEVICES
from safetensors.torch import save_file
from torch.nn import functional as F

from diffseg import devices
from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import decode
from diffseg.diffusion.loading import load_vae
from diffseg.diffusion.options import group_options
from diffseg.diffusion.schedules import add_noise
from diffseg.diffusion.trajectories import seeded_noise
from diffseg.geometry import fit_to_image

LAYERS = ['up-level0-repeat1-res-out', 'up-level2-repeat1-vit-block0-cross-q', 'down-level0-repeat0-vit-out']
STRIDES = [64, 16, 8]
CLOSE = {'rtol': 1e-4, 'atol': 1e-5}


@pytest.fixture(scope='module')
def make(tiny_pipeline, tmp_path_factory):
    """`make(**options)`: an extractor of the tiny SD1.5, by default with an embedding instead of a prompt."""
    cache = tmp_path_factory.mktemp('prompts')
    embedding = seeded_noise((1, 77, 32), 0)

    def make(layers=LAYERS, timesteps=(50, 400), prompt=embedding, **options):
        options = group_options({'cache_dir': cache, **options})
        return DiffusionExtractor(tiny_pipeline, layers, timesteps, prompt=prompt, **options)

    return make


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64) * 2 - 1


def assert_same(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or CLOSE))


@pytest.mark.parametrize('size', [(64, 64), (64, 128), (96, 40), (70, 129), (8, 8), (9, 200)])
def test_shapes_follow_the_sites(make, size):
    extractor = make([*LAYERS, 'up-level2-repeat0-vit-block0-cross-map'], attention_maps=['up_cross'])
    activations = extractor(torch.zeros(1, 3, *size))
    assert list(activations) == extractor.layers == [*LAYERS, 'up-level2-repeat0-vit-block0-cross-map', 'attn']
    assert extractor.channels[-2:] == [77, 2 * 77]
    assert [site.stride for site in extractor.sites.values()][:3] == STRIDES
    for (name, site), channels in zip(extractor.sites.items(), extractor.channels, strict=True):
        assert activations[name].shape == (1, 2, channels, *(math.ceil(side / site.stride) for side in size))
        assert activations[name].shape[-2:] == site.size(*size)


@pytest.mark.parametrize(
    'options', [{}, {'micro_batch': 1}, {'ensemble': 2}, {'trajectory': {'type': 'inversion', 'steps': 20}}]
)
def test_activations_are_transformed_as_soon_as_they_are_read(make, images, options):
    seen = []

    def halve(name, x):
        seen.append((name, len(x)))
        return x[:, ::2] / 2

    layers = [*LAYERS, 'unet-out']
    found = make(layers, transform=halve, **options)(images)
    expected = make(layers, **options)(images)
    prediction = expected.pop('unet-out')
    assert_same(found, {name: x[:, :, ::2] / 2 for name, x in expected.items()} | {'unet-out': prediction})
    assert {name for name, _ in seen} == set(LAYERS)
    assert 'micro_batch' not in options or {count for _, count in seen} == {1}
    assert 'halve' in make(transform=halve).fingerprint['transform'] and 'transform' not in make().fingerprint


def test_averaged_attention_is_cropped_at_its_own_stride(make):
    extractor = make(attention_maps=['up_cross', 'down_cross'], attention_mode='average')
    activations = extractor(torch.zeros(1, 3, 70, 129))
    assert extractor.layers[-2:] == ['attn-16', 'attn-32'] and extractor.channels[-2:] == [77, 77]
    assert activations['attn-16'].shape == (1, 2, 77, 5, 9) and activations['attn-32'].shape == (1, 2, 77, 3, 5)


def test_averaged_attention_stands_where_the_layers_say(make, images):
    attention = {'attention_maps': ['up_cross'], 'attention_mode': 'average'}
    names = [LAYERS[0], 'attn-32', *LAYERS[1:], 'attn-16']
    found, last = make(names[:-1], **attention)(images), make(**attention)(images)
    assert list(found) == names and list(last) == [*LAYERS, 'attn-16', 'attn-32']
    assert_same(found, {name: last[name] for name in names})
    with pytest.raises(ValueError, match="unknown activation 'attn-64'"):
        make(['attn-64'], **attention)


def test_the_latent_of_vpd_is_the_mode_as_it_is(make, images):
    extractor = make(['unet-in'], (1,), trajectory='clean', vae_sample='mode', scale_latent=False)
    with torch.no_grad():
        mode = extractor.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(extractor(images)['unet-in'][:, 0], mode)
    scaled = make(['unet-in'], (1,), trajectory='clean', vae_sample='mode')(images)['unet-in'][:, 0]
    torch.testing.assert_close(scaled, mode * 0.18215)


def test_without_a_prompt_each_call_gives_one(make, images):
    extractor = make(prompt=None, attention_maps=['up_cross'])
    embedding = seeded_noise((1, 77, 32), 0)
    assert_same(extractor(images, embedding), make(attention_maps=['up_cross'])(images))
    assert extractor.fingerprint['prompt'] is None and extractor.channels[-1] is None
    with pytest.raises(ValueError, match='give one with each call'):
        extractor(images)


@pytest.mark.parametrize('size', [(50, 40), (56, 40), (33, 64)])
def test_maps_of_a_continued_image_are_fitted_to_the_image(make, images, size):
    """Interpolated along sides that are no multiple of a map's stride, cut along the others."""
    image = images[..., : size[0], : size[1]]
    extractor = make(vae_sample='mode', attention_maps=['up_cross', 'up_self'])
    whole = extractor(F.pad(image, (0, 64 - size[1], 0, 64 - size[0]), mode='reflect'))
    for name, x in extractor(image).items():
        stride = extractor.sites[name].stride
        assert torch.equal(x, fit_to_image(whole[name], stride, size))
        cut = whole[name][..., : math.ceil(size[0] / stride), : math.ceil(size[1] / stride)]
        if all(side % stride == 0 for side in size):
            assert torch.equal(x, cut)


def test_cells_tile_images_of_any_size(make, monkeypatch):
    """A network that knows where each cell of its input lies: the maps say where the cells of the image lie."""
    extractor, size = make(), (70, 97)

    def places(latents, prompts, images):
        found = {}
        for name, site in extractor.sites.items():
            axes = [(torch.arange(side // site.stride) + 0.5) * site.stride - 0.5 for side in images.shape[-2:]]
            found[name] = torch.stack(torch.meshgrid(*axes, indexing='ij')).expand(1, 1, 2, -1, -1)
        return found

    monkeypatch.setattr(extractor, '_extract', places)
    for name, x in extractor(torch.zeros(1, 3, *size)).items():
        rows, columns = x.shape[-2:]
        assert (rows, columns) == extractor.sites[name].size(*size)
        for found, side, count in ((x[0, 0, 0, :, 0], 70, rows), (x[0, 0, 1, 0], 97, columns)):
            expected = (torch.arange(count) + 0.5) * (side / count) - 0.5
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    'options',
    [
        {'ensemble': 2},
        {'trajectory': 'clean', 'timesteps': (261,)},
        {'trajectory': {'type': 'inversion', 'steps': 10}, 'timesteps': (-1, 100)},
        {'trajectory': {'type': 'generation', 'steps': 10, 'guidance': 3.0}, 'timesteps': (801, 901), 'ensemble': 2},
    ],
)
def test_an_image_gives_the_same_alone_in_a_batch_and_at_another_position(make, images, options):
    extractor = make(**options)
    together, swapped = extractor(images), extractor(images.flip(0))
    alone = extractor(images[:1])
    for name in LAYERS:
        torch.testing.assert_close(together[name][:1], alone[name], **CLOSE)
        torch.testing.assert_close(swapped[name][1:], alone[name], **CLOSE)
    torch.rand(3)
    assert_same(extractor(images), together, rtol=0, atol=0)
    assert_same(make(**options)(images), together, rtol=0, atol=0)


def test_seed_and_random_noise_change_the_draws(make, images):
    base = make()(images)[LAYERS[2]]
    assert not torch.allclose(make(seed=1)(images)[LAYERS[2]], base)
    random = make(noise='random')
    torch.manual_seed(3)
    first = random(images)
    assert not torch.allclose(first[LAYERS[2]], random(images)[LAYERS[2]])
    torch.manual_seed(3)
    assert_same(random(images), first, rtol=0, atol=0)
    equal = random(images[:1].expand(2, -1, -1, -1))[LAYERS[2]]
    assert not torch.allclose(equal[0], equal[1])


def test_the_ensemble_is_the_mean_of_its_members(make):
    latents = torch.randn(2, 3, 4, 8, 8)  # (B, E, 4, h, w)
    found = make(trajectory='clean', ensemble=3).extract_latents(latents)
    single = make(trajectory='clean')
    members = [single.extract_latents(latents[:, member]) for member in range(3)]
    assert_same(found, {name: torch.stack([m[name] for m in members]).mean(0) for name in LAYERS})


def test_every_ensemble_member_has_its_own_noise(make):
    latent = torch.randn(2, 4, 8, 8)
    extractor = make(['unet-in'], ensemble=3, seed=5)
    noise = sum(seeded_noise((1, 4, 8, 8), 5, 'noise', member) for member in range(3)) / 3
    expected = [add_noise(latent, noise, extractor.parts.schedule.alphas_cumprod[t]) for t in extractor.timesteps]
    torch.testing.assert_close(extractor.extract_latents(latent)['unet-in'], torch.stack(expected, dim=1))


@pytest.mark.parametrize('micro_batch', [1, 5, 8])
def test_micro_batches_change_nothing(make, images, micro_batch):
    whole, cut = make(ensemble=3), make(ensemble=3, micro_batch=micro_batch)
    sizes = []
    cut.network.conv_in.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    assert_same(cut(images), whole(images))
    assert max(sizes) <= micro_batch and sum(sizes) == 2 * 2 * 3


def test_the_image_is_encoded_once(make, images):
    extractor, calls = make(ensemble=3), []
    extractor.vae.encoder.register_forward_hook(lambda *args: calls.append(1))
    extractor(images)
    assert len(calls) == 1


def test_encode_and_extract_latents_make_up_forward(make, images):
    extractor = make()
    latent = extractor.encode(images)
    assert latent.shape == (2, 4, 8, 8)
    assert_same(extractor.extract_latents(latent), extractor(images), rtol=0, atol=0)


def test_the_latent_is_the_scaled_posterior(make, images):
    extractor = make(vae_sample='mode')
    mean = extractor.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(extractor.encode(images), mean * 0.18215)
    sampled = make().encode(images)
    assert not torch.allclose(sampled, mean * 0.18215)
    draw = (sampled / 0.18215 - mean) / extractor.vae.encode(images).latent_dist.std
    torch.testing.assert_close(draw[0], draw[1], rtol=1e-2, atol=1e-2)


def test_sdxl(tiny_sdxl_pipeline, tmp_path, images):
    layers = ['up-level0-repeat0-vit-block7-out', 'up-level1-repeat0-vit-block0-cross-q']
    extractor = DiffusionExtractor(tiny_sdxl_pipeline, layers, [50], prompt='a horse', runtime={'cache_dir': tmp_path})
    activations = extractor(images[..., :40])
    assert [tuple(x.shape) for x in activations.values()] == [(2, 1, 64, 2, 2), (2, 1, 32, 4, 3)]


def test_prompts_for_all_and_for_each(make, images):
    both = make(prompt=['horse', 'cat'])
    horse, cat = make(prompt='horse')(images), make(prompt='cat')(images)
    assert not torch.allclose(horse[LAYERS[0]], cat[LAYERS[0]])
    found = both(images, ['cat', 'horse'])
    for name in LAYERS:
        torch.testing.assert_close(found[name][0], cat[name][0], **CLOSE)
        torch.testing.assert_close(found[name][1], horse[name][1], **CLOSE)
    assert_same(both(images, 'cat'), cat)
    assert_same(make(prompt='horse')(images, 'cat'), cat)  # not known beforehand
    with pytest.raises(ValueError, match='2 prompts; say'):
        both(images)
    with pytest.raises(ValueError, match='3 prompts for a batch of 2'):
        both(images, ['cat'] * 3)


def test_embeddings_instead_of_prompts(make, images):
    texts = make(prompt='horse')
    embeds = texts.conditioning.embeds
    for prompt in (embeds, Conditioning(embeds)):
        assert_same(make(prompt=prompt)(images), texts(images), rtol=0, atol=0)
    assert_same(texts(images, embeds.expand(2, -1, -1)), texts(images), rtol=0, atol=0)


def test_gradients_flow_where_they_are_wanted(make, images):
    extractor = make(timesteps=(50,))
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not any(x.requires_grad for x in extractor(images).values())

    latent = extractor.encode(images).requires_grad_()
    extractor.extract_latents(latent)[LAYERS[1]].sum().backward()
    assert latent.grad.abs().sum() > 0

    embeds = extractor.conditioning.embeds.clone().requires_grad_()
    extractor(images, embeds)[LAYERS[1]].sum().backward()
    assert embeds.grad.abs().sum() > 0

    pixels = images.clone().requires_grad_()
    extractor(pixels)[LAYERS[1]].sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients(make, images):
    gradients = []
    for checkpointing in (False, True):
        extractor = make(timesteps=(50,), gradient_checkpointing=checkpointing)
        extractor.network.requires_grad_(True)
        found = extractor.extract_latents(extractor.encode(images))
        sum(x.square().mean() for x in found.values()).backward()
        gradients.append({name: p.grad for name, p in extractor.network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() <= gradients[1].keys()
    assert all(gradients[0][name].abs().sum() > 0 for name in ('conv_in.weight', 'up_blocks.0.resnets.1.conv2.weight'))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **CLOSE)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', ['bfloat16', torch.float16])
def test_half_precision(make, images, dtype, device):
    exact, half = make(vae_sample='mode', ensemble=2)(images), make(vae_sample='mode', ensemble=2, dtype=dtype)
    for name, x in half.to(device)(images.to(device)).items():
        assert x.dtype == half.network.dtype and x.device.type == device
        assert (x.cpu().float() - exact[name]).norm() < 0.05 * exact[name].norm()


@pytest.mark.parametrize('device', DEVICES)
def test_autocast_leaves_the_vae_alone(make, images, device):
    extractor, images = make().to(device), images.to(device)
    with torch.autocast(device, torch.bfloat16):
        latent = extractor.encode(images)
        assert extractor(images)[LAYERS[1]].dtype == torch.bfloat16
    assert torch.equal(latent, extractor.encode(images))


def test_memory_options_change_nothing(make, images):
    expected = make()(images)
    assert_same(make(memory_format='channels_last', vae_slicing=True)(images), expected)
    assert make(vae_tiling=True).vae.use_tiling


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_is_chosen_for_the_device_is_in_the_fingerprint(make, images, monkeypatch, dtype):
    monkeypatch.setattr(devices, 'fast_dtype', lambda device: dtype)
    exact = make()
    assert exact.network.dtype == torch.float32  # it is small
    monkeypatch.setattr(devices, 'SMALL_NETWORK', 0)
    extractor = make()
    assert extractor.network.dtype == extractor.vae.dtype == dtype
    rounded = dtype == torch.bfloat16
    assert extractor.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == rounded
    expected = {'dtype': 'bfloat16', 'memory_format': 'channels_last'} if rounded else {}
    different = {key for key, value in extractor.fingerprint.items() if value != exact.fingerprint.get(key)}
    assert {key: extractor.fingerprint[key] for key in different - {'weights'}} == expected
    reference = exact(images)
    for name, x in extractor(images).items():
        cosine = torch.cosine_similarity(x.float().flatten(1), reference[name].flatten(1)).min()
        assert cosine > (0.99 if rounded else 0.999999)


def test_compiled_blocks_change_nothing_and_leave_the_read_ones(make, images):
    extractor = make(compile={'backend': 'eager'})
    compiled = {
        name
        for name, module in extractor.network.named_modules()
        if getattr(module, '_compiled_call_impl', None) is not None
    }
    blocks = {name for name, _ in extractor.network.named_modules() if name.endswith('transformer_blocks.0')}
    assert blocks - compiled == {'up_blocks.2.attentions.1.transformer_blocks.0'}
    assert_same(extractor(images), make()(images))


def test_only_the_unet_the_vae_and_controlnets_are_children(make):
    extractor = make()
    assert [name for name, _ in extractor.named_children()] == ['network', 'vae', 'controls']
    assert len(extractor.controls) == 0
    assert not extractor.network.training and not extractor.vae.training


def test_the_fingerprint_says_what_activations_depend_on(make, tiny_unet, tmp_path):
    save_file(tiny_unet(seed=1).state_dict(), tmp_path / 'unet.safetensors')
    base = make().fingerprint
    assert json.loads(json.dumps(base)) == base
    assert make().fingerprint == base
    assert make(['dhf-0-1']).fingerprint['layers'] == ['up-level0-repeat1-res-increment']
    for options in (
        {'layers': LAYERS[:2]},
        {'timesteps': (50,)},
        {'trajectory': 'clean'},
        {'prompt': 'a horse'},
        {'prompt': torch.zeros(1, 77, 32)},
        {'ensemble': 2},
        {'noise': 'random'},
        {'seed': 1},
        {'dtype': 'bfloat16'},
        {'network_weights': tmp_path / 'unet.safetensors'},
        {'vae_sample': 'mode'},
        {'scale_latent': False},
        {'attention_maps': ['up_cross']},
        {'attention_mode': 'average'},
    ):
        assert make(**options).fingerprint != base, options
    guided = {'type': 'generation', 'negative_prompt': 'blurred'}
    assert make(trajectory=guided, timesteps=(21,)).fingerprint['negative_prompt'] == ['blurred']


def test_the_negative_prompt_matters(make, images):
    guided = [
        make(trajectory={'type': 'generation', 'steps': 4, 'negative_prompt': text}, timesteps=(501,))(images)
        for text in ('', 'a horse')
    ]
    assert not torch.allclose(guided[0][LAYERS[0]], guided[1][LAYERS[0]])


@torch.no_grad()
def test_a_prompt_that_is_the_negative_prompt_is_not_guided(make, images):
    """Both predictions would be the same, bit for bit, so that guidance would only take twice as long."""
    extractor = make(trajectory={'type': 'generation', 'steps': 4}, timesteps=(251,), prompt=['', 'a horse'])
    calls = []
    extractor.network.register_forward_pre_hook(lambda *_: calls.append(1))
    skipped = extractor(images, '')
    assert len(calls) == 3
    extractor(images, ['', 'a horse'])
    assert len(calls) == 3 + 5
    extractor._is_guided = lambda prompts: True
    assert_same(extractor(images, ''), skipped, rtol=0, atol=0)
    assert len(calls) == 3 + 5 + 5
    del extractor._is_guided
    embedding = torch.zeros(1, 77, 32)
    given = make(
        trajectory={'type': 'generation', 'negative_prompt': embedding}, timesteps=(961,), prompt=embedding + 1
    )
    assert given._is_guided(None)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'layers': ['up-level9-repeat0-res-out']}, 'nearest'),
        ({'timesteps': (1000,)}, r'\[1000\].*999'),
        ({'trajectory': 'inversion', 'timesteps': (50,)}, r'-1, 0, \.\.\., 960'),
        ({'noise': 'fresh'}, "'seeded' or 'random'"),
        ({'vae_sample': 'mean'}, "'sample' or 'mode'"),
        ({'ensemble': 0}, 'ensemble is 0'),
        ({'dtype': 'half-ish'}, 'half-ish'),
        ({'micro_batch': 0}, 'micro_batch is 0'),
    ],
)
def test_wrong_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (torch.zeros(3, 64, 64), r'\(3, 64, 64\); expected \(B, 3, H, W\)'),
        (torch.zeros(1, 4, 64, 64), r'expected \(B, 3, H, W\)'),
        (torch.zeros(0, 3, 64, 64), r'expected \(B, 3, H, W\)'),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'uint8'),
        (torch.full((1, 3, 64, 64), 255.0), r'\[255, 255\]; expected \[-1, 1\]'),
        (torch.zeros(1, 3, 7, 64), 'smaller than one cell'),
    ],
)
def test_wrong_images(make, images, message):
    extractor = make()
    for call in (extractor, extractor.encode):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_on_the_meta_device_shapes_are_the_same(make, images):
    shapes = {name: x.shape for name, x in make()(images).items()}
    with torch.device('meta'):
        extractor = make(random=('unet', 'vae'))
    activations = extractor(images.to('meta'))
    assert all(x.is_meta for x in activations.values())
    assert {name: x.shape for name, x in activations.items()} == shapes


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_latents_in_half_precision_are_noised_in_single(make, dtype):
    extractor = make(['unet-in'], (0, 5), dtype=dtype)
    latents = torch.zeros(1, 4, 32, 32, dtype=getattr(torch, dtype))
    deviations = extractor.extract_latents(latents)['unet-in'].float().std(dim=(0, 2, 3, 4))
    expected = (1 - extractor.parts.schedule.alphas_cumprod[[0, 5]]).sqrt().float()  # 0.029 and 0.072
    torch.testing.assert_close(deviations, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'timesteps': (50, 261, 400)}, [3] * 4),  # a member's three timesteps
        ({'timesteps': (-1, 250, 500), 'trajectory': {'type': 'inversion', 'steps': 4}}, [4] * 4),  # all members
        ({'timesteps': (0, 1, 2), 'trajectory': 'refinement'}, [4] * 3),
    ],
    ids=['noise', 'inversion', 'refinement'],
)
@torch.no_grad()
def test_micro_batches_are_filled(make, options, expected):
    extractor = make(ensemble=4, micro_batch=4, **options)
    sizes = []
    extractor.network.conv_in.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    extractor.extract_latents(torch.randn(1, 4, 8, 8))
    assert sizes == expected


def test_all_values_are_checked_at_once(make, images, monkeypatch):
    reads, read = [], torch.Tensor.tolist
    extractor = make()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, 'tolist', lambda x: reads.append(x) or read(x))
        extractor(images)
        assert len(reads) == 1
        with pytest.raises(ValueError, match=r'images are in \[.*127.5\]; expected \[-1, 1\]'):
            extractor(images / images.max() * 127.5)
        extractor.check_finite = False
        extractor(images / images.max() * 127.5)
        assert len(reads) == 2


def test_not_finite_activations_name_the_layer_the_dtype_and_the_remedy(make, images):
    extractor = make(dtype='float16')
    extractor.network.up_blocks[2].attentions[1].transformer_blocks[0].attn2.to_q.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"in up-level2-\S+-cross-q computed in torch.float16: use dtype 'bf"):
        extractor(images)
    extractor.check_finite = False
    assert not extractor(images)[LAYERS[1]].isfinite().all()
    with pytest.raises(FloatingPointError, match=r'the latent computed in torch\.float32: the images'):
        make()(images * torch.nan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_gpu_gives_the_same(make, images):
    extractor = make(ensemble=2)
    expected = extractor(images)
    found = extractor.to('cuda')(images.to('cuda'))
    assert_same({name: x.cpu() for name, x in found.items()}, expected, rtol=1e-2, atol=1e-3)


SAMPLING = {
    "the model's own": ({}, {}, (201, 601)),
    'as in Hyperfeatures': ({'steps_offset': 0}, {'steps_offset': 0}, (200, 600)),
    'trailing': ({'spacing': 'trailing'}, {'timestep_spacing': 'trailing'}, (199, 999)),
}


@pytest.mark.parametrize('guidance', [1.0, 7.5])
@pytest.mark.parametrize(('ours', 'theirs', 'timesteps'), SAMPLING.values(), ids=SAMPLING)
def test_generated_images_are_those_of_diffusers_pipeline(make, tiny_pipeline, guidance, ours, theirs, timesteps):
    trajectory = {'type': 'generation', 'steps': 5, 'guidance': guidance, 'negative_prompt': 'blurred', **ours}
    extractor = make(trajectory=trajectory, timesteps=timesteps, prompt='a photo of a horse', seed=3)
    activations, latent = extractor.generate((64, 128))
    assert_same(activations, extractor(torch.zeros(1, 3, 64, 128)))

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, **theirs, set_alpha_to_one=True, clip_sample=False
    )
    expected = pipe(
        'a photo of a horse',
        negative_prompt='blurred',
        height=64,
        width=128,
        latents=seeded_noise((4, 8, 16), 3, 'noise', 0)[None],
        guidance_scale=guidance,
        num_inference_steps=5,
        output_type='pt',
    ).images
    image = decode(load_vae(tiny_pipeline), latent)
    torch.testing.assert_close(image / 2 + 0.5, expected, rtol=1e-3, atol=1e-4)
    again = make(trajectory=trajectory, timesteps=timesteps, prompt='a photo of a horse', seed=4)
    assert (again.generate((64, 128))[1] - latent).abs().max() > 0.1


def test_what_cannot_be_generated(make):
    with pytest.raises(ValueError, match="trajectory='generation', not 'noise'"):
        make().generate((64, 64))
    with pytest.raises(ValueError, match='from one draw'):
        make(trajectory='generation', timesteps=(1,), ensemble=2).generate((64, 64))
    with pytest.raises(ValueError, match=r'size is \(64, 65\); height and width must be multiples of 64'):
        make(trajectory='generation', timesteps=(1,)).generate((64, 65))
