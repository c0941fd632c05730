"""The Inception network of FID: the TensorFlow graph of 2015-12-05.

It is neither torchvision's Inception v3 nor the paper's: average pools leave
the padding out of the mean, the last block pools by maxima, and there are
1008 classes. `pytorch-fid` and `torch-fidelity` have the same network; module
names and parameters here are theirs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models.lpips import max_pool

SIDE = 299
FEATURES = ("64", "192", "768", "2048", "spatial", "logits")

_BATCH_NORM_EPS = 1e-3
_SPATIAL_CHANNELS = 7
_CLASSES = 1008


class Inception(nn.Module):
  """The network and everything that metrics read of it.

  Float32 throughout, in full precision on any device: figures must not depend
  on the machine.
  """

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Computes features.

    Args:
      images: (B, 299, 299, 3) float32 in [−1, 1].

    Returns:
      Each float32:
        "64", "192", "768": (B, ·) means over positions of the maps behind the
          first and second pooling and before the auxiliary classifier.
        "2048": (B, 2048), the mean of the last map: FID, KID, precision and
          recall.
        "spatial": (B, 2023), sFID's: 7 channels of a 17 × 17 map, unpooled.
          ADM's evaluator takes `mixed_6/conv:0`, which is
          `Mixed_6d.branch1x1` after its ReLU, in the order row, column,
          channel.
        "logits": (B, 1008) without the classifier's bias, as the inception
          score is computed by ADM's evaluator and by `torch-fidelity`.

    Raises:
      ValueError: another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
      raise ValueError(
        f"Inception takes images (B, {SIDE}, {SIDE}, 3), got {images.shape}; "
        "InceptionNetwork.features resizes them"
      )
    out = {}
    x = images.astype(jnp.float32)
    x = Unit(32, (3, 3), stride=2, padding="VALID", name="Conv2d_1a_3x3")(x)
    x = Unit(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
    x = Unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = max_pool(x, 3)
    out["64"] = _mean(x)
    x = Unit(80, name="Conv2d_3b_1x1")(x)
    x = Unit(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
    x = max_pool(x, 3)
    out["192"] = _mean(x)
    for name, pool_features in (("5b", 32), ("5c", 64), ("5d", 64)):
      x = BlockA(pool_features, name=f"Mixed_{name}")(x)
    x = BlockB(name="Mixed_6a")(x)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
      x = BlockC(width, name=f"Mixed_{name}")(x)
      if name == "6d":  # the block's first channels are branch1x1's
        spatial = x[..., :_SPATIAL_CHANNELS]
        out["spatial"] = spatial.reshape(x.shape[0], -1)
    out["768"] = _mean(x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE("average", name="Mixed_7b")(x)
    x = BlockE("max", name="Mixed_7c")(x)
    out["2048"] = _mean(x)
    out["logits"] = nn.Dense(
      _CLASSES,
      use_bias=False,
      precision=jax.lax.Precision.HIGHEST,
      name="fc",
    )(out["2048"])
    return {name: out[name] for name in FEATURES}


class Unit(nn.Module):
  """Convolution without bias, BatchNorm with stored statistics, ReLU.

  Attributes:
    features: output channels.
    kernel: its rows and columns.
    stride: of both axes.
    padding: "SAME" or "VALID".
    average: takes 3 × 3 means ahead of a 1 × 1 convolution. They commute, and
      a mean of its outputs is the cheaper one.
  """

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"
  average: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def vector(name, init):
      return self.param(name, init, (self.features,), jnp.float32)

    kernel = self.param(
      "kernel",
      nn.initializers.he_normal(),
      (*self.kernel, x.shape[-1], self.features),
      jnp.float32,
    )
    zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
    scale, bias = vector("scale", ones), vector("bias", zeros)
    mean, variance = vector("mean", zeros), vector("variance", ones)
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=jax.lax.Precision.HIGHEST,
    )
    if self.average:
      x = _average(x)
    gain = scale * jax.lax.rsqrt(variance + _BATCH_NORM_EPS)
    return nn.relu((x - mean) * gain + bias)


class BlockA(nn.Module):
  """The 35 × 35 blocks."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = Unit(64, name="branch1x1")(x)
    five = Unit(48, name="branch5x5_1")(x)
    five = Unit(64, (5, 5), name="branch5x5_2")(five)
    double = Unit(64, name="branch3x3dbl_1")(x)
    double = Unit(96, (3, 3), name="branch3x3dbl_2")(double)
    double = Unit(96, (3, 3), name="branch3x3dbl_3")(double)
    pool = Unit(self.pool_features, average=True, name="branch_pool")(x)
    return jnp.concatenate([one, five, double, pool], -1)


class BlockB(nn.Module):
  """From 35 × 35 to 17 × 17."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    halve = functools.partial(Unit, kernel=(3, 3), stride=2, padding="VALID")
    three = halve(384, name="branch3x3")(x)
    double = Unit(64, name="branch3x3dbl_1")(x)
    double = Unit(96, (3, 3), name="branch3x3dbl_2")(double)
    double = halve(96, name="branch3x3dbl_3")(double)
    return jnp.concatenate([three, double, max_pool(x, 3)], -1)


class BlockC(nn.Module):
  """The 17 × 17 blocks: 7 × 7 convolutions as rows and columns."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    row, column = (1, 7), (7, 1)
    one = Unit(192, name="branch1x1")(x)
    seven = Unit(self.width, name="branch7x7_1")(x)
    seven = Unit(self.width, row, name="branch7x7_2")(seven)
    seven = Unit(192, column, name="branch7x7_3")(seven)
    double = Unit(self.width, name="branch7x7dbl_1")(x)
    double = Unit(self.width, column, name="branch7x7dbl_2")(double)
    double = Unit(self.width, row, name="branch7x7dbl_3")(double)
    double = Unit(self.width, column, name="branch7x7dbl_4")(double)
    double = Unit(192, row, name="branch7x7dbl_5")(double)
    pool = Unit(192, average=True, name="branch_pool")(x)
    return jnp.concatenate([one, seven, double, pool], -1)


class BlockD(nn.Module):
  """From 17 × 17 to 8 × 8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    halve = functools.partial(Unit, kernel=(3, 3), stride=2, padding="VALID")
    three = Unit(192, name="branch3x3_1")(x)
    three = halve(320, name="branch3x3_2")(three)
    seven = Unit(192, name="branch7x7x3_1")(x)
    seven = Unit(192, (1, 7), name="branch7x7x3_2")(seven)
    seven = Unit(192, (7, 1), name="branch7x7x3_3")(seven)
    seven = halve(192, name="branch7x7x3_4")(seven)
    return jnp.concatenate([three, seven, max_pool(x, 3)], -1)


class BlockE(nn.Module):
  """The 8 × 8 blocks; they differ in their pooling.

  Attributes:
    pool: "average", or "max" in the last block, as the graph has it.
  """

  pool: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    row, column = (1, 3), (3, 1)
    one = Unit(320, name="branch1x1")(x)
    three = Unit(384, name="branch3x3_1")(x)
    three_row = Unit(384, row, name="branch3x3_2a")(three)
    three_column = Unit(384, column, name="branch3x3_2b")(three)
    double = Unit(448, name="branch3x3dbl_1")(x)
    double = Unit(384, (3, 3), name="branch3x3dbl_2")(double)
    double_row = Unit(384, row, name="branch3x3dbl_3a")(double)
    double_column = Unit(384, column, name="branch3x3dbl_3b")(double)
    average = self.pool == "average"
    if not average:
      x = nn.max_pool(x, (3, 3), padding="SAME")
    pool = Unit(192, average=average, name="branch_pool")(x)
    branches = [one, three_row, three_column, double_row, double_column, pool]
    return jnp.concatenate(branches, -1)


def _average(x: jax.Array) -> jax.Array:
  """3 × 3 means, of those positions that are inside the map."""
  return nn.avg_pool(
    x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False
  )


def _mean(x: jax.Array) -> jax.Array:
  """(B, H, W, C) → (B, C); one axis at a time, for the digits' sake."""
  return jnp.mean(jnp.mean(x, axis=2), axis=1)
