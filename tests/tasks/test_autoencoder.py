"""Which loss reaches which module, by gradients and by updates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax.config import ConfigError
from psvae_jax.config import parser as config_parser
from psvae_jax.models.autoencoder import MODULES
from psvae_jax.optim import make_optimizer
from psvae_jax.tasks import autoencoder, perceptual, routes
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.train import make_train_step
from psvae_jax.train_state import create


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def make_task(encoder_folder, stage, remat=False, **loss):
  raw = tiny.config(encoder_folder)
  raw.perceptual = dict(weights="random:alex", network="alex")
  raw.compute.remat = remat
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
  pixel, metrics = task.pixel_loss(frozen, out.reconstruction, out.image)
  terms = {**task.latent_terms(out)[0], "pixel": weights.pixel * pixel}
  if weights.lpips:
    terms["lpips"] = weights.pixel * weights.lpips * metrics["loss_lpips"]
  return terms


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


@pytest.mark.parametrize("stage", sorted(ROUTES))
def test_lpips_reaches_what_the_pixel_loss_reaches(encoder_folder, stage):
  """In stage 2 E, in stage 1 not; and never its own parameters."""
  task = make_task(encoder_folder, stage, lpips=0.5)
  params = all_params(task)
  # E of stage 1 is the teacher.
  frozen = {**task.frozen, "teacher": params["encoder"]}

  @jax.jit
  def gradients(params, frozen):
    def term(params, frozen):
      return loss_terms(task, params, frozen)["lpips"]

    return jax.grad(term, argnums=(0, 1))(params, frozen)

  grads, of_frozen = gradients(params, frozen)
  for module in MODULES:
    assert is_zero(grads[module]) != (module in task.route.pixel), module
    chex.assert_tree_all_finite(grads[module])
  assert set(of_frozen) == {"teacher", "perceptual"}
  assert is_zero(of_frozen)


def test_teacher_gets_no_gradient(encoder_folder):
  task = make_task(encoder_folder, "psvae")
  params = all_params(task)

  def loss(frozen):
    return sum(loss_terms(task, params, frozen).values())

  assert is_zero(jax.jit(jax.grad(loss))(task.frozen))


def test_lpips_is_frozen_and_no_part_of_the_model(encoder_folder):
  """An argument of the step, without optimizer, average or fingerprint."""
  task = make_task(encoder_folder, "psvae", lpips=0.5)
  plain = make_task(encoder_folder, "psvae")
  assert "perceptual" in task.frozen and "perceptual" not in plain.frozen
  assert task.fingerprint == plain.fingerprint
  assert set(task.modules) == set(plain.modules)
  state = jax.eval_shape(lambda: new_state(task)[0])
  step = make_train_step(task, make_optimizer(task.modules, 10), 0.9)
  arguments = state, task.frozen, tiny.batch(), jax.random.key(0)
  program = jax.make_jaxpr(step)(*arguments)
  largest = max((np.size(const) for const in program.consts), default=0)
  assert largest < 2e4  # its smallest kernel has 23 232 numbers
  metrics = jax.eval_shape(step, *arguments)[1]
  assert "train/loss_lpips" in metrics
  assert "train/loss_perceptual" not in metrics


def test_lpips_computes_wide(encoder_folder):
  raw = tiny.config(encoder_folder)
  raw.perceptual = dict(weights="random:alex", network="alex")
  for dtype, wanted in (("bfloat16", "float32"), ("float64", "float64")):
    raw.compute.dtype = dtype
    config = config_parser.parse(raw)
    with jax.enable_x64(dtype == "float64"):
      loaded, abstract = perceptual.load(config), perceptual.abstract(config)
    assert loaded.module.dtype == wanted
    assert abstract.module == loaded.module
    chex.assert_trees_all_equal_shapes(abstract.params, loaded.params)
  raw.compute.dtype = raw.perceptual.dtype = "bfloat16"
  found = perceptual.load(config_parser.parse(raw)).module.dtype
  assert found == "bfloat16"


def test_missing_lpips_says_how_to_make_it(encoder_folder, tmp_path):
  raw = tiny.config(encoder_folder)
  raw.psvae.loss.lpips = 1.0
  for weights, kind in (("", ConfigError), ("nowhere", FileNotFoundError)):
    raw.perceptual = dict(weights=weights and str(tmp_path / weights))
    with pytest.raises(kind, match="psvae_jax.convert vgg16") as error:
      AutoencoderTask("psvae", config_parser.parse(raw), tmp_path)
    assert "random:vgg" in str(error.value) and "\n" not in str(error.value)


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


def test_frozen_networks_are_unchanged_by_ten_steps(encoder_folder):
  task = make_task(encoder_folder, "psvae", lpips=0.5, remat=True)
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
