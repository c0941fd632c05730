"""Pillow's bicubic resizing of 8-bit images, on the devices.

Networks of metrics were defined on images that Pillow had resized. As there,
the filter is Keys' with a = -0.5, widened where it shrinks an axis; the width
is resized first, and 8 bits are all that is kept between the two passes.
Pillow's weights are fixed-point numbers: of a thousand values, a few differ
by one level.
"""

import functools

import jax
import jax.numpy as jnp

from psvae_jax.models.resize import bicubic_matrix


def resize_bicubic(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes 8-bit levels as `PIL.Image.resize(…, BICUBIC)` does.

  Args:
    images: (B, H, W, C), uint8 or floating point levels in [0, 255].
    size: the (height, width) wanted.

  Returns:
    float32 (B, height, width, C), whole levels in [0, 255].
  """
  x = images.astype(jnp.float32)
  height, width = x.shape[1:3]
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  if width != size[1]:
    columns = bicubic_matrix(width, size[1], antialias=True)
    x = _levels(product("pw,bhwc->bhpc", jnp.float32(columns), x))
  if height != size[0]:
    rows = bicubic_matrix(height, size[0], antialias=True)
    x = _levels(product("oh,bhwc->bowc", jnp.float32(rows), x))
  return x


def _levels(x: jax.Array) -> jax.Array:
  """To the nearest level, halves up, as fixed-point numbers are rounded."""
  return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)
