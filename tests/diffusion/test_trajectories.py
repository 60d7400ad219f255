import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from diffseg.diffusion.schedules import SPACINGS, NoiseSchedule, add_noise, sampling_timesteps
from diffseg.diffusion.trajectories import TRAJECTORIES, Denoiser, build_trajectory, dhf_timesteps, seeded_noise

LAYERS = ['up-level1-repeat0-res-increment', 'up-level2-repeat1-vit-out']
WANTED = [-1, 60, 160, 260, 360, 460, 560, 660, 760, 860, 960]
SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', clip_sample=False)


@pytest.fixture
def schedule():
    return NoiseSchedule(SCHEDULER.alphas_cumprod)


@pytest.fixture
def condition():
    return {'encoder_hidden_states': torch.randn(2, 7, 32)}


def trace_calls(unet):
    """Note (timestep, whether conv_out was reached) of each call of `unet`."""
    calls = []
    unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append([int(args[1][0] if len(args) > 1 else kwargs['timestep'][0]), False]),
        with_kwargs=True,
    )
    unet.conv_out.register_forward_hook(lambda *args: calls[-1].__setitem__(1, True))
    return calls


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize('mode', ['inversion', 'generation'])
def test_hyperfeatures_published_values(reference, schedule, mode):
    folder = reference('hyperfeatures')
    unet = UNet2DConditionModel.from_pretrained(reference('sd15') / 'unet').eval()
    inputs = load_file(folder / 'inputs.safetensors')
    with safe_open(folder / 'expected.safetensors', 'pt') as file:
        expected = file.get_tensor(mode)  # (2, 11, 432, 8, 8)
        saved = json.loads(file.metadata()['save_timestep'])
    layers = [f'up-level{level}-repeat{repeat}-res-increment' for level in range(4) for repeat in range(3)]
    guidance = {'inversion': 1.0, 'generation': 7.5}[mode]
    trajectory = build_trajectory({'type': mode, 'guidance': guidance}, dhf_timesteps(saved, mode), schedule)
    with torch.no_grad():
        found = trajectory(
            Denoiser(unet, layers),
            inputs['x0' if trajectory.from_image else 'zT'],
            {'encoder_hidden_states': inputs['cond']},
            negative={'encoder_hidden_states': inputs['uncond']},
        )
    assert list(found) == layers
    resized = [
        torch.nn.functional.interpolate(found[name].flatten(0, 1), expected.shape[-2:], mode='bilinear')
        for name in layers
    ]
    ours = torch.cat(resized, dim=1).unflatten(0, expected.shape[:2])
    assert ours.shape == expected.shape
    assert relative_error(ours, expected) < 1e-5


def test_inversion_stops_in_its_last_wanted_call(tiny_unet, schedule, condition):
    unet = tiny_unet()
    calls = trace_calls(unet)
    trajectory = build_trajectory('inversion', [60, -1], schedule)
    with torch.no_grad():
        trajectory(Denoiser(unet, LAYERS), torch.randn(2, 4, 8, 8), condition)
    assert calls == [[-1, True], [0, True], [20, True], [40, True], [60, False]]


def test_guidance_calls_the_unet_twice_but_for_the_last(tiny_unet, schedule, condition):
    unet = tiny_unet()
    calls = trace_calls(unet)
    trajectory = build_trajectory('generation', [960], schedule)
    assert trajectory.needs_negative
    with torch.no_grad():
        trajectory(Denoiser(unet, LAYERS), torch.randn(2, 4, 8, 8), condition, negative=condition)
    assert calls == [[980, True], [980, True], [960, False]]


def test_timesteps_come_in_the_requested_order(tiny_unet, schedule, condition):
    denoiser, latent = Denoiser(tiny_unet(), LAYERS), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for name, forward, backward in [('inversion', [-1, 40], [40, -1]), ('clean', [3, 700], [700, 3])]:
            a = build_trajectory(name, forward, schedule)(denoiser, latent, condition)
            b = build_trajectory(name, backward, schedule)(denoiser, latent, condition)
            for layer in LAYERS:
                torch.testing.assert_close(a[layer], b[layer].flip(1))


def test_folded_timesteps_equal_single_ones(tiny_unet, schedule, condition):
    denoiser, latent = Denoiser(tiny_unet(), LAYERS), torch.randn(2, 4, 8, 8)
    noise, steps = torch.randn(2, 3, 4, 8, 8), (0, 999, 261)
    with torch.no_grad():
        found = build_trajectory('noise', steps, schedule)(denoiser, latent, condition, noise=noise)
        for i, t in enumerate(steps):
            alone = denoiser.read(add_noise(latent, noise[:, i], SCHEDULER.alphas_cumprod[t]), t, condition)
            for layer in LAYERS:
                torch.testing.assert_close(found[layer][:, i], alone[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('micro_batch', [1, 4, 5])
def test_micro_batch_bounds_the_unet_batch_and_changes_nothing(tiny_unet, schedule, micro_batch):
    unet, latent, noise = tiny_unet(), torch.randn(3, 4, 8, 8), torch.randn(3, 1, 4, 8, 8)
    condition = {'encoder_hidden_states': torch.randn(3, 7, 32)}
    trajectory = build_trajectory('noise', [50, 400, 800], schedule)
    sizes = []
    with torch.no_grad():
        whole = trajectory(Denoiser(unet, LAYERS), latent, condition, noise=noise)
        unet.conv_in.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        cut = trajectory(Denoiser(unet, LAYERS, micro_batch=micro_batch), latent, condition, noise=noise)
    assert max(sizes) == micro_batch and sum(sizes) == 9
    for layer in LAYERS:
        torch.testing.assert_close(whole[layer], cut[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('t', [0, 261, 999])
def test_noise_is_the_schedulers(t):
    latent, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    theirs = SCHEDULER.add_noise(latent, noise, torch.tensor([t]))
    torch.testing.assert_close(add_noise(latent, noise, SCHEDULER.alphas_cumprod[t]), theirs)


@pytest.mark.parametrize('t', [0, 1, 50])
def test_noise_of_small_timesteps_survives_half_precision(t):
    latent, noise = torch.zeros(4, 64, 64), torch.randn(4, 64, 64)
    expected = add_noise(latent, noise, SCHEDULER.alphas_cumprod[t])
    for abar in (SCHEDULER.alphas_cumprod[t], float(SCHEDULER.alphas_cumprod[t]), SCHEDULER.alphas_cumprod[[t]]):
        x_t = add_noise(latent.bfloat16(), noise, abar)
        assert x_t.dtype == torch.float32
        torch.testing.assert_close(x_t, expected)


@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
def test_a_ddim_step_with_the_true_prediction_stays_on_the_closed_form(schedule, prediction_type):
    schedule = NoiseSchedule(schedule.alphas_cumprod, prediction_type)
    latent, epsilon = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double()
    for t, t_next in [(-1, 0), (0, 20), (940, 960), (980, 960), (0, -1)]:
        abar = schedule.alpha_bar(t)
        velocity = math.sqrt(abar) * epsilon - math.sqrt(1 - abar) * latent
        prediction = {'epsilon': epsilon, 'v_prediction': velocity}[prediction_type]
        stepped = schedule.step(add_noise(latent, epsilon, abar), prediction, t, t_next)
        torch.testing.assert_close(stepped, add_noise(latent, epsilon, schedule.alpha_bar(t_next)))


def test_a_v_prediction_walk_is_the_schedulers(tiny_unet, schedule, condition):
    unet, x_t = tiny_unet(), torch.randn(2, 4, 8, 8)
    theirs = DDIMScheduler.from_config(SCHEDULER.config, prediction_type='v_prediction', set_alpha_to_one=True)
    theirs.set_timesteps(50)
    trajectory = build_trajectory({'type': 'generation', 'guidance': 1}, [940], schedule)
    trajectory = replace(trajectory, schedule=NoiseSchedule(schedule.alphas_cumprod, 'v_prediction'))
    with torch.no_grad():
        found = trajectory(Denoiser(unet, ['unet-in']), x_t, condition)['unet-in'][:, 0]
        for t in (980, 960):
            x_t = theirs.step(unet(x_t, t, **condition).sample, t, x_t).prev_sample
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('steps', [1, 3, 4, 30, 50, 1000])
@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('offset', [0, 1])
def test_sampling_timesteps_are_the_schedulers(steps, spacing, offset):
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(steps)
    if theirs.timesteps[0] > 999:  # which has no alpha
        with pytest.raises(ValueError, match='begins at t = 1000, but the last timestep is 999; set steps_offset=0'):
            sampling_timesteps(steps, 1000, spacing, offset)
    else:
        assert sampling_timesteps(steps, 1000, spacing, offset) == theirs.timesteps.tolist()


@pytest.mark.parametrize('steps', [1, 4])
@torch.no_grad()
def test_trailing_steps_are_eulers(tiny_unet, schedule, condition, steps):
    """Of turbo models; DDIM is Euler's method in coordinates that keep the variance."""
    unet, noise = tiny_unet(), torch.randn(2, 4, 8, 8)
    euler = EulerDiscreteScheduler.from_config(SCHEDULER.config, timestep_spacing='trailing')
    euler.set_timesteps(steps)
    x_t = noise * euler.init_noise_sigma
    for t in euler.timesteps:
        prediction = unet(euler.scale_model_input(x_t, t), t, **condition).sample
        x_t = euler.step(prediction, t, x_t).prev_sample
    schedule = NoiseSchedule(schedule.alphas_cumprod, spacing='trailing')
    last = int(euler.timesteps[-1])
    trajectory = build_trajectory({'type': 'generation', 'steps': steps, 'guidance': 1}, [last], schedule)
    start = noise * (1 - schedule.alpha_bar(999)) ** 0.5  # where Euler starts, of nearly the same norm
    _, latent = trajectory.generate(Denoiser(unet, LAYERS), start, condition)
    torch.testing.assert_close(latent, x_t, rtol=1e-3, atol=1e-3)


def test_the_models_own_timesteps_can_be_replaced(schedule):
    own = NoiseSchedule(schedule.alphas_cumprod, spacing='trailing')
    assert build_trajectory('generation', [999], own).options['spacing'] == 'trailing'
    leading = {'type': 'generation', 'spacing': 'leading', 'steps_offset': 1}
    assert build_trajectory(leading, [981], own).allowed()[-1] == 1
    assert build_trajectory('inversion', [960], own).allowed()[:3] == [-1, 0, 20]


def test_unet_out_is_read_along_with_the_prediction(tiny_unet, schedule, condition):
    trajectory = build_trajectory('inversion', [-1, 0, 20], schedule)
    with torch.no_grad():
        found = trajectory(Denoiser(tiny_unet(), ['unet-out', LAYERS[0]]), torch.randn(2, 4, 8, 8), condition)
    assert list(found) == ['unet-out', LAYERS[0]]
    assert found['unet-out'].shape == (2, 3, 4, 8, 8)


def test_seeded_noise_depends_on_its_key_and_on_nothing_else():
    noise = seeded_noise((4, 8, 8), 0, 'noise', 1)
    torch.rand(3)
    assert torch.equal(noise, seeded_noise(torch.Size([4, 8, 8]), 0, 'noise', 1))
    for other in [(1, 'noise', 1), (0, 'posterior', 1), (0, 'noise', 2)]:
        assert not torch.equal(noise, seeded_noise((4, 8, 8), *other))
    many = seeded_noise((4, 64, 64), 3)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


@pytest.mark.parametrize(
    ('trajectory', 'timesteps', 'message'),
    [
        ('noise', [50, 1000], r'\[1000\].*0, 1, \.\.\., 999'),
        ('noise', [-1], r'\[-1\].*0, 1, \.\.\., 999'),
        ('clean', [-2], r'-1, 0, \.\.\., 999'),
        ('inversion', [-1, 50], r'\[50\].*-1, 0, \.\.\., 960'),
        ('generation', [-1], r'980, 960, \.\.\., 0'),
        ({'type': 'inversion', 'steps': 2}, [1], r'-1, 0$'),
        ({'type': 'generation', 'steps': 1}, [0], "begins at t = 0, .* set spacing='trailing', or more steps"),
        ({'type': 'generation', 'spacing': 'middle'}, [0], "'middle'; it is 'leading', 'trailing', 'linspace'"),
        ({'type': 'inversion', 'steps': 0}, [-1], '1 to 1000'),
        ('noise', [], 'timesteps is empty'),
        ('noise', [50.9], r'timesteps is \[50\.9\]; it is a list of whole numbers, such as'),
        ('noise', 50, r'timesteps is 50; it is a list'),
        ('noise', '50', r"timesteps is '50'; it is a list"),
        ('ddpm', [1], 'noise, clean, inversion, generation'),
        ({'steps': 50}, [1], 'noise, clean, inversion, generation'),
        ({'type': 'noise', 'steps': 50}, [1], r"no options \['steps'\]"),
    ],
)
def test_wrong_requests_name_what_is_allowed(schedule, trajectory, timesteps, message):
    with pytest.raises(ValueError, match=message):
        build_trajectory(trajectory, timesteps, schedule)


def test_wrong_schedule_and_micro_batch(tiny_unet):
    with pytest.raises(ValueError, match='sample'):
        NoiseSchedule(SCHEDULER.alphas_cumprod, 'sample')
    with pytest.raises(ValueError, match='micro_batch'):
        Denoiser(tiny_unet(), LAYERS, micro_batch=0)


def test_hyperfeatures_step_indices():
    saved = [49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0]
    assert dhf_timesteps(saved) == WANTED
    assert dhf_timesteps(saved, 'generation') == [0, 80, 180, 280, 380, 480, 580, 680, 780, 880, 980]
    assert dhf_timesteps([0], steps=1) == [-1]
    with pytest.raises(ValueError, match='0 to 49'):
        dhf_timesteps([50])
    with pytest.raises(ValueError, match='inversion and generation'):
        dhf_timesteps([0], 'noise')


def test_every_trajectory_has_finite_activations_with_all_timesteps(tiny_unet, schedule, condition):
    denoiser = Denoiser(tiny_unet(), LAYERS)
    for name in TRAJECTORIES:
        trajectory = build_trajectory(name, [20, 0], schedule) if name != 'generation' else None
        trajectory = trajectory or build_trajectory(name, [960, 980], schedule)
        with torch.no_grad():
            found = trajectory(
                denoiser, torch.randn(2, 4, 6, 10), condition, noise=torch.randn(2, 1, 4, 6, 10), negative=condition
            )
        for layer in LAYERS:
            assert found[layer].shape[:2] == (2, 2)
            assert found[layer].isfinite().all()


@pytest.mark.parametrize('timesteps', [(2,), (1, 0, 3)])
@torch.no_grad()
def test_refinement_feeds_the_unet_its_own_output(tiny_unet, schedule, condition, timesteps):
    unet, latent = tiny_unet(), torch.randn(2, 4, 8, 8)
    calls = trace_calls(unet)
    found = build_trajectory('refinement', timesteps, schedule)(Denoiser(unet, ['unet-in', *LAYERS]), latent, condition)
    assert calls == [[t, t < max(timesteps)] for t in range(max(timesteps) + 1)]  # the last one is stopped early
    x, unet = latent, tiny_unet()
    for t in range(max(timesteps) + 1):
        if t in timesteps:
            torch.testing.assert_close(found['unet-in'][:, timesteps.index(t)], x)
        x = unet(x, t, **condition).sample


@torch.no_grad()
def test_given_time_embeddings_replace_the_unets(tiny_unet, schedule, condition):
    unet, latents = tiny_unet(), torch.randn(2, 4, 8, 8)
    before = Denoiser(unet, LAYERS).read(latents, 5, condition)
    own = torch.stack([unet.time_embedding(unet.time_proj(torch.tensor([t]))) for t in (5, 9)], dim=1)  # (1, 2, E)
    given = {**condition, 'time_embeddings': own.expand(2, -1, -1)}
    for micro_batch in (None, 1):
        read = Denoiser(unet, LAYERS, micro_batch=micro_batch).read(latents, torch.tensor([1, 0]), given)
        expected = Denoiser(unet, LAYERS).read(latents, torch.tensor([9, 5]), condition)
        for name in LAYERS:
            torch.testing.assert_close(read[name], expected[name], rtol=1e-4, atol=1e-5)
    after = Denoiser(unet, LAYERS).read(latents, 5, condition)
    assert all(torch.equal(before[name], after[name]) for name in LAYERS)
    with pytest.raises(IndexError):
        Denoiser(unet, LAYERS).read(latents, 2, given)
    assert not unet.time_embedding._forward_hooks
