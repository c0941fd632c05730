"""One and eight devices compute the same training, DESIGN section 4."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import optim, sharding, train, train_state
from psvae_jax import stages as stage_lib
from psvae_jax.config import ConfigError, MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.tasks.autoencoder import AutoencoderTask

MESHES = {
  "data": dict(data=8),
  "fsdp": dict(data=1, fsdp=8),
  "mixed": dict(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def make_task(
  encoder_folder, stage, decoder="vit", dtype="float32", accumulate=1
):
  """A stage with the adversarial term at work from the first step on."""
  kind = "dino" if stage == "svae" else "patch"
  raw = tiny.adversarial_config(encoder_folder, decoder=decoder, kind=kind)
  raw[stage].train.accumulate = accumulate
  if accumulate == 1:  # no loop and no condition around the convolutions
    raw.compute.convolution = "native"
  raw.compute.dtype = dtype
  raw[stage].optim.eps = 1e-3
  raw[stage].discriminator_optim.eps = 1e-3
  return AutoencoderTask(stage, config_parser.parse(raw), encoder_folder)


@functools.cache
def trained(encoder_folder, stage, decoder, mesh_name, dtype, accumulate=1):
  """Parameters after 3 steps; gradients and λ of the first."""
  count = 1 if mesh_name == "one" else 8
  sizes = {} if mesh_name == "one" else MESHES[mesh_name]
  mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])
  task = make_task(encoder_folder, stage, decoder, dtype, accumulate)

  def cast(tree):
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)

  with jax.set_mesh(mesh):
    frozen = sharding.put_tree(cast(task.frozen), mesh)
    params, model_state = jax.jit(task.init)(jax.random.key(0), task.frozen)
    params = cast(tiny.randomise(params, scale=0.05))
    arrays = sharding.put_tree((params, cast(model_state)), mesh)
    tx = optim.make_optimizer(task.modules, 10)
    create = functools.partial(train_state.create, tx=tx, modules=task.modules)
    shardings = sharding.infer_sharding(jax.eval_shape(create, *arrays), mesh)
    state = jax.jit(create, out_shardings=shardings)(*arrays)
    gradients, seen = task.gradients, {}

    def recorded(*args):
      seen["grads"], model_state, metrics = gradients(*args)
      seen["weight"] = metrics["gan_weight"]
      return seen["grads"], model_state, metrics

    task.gradients = recorded
    train_step = train.make_train_step(task, tx, 0.9)

    @jax.jit
    def step(state, frozen, batch, rng):
      state = train_step(state, frozen, batch, rng)[0]
      return state, (seen["grads"], seen["weight"])

    rng = jax.random.key(7)
    batch = sharding.put_batch(tiny.batch(16, task.image_size), mesh)
    state, first = step(state, frozen, batch, rng)
    for _ in range(2):
      state, _ = step(state, frozen, batch, rng)
  return jax.device_get((state.params, first))


@pytest.mark.parametrize(
  "stage, mesh_name, accumulate",
  [("svae", "data", 2), ("psvae", "mixed", 1)],
)
def test_float64_parameters_equal_after_3_steps(
  encoder_folder, stage, mesh_name, accumulate
):
  """One device and the whole batch; eight devices, also in micro-batches."""
  case = encoder_folder, stage, "vit"
  with jax.enable_x64(True):
    one, _ = trained(*case, "one", "float64")
    many, _ = trained(*case, mesh_name, "float64", accumulate)
  assert {x.dtype for x in jax.tree.leaves(one)} == {np.dtype("float64")}
  chex.assert_trees_all_close(one, many, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
  "stage, decoder, mesh_name",
  [
    # By default its stricter sibling in double precision.
    pytest.param("svae", "vit", "data", marks=pytest.mark.slow),
    ("psvae", "conv", "fsdp"),
  ],
)
def test_float32_gradients_and_parameters_equal(
  encoder_folder, stage, decoder, mesh_name
):
  case = encoder_folder, stage, decoder
  params_one, (one, weight) = trained(*case, "one", "float32")
  params_many, (many, found) = trained(*case, mesh_name, "float32")
  assert "discriminator" in one and weight > 0
  assert found == pytest.approx(weight, rel=1e-4)
  scale = max(float(np.linalg.norm(x)) for x in jax.tree.leaves(one))

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    error = np.linalg.norm(a - b)
    # A key bias shifts all logits of a query alike: its true gradient is 0.
    if name.endswith("['key']['bias']"):
      assert error <= 1e-6 * scale, name
    else:
      assert error <= 1e-5 * np.linalg.norm(a), name

  jax.tree_util.tree_map_with_path(check, one, many)
  chex.assert_trees_all_close(params_one, params_many, rtol=0, atol=1e-5)


def test_parameters_are_really_sharded(encoder_folder):
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices())
  task = make_task(encoder_folder, "psvae")
  params = sharding.put_tree(task.frozen["teacher"], mesh)
  kernel = params["blocks"]["block"]["mlp"]["fc1"]["kernel"]
  chex.assert_shape(kernel, (2, 16, 32))
  assert kernel.addressable_shards[0].data.shape == (2, 8, 16)


def test_optimizer_and_ema_take_the_parameters_sharding(encoder_folder):
  mesh = sharding.make_mesh(MeshConfig(fsdp=8), jax.devices())
  task = make_task(encoder_folder, "psvae")
  tx = optim.make_optimizer(task.modules, 10)
  with jax.set_mesh(mesh):
    frozen = sharding.put_tree(task.frozen, mesh)
    shapes = stage_lib.abstract_state(task, tx, frozen, mesh)
  shardings = sharding.infer_sharding(shapes, mesh)
  wanted = jax.tree.map(lambda s: s.spec, shardings.params)
  averaged = {k: v for k, v in wanted.items() if k != "discriminator"}
  assert jax.tree.map(lambda s: s.spec, shardings.ema_params) == averaged
  adam = shardings.opt_state["pixel_decoder"][0][0]
  assert jax.tree.map(lambda s: s.spec, adam.mu) == wanted["pixel_decoder"]
  sharded = [s for s in jax.tree.leaves(wanted) if any(s)]
  assert len(sharded) > 10


@pytest.mark.parametrize(
  "sizes, message",
  [
    (dict(data=3), "needs 3 devices, this job has 8"),
    (dict(data=-1, fsdp=-1), "at most one"),
    (dict(data=-1, fsdp=3), "set one axis to -1"),
    (dict(data=0), "positive"),
  ],
)
def test_bad_meshes(sizes, message):
  with pytest.raises(ConfigError, match=message):
    sharding.make_mesh(MeshConfig(**sizes), jax.devices())


def test_sharding_falls_back_where_a_dimension_does_not_divide():
  mesh = sharding.make_mesh(MeshConfig(fsdp=8), jax.devices())
  tree = {"fc1": {"kernel": jax.ShapeDtypeStruct((12, 16), jnp.float32)}}
  spec = sharding.infer_sharding(tree, mesh)["fc1"]["kernel"].spec
  assert spec == jax.sharding.PartitionSpec(None, "tensor")
