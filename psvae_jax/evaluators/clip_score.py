"""CLIP score: how well images and their captions agree.

The score of a pair is 100 · max(cos, 0) between CLIP's embeddings of image and
caption (Hessel et al., arXiv 2104.08718, whose own figure has a factor of 2.5
in place of 100), and that of a set is the mean. torchmetrics cuts off at zero
after the mean: the two are equal unless a pair points away from each other.

A score is only comparable under the same CLIP: say which with it.
"""

import jax
import jax.numpy as jnp


def clip_score(image_embeds: jax.Array, text_embeds: jax.Array) -> jax.Array:
  """Scores of pairs; pure.

  Args:
    image_embeds: (B, P) of unit length.
    text_embeds: (B, P) of unit length, row by row of the same pairs.

  Returns:
    (B,) in [0, 100]; NaN where an embedding has one.

  Raises:
    ValueError: other shapes.
  """
  if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
    raise ValueError(
      "images and captions come in pairs, (B, P) each; got embeddings of "
      f"{image_embeds.shape} and {text_embeds.shape}"
    )
  cosines = jnp.sum(image_embeds * text_embeds, axis=-1)
  return 100.0 * jnp.maximum(cosines, 0.0)
