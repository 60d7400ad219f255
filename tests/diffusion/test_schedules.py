import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffseg.diffusion.schedules import CLEAN, FlowSchedule, NoiseSchedule, build_schedule
from diffseg.diffusion.trajectories import build_trajectory

SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
FLUX = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
BETAS = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)


@pytest.fixture
def flow():
    return FlowSchedule(SD3.config, evenly=False)


def test_sigmas_and_indices_are_the_same_timesteps(flow):
    assert flow.read([0.26, 260, 0.5, 1000, 260.5, -1, 0.0005]) == (260, 260, 500, 1000, 260.5, -1, 0.0005)
    assert flow.sigma(260) == 0.26 and flow.sigma(CLEAN) == 0 and flow.sigma(0.0005) == 0.0005
    assert flow.network_timestep(260) == 260 and flow.network_timestep(CLEAN) == 0
    assert isinstance(flow.read([0.26])[0], int)


@given(st.floats(1e-6, 1 - 1e-6))
def test_timesteps_that_were_read_are_read_alike(sigma):
    flow = FlowSchedule(SD3.config)
    (timestep,) = flow.read([sigma])
    assert flow.read([timestep]) == (timestep,)
    assert flow.sigma(timestep) == pytest.approx(sigma, abs=1e-6)


@pytest.mark.parametrize(
    ('timestep', 'message'),
    [
        (0, 'timestep 0 may be a sigma or an index of the model; write -1 for the clean latent'),
        (1, 'timestep 1 may be a sigma or an index of the model; write 1000 for noise'),
        (1.0, 'write 1000 for noise'),
        (1001, 'not in the range; there are the indices above 1 to 1000, or sigmas between 0 and 1'),
        (-0.5, 'not in the range'),
        ('0.26', 'is no number'),
        (True, 'is no number'),
        (float('nan'), 'not in the range'),
    ],
)
def test_timesteps_that_are_refused(flow, timestep, message):
    with pytest.raises(ValueError, match=message):
        flow.read([timestep])


def test_whole_numbers_for_schedules_of_betas():
    with pytest.raises(ValueError, match=r'timesteps is \[50\.5\]; it is a list of whole numbers'):
        NoiseSchedule(BETAS).read([50.5])


def test_noise_and_latent_are_mixed_on_a_line(flow):
    latent, noise = torch.randn(2, 1, 4, 3, 5), torch.randn(2, 2, 4, 3, 5)
    x_t = flow.add_noise(latent, noise, (260, 1000))
    torch.testing.assert_close(x_t[:, 0], 0.74 * latent[:, 0] + 0.26 * noise[:, 0])
    assert torch.equal(x_t[:, 1], noise[:, 1])
    assert flow.add_noise(latent.bfloat16(), noise, (0.0005,)).dtype == torch.float32


def test_steps_with_the_true_velocity_go_to_the_latent(flow):
    latent, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    for t, t_next in ((1000, 260), (260, CLEAN), (CLEAN, 500)):
        x_t = (1 - flow.sigma(t)) * latent + flow.sigma(t) * noise
        expected = (1 - flow.sigma(t_next)) * latent + flow.sigma(t_next) * noise
        torch.testing.assert_close(flow.step(x_t, noise - latent, t, t_next), expected)


@pytest.mark.parametrize('steps', [1, 4, 28])
def test_steps_are_those_of_diffusers_scheduler(steps):
    SD3.set_timesteps(steps)
    assert FlowSchedule(SD3.config, evenly=False).generation_steps(steps) == pytest.approx(
        SD3.timesteps.tolist(), abs=1e-3
    )
    for mu in (0.5, 1.15):
        FLUX.set_timesteps(steps, sigmas=[1 - i / steps for i in range(steps)], mu=mu)
        ours = FlowSchedule(FLUX.config).generation_steps(steps, mu)
        assert ours == pytest.approx(FLUX.timesteps.tolist(), abs=1e-3)
    assert ours == FlowSchedule(FLUX.config).generation_steps(steps)  # that of 1024 pixels


def test_inversion_begins_with_the_clean_latent_and_ends_before_noise(flow):
    generation, inversion = flow.generation_steps(4), flow.inversion_steps(4)
    assert generation[0] == 1000 and inversion == [CLEAN, *generation[:0:-1]]


def test_a_timestep_means_the_nearest_step():
    four = {'type': 'generation', 'steps': 4}
    trajectory = build_trajectory(four, [1000, 899.6], FlowSchedule(SD3.config))
    assert trajectory.timesteps == (1000, 900)
    assert trajectory.options == {**four, 'guidance': 7.5, 'mu': None}
    message = r'timesteps \[800\] are not on the generation trajectory, which has 1000, 900, 750, 500'
    with pytest.raises(ValueError, match=message):
        build_trajectory(four, [800], FlowSchedule(SD3.config))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'type': 'generation', 'spacing': 'leading'}, "spacing is 'leading', but the model has rectified flow"),
        ({'type': 'generation', 'steps_offset': 0}, 'steps_offset is 0, but the model has rectified flow'),
        ({'type': 'inversion', 'mu': 1.0}, 'the shift of this model is fixed at 3.0'),
        ('refinement', 'the refinement trajectory is for schedules of betas'),
    ],
)
def test_options_of_other_schedules(flow, options, message):
    with pytest.raises(ValueError, match=message):
        build_trajectory(options, [1000], flow)


def test_mu_is_for_rectified_flow():
    with pytest.raises(ValueError, match=r'mu is 1\.0, but the model has a schedule of betas'):
        build_trajectory({'type': 'inversion', 'mu': 1.0}, [-1], NoiseSchedule(BETAS))
    inversion = build_trajectory('inversion', [-1], NoiseSchedule(BETAS))
    assert inversion.options == {'type': 'inversion', 'steps': 50, 'guidance': 1.0}


@pytest.mark.parametrize(
    ('config', 'kind'),
    [
        ({'_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 3.0}, FlowSchedule),
        ({'_class_name': 'DPMSolverMultistepScheduler', 'use_flow_sigmas': True, 'flow_shift': 3.0}, FlowSchedule),
        ({'_class_name': 'DPMSolverMultistepScheduler', 'beta_start': 0.0001, 'beta_end': 0.02}, NoiseSchedule),
    ],
)
def test_the_kind_of_schedule_is_that_of_the_configuration(config, kind):
    assert type(build_schedule(config, 'a model')) is kind
