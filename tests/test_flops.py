"""FLOPs against hand formulas, against XLA, and through loops."""

import functools

import jax
import jax.numpy as jnp
import pytest

from psvae_jax.flops import count_flops
from psvae_jax.models import layers


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def xla_flops(fn, *args):
  return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


BLOCK = layers.BlockConfig(width=64, num_heads=4, mlp_hidden=256)


def block_flops(tokens, width=64, hidden=256):
  """Query, key, value, out; logits and their product; the MLP."""
  projections = 4 * 2 * tokens * width**2
  attention = 2 * 2 * tokens**2 * width
  return projections + attention + 2 * 2 * tokens * width * hidden


def test_matrix_products():
  a, b = shape(3, 8, 16), shape(3, 16, 5)
  assert count_flops(jnp.matmul, a, b) == 2 * 3 * 8 * 16 * 5
  outer = functools.partial(jnp.einsum, "i,j->ij")
  assert count_flops(outer, shape(7), shape(9)) == 2 * 7 * 9


def convolution(x, kernel, stride=1, padding="VALID", groups=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def test_convolutions():
  x, kernel = shape(2, 16, 12, 8), shape(3, 3, 8, 10)
  want = 2 * 2 * 14 * 10 * 3 * 3 * 8 * 10
  assert count_flops(convolution, x, kernel) == want
  # With padding, 3 taps of an axis read 3·n − 2 pixels.
  same = functools.partial(convolution, padding="SAME")
  want = 2 * 2 * (3 * 16 - 2) * (3 * 12 - 2) * 8 * 10
  assert count_flops(same, x, kernel) == want
  grouped = functools.partial(convolution, groups=4)
  want = 2 * 2 * 14 * 10 * 3 * 3 * 2 * 12
  assert count_flops(grouped, x, shape(3, 3, 2, 12)) == want


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_and_its_gradients_are_xlas(groups):
  def loss(x, kernel):
    return convolution(x, kernel, 2, ((1, 1), (1, 1)), groups).sum()

  x, kernel = shape(2, 16, 16, 8), shape(4, 4, 8 // groups, 16)
  want = count_flops(loss, x, kernel)
  for argument in (0, 1):
    gradient = jax.grad(loss, argument)
    assert count_flops(gradient, x, kernel) == want
    if groups == 1:
      assert xla_flops(gradient, x, kernel) == pytest.approx(want, rel=0.02)


def test_attention_block():
  block = layers.Block(BLOCK)
  x = shape(2, 9, 64)
  params = jax.eval_shape(block.init, jax.random.key(0), x)
  assert count_flops(block.apply, params, x) == 2 * block_flops(tokens=9)


@pytest.mark.parametrize("remat", [False, True])
def test_four_times_the_depth_is_four_times_the_flops(remat):
  def flops(depth):
    stack = layers.BlockStack(BLOCK, depth=depth, remat=remat)
    x = shape(2, 9, 64)
    params = jax.eval_shape(stack.init, jax.random.key(0), x)

    def loss(params, x):
      return stack.apply(params, x).sum()

    forward = count_flops(loss, params, x)
    # By the input too: else the first block's gradient would be cheaper.
    step = count_flops(jax.grad(loss, argnums=(0, 1)), params, x)
    return forward, step

  forward, step = flops(3)
  assert flops(12) == (4 * forward, 4 * step)
  assert forward == 3 * 2 * block_flops(tokens=9)
  # The backward pass is twice the forward one; remat does that one again.
  assert step == (4 if remat else 3) * forward


def test_a_training_step_is_xlas_within_5_percent():
  width, depth = 256, 2

  def loss(params, x):
    for layer in params:
      x = jax.nn.relu(x @ layer["up"]) @ layer["down"]
    return jnp.square(x).sum()

  def step(params, x):
    grads = jax.grad(loss)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  layer = {"up": shape(width, 4 * width), "down": shape(4 * width, width)}
  params, x = [layer] * depth, shape(512, width)
  got = count_flops(step, params, x)
  assert got == pytest.approx(xla_flops(step, params, x), rel=0.05)


def test_a_block_is_xlas_within_5_percent():
  block = layers.Block(layers.BlockConfig(256, 4, 1024))
  x = shape(2, 64, 256)
  params = jax.eval_shape(block.init, jax.random.key(0), x)

  def step(params, x):
    return jax.grad(lambda p: block.apply(p, x).sum())(params)

  got = count_flops(step, params, x)
  assert got == pytest.approx(xla_flops(step, params, x), rel=0.05)


def test_dead_work_and_branches():
  w = shape(8, 8)
  product = 2 * 8**3

  def dead(w):
    _ = w @ w
    return w + 1

  def branches(w):
    return jax.lax.cond(w[0, 0] > 0, lambda w: w @ w @ w, lambda w: w, w)

  def looped(w):
    return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, w)

  def jitted(w):
    return jax.jit(lambda w: w @ w)(w)

  assert count_flops(dead, w) == 0
  assert count_flops(branches, w) == 2 * product
  assert count_flops(looped, w) == 5 * product
  assert count_flops(jitted, w) == product


def test_a_loop_of_unknown_length_is_an_error():
  def until_small(w):
    return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ x, w)

  with pytest.raises(ValueError, match="while.*1,024 FLOPs"):
    count_flops(until_small, shape(8, 8))
