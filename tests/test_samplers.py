"""Time grids against their sources; solvers against exact solutions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from psvae_jax import flow, samplers
from psvae_jax.config import ConfigError
from psvae_jax.config import parser as config_parser


@pytest.mark.parametrize(
  "field, names",
  [("solver", tuple(samplers.SOLVERS)), ("grid", samplers.GRIDS)],
)
def test_the_config_knows_every_name(tmp_path, field, names):
  raw = tiny.config(tmp_path)
  for name in names:
    raw.sample = {field: name}
    assert getattr(config_parser.parse(raw).sample, field) == name
  raw.sample = {field: "other"}
  with pytest.raises(ConfigError) as error:
    config_parser.parse(raw)
  assert all(name in str(error.value) for name in names)


# Grids.


@pytest.mark.parametrize("steps", [1, 2, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.928])
def test_diffusers_grid_is_the_scheduler_s(steps, shift):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  scheduler.set_timesteps(steps)
  grid = samplers.time_grid("diffusers", steps, shift)
  np.testing.assert_allclose(grid, scheduler.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.928])
def test_rae_grid_is_its_closed_form(shift):
  """RAE: t = 1 − linspace(0, 1 − 1/1000, 50), then s·t / (1 + (s − 1)·t)."""
  t = 1 - np.linspace(0, 1 - 1 / 1000, 50, dtype=np.float32)
  expected = np.float32(shift) * t / (1 + np.float32(shift - 1) * t)
  grid = samplers.time_grid("rae", 50, shift)
  np.testing.assert_allclose(grid, expected, rtol=0, atol=1e-6)
  assert len(grid) == 50


def test_uniform_grid_is_shifted_after_it_is_spaced():
  grid = samplers.time_grid("uniform", 50, 3.0)
  t = np.arange(50, -1, -1) / 50
  np.testing.assert_allclose(grid, 3 * t / (1 + 2 * t), rtol=0, atol=1e-12)


def test_last_times_of_50_steps():
  """Figures that three programs give for "50 steps, shift 3" (or 6.928)."""
  last = {
    name: samplers.time_grid(name, 50, 3.0)[-2] for name in samplers.GRIDS
  }
  assert last["uniform"] == pytest.approx(0.0577, abs=5e-5)
  assert last["diffusers"] == pytest.approx(0.00893, abs=5e-6)
  rae = samplers.time_grid("rae", 50, flow.dimension_shift(16, 16, 768))
  assert rae[-1] == pytest.approx(0.0069, abs=5e-5)


@pytest.mark.parametrize("name", samplers.GRIDS)
@pytest.mark.parametrize("start", [1.0, 0.6, 1e-3])
def test_grids_descend_from_their_start(name, start):
  grid = samplers.time_grid(name, 10, 3.0, start)
  assert grid.dtype == np.float64
  assert grid[0] == start
  assert (np.diff(grid) < 0).all()
  assert (grid[-1] > 0) if name == "rae" else (grid[-1] == 0)


@pytest.mark.parametrize("name", samplers.GRIDS)
def test_a_later_start_squeezes_the_unshifted_grid(name):
  whole = flow.shift_time(samplers.time_grid(name, 10, 3.0), 1 / 3.0)
  part = flow.shift_time(samplers.time_grid(name, 10, 3.0, 0.6), 1 / 3.0)
  np.testing.assert_allclose(part, whole * part[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", samplers.GRIDS)
def test_start_zero_leaves_the_latents_alone(name):
  grid = samplers.time_grid(name, 4, 3.0, start=0.0)
  np.testing.assert_array_equal(grid, np.zeros_like(grid))
  x = jnp.arange(3.0)
  out = samplers.integrate(lambda x, t: x + 1, x, grid, "heun")
  np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(name="unform", steps=4), "one of uniform, diffusers, rae"),
    (dict(name="uniform", steps=0), "steps >= 1, got 0"),
    (dict(name="rae", steps=1), "steps >= 2, got 1"),
    (dict(name="uniform", steps=4, shift=0.0), "above 0, got 0.0"),
    (dict(name="uniform", steps=4, start=1.2), r"\[0, 1\], got 1.2"),
  ],
)
def test_wrong_grids_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    samplers.time_grid(**kwargs)


# Solvers. Points (weight, mean, deviation) of a mixture in one dimension,
# where the flow from noise to data keeps the order of points, so that its
# solution is a quantile map.

_MIXTURE = np.array([[0.3, -1.0, 0.7], [0.7, 0.8, 0.9]])
_GAUSSIAN = np.array([[1.0, 0.7, 0.5]])


def _at(mixture, t):
  """Weights, means and deviations at time t."""
  weight, mean, deviation = mixture.T
  return weight, (1 - t) * mean, ((1 - t) ** 2 * deviation**2 + t**2) ** 0.5


def _velocity(mixture):
  """v(x, t) = E[ε − x₀ | x_t = x] of a mixture."""

  def fn(x, t):
    weight, mean, deviation = _at(mixture, t)
    residual = (x[..., None] - mean) / deviation
    logits = jnp.log(weight / deviation) - residual**2 / 2
    noise = t * residual / deviation
    gain = (1 - t) * mixture[:, 2] ** 2 / deviation
    each = noise - (mixture[:, 1] + gain * residual)
    return jnp.sum(jax.nn.softmax(logits) * each, axis=-1)

  return fn


def _solution(mixture, x, start, end):
  """Where the exact flow carries points x: equal quantiles, by bisection."""

  def cdf(x, t):
    weight, mean, deviation = _at(mixture, t)
    return scipy.stats.norm.cdf(x[..., None], mean, deviation) @ weight

  low, high = np.full_like(x, -20), np.full_like(x, 20)
  for _ in range(80):
    middle = (low + high) / 2
    below = cdf(middle, end) < cdf(x, start)
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return middle


def _slope(mixture, solver, shift=1.0, start=1.0, name="uniform"):
  """Order of a solver: how fast its error falls with the number of steps."""
  steps = np.array([64, 128, 256])
  x = np.linspace(-2, 2, 9)
  errors = []
  with jax.enable_x64(True):
    for n in steps:
      grid = samplers.time_grid(name, n, shift, start)
      out = samplers.integrate(_velocity(mixture), x, grid, solver)
      assert out.dtype == np.float64
      exact = _solution(mixture, x, grid[0], grid[-1])
      errors.append(np.max(np.abs(out - exact)))
  return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("shift, start", [(1.0, 1.0), (2.0, 0.8)])
@pytest.mark.parametrize(
  "solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2)]
)
def test_order_of_accuracy(solver, order, shift, start):
  slope = _slope(_MIXTURE, solver, shift, start)
  assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
  "solver, order", [("euler", 1), ("heun", 2), ("midpoint", 3)]
)
def test_order_of_accuracy_on_gaussian_data(solver, order):
  """Midpoint gains an order there, and only there.

  Its leading error on dx/dt = λ(t)·x is h³/24·(λ″ + 6λλ′ + 4λ³)·x, which is
  (S²)‴ up to a factor, S being the deviation at t: S² is quadratic in t.
  """
  slope = _slope(_GAUSSIAN, solver)
  assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", samplers.GRIDS)
def test_every_grid_reaches_the_data(name):
  x = np.linspace(-2, 2, 9)
  with jax.enable_x64(True):
    grid = samplers.time_grid(name, 200, 3.0)
    out = samplers.integrate(_velocity(_MIXTURE), x, grid, "heun")
  exact = _solution(_MIXTURE, x, 1.0, grid[-1])
  np.testing.assert_allclose(out, exact, atol=1e-3)


def test_euler_on_diffusers_grid_is_its_scheduler():
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
  scheduler.set_timesteps(10)
  x = sample = np.linspace(-2, 2, 9, dtype=np.float32)
  fn = jax.jit(_velocity(_MIXTURE))
  for t in scheduler.timesteps:
    v = np.array(fn(sample, np.float32(t) / 1000))
    step = scheduler.step(torch.from_numpy(v), t, torch.from_numpy(sample))
    sample = step.prev_sample.numpy()
  grid = samplers.time_grid("diffusers", 10, 3.0)
  out = samplers.integrate(_velocity(_MIXTURE), x, grid)
  np.testing.assert_allclose(out, sample, atol=2e-6)


# Ancestral steps.


def _noise(count, shape, seed=0):
  """Noise of every step, drawn beforehand: (count, *shape)."""
  return np.random.default_rng(seed).normal(size=(count, *shape))


def _noise_of(solver, x):
  """What `integrate` wants as noise_fn."""
  if solver not in samplers.STOCHASTIC:
    return None
  key = jax.random.key(3)
  return lambda step: jax.random.normal(
    jax.random.fold_in(key, step), np.shape(x)
  )


def test_an_ancestral_step_is_the_posterior_of_the_forward_process():
  """q(x_s | x_t, x₀) by Bayes: x_s is Gaussian, and x_t is x_s with more noise.

  x_t = (1 − t)/(1 − s)·x_s + noise of variance t² − ((1 − t)/(1 − s)·s)².
  """
  t, s = np.array([0.9, 0.5, 0.3]), np.array([0.6, 0.45, 0.0])
  data, x = 0.7, np.array([-1.2, 0.4, 2.0])
  gain = (1 - t) / (1 - s)
  added = t**2 - (gain * s) ** 2
  total = added + (gain * s) ** 2
  mean = ((1 - s) * data * added + gain * s**2 * x) / total
  spread = s * np.sqrt(added / total)
  for i in range(3):
    for noise in (0.0, 1.0):
      with jax.enable_x64(True):
        out = samplers.integrate(
          lambda x, t: (x - data) / t,
          x[i : i + 1],
          np.array([t[i], s[i]]),
          "ancestral",
          noise_fn=lambda step, noise=noise: jnp.full((1,), noise),
        )
      np.testing.assert_allclose(out, mean[i] + noise * spread[i], atol=1e-12)


def test_ancestral_steps_keep_the_marginals_of_the_data():
  """Exact velocity, many steps: the distribution at t = 0 is the data's."""
  count, steps = 20_000, 200
  start, noise = _noise(1, (count,))[0], _noise(steps, (count,), 1)
  grid = samplers.time_grid("uniform", steps)
  out = samplers.integrate(
    _velocity(_MIXTURE),
    jnp.asarray(start, jnp.float32),
    grid,
    "ancestral",
    noise_fn=lambda step: jnp.asarray(noise, jnp.float32)[step],
  )

  def cdf(x):
    weight, mean, deviation = _at(_MIXTURE, 0.0)
    return scipy.stats.norm.cdf(x[..., None], mean, deviation) @ weight

  # The distance of 20,000 exact draws is below 0.0136 99.9 % of the time; the
  # rest is the error of 200 steps.
  distance = scipy.stats.kstest(np.asarray(out, np.float64), cdf).statistic
  assert distance < 0.02
  # And it is another path: what it starts from no longer decides.
  assert abs(np.corrcoef(start, out)[0, 1]) < 0.1


def test_a_strength_of_zero_leaves_x_as_it_is():
  grid = samplers.time_grid("uniform", 4, 3.0, 0.0)
  x = jnp.linspace(-2, 2, 5)
  out = samplers.integrate(
    lambda x, t: x + 1, x, grid, "ancestral", noise_fn=lambda step: x
  )
  np.testing.assert_array_equal(out, x)


def test_noise_is_for_solvers_that_draw_it():
  grid, x = samplers.time_grid("uniform", 4), jnp.ones(2)
  with pytest.raises(ValueError, match="give noise_fn"):
    samplers.integrate(lambda x, t: x, x, grid, "ancestral")
  with pytest.raises(ValueError, match="draws no noise"):
    samplers.integrate(lambda x, t: x, x, grid, noise_fn=lambda step: x)


# The program.


@pytest.mark.parametrize("name", samplers.GRIDS)
@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_evaluations_are_as_stated_and_the_velocity_is_traced_once(
  solver, name
):
  calls, traces = [], []

  def velocity(x, t):
    traces.append(t)
    jax.debug.callback(lambda t: calls.append(float(t)), t)
    return x

  grid = samplers.time_grid(name, 5, 3.0)
  x = jnp.ones(2)
  noise_fn = _noise_of(solver, x)
  jax.jit(
    lambda x: samplers.integrate(velocity, x, grid, solver, noise_fn=noise_fn)
  )(x)
  jax.effects_barrier()
  assert len(traces) == 1
  assert len(calls) == samplers.num_evaluations(solver, grid)
  steps = 4 if name == "rae" else 5
  assert len(calls) == steps * samplers.SOLVERS[solver]
  # Times are rounded once, from float64.
  second = {
    "euler": [],
    "ancestral": [],
    "heun": grid[1:],
    "midpoint": (grid[1:] + grid[:-1]) / 2,
  }
  expected = np.concatenate([grid[:-1], second[solver]]).astype(np.float32)
  np.testing.assert_array_equal(np.sort(calls), np.sort(expected))


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_a_compiled_function_takes_the_grid_as_an_argument(solver):
  traces = []
  x = jnp.linspace(-2, 2, 9)
  solve = functools.partial(samplers.integrate, noise_fn=_noise_of(solver, x))

  @jax.jit
  def sample(x, grid):
    traces.append(None)
    return solve(_velocity(_MIXTURE), x, grid, solver)

  for start in (1.0, 0.4):
    grid = samplers.time_grid("uniform", 20, 3.0, start)
    plain = solve(_velocity(_MIXTURE), x, grid, solver)
    out = sample(x, jnp.asarray(grid, jnp.float32))
    np.testing.assert_allclose(out, plain, atol=2e-6)
  assert len(traces) == 1


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_kept_points_are_shorter_integrations(solver):
  grid = samplers.time_grid("uniform", 6, 2.0)
  fn = _velocity(_MIXTURE)
  x = jnp.linspace(-2, 2, 5)
  keep = (6, 3, -3, 3, 0)
  solve = functools.partial(samplers.integrate, noise_fn=_noise_of(solver, x))
  end, kept = solve(fn, x, grid, solver, keep)
  np.testing.assert_array_equal(end, solve(fn, x, grid, solver))
  assert kept.shape == (5, 5)
  np.testing.assert_array_equal(kept[0], end)
  np.testing.assert_array_equal(kept[4], x)
  np.testing.assert_array_equal(kept[3], kept[1])
  for row, point in ((1, 3), (2, 4)):
    np.testing.assert_allclose(
      kept[row],
      solve(fn, x, grid[: point + 1], solver),
      atol=1e-6,
    )


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_kept_estimates_point_along_the_velocity(solver):
  grid = samplers.time_grid("uniform", 6, 2.0)
  fn = _velocity(_MIXTURE)
  x = jnp.linspace(-2, 2, 5)
  solve = functools.partial(samplers.integrate, noise_fn=_noise_of(solver, x))
  end, points = solve(fn, x, grid, solver, (0, 2, 6))
  same_end, kept = solve(fn, x, grid, solver, (0, 2, 6), keep_denoised=True)
  np.testing.assert_array_equal(same_end, end)
  for i, point in enumerate((0, 2)):
    t = jnp.float32(grid[point])
    expected = flow.denoised(points[i], fn(points[i], t), t)
    np.testing.assert_allclose(kept[i], expected, atol=2e-6)
  np.testing.assert_array_equal(kept[2], end)


def test_the_last_estimate_of_an_unfinished_grid_is_a_step_ahead():
  grid = samplers.time_grid("rae", 5)
  x = jnp.linspace(-2, 2, 5)
  _, kept = samplers.integrate(
    _velocity(_MIXTURE), x, grid, keep=(-2, -1), keep_denoised=True
  )
  np.testing.assert_allclose(kept[1], kept[0], atol=1e-6)


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_examples_never_leave_their_device(solver):
  """Kept points and all: split over a mesh, a solver communicates nothing."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  x = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split)
  grid = samplers.time_grid("uniform", 6)

  @jax.jit
  def sample(x):
    noise_fn = (lambda step: x) if solver in samplers.STOCHASTIC else None
    return samplers.integrate(
      lambda x, t: t * x, x, grid, solver, (0, 3, 6), noise_fn=noise_fn
    )

  compiled = sample.lower(x).compile()
  assert not re.search("all-|collective|permute", compiled.as_text())
  end, kept = compiled.output_shardings
  assert end.spec == PartitionSpec("data")
  assert kept.spec == PartitionSpec(None, "data")


def test_half_precision_latents_are_integrated_in_float32():
  grid = samplers.time_grid("uniform", 4)
  x = jnp.ones((2, 3), jnp.bfloat16)
  out = samplers.integrate(lambda x, t: x.astype(jnp.bfloat16), x, grid)
  assert out.dtype == jnp.float32


def test_wrong_solvers_and_points_are_refused():
  grid = samplers.time_grid("uniform", 4)
  x = jnp.ones(2)
  with pytest.raises(ValueError, match="one of euler, heun, midpoint"):
    samplers.integrate(lambda x, t: x, x, grid, "rk4")
  with pytest.raises(ValueError, match="cannot keep point 5"):
    samplers.integrate(lambda x, t: x, x, grid, keep=(5,))
