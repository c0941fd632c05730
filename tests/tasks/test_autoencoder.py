"""Which loss reaches which module, by gradients and by updates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax.config import parser as config_parser
from psvae_jax.models.autoencoder import MODULES
from psvae_jax.optim import make_optimizer
from psvae_jax.tasks import autoencoder, routes
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.train import make_train_step
from psvae_jax.train_state import create


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def make_task(encoder_folder, stage, **loss):
  raw = tiny.config(encoder_folder)
  raw[stage].loss.update(loss)
  return AutoencoderTask(stage, config_parser.parse(raw), encoder_folder)


def all_params(task):
  """Random parameters of every module, trained in this stage or not."""
  params = jax.jit(task.model.init)(jax.random.key(1), task.frozen["teacher"])
  params["encoder"] = task.frozen["teacher"]
  return tiny.randomise({name: params[name] for name in MODULES}, seed=2)


def loss_terms(task, params, frozen):
  """Weighted terms by their name in the table."""
  noise = jax.random.normal(jax.random.key(3), (8, 4, 4, 4))
  out = autoencoder.forward(
    task.model, task.route, params, frozen, tiny.batch()["image"], noise
  )
  weights = task.section.loss
  pixel, _ = autoencoder.pixel_loss(weights, out.reconstruction, out.image)
  return {**task.latent_terms(out)[0], "pixel": weights.pixel * pixel}


def new_state(task, params=None):
  tx = make_optimizer(task.modules, 10)
  fresh, model_state = jax.jit(task.init)(jax.random.key(0), task.frozen)
  return create(params or fresh, model_state, tx, task.modules), tx


def is_zero(tree):
  return all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("stage", sorted(ROUTES))
def test_gradients_follow_the_table(encoder_folder, stage):
  task = make_task(encoder_folder, stage)
  route = task.route
  params = all_params(task)
  # Where E does not train it is the teacher: differentiate that one.
  frozen = {"teacher": params["encoder"]}
  if "encoder" in route.trains:
    frozen = task.frozen

  @jax.jit
  def gradients(params, frozen):
    def terms(params):
      teacher = frozen
      if "encoder" not in route.trains:
        teacher = {"teacher": params["encoder"]}
      return loss_terms(task, params, teacher)

    return jax.jacrev(terms)(params)

  jacobian = gradients(params, frozen)
  expected = {k for k, reach in route.losses.items() if reach}
  assert set(jacobian) == expected
  for loss, grads in jacobian.items():
    for module in MODULES:
      reached = module in route.losses[loss]
      assert is_zero(grads[module]) != reached, (loss, module)
      if reached:
        chex.assert_tree_all_finite(grads[module])


def test_teacher_gets_no_gradient(encoder_folder):
  task = make_task(encoder_folder, "psvae")
  params = all_params(task)

  def loss(frozen):
    return sum(loss_terms(task, params, frozen).values())

  assert is_zero(jax.jit(jax.grad(loss))(task.frozen))


def test_every_parameter_of_a_trained_module_moves(encoder_folder):
  task = make_task(encoder_folder, "psvae")
  state, _ = new_state(task, all_params(task))
  grads, *_ = jax.jit(task.gradients)(
    state, task.frozen, tiny.batch(), jax.random.key(0)
  )
  for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
    assert bool(jnp.any(grad != 0)), jax.tree_util.keystr(path)


def step_once(task):
  state, tx = new_state(task)
  step = jax.jit(make_train_step(task, tx, 0.9))
  return step(state, task.frozen, tiny.batch(), jax.random.key(0))[0]


def test_stage_1_update_ignores_the_pixel_loss(encoder_folder):
  states = [
    step_once(make_task(encoder_folder, "svae", pixel=weight))
    for weight in (1.0, 0.0)
  ]
  for module in ("semantic_encoder", "semantic_decoder"):
    chex.assert_trees_all_equal(*(s.params[module] for s in states))
    chex.assert_trees_all_equal(*(s.opt_state[module] for s in states))
  decoder = [s.params["pixel_decoder"] for s in states]
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(*decoder)


def test_stage_2_update_does_not_ignore_the_pixel_loss(encoder_folder):
  states = [
    step_once(make_task(encoder_folder, "psvae", pixel=weight))
    for weight in (1.0, 0.0)
  ]
  for module in ("encoder", "semantic_encoder"):
    with pytest.raises(AssertionError):
      chex.assert_trees_all_equal(*(s.params[module] for s in states))


def test_teacher_is_unchanged_by_ten_steps(encoder_folder):
  task = make_task(encoder_folder, "psvae")
  before = jax.tree.map(np.array, task.frozen)
  state, tx = new_state(task)
  step = jax.jit(make_train_step(task, tx, 0.9), donate_argnums=0)
  frozen = jax.tree.map(jnp.asarray, task.frozen)
  for seed in range(10):
    batch = tiny.batch(seed=seed)
    state, *_ = step(state, frozen, batch, jax.random.key(0))
  chex.assert_trees_all_equal(jax.tree.map(np.array, frozen), before)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(state.params["encoder"], frozen["teacher"])


def test_stage_2_starts_at_the_teacher_with_finite_gradients(encoder_folder):
  task = make_task(encoder_folder, "psvae")
  state, _ = new_state(task)
  grads, _, metrics = jax.jit(task.gradients)(
    state, task.frozen, tiny.batch(), jax.random.key(0)
  )
  assert float(metrics["loss_semantic_tuned"]) == pytest.approx(0, abs=1e-5)
  chex.assert_tree_all_finite(grads)


def test_semantic_blocks_start_from_the_encoder(encoder_folder):
  task = make_task(encoder_folder, "svae")
  params, _ = jax.jit(task.init)(jax.random.key(0), task.frozen)
  last = jax.tree.map(lambda x: x[-1:], task.frozen["teacher"]["blocks"])
  chex.assert_trees_all_equal(params["semantic_encoder"]["blocks"], last)
  chex.assert_trees_all_equal(params["semantic_decoder"]["blocks"], last)


@pytest.mark.parametrize(
  "name, weight, default",
  [("semantic", 0.1, 1.0), ("kl", 2.0, 1e-3), ("pixel", 3.0, 1.0)],
)
def test_loss_weights_are_linear(encoder_folder, name, weight, default):
  values = []
  for changes in ({name: weight}, {}):
    task = make_task(encoder_folder, "psvae", **changes)
    values.append(loss_terms(task, all_params(task), task.frozen))
  scaled, plain = values
  for term in plain:
    factor = weight / default if term.startswith(name) else 1.0
    np.testing.assert_allclose(scaled[term], factor * plain[term], rtol=1e-5)


def test_fingerprint_is_of_the_model_alone(encoder_folder):
  def fingerprint(**changes):
    raw = tiny.config(encoder_folder)
    for key, value in changes.items():
      section, name = key.split("__")
      raw[section][name] = value
    parsed = config_parser.parse(raw)
    return AutoencoderTask("svae", parsed, encoder_folder).fingerprint

  same = fingerprint()
  assert fingerprint(data__seed=7) == same
  assert fingerprint(model__channels=6) != same


def test_route_that_skips_the_encoder_is_refused():
  with pytest.raises(ValueError, match="semantic_encoder"):
    routes.Route(
      semantic_tuned=("encoder",),
      semantic_decoded=("encoder", "semantic_encoder", "semantic_decoder"),
      kl=("semantic_encoder",),
      pixel=("pixel_decoder",),
    )
