"""Time grids and solvers that carry noise to data along a velocity.

A solver moves x through dx/dt = v(x, t) from the first point of a grid to its
last, downwards from t = 1 (noise). What a sample costs is its number of
velocity evaluations, `num_evaluations`; "50 steps" says that only together
with the solver and the name of the grid.

"ancestral" solves not that equation but a stochastic one with the same
marginals: every step replaces a part of the noise (DDPM, arXiv 2006.11239; DDIM
with η = 1, arXiv 2010.02502).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.flow import shift_time
from psvae_jax.models.layers import wide

# Velocity evaluations a step.
SOLVERS = {"euler": 1, "heun": 2, "midpoint": 2, "ancestral": 1}
STOCHASTIC = ("ancestral",)

GRIDS = ("uniform", "diffusers", "rae")

# Smallest unshifted time of diffusers' scheduler (1 of 1000 training steps)
# and of RAE's transport (1 − its last time).
_LAST_TIME = 1e-3

VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]
NoiseFn = Callable[[jax.Array], jax.Array]


def time_grid(
  name: str, steps: int, shift: float = 1.0, start: float = 1.0
) -> np.ndarray:
  """Times at which a solver stops, float64, descending from `start`.

  * "uniform" (this project's): `steps` equal steps from 1 to 0, shifted.
  * "diffusers": FlowMatchEulerDiscreteScheduler's. Its range ends at a
    training time that is shifted already, the whole is shifted again, and 0
    is appended: `steps` steps.
  * "rae": RAE's. `steps` counts points, so there are steps − 1 steps, and the
    last time is not 0: what comes out holds a little noise.

  At 50 steps and shift 3 they differ by up to 0.055. A `start` under 1 squeezes
  the unshifted grid so that its first time, shifted, is `start` itself; the
  two foreign grids have no such use of their own that one could copy.

  Args:
    name: one of `GRIDS`.
    steps: ≥ 1 ("rae": ≥ 2).
    shift: s of `flow.shift_time`.
    start: first time, in [0, 1]: the noise that x has (an edit's strength). 0
      gives zeros: a solver then leaves x as it is.

  Raises:
    ValueError: a name or value that is none of these.
  """
  least = 2 if name == "rae" else 1
  if steps < least:
    raise ValueError(f"a {name!r} grid takes steps >= {least}, got {steps}")
  if not shift > 0:
    raise ValueError(f"a time shift is above 0, got {shift}")
  if not 0 <= start <= 1:
    raise ValueError(f"a grid starts at a time in [0, 1], got {start}")
  if name == "uniform":
    times = np.linspace(1.0, 0.0, steps + 1)
  elif name == "diffusers":
    last = shift_time(_LAST_TIME, shift)
    times = np.append(np.linspace(1.0, last, steps), 0.0)
  elif name == "rae":
    times = np.linspace(1.0, _LAST_TIME, steps)
  else:
    raise ValueError(f"a grid is one of {', '.join(GRIDS)}; got {name!r}")
  times = shift_time(times * shift_time(start, 1 / shift), shift)
  times[0] = start  # free of rounding
  return times


def num_evaluations(solver: str, grid: np.ndarray) -> int:
  """Velocity evaluations (NFE) of one sample. Guidance multiplies each."""
  return _stages(solver) * (len(grid) - 1)


def integrate(
  velocity_fn: VelocityFn,
  x: jax.Array,
  grid: np.ndarray | jax.Array,
  solver: str = "euler",
  keep: Sequence[int] = (),
  keep_denoised: bool = False,
  noise_fn: NoiseFn | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Carries x from the first time of the grid to the last.

  "euler" is of first order; "heun" (trapezoid) and "midpoint" are of second
  order and evaluate the velocity twice a step. "ancestral" goes from t to s
  by a draw from q(x_s | x_t, x₀) at the x₀-estimate. Whatever the solver, the
  program holds one copy of `velocity_fn`: a scan over evaluations, not steps.

  Args:
    velocity_fn: x (B, …) and scalar t → v (B, …).
    x: (B, …) at time grid[0]; computed in float32, float64 stays.
    grid: (n + 1,) times. A numpy grid is differenced in float64 before it is
      rounded. A jax array may be an argument of a compiled function, so that
      another shift or strength needs no compilation.
    solver: one of `SOLVERS`.
    keep: indices of grid points (negative ones count from the end) whose x is
      returned as well.
    keep_denoised: return the x₀-estimate x − t·v there in place of x. It costs
      nothing: v is the solver's own. The last point, where none is evaluated,
      takes the one before; at t = 0 the estimate is x in any case.
    noise_fn: index of a step → fresh standard normal noise, as x; for
      "ancestral" alone.

  Returns:
    x at the last time, (B, …). With `keep`: that, and (len(keep), B, …).

  Raises:
    ValueError: an unknown solver, a point that the grid has not, noise for a
      solver without or none for one with.
  """
  stages = _stages(solver)
  if (solver in STOCHASTIC) != (noise_fn is not None):
    raise ValueError(
      f"solver {solver!r} "
      + ("draws noise: give noise_fn" if noise_fn is None else "draws no noise")
    )
  x = jnp.asarray(x)
  x = x.astype(wide(x.dtype))
  last = len(grid) - 1
  points = [_point(index, last) for index in keep]
  # For each evaluation, the row of `kept` it writes; len(points) is none.
  rows = np.full((last, stages), len(points), np.int32)
  for point in points:
    if point < last:
      rows[point, 0] = points.index(point)  # a point named twice: its first
  kept = jnp.zeros((len(points), *x.shape), x.dtype)

  def evaluate(carry, evaluation):
    """One velocity: y is where it is taken, z what the step has reached."""
    y, z, _, kept = carry
    t, probe, advance, row, renew = evaluation
    v = velocity_fn(y, t).astype(y.dtype)
    if points:
      value = y - t * v if keep_denoised else y
      kept = kept.at[row].set(value, mode="drop")
    if noise_fn is None:
      return (z + probe * v, z + advance * v, v, kept), None
    step, retain, fresh = renew
    z = retain * z + advance * v + fresh * noise_fn(step).astype(z.dtype)
    return (z, z, v, kept), None

  times, probe, advance = _evaluations(solver, grid, x.dtype)
  renew = None
  if noise_fn is not None:
    advance, *renew = _ancestral(grid, x.dtype)
    renew = (jnp.arange(last), *renew)
  carry = (x, x, jnp.zeros_like(x), kept)
  carry, _ = jax.lax.scan(
    evaluate, carry, (times, probe, advance, rows.reshape(-1), renew)
  )
  _, x, v, kept = carry
  if not points:
    return x
  end = x - jnp.asarray(grid[-1], x.dtype) * v if keep_denoised else x
  rows = [kept[points.index(p)] if p < last else end for p in points]
  return x, jnp.stack(rows)


def _evaluations(
  solver: str, grid: np.ndarray | jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A solver as a list of evaluations, each (NFE,) of `dtype`.

  Returns:
    times of the evaluations; how far the next evaluation's point lies from
    what the step has reached, in v; how far this v moves the latter. After
    the last evaluation of a step both are the same.
  """
  xp = jnp if isinstance(grid, jax.Array) else np
  t, h = grid[:-1], grid[1:] - grid[:-1]
  if SOLVERS[solver] == 1:
    table = ([t], [h], [h])
  elif solver == "heun":
    table = ([t, grid[1:]], [h, h / 2], [h / 2, h / 2])
  else:
    table = ([t, t + h / 2], [h / 2, h], [0 * h, h])
  columns = (xp.stack(column, axis=1).reshape(-1) for column in table)
  return tuple(jnp.asarray(column, dtype) for column in columns)


def _ancestral(
  grid: np.ndarray | jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Ancestral steps: x_s = retain · x_t + advance · v + fresh · noise.

  With x₀ and ε as v estimates them, q(x_s | x_t, x₀) has the mean
  (1 − s)·x₀ + s·r·ε and the deviation s·√(1 − r²), where r is the ratio of the
  signal-to-noise amplitudes, ((1 − t) / t) / ((1 − s) / s).

  Returns:
    advance, retain, fresh, each (n,) of `dtype`.
  """
  xp = jnp if isinstance(grid, jax.Array) else np
  t, s = grid[:-1], grid[1:]
  # A grid of strength 0 goes from t = 0 to 0: there r = 0, and nothing moves.
  r = (1 - t) * s / xp.where(t == 0, 1, (1 - s) * t)
  advance = -(1 - s) * t + s * r * (1 - t)
  retain = (1 - s) + s * r
  fresh = s * xp.sqrt(xp.maximum(1 - r * r, 0))
  return tuple(jnp.asarray(c, dtype) for c in (advance, retain, fresh))


def _stages(solver: str) -> int:
  if solver not in SOLVERS:
    raise ValueError(f"a solver is one of {', '.join(SOLVERS)}; got {solver!r}")
  return SOLVERS[solver]


def _point(index: int, last: int) -> int:
  if not -last - 1 <= index <= last:
    raise ValueError(f"cannot keep point {index}: a grid of {last + 1} points")
  return index % (last + 1)
