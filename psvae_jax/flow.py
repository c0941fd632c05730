"""Rectified flow between data and noise, as pure functions of arrays.

The project's convention (paper section 4): t = 1 is noise,

  x_t = (1 − t)·x₀ + t·ε,   v = dx_t/dt = ε − x₀.

Arrays are (B, …) latents. A time is a scalar, or (B,), one an example; it
lies in [0, 1]. Results are float32, or float64 for float64 arrays.

Other projects point time the other way, scale x_t or predict another quantity.
The second half of this file maps each of those to the convention above.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models.layers import wide

# A number, numpy array or jax array: whatever goes in comes out.
Time = TypeVar("Time", float, np.ndarray, jax.Array)

# Latent elements at which the time shift is 1: an image of 32 × 32 × 4 (SD).
BASE_DIMENSION = 4096


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """x_t = (1 − t)·x₀ + t·ε: exactly x0 at t = 0, exactly noise at t = 1.

  Args:
    x0: (B, …) clean latents.
    noise: (B, …) standard normal.
    t: scalar or (B,), in [0, 1].
  """
  x0, noise, t = _wide(x0, noise, t)
  return (1 - t) * x0 + t * noise


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
  """v = ε − x₀, the target of training; the same at every t."""
  x0, noise, _ = _wide(x0, noise, 0)
  return noise - x0


def denoised(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
  """x₀ = x_t − t·v, the clean latents that a velocity points at."""
  x_t, v, t = _wide(x_t, v, t)
  return x_t - t * v


def noise_of(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
  """ε = x_t + (1 − t)·v, the noise that a velocity comes from."""
  x_t, v, t = _wide(x_t, v, t)
  return x_t + (1 - t) * v


# Time.


def shift_time(t: Time, shift: float) -> Time:
  """t′ = s·t / (1 + (s − 1)·t): more of [0, 1] near noise for s > 1.

  Paper section 4, after SD3. It adds log s to the logit of t. Therefore 0 and
  1 stay, shifts multiply (s₁ after s₂ is s₁·s₂), and 1/s undoes s.
  """
  return shift * t / (1 + (shift - 1) * t)


def dimension_shift(height: int, width: int, channels: int) -> float:
  """Time shift s = sqrt(h·w·C / 4096) of latents (h, w, C).

  A latent of more elements needs more noise to hide as much. RAE's form; at
  16 × 16 it equals the paper's sqrt(C·P² / 16) with P = 1: 1.414, 2.449 and
  6.928 for 32, 96 and 768 channels. Below 4096 elements it is under 1, where
  callers take max(1, s).
  """
  return math.sqrt(height * width * channels / BASE_DIMENSION)


def draw_times(
  rng: jax.Array,
  shape: tuple[int, ...],
  mean: float = 0.0,
  std: float = 1.0,
  shift: float = 1.0,
  stratified: bool = False,
) -> jax.Array:
  """Times of training examples: logit-normal, then shifted (paper section 4).

  Args:
    rng: random key.
    shape: of the result.
    mean, std: of the normal whose logistic is t before the shift.
    shift: s of `shift_time`.
    stratified: one time from each of as many equally likely intervals, in
      order (arXiv 2107.00630, appendix I): each has the same distribution, and
      a batch's loss less variance.

  Returns:
    times strictly between 0 and 1.
  """
  # A shift is an offset of the logit: unlike `shift_time` of a rounded t, this
  # keeps times near 1 apart.
  if stratified:
    count = math.prod(shape)
    share = jnp.arange(count).reshape(shape) + jax.random.uniform(rng, shape)
    # Inside of (0, 1), whichever way the sum was rounded.
    info = jnp.finfo(share.dtype)
    share = jnp.clip(share / count, info.tiny, 1 - info.epsneg)
    normal = jax.scipy.special.ndtri(share)
  else:
    normal = jax.random.normal(rng, shape)
  logit = mean + std * normal + jnp.log(shift)
  info = jnp.finfo(logit.dtype)
  return jnp.clip(jax.nn.sigmoid(logit), info.tiny, 1 - info.epsneg)


# Other conventions. x′ = α·x₀ + σ·ε is `scale` · x_t for one t and one scale,
# whatever the schedule (`time_of_scales`): a model of x′ is a model of x_t.


def reverse_time(t: Time) -> Time:
  """t of a project that puts data at t = 1 (SiT, LightningDiT, DDT), or back.

  x_t is the same. The velocity is `reverse_velocity`; a time shift of s there
  is 1/s here.
  """
  return 1 - t


def reverse_velocity(v: jax.Array) -> jax.Array:
  """v of a project that predicts x₀ − ε, data at t = 1 or not; or back."""
  return -v


def velocity_from_noise(
  x_t: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
  """v of a model that predicts ε, for t < 1. `noise_of` is the way back.

  At t = 1 a prediction of the noise says nothing of the data: not finite.
  """
  x_t, noise, t = _wide(x_t, noise, t)
  return (noise - x_t) / (1 - t)


def velocity_from_data(
  x_t: jax.Array, x0: jax.Array, t: jax.Array
) -> jax.Array:
  """v of a model that predicts x₀, for t > 0. `denoised` is the way back.

  At t = 0 a prediction of the data says nothing of the noise: not finite.
  """
  x_t, x0, t = _wide(x_t, x0, t)
  return (x_t - x0) / t


def time_of_scales(alpha: Time, sigma: Time) -> tuple[Time, Time]:
  """Maps x′ = α·x₀ + σ·ε onto the flow's straight path.

  Args:
    alpha, sigma: scales of data and noise, ≥ 0 and not both 0. DDPM has
      α = sqrt(ᾱ) and σ = sqrt(1 − ᾱ); EDM has α = 1.

  Returns:
    t = σ / (α + σ) and scale = α + σ, with x′ = scale · x_t.
  """
  scale = alpha + sigma
  return sigma / scale, scale


def preserving_scales(t: Time) -> tuple[Time, Time]:
  """α and σ of the variance-preserving process (DDPM) with the noise of t.

  Those with α² + σ² = 1 and σ/α = t/(1 − t). ᾱ of DDPM is α².
  """
  norm = ((1 - t) ** 2 + t**2) ** 0.5
  return (1 - t) / norm, t / norm


def exploding_sigma(t: Time) -> Time:
  """σ of the variance-exploding process x₀ + σ·ε (EDM): t / (1 − t), t < 1."""
  return t / (1 - t)


def velocity_from_preserving(
  x_t: jax.Array, v: jax.Array, t: jax.Array
) -> jax.Array:
  """v of a model that predicts α·ε − σ·x₀ (DDPM's "v-prediction").

  Args:
    x_t: (B, …) on the straight path: DDPM's own x′ divided by α + σ.
    v: (B, …) prediction of α·ε − σ·x₀.
    t: scalar or (B,), in [0, 1]; α and σ are `preserving_scales` of it.
  """
  x_t, v, t = _wide(x_t, v, t)
  alpha, sigma = preserving_scales(t)
  # x′ = scale · x_t and v turn (x₀, ε) by an angle; this turns them back.
  scaled = (alpha + sigma) * x_t
  return (sigma * scaled + alpha * v) - (alpha * scaled - sigma * v)


def preserving_velocity(
  x_t: jax.Array, v: jax.Array, t: jax.Array
) -> jax.Array:
  """α·ε − σ·x₀ from the flow's v: the inverse of `velocity_from_preserving`."""
  alpha, sigma = preserving_scales(_wide(x_t, v, t)[2])
  return alpha * noise_of(x_t, v, t) - sigma * denoised(x_t, v, t)


def _wide(
  a: jax.Array, b: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Both arrays and the time in one dtype; t broadcasts over trailing axes."""
  a, b = jnp.asarray(a), jnp.asarray(b)
  if a.shape != b.shape:
    raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
  dtype = wide(jnp.promote_types(a.dtype, b.dtype))
  t = jnp.asarray(t, dtype)
  if t.shape not in ((), a.shape[:1]):
    raise ValueError(
      f"a time is a scalar or one an example {a.shape[:1]}, got {t.shape}"
    )
  t = t.reshape(t.shape + (1,) * (a.ndim - t.ndim)) if t.ndim else t
  return a.astype(dtype), b.astype(dtype), t
