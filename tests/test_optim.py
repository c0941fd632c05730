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
    updates, state = tx.update(grads, state, params, step=step)
    params = jax.tree.map(jnp.add, params, updates)
  return params, state


def make_tx(config, steps=10, names=("encoder", "pixel_decoder")):
  return optim.make_optimizer(
    {name: optim.TrainedModule(config) for name in names}, steps
  )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_modules_do_not_rescale_each_other(name):
  config = OptimConfig(name=name, clip=0.5, learning_rate=0.1)
  tx = make_tx(config)

  def scale_decoder(grads):
    decoder = jax.tree.map(lambda g: 1e3 * g, grads["pixel_decoder"])
    return {**grads, "pixel_decoder": decoder}

  plain, _ = run(tx, make_params())
  other, _ = run(tx, make_params(), change=scale_decoder)
  chex.assert_trees_all_equal(plain["encoder"], other["encoder"])


def test_clip_is_by_the_modules_own_norm():
  config = OptimConfig(clip=0.5, learning_rate=1.0)
  tx = make_tx(config)
  params = make_params()
  grads = gradients(1)
  clipped = jax.tree.map(
    lambda g: g * 0.5 / jnp.linalg.norm(ravel(grads["encoder"])),
    grads["encoder"],
  )
  updates, _ = tx.update(grads, tx.init(params), params, step=0)
  loose = make_tx(OptimConfig(clip=0.0, learning_rate=1.0))
  expected, _ = loose.update(
    {**grads, "encoder": clipped}, loose.init(params), params, step=0
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
    modules = {
      "encoder": optim.TrainedModule(config, multiplier),
      "pixel_decoder": optim.TrainedModule(config),
    }
    tx = optim.make_optimizer(modules, 10)
    updates.append(tx.update(grads, tx.init(params), params, step=0)[0])
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
  tx = make_tx(config, 20, ("encoder",))
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
    updates, state = tx.update(grads, state, params, step=step)
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
  tx = make_tx(config)
  params = make_params()
  updates, _ = tx.update(gradients(0), tx.init(params), params, step=0)
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
  config = OptimConfig(learning_rate=0.1, schedule="constant")
  modules = {"encoder": optim.TrainedModule(config)}
  tx = optim.make_optimizer(modules, 10)
  state = train_state.create(params, {}, tx, modules)
  chex.assert_trees_all_equal(state.ema_params, state.params)
  expected = np.ones(3)
  for n in range(12):
    state, _ = train_state.apply_gradients(
      state, {"encoder": {"w": jnp.full(3, 2.0)}}, {}, tx, 0.5
    )
    decay = min(0.5, (1 + n) / (10 + n))
    weight = np.array(state.params["encoder"]["w"])
    expected = decay * expected + (1 - decay) * weight
    np.testing.assert_allclose(
      state.ema_params["encoder"]["w"], expected, rtol=1e-5, atol=1e-7
    )
  assert int(state.step) == 12


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_module_with_a_start_is_held_then_trains_as_if_new(name):
  """Bit-unchanged before it, its schedule from its beginning after it."""
  config = OptimConfig(name=name, learning_rate=0.1, warmup_steps=2)
  plain = {"encoder": optim.TrainedModule(config)}
  late = {"encoder": optim.TrainedModule(config, start=3)}
  params = {"encoder": make_params()["encoder"]}
  tx = optim.make_optimizer(late, 9)
  update = jax.jit(lambda g, s, p, n: tx.update(g, s, p, step=n))
  start = state = tx.init(params)
  held = params
  for step in range(3):
    updates, state = update(
      {"encoder": gradients(7)["encoder"]}, state, held, step
    )
    held = jax.tree.map(jnp.add, held, updates)
  chex.assert_trees_all_equal(held, params)
  chex.assert_trees_all_equal(state, start)

  reference = optim.make_optimizer(plain, 6)
  other, other_state = params, reference.init(params)
  for step in range(3):
    grads = {"encoder": gradients(step)["encoder"]}
    updates, state = update(grads, state, held, step + 3)
    held = jax.tree.map(jnp.add, held, updates)
    updates, other_state = reference.update(
      grads, other_state, other, step=step
    )
    other = jax.tree.map(jnp.add, other, updates)
  chex.assert_trees_all_close(held, other, rtol=1e-6)


def test_skipped_step_changes_the_counter_alone():
  modules = {"encoder": optim.TrainedModule(OptimConfig(learning_rate=0.1))}
  tx = optim.make_optimizer(modules, 10)
  params = {"encoder": make_params()["encoder"]}
  state = train_state.create(params, {"a": jnp.zeros(2)}, tx, modules)
  grads = {"encoder": gradients(0)["encoder"]}
  new_state, _ = train_state.apply_gradients(
    state, grads, {"a": jnp.ones(2)}, tx, 0.9
  )
  kept = train_state.skip(state, new_state, jnp.bool_(True))
  chex.assert_trees_all_equal(kept, new_state)
  held = train_state.skip(state, new_state, jnp.bool_(False))
  chex.assert_trees_all_equal(held, state.replace(step=new_state.step))
