"""Attention under a mask of pairs, and the masks of decoders.

A mask is boolean, (B, 1, N, M), or (1, 1, N, M) for every example alike: True
where query n may look at key m. A sequence of text and images is described by
one integer a token, its segment: `PADDING`, `TEXT`, or 1, 2, … for the first,
second, … image.
"""

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models.layers import wide

PADDING, TEXT = -1, 0


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention in which heads of the query may share a key.

  Logits and softmax are wide. A key that `mask` hides has exactly no weight,
  save in a row that sees no key at all: that one sees all of them alike, so
  that padding is finite, as its gradients are.

  Args:
    query: (B, N, H, d).
    key, value: (B, M, K, d), K dividing H: query head h looks at key head
      h // (H / K), as in grouped-query attention (arXiv 2305.13245).
    mask: (B or 1, 1, N, M) bool; None hides nothing.

  Returns:
    (B, N, H, d) in value's dtype.
  """
  batch, length, heads, width = query.shape
  shared = key.shape[2]
  dtype = wide(query.dtype)
  query = query.reshape(batch, length, shared, heads // shared, width)
  logits = width**-0.5 * jnp.einsum(
    "bqkgd,bskd->bkgqs", query, key, preferred_element_type=dtype
  )
  if mask is not None:
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(dtype).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  out = jnp.einsum("bkgqs,bskd->bqkgd", weights, value)
  return out.reshape(batch, length, heads, width)


def causal_mask(length: int) -> np.ndarray:
  """(1, 1, N, N) bool: each token sees itself and those before it."""
  return np.tri(length, dtype=bool)[None, None]


def segment_ids(text_mask: jax.Array, *image_lengths: int) -> jax.Array:
  """Segments of text followed by images.

  Args:
    text_mask: (B, L) bool, True where a text token is not padding.
    *image_lengths: tokens of the first image, the second, and so on.

  Returns:
    (B, L + Σ image_lengths) int32.
  """
  text = jnp.where(text_mask, TEXT, PADDING).astype(jnp.int32)
  numbers = range(1, len(image_lengths) + 1)
  images = np.repeat(np.array(numbers, np.int32), image_lengths)
  images = jnp.broadcast_to(images, (text.shape[0], len(images)))
  return jnp.concatenate([text, images], axis=1)


def transfusion_mask(segments: jax.Array) -> jax.Array:
  """Causal, but all tokens of an image see each other.

  As Transfusion (arXiv 2408.11039, section 3.2): a token sees the tokens before
  it, and an image's tokens also those of the same image that come after.
  Nothing sees padding; what padded tokens themselves become is meaningless.

  Args:
    segments: (B, N) integers, see the module's description.

  Returns:
    (B, 1, N, N) bool.
  """
  length = segments.shape[1]
  query, key = segments[:, :, None], segments[:, None, :]
  same_image = (query == key) & (query > TEXT)
  visible = (causal_mask(length)[0] | same_image) & (key != PADDING)
  return visible[:, None]


def sequence_positions(segments: jax.Array) -> jax.Array:
  """Place of every token among those that are not padding.

  With these the features of an image do not depend on how far the text before
  it was padded.

  Args:
    segments: (B, N) integers, see the module's description.

  Returns:
    (B, N) int32, from 0; of padding, the place of the last token before it.
  """
  count = jnp.cumsum(segments != PADDING, axis=1, dtype=jnp.int32)
  return jnp.maximum(count - 1, 0)
