"""The latent grid: its diagonal Gaussian posterior and its position code.

Latents are (B, h, w, C). The posterior is float32 whatever the compute dtype
is: a bfloat16 log-variance would quantise both the noise and the KL.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models.layers import wide

# LDM's bounds: exp(20) still squares within float32, exp(-30) is no noise.
LOGVAR_RANGE = (-30.0, 20.0)


@flax.struct.dataclass
class DiagonalGaussian:
  """N(mean, exp(logvar)) per element.

  Attributes:
    mean: (…, C) float32.
    logvar: (…, C) float32, log σ² within `LOGVAR_RANGE`.
  """

  mean: jax.Array
  logvar: jax.Array

  @classmethod
  def from_moments(cls, moments: jax.Array) -> "DiagonalGaussian":
    """Splits (…, 2C) into mean (first C) and clamped log-variance (last C)."""
    if moments.shape[-1] % 2:
      raise ValueError(
        "moments hold a mean and a log-variance for every channel, so their "
        f"last axis is even; got shape {moments.shape}"
      )
    mean, logvar = jnp.split(moments.astype(wide(moments.dtype)), 2, axis=-1)
    return cls(mean=mean, logvar=jnp.clip(logvar, *LOGVAR_RANGE))

  def sample(self, rng: jax.Array) -> jax.Array:
    """One draw by reparameterisation: (…, C) float32."""
    return self.at(jax.random.normal(rng, self.mean.shape, self.mean.dtype))

  def at(self, noise: jax.Array) -> jax.Array:
    """The draw that standard normal `noise` (…, C) gives: μ + σ · noise."""
    return self.mean + jnp.exp(0.5 * self.logvar) * noise

  def mode(self) -> jax.Array:
    """The mean, which is what `encode` and latent statistics use."""
    return self.mean


def sincos_positions(
  height: int, width: int, dim: int, dtype: Any = jnp.float32
) -> jax.Array:
  """Fixed 2-D sin-cos position code of a grid: (height, width, dim) `dtype`.

  One half of the channels codes the row, the other the column; each half is
  sines then cosines of position × 10000^(−i / (dim / 4)) (MAE, arXiv
  2111.06377). `models` add it where tokens are rebuilt from latents: z need
  not keep the absolute position that the encoder's tokens carry, and a block
  without a position code treats tokens as a set. Fixed rather than learned:
  it has no parameters to convert, shard or average, and works on any grid. The
  DiT adds it beside rotary positions, which say offsets alone.

  Args:
    height: rows h of the grid.
    width: columns w of the grid.
    dim: channels; a multiple of 4.
    dtype: of the result.
  """
  if dim % 4:
    raise ValueError(
      f"2-D sin-cos positions need a width that is a multiple of 4, got {dim}"
    )
  frequency = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))

  def code(length):
    angle = np.arange(length)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)

  grid = (height, width, dim // 2)
  rows = np.broadcast_to(code(height)[:, None], grid)
  columns = np.broadcast_to(code(width)[None], grid)
  return jnp.asarray(np.concatenate([rows, columns], axis=-1), dtype)
