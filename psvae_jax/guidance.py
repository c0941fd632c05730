"""Classifier-free guidance of velocities: pure functions of arrays.

Guidance acts on every channel. Each formula is written around the fully
conditioned velocity, so that scale 1 returns exactly that, and costs no
rounding where guidance is off.

A scale is a number, or (B,), one an example.
"""

import jax
import jax.numpy as jnp


def text_guided(
  v_null: jax.Array, v_text: jax.Array, scale: jax.Array
) -> jax.Array:
  """v = v(∅) + s·(v(text) − v(∅)): two evaluations a time (DESIGN section 4).

  Args:
    v_null: (B, h, w, C) velocity under the null text (or class).
    v_text: (B, h, w, C) velocity under the prompt.
    scale: s; 1 is no guidance.
  """
  scale = _expand(scale, v_text)
  return v_text + (scale - 1) * (v_text - v_null)


def edit_guided(
  v_null: jax.Array,
  v_image: jax.Array,
  v_both: jax.Array,
  image_scale: jax.Array,
  text_scale: jax.Array,
) -> jax.Array:
  """v = v(∅,∅) + s_I·(v(I,∅) − v(∅,∅)) + s_T·(v(I,T) − v(I,∅)).

  InstructPix2Pix's rule: three evaluations a time (DESIGN section 4).

  Args:
    v_null: (B, h, w, C) velocity without source, under the null text.
    v_image: (B, h, w, C) velocity with the source, under the null text.
    v_both: (B, h, w, C) velocity with the source and the instruction.
    image_scale: s_I, how closely the source is kept; 1 is no guidance.
    text_scale: s_T, how closely the instruction is followed; 1 is none.
  """
  image_scale = _expand(image_scale, v_both)
  text_scale = _expand(text_scale, v_both)
  text = (text_scale - 1) * (v_both - v_image)
  image = (image_scale - 1) * (v_image - v_null)
  return v_both + text + image


def interval_scale(
  t: jax.Array, scale: jax.Array, low: float, high: float
) -> jax.Array:
  """The scale for t inside [low, high], 1 (unguided) outside.

  Guidance near noise costs diversity and near data does nothing (Kynkäänniemi
  et al. 2024, "guidance interval").

  Args:
    t: scalar or (B,); 1 is noise.
    scale: guidance inside the interval.
    low, high: ends of the interval, both inside it.
  """
  return jnp.where((low <= t) & (t <= high), scale, 1.0)


def _expand(scale: jax.Array, like: jax.Array) -> jax.Array:
  """Lets a scale per example broadcast over the axes of a latent."""
  scale = jnp.asarray(scale, like.dtype)
  return scale.reshape(scale.shape + (1,) * (like.ndim - scale.ndim))
