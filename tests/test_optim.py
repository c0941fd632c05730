"""Optimizers against torch, and modules that do not touch each other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax import optim, train_state
from psvae_jax.config import OptimConfig


def make_params(seed=0):
  rngs = jax.random.split(jax.random.key(seed), 4)
  dense = {
    "kernel": jax.random.normal(rngs[0], (5, 3)),
    "bias": jax.random.normal(rngs[1], (3,)),
  }
  stack = {"fc1": {"kernel": jax.random.normal(rngs[2], (2, 4, 6))}}
  conv = {"conv": {"kernel": jax.random.normal(rngs[3], (3, 3, 2, 4))}}
  return {"encoder": {"dense": dense}, "pixel_decoder": {**stack, **conv}}


def gradients(step):
  return jax.tree.map(lambda x: x * 0.5 + 0.1 * step, make_params(step))


def run(tx, params, steps=3, change=None):
  state = tx.init(params)
  for step in range(steps):
    grads = gradients(step)
    if change is not None:
      grads = change(grads)
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params, state


MULTIPLIERS = {"encoder": 1.0, "pixel_decoder": 1.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_modules_do_not_rescale_each_other(name):
  config = OptimConfig(name=name, clip=0.5, learning_rate=0.1)
  tx = optim.make_optimizer(config, 10, MULTIPLIERS)

  def scale_decoder(grads):
    decoder = jax.tree.map(lambda g: 1e3 * g, grads["pixel_decoder"])
    return {**grads, "pixel_decoder": decoder}

  plain, _ = run(tx, make_params())
  other, _ = run(tx, make_params(), change=scale_decoder)
  chex.assert_trees_all_equal(plain["encoder"], other["encoder"])


def test_clip_is_by_the_modules_own_norm():
  config = OptimConfig(clip=0.5, learning_rate=1.0)
  tx = optim.make_optimizer(config, 10, MULTIPLIERS)
  params = make_params()
  grads = gradients(1)
  clipped = jax.tree.map(
    lambda g: g * 0.5 / jnp.linalg.norm(ravel(grads["encoder"])),
    grads["encoder"],
  )
  updates, _ = tx.update(grads, tx.init(params), params)
  loose = optim.make_optimizer(
    OptimConfig(clip=0.0, learning_rate=1.0), 10, MULTIPLIERS
  )
  expected, _ = loose.update(
    {**grads, "encoder": clipped}, loose.init(params), params
  )
  chex.assert_trees_all_close(
    updates["encoder"], expected["encoder"], rtol=1e-5
  )


def ravel(tree):
  return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def test_encoder_multiplier_scales_its_update_alone():
  config = OptimConfig(learning_rate=0.1)
  params, grads = make_params(), gradients(0)
  updates = []
  for multiplier in (1.0, 0.1):
    tx = optim.make_optimizer(
      config, 10, {"encoder": multiplier, "pixel_decoder": 1.0}
    )
    updates.append(tx.update(grads, tx.init(params), params)[0])
  chex.assert_trees_all_close(
    updates[1]["encoder"],
    jax.tree.map(lambda x: 0.1 * x, updates[0]["encoder"]),
    rtol=1e-5,
  )
  chex.assert_trees_all_equal(
    updates[0]["pixel_decoder"], updates[1]["pixel_decoder"]
  )


def test_adamw_equals_torch():
  torch = pytest.importorskip("torch")
  config = OptimConfig(
    learning_rate=0.01,
    schedule="constant",
    weight_decay=0.1,
    clip=0.0,
    b2=0.95,
  )
  tx = optim.make_optimizer(config, 20, {"encoder": 1.0})
  params = {"encoder": make_params()["encoder"]}
  kernel, bias = (
    torch.tensor(np.array(params["encoder"]["dense"][k]), requires_grad=True)
    for k in ("kernel", "bias")
  )
  options = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8)
  reference = torch.optim.AdamW(
    [
      {"params": [kernel], "weight_decay": 0.1},
      {"params": [bias], "weight_decay": 0.0},
    ],
    **options,
  )
  state = tx.init(params)
  for step in range(20):
    grads = {"encoder": gradients(step)["encoder"]}
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    for tensor, name in ((kernel, "kernel"), (bias, "bias")):
      tensor.grad = torch.tensor(np.array(grads["encoder"]["dense"][name]))
    reference.step()
  dense = params["encoder"]["dense"]
  np.testing.assert_allclose(dense["kernel"], kernel.detach(), rtol=1e-5)
  np.testing.assert_allclose(dense["bias"], bias.detach(), rtol=1e-5)


def test_muon_orthogonalises_every_matrix_of_a_stack():
  config = OptimConfig(
    name="muon", learning_rate=1.0, schedule="constant", clip=0.0
  )
  tx = optim.make_optimizer(config, 10, MULTIPLIERS)
  params = make_params()
  updates, _ = tx.update(gradients(0), tx.init(params), params)
  for matrix in updates["pixel_decoder"]["fc1"]["kernel"]:
    values = np.linalg.svd(np.array(matrix), compute_uv=False)
    # Five Newton-Schulz steps bring singular values near 1, not to it.
    scale = np.sqrt(max(1.0, matrix.shape[1] / matrix.shape[0]))
    assert np.all((0.4 < values / scale) & (values / scale < 1.4)), values


@pytest.mark.parametrize(
  "schedule, at_middle, at_end",
  [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)],
)
def test_schedules(schedule, at_middle, at_end):
  config = OptimConfig(warmup_steps=10, schedule=schedule, end_factor=0.1)
  fn = optim.make_schedule(config, 2.0, 110)
  assert float(fn(0)) == 0.0
  assert float(fn(5)) == pytest.approx(1.0)
  assert float(fn(10)) == pytest.approx(2.0)
  assert float(fn(60)) == pytest.approx(2.0 * at_middle)
  assert float(fn(110)) == pytest.approx(2.0 * at_end)


def test_ema_starts_at_the_parameters_and_warms_up():
  params = {"encoder": {"w": jnp.ones(3)}}
  tx = optim.make_optimizer(
    OptimConfig(learning_rate=0.1, schedule="constant"), 10, {"encoder": 1.0}
  )
  state = train_state.create(params, tx)
  chex.assert_trees_all_equal(state.ema_params, state.params)
  expected = np.ones(3)
  for n in range(12):
    state, _ = train_state.apply_gradients(
      state, {"encoder": {"w": jnp.full(3, 2.0)}}, tx, 0.5
    )
    decay = min(0.5, (1 + n) / (10 + n))
    weight = np.array(state.params["encoder"]["w"])
    expected = decay * expected + (1 - decay) * weight
    np.testing.assert_allclose(
      state.ema_params["encoder"]["w"], expected, rtol=1e-5, atol=1e-7
    )
  assert int(state.step) == 12
