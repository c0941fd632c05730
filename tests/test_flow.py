"""The flow's convention, its times, and the maps from other conventions."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from psvae_jax import flow

_SETTINGS = hypothesis.settings(
  max_examples=60, deadline=None, derandomize=True
)
_LATENTS = hnp.arrays(np.float64, (3, 2, 2), elements=st.floats(-10, 10))
_TIMES = st.one_of(
  st.floats(0, 1), hnp.arrays(np.float64, (3,), elements=st.floats(0, 1))
)
_INNER_TIMES = st.floats(0.01, 0.99)
_SHIFTS = st.floats(0.05, 20)


@pytest.fixture(autouse=True)
def _double():
  with jax.enable_x64(True):
    yield


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


# The path.


@_SETTINGS
@hypothesis.given(x0=_LATENTS, noise=_LATENTS, t=_TIMES)
def test_data_and_noise_come_back_from_the_velocity(x0, noise, t):
  x_t = flow.interpolate(x0, noise, t)
  v = flow.velocity(x0, noise)
  np.testing.assert_allclose(flow.denoised(x_t, v, t), x0, atol=1e-13)
  np.testing.assert_allclose(flow.noise_of(x_t, v, t), noise, atol=1e-13)


def test_noise_is_at_one_and_each_example_has_its_own_time():
  x0, noise = _normal(0, 3, 4, 4, 2), _normal(1, 3, 4, 4, 2)
  np.testing.assert_array_equal(flow.interpolate(x0, noise, 0.0), x0)
  np.testing.assert_array_equal(flow.interpolate(x0, noise, 1.0), noise)
  t = np.array([0.0, 0.25, 1.0])
  expected = np.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]])
  np.testing.assert_allclose(
    flow.interpolate(x0, noise, t), expected, atol=1e-15
  )


def test_velocity_is_the_derivative_of_the_path():
  x0, noise = _normal(0, 2, 5), _normal(1, 2, 5)
  _, slope = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (0.3,), (1.0,))
  np.testing.assert_allclose(flow.velocity(x0, noise), slope, atol=1e-15)


def test_half_precision_is_widened_and_float32_kept():
  x = jnp.ones((2, 3), jnp.bfloat16)
  t = jnp.full((2,), 0.3, jnp.bfloat16)
  for out in (
    flow.interpolate(x, x, t),
    flow.velocity(x, x),
    flow.denoised(x, x.astype(jnp.float32), t),
  ):
    assert out.dtype == jnp.float32


def test_wrong_shapes_are_refused():
  x = np.zeros((2, 4, 4, 3))
  with pytest.raises(ValueError, match=r"one an example \(2,\), got \(4,\)"):
    flow.interpolate(x, x, np.zeros(4))
  with pytest.raises(ValueError, match="shapes differ"):
    flow.velocity(x, x[:1])


# Time.


@pytest.mark.parametrize(
  "channels, expected", [(32, 1.414), (96, 2.449), (768, 6.928)]
)
def test_dimension_shift(channels, expected):
  shift = flow.dimension_shift(16, 16, channels)
  assert shift == pytest.approx(expected, abs=5e-4)
  # The paper's form: P = 1, and 16 for a latent of 16 × 16.
  assert shift == pytest.approx(np.sqrt(channels * 1**2 / 16), abs=1e-12)


@_SETTINGS
@hypothesis.given(t=st.floats(0, 1), first=_SHIFTS, second=_SHIFTS)
def test_shift_keeps_ends_inverts_and_composes(t, first, second):
  assert flow.shift_time(0.0, first) == 0
  assert flow.shift_time(1.0, first) == pytest.approx(1, abs=1e-15)
  shifted = flow.shift_time(t, first)
  assert flow.shift_time(shifted, 1 / first) == pytest.approx(t, abs=1e-12)
  assert flow.shift_time(shifted, second) == pytest.approx(
    flow.shift_time(t, first * second), abs=1e-12
  )
  assert (shifted >= t) if first >= 1 else (shifted <= t)


def test_shift_matches_diffusers():
  diffusers = pytest.importorskip("diffusers")
  reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.449)
  t = np.arange(1000, 0, -1) / 1000
  np.testing.assert_allclose(
    flow.shift_time(t, 2.449), reference.sigmas, atol=1e-6
  )


@pytest.mark.parametrize(
  "mean, std, shift", [(0, 1, 1), (0, 1, 6.928), (-0.8, 0.5, 2.449)]
)
def test_times_are_shifted_logit_normal(rng, mean, std, shift):
  times = np.asarray(flow.draw_times(rng, (20_000,), mean, std, shift))

  def cdf(t, shift):
    unshifted = flow.shift_time(t, 1 / shift)
    return scipy.stats.norm.cdf(scipy.special.logit(unshifted), mean, std)

  def p_value(shift):
    return scipy.stats.kstest(times, lambda t: cdf(t, shift)).pvalue

  assert p_value(shift) > 0.01
  assert p_value(1.1 * shift) < 1e-3  # the test would notice


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mean", [-1000.0, 1000.0])
def test_times_stay_between_the_ends(rng, mean, dtype):
  with jax.enable_x64(dtype == "float64"):
    times = flow.draw_times(rng, (8,), mean)
    assert times.dtype == dtype
    assert ((0 < times) & (times < 1)).all()


# Other conventions.


@_SETTINGS
@hypothesis.given(x0=_LATENTS, noise=_LATENTS, t=_INNER_TIMES)
def test_predictions_are_interchangeable(x0, noise, t):
  x_t, v = flow.interpolate(x0, noise, t), flow.velocity(x0, noise)
  for from_other, to_other in (
    (flow.velocity_from_noise, flow.noise_of),
    (flow.velocity_from_data, flow.denoised),
    (flow.velocity_from_preserving, flow.preserving_velocity),
  ):
    other = to_other(x_t, v, t)
    np.testing.assert_allclose(from_other(x_t, other, t), v, atol=1e-11)
    np.testing.assert_allclose(
      to_other(x_t, from_other(x_t, x0, t), t), x0, atol=1e-11
    )


@_SETTINGS
@hypothesis.given(t=st.floats(0, 0.999))
def test_schedules_come_back(t):
  alpha, sigma = flow.preserving_scales(t)
  assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-14)
  assert flow.time_of_scales(alpha, sigma)[0] == pytest.approx(t, abs=1e-14)
  sigma = flow.exploding_sigma(t)
  time, scale = flow.time_of_scales(1.0, sigma)
  assert time == pytest.approx(t, abs=1e-14)
  assert scale == pytest.approx(1 / (1 - t), rel=1e-12)


def test_data_at_one_is_the_same_path():
  """SiT: x = t′·x₀ + (1 − t′)·ε, v′ = x₀ − ε; shift .3 there is 1/.3 here."""
  x0, noise, theirs = _normal(0, 2, 5), _normal(1, 2, 5), 0.3
  t = flow.reverse_time(theirs)
  x_t = theirs * x0 + (1 - theirs) * noise
  np.testing.assert_allclose(flow.interpolate(x0, noise, t), x_t, atol=1e-15)
  v = flow.reverse_velocity(x0 - noise)
  np.testing.assert_array_equal(flow.velocity(x0, noise), v)
  assert flow.reverse_time(flow.shift_time(theirs, 0.3)) == pytest.approx(
    flow.shift_time(t, 1 / 0.3), abs=1e-15
  )


def test_ddpm_matches_diffusers():
  """Noising and "v-prediction" of a scheduler, at several of its steps."""
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
  x0, noise = _normal(0, 4, 3, 3, 2), _normal(1, 4, 3, 3, 2)
  steps = torch.tensor([0, 200, 700, 999])
  alpha_bar = scheduler.alphas_cumprod.numpy().astype(np.float64)[steps]
  args = (torch.from_numpy(x0), torch.from_numpy(noise), steps)
  noisy = scheduler.add_noise(*args).numpy()
  prediction = scheduler.get_velocity(*args).numpy()

  t, scale = flow.time_of_scales(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
  x_t = noisy / scale[:, None, None, None]
  np.testing.assert_allclose(x_t, flow.interpolate(x0, noise, t), atol=1e-12)
  np.testing.assert_allclose(
    flow.velocity_from_preserving(x_t, prediction, t),
    flow.velocity(x0, noise),
    atol=1e-10,
  )


# Gaussian data, whose velocity has a closed form.


def _posterior_mean(x, alpha, sigma, mean, factor):
  """E[x₀ | x] in numpy, where x = α·x₀ + σ·ε and x₀ = mean + factor·N(0, I).

  The system that is solved has the size of the data's own space.
  """
  noisy = alpha**2 * factor.T @ factor + sigma**2 * np.eye(factor.shape[1])
  gain = alpha * factor @ np.linalg.solve(noisy, factor.T)
  return mean + (x - alpha * mean) @ gain.T


def _gaussian_velocity(x_t, t, mean, factor):
  x0 = _posterior_mean(x_t, 1 - t, t, mean, factor)
  return flow.velocity_from_data(x_t, x0, t)


@pytest.mark.parametrize("t", [0.01, 0.5, 0.99])
def test_equation_one_of_the_paper(t):
  """v_x(x_t) = Q·v_z(Qᵀx_t) + (1/t)(I − QQᵀ)x_t for x = Qz, QᵀQ = I."""
  small, large = 3, 12
  q = np.linalg.qr(_normal(0, large, small))[0]
  mean, factor = _normal(3, small), _normal(2, small, small)
  x_t = 3 * _normal(1, 50, large)  # anywhere, not only where data gets to
  whole = _gaussian_velocity(x_t, t, q @ mean, q @ factor)
  inside = _gaussian_velocity(x_t @ q, t, mean, factor) @ q.T
  outside = (x_t - x_t @ q @ q.T) / t
  np.testing.assert_allclose(whole, inside + outside, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", ["preserving", "exploding"])
def test_a_diffusion_model_gives_the_velocity_of_the_flow(schedule):
  """The best ε-model of another schedule, mapped, is the flow's best v."""
  mean, factor = _normal(3, 4), _normal(2, 4, 4)
  t, noisy = 0.4, 2 * _normal(1, 20, 4)
  if schedule == "preserving":
    alpha, sigma = flow.preserving_scales(t)
  else:
    alpha, sigma = 1.0, flow.exploding_sigma(t)
  x0 = _posterior_mean(noisy, alpha, sigma, mean, factor)
  noise = (noisy - alpha * x0) / sigma
  time, scale = flow.time_of_scales(alpha, sigma)
  assert time == pytest.approx(t, abs=1e-15)
  np.testing.assert_allclose(
    flow.velocity_from_noise(noisy / scale, noise, t),
    _gaussian_velocity(noisy / scale, t, mean, factor),
    atol=1e-12,
  )


def test_stratified_times_take_one_from_each_interval():
  count, draws = 64, 40
  keys = jax.random.split(jax.random.key(0), draws)
  times = np.stack(
    [flow.draw_times(k, (count,), 0.3, 1.2, 2.0, stratified=True) for k in keys]
  ).astype(np.float64)
  share = scipy.stats.norm.cdf(
    (np.log(times / (1 - times)) - np.log(2.0) - 0.3) / 1.2
  )
  places = np.arange(count)
  assert np.all(share > (places - 1e-3) / count)
  assert np.all(share < (places + 1 + 1e-3) / count)
  # Within its interval a time lies anywhere.
  inside = (share * count - places).ravel()
  assert scipy.stats.kstest(inside, "uniform").pvalue > 1e-3
