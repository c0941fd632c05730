"""One generator's flow solved under guidance: pure functions of arrays.

A guided step evaluates the generator two or three times. These evaluations are
rows of one batch, an example's side by side: one forward pass, and no row ever
moves between devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax import guidance, samplers, sharding
from psvae_jax.config import SampleConfig
from psvae_jax.models.generator import Condition, Generator, Params

# What the evaluations of a step see: "null" neither prompt nor source, "source"
# the source alone, "full" all there is.
PLAIN = ("full",)
TEXT = ("null", "full")
EDIT_TEXT = ("source", "full")
EDIT = ("null", "source", "full")


def branches(settings: SampleConfig, *, edit: bool) -> tuple[str, ...]:
  """The evaluations a step needs; guidance that is 1 everywhere needs none."""
  if settings.guidance_low > settings.guidance_high:
    return PLAIN
  if edit and settings.image_guidance != 1:
    return EDIT
  if settings.guidance == 1:
    return PLAIN
  return EDIT_TEXT if edit else TEXT


def scales(settings: SampleConfig) -> np.ndarray:
  """What `solve` takes as its argument: float32 (4,)."""
  values = (
    settings.guidance,
    settings.image_guidance,
    settings.guidance_low,
    settings.guidance_high,
  )
  return np.array(values, np.float32)


def solve(
  generator: Generator,
  params: Params,
  frozen: Params,
  x: jax.Array,
  condition: Condition,
  source: jax.Array | None,
  grid: jax.Array,
  scales: jax.Array,
  *,
  solver: str,
  branches: tuple[str, ...],
  keep: tuple[int, ...] = (),
  noise_fn: samplers.NoiseFn | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Carries latents from the grid's first time to its last.

  Args:
    generator: the modules.
    params: the DiT's.
    frozen: see `models.generator`.
    x: (B, h, w, C) at the first time.
    condition: of B rows.
    source: (B, h, w, C) normalised latents to edit; None without.
    grid: (n + 1,) descending times.
    scales: what the function of that name returns.
    solver: see `samplers`.
    branches: what the function of that name returns.
    keep: grid points whose x₀-estimates are returned.
    noise_fn: of a stochastic solver, see `samplers.integrate`.

  Returns:
    (B, h, w, C); and (len(keep), B, h, w, C), or None where nothing is kept.
  """
  count, width = x.shape[0], len(branches)
  null = generator.null_condition(frozen, count)
  seen = {"null": null, "source": null, "full": condition}
  given = jax.tree.map(_interleave, *(seen[name] for name in branches))
  mask = None
  if source is not None:
    source = _interleave(*[source] * width)
    if "null" in branches:
      mask = jnp.tile(jnp.array([n != "null" for n in branches]), count)

  def velocity_fn(x, t):
    v = generator.velocity(
      params,
      _interleave(*[x] * width),
      jnp.full((count * width,), t),
      given,
      source,
      mask,
    )
    v = v.reshape(count, width, *v.shape[1:])
    v = {name: v[:, i] for i, name in enumerate(branches)}
    return _guided(v, branches, t, scales)

  out = samplers.integrate(
    velocity_fn, x, grid, solver, keep, keep_denoised=True, noise_fn=noise_fn
  )
  return out if keep else (out, None)


def _interleave(*parts: jax.Array) -> jax.Array:
  """k arrays (B, …) → (B · k, …), an example's rows side by side."""
  rows = jnp.stack(parts, axis=1)
  rows = rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])
  return sharding.constrain(rows, sharding.BATCH_AXES)


def _guided(
  v: dict[str, jax.Array],
  branches: tuple[str, ...],
  t: jax.Array,
  scales: jax.Array,
) -> jax.Array:
  """One velocity from those of the branches."""
  if branches == PLAIN:
    return v["full"]
  text, image, low, high = scales
  inside = functools.partial(guidance.interval_scale, t, low=low, high=high)
  if branches == EDIT:
    return guidance.edit_guided(
      v["null"], v["source"], v["full"], inside(image), inside(text)
    )
  return guidance.text_guided(v[branches[0]], v["full"], inside(text))
