"""DiffAug (arXiv 2006.10738): what the discriminator sees, augmented.

The same family of augmentations on data and on reconstructions, differentiable
in the image, lets a discriminator overfit later without the augmentation
leaking into what the decoder draws. It comes in two pure halves: `draw` makes
the random numbers of a global batch, `augment` applies a part of them to the
same part of the batch, so that results do not depend on how a batch is split.

Operations are applied in the order given, each to every image. The paper's
order is ("color", "translation", "cutout"). RAE (arXiv 2510.11690) uses
("translation", "color"): its class has a cutout of ratio 0.2, which its
configuration sets to 0. The ratio here is the published 0.5. Both draw anew
for data and for reconstructions; here that is the caller's choice.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from psvae_jax.config import nearest

OPERATIONS = ("color", "translation", "cutout")
TRANSLATION_RATIO = 0.125
CUTOUT_RATIO = 0.5


def draw(
  rng: jax.Array, batch: int, image_size: int, operations: tuple[str, ...]
) -> dict[str, jax.Array]:
  """Draws the random numbers that `augment` uses.

  Args:
    rng: random key. Numbers of one operation do not depend on which others
      are asked for.
    batch: images B of the global batch.
    image_size: side of the square images, pixels.
    operations: among `OPERATIONS`.

  Returns:
    Arrays that lead with B. "color": "brightness" in [−½, ½), "saturation" in
    [0, 2), "contrast" in [½, 3/2), each (B,). "translation": pixels (down,
    right) from which an output pixel is read, (B, 2) int32. "cutout": (row,
    column) of the middle of the square, (B, 2) int32.

  Raises:
    ValueError: an unknown or repeated operation.
  """
  _check(operations)
  rngs = {name: jax.random.fold_in(rng, i) for i, name in enumerate(OPERATIONS)}
  draws = {}
  if "color" in operations:
    uniform = jax.random.uniform(rngs["color"], (3, batch))
    draws["brightness"] = uniform[0] - 0.5
    draws["saturation"] = uniform[1] * 2.0
    draws["contrast"] = uniform[2] + 0.5
  if "translation" in operations:
    reach = _pixels(image_size, TRANSLATION_RATIO)
    draws["translation"] = jax.random.randint(
      rngs["translation"], (batch, 2), -reach, reach + 1
    )
  if "cutout" in operations:
    # An even square has its middle between pixels: one place more.
    places = image_size + 1 - _pixels(image_size, CUTOUT_RATIO) % 2
    draws["cutout"] = jax.random.randint(rngs["cutout"], (batch, 2), 0, places)
  return draws


def augment(
  images: jax.Array,
  draws: Mapping[str, jax.Array],
  operations: tuple[str, ...],
) -> jax.Array:
  """Applies `operations`, in their order.

  Args:
    images: (B, S, S, C) floating point in [−1, 1].
    draws: `draw`'s arrays for these B images and this S.
    operations: those that `draws` was made for.

  Returns:
    (B, S, S, C) in the dtype of `images`. Colours may leave [−1, 1]; what
    translation and cutout leave empty is 0, mid-grey.

  Raises:
    ValueError: an unknown or repeated operation.
  """
  _check(operations)
  for name in operations:
    images = _APPLY[name](images, draws)
  return images


def _check(operations: tuple[str, ...]) -> None:
  for i, name in enumerate(operations):
    if name not in OPERATIONS:
      raise ValueError(
        f"unknown augmentation {name!r}; {nearest(str(name), OPERATIONS)}"
      )
    if name in operations[:i]:
      raise ValueError(f"augmentation {name!r} is given twice")


def _pixels(size: int, ratio: float) -> int:
  return int(size * ratio + 0.5)


def _color(images, draws):
  def per_image(name):
    return draws[name].astype(images.dtype)[:, None, None, None]

  images = images + per_image("brightness")
  grey = jnp.mean(images, axis=3, keepdims=True)
  images = (images - grey) * per_image("saturation") + grey
  mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
  return (images - mean) * per_image("contrast") + mean


def _translate(images, draws):
  height, width = images.shape[1:3]
  rows = _pixels(height, TRANSLATION_RATIO)
  columns = _pixels(width, TRANSLATION_RATIO)
  padding = ((0, 0), (rows, rows), (columns, columns), (0, 0))
  first = draws["translation"] + jnp.array([rows, columns], jnp.int32)

  @functools.partial(jax.vmap, in_axes=(0, 0))
  def window(image, first):
    start = (first[0], first[1], 0)
    return jax.lax.dynamic_slice(image, start, images.shape[1:])

  return window(jnp.pad(images, padding), first)


def _cutout(images, draws):
  def outside(size, middle):
    side = _pixels(size, CUTOUT_RATIO)
    first = (middle - side // 2)[:, None]
    pixel = jnp.arange(size)
    return (pixel < first) | (pixel >= first + side)

  rows = outside(images.shape[1], draws["cutout"][:, 0])
  columns = outside(images.shape[2], draws["cutout"][:, 1])
  keep = rows[:, :, None] | columns[:, None, :]
  return images * keep[..., None].astype(images.dtype)


_APPLY = {"color": _color, "translation": _translate, "cutout": _cutout}
