"""Two-dimensional rotary positions: attention that sees offsets on a grid.

Half of a head's pairs of channels turn with the token's row, the other half
with its column (RoPE, arXiv 2104.09864, axial as in LightningDiT and RAE). The
logit of a query and a key then depends on the difference of their rows and of
their columns. A token without a place on the grid has angle 0 and is not
turned.

Tables are made on the host in float64; turning runs in float32 or wider.
"""

import jax
import jax.numpy as jnp
import numpy as np


def grid_angles(
  height: int, width: int, head_dim: int, base: float = 10_000.0
) -> np.ndarray:
  """Angles of a grid's tokens, row by row.

  Args:
    height, width: of the grid, h and w.
    head_dim: channels of an attention head, d; a multiple of 4.
    base: ratio of the fastest to the slowest frequency, about.

  Returns:
    (h·w, d/2) float64: angle of each pair of channels; rows' pairs first.

  Raises:
    ValueError: `head_dim` is not a multiple of 4.
  """
  return _angles(np.arange(height), np.arange(width), head_dim, base)


def centre_angles(
  height: int, width: int, head_dim: int, base: float = 100.0
) -> np.ndarray:
  """Angles of a grid's tokens by where their centres lie in the image.

  As DINOv3 (arXiv 2508.10104): the image reaches from -1 to 1 along either
  axis whatever its size, and a whole turn of the fastest frequency is 1. Grids
  of other sizes and shapes are the same image sampled more or less densely.

  Args:
    height, width: of the grid, h and w.
    head_dim: channels of an attention head, d; a multiple of 4.
    base: ratio of the fastest to the slowest frequency, about.

  Returns:
    (h·w, d/2) float64: angle of each pair of channels; rows' pairs first.

  Raises:
    ValueError: `head_dim` is not a multiple of 4.
  """

  def places(count):
    centres = (np.arange(count) + 0.5) / count
    return 2 * np.pi * (2 * centres - 1)

  return _angles(places(height), places(width), head_dim, base)


def _angles(
  rows: np.ndarray, columns: np.ndarray, head_dim: int, base: float
) -> np.ndarray:
  """Angles (h·w, d/2) of the tokens at all pairs of two axes' places."""
  if head_dim % 4:
    raise ValueError(
      f"rotary positions of rows and columns need a head width that is a "
      f"multiple of 4, not {head_dim}"
    )
  frequencies = base ** (-np.arange(head_dim // 4) / (head_dim // 4))
  grid = np.meshgrid(rows, columns, indexing="ij")
  rows, columns = (places.reshape(-1, 1) for places in grid)
  return np.concatenate([rows * frequencies, columns * frequencies], axis=1)


def rotate(x: jax.Array, angles: jax.Array | np.ndarray) -> jax.Array:
  """Turns each pair of channels (i, i + d/2) by its angle.

  Args:
    x: (B, N, H, d).
    angles: (N, d/2).

  Returns:
    (B, N, H, d) in x's dtype, at least float32.
  """
  # `layers.wide`, which cannot be had here: blocks turn their queries.
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  angles = jnp.asarray(angles, x.dtype)[:, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
