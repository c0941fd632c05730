"""The generator's stages: objective, data, bridge, and whole jobs."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_generator_job

from psvae_jax import checkpoint as ckpt
from psvae_jax import main, sharding, train
from psvae_jax import stages as stage_lib
from psvae_jax.config import MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.optim import make_optimizer
from psvae_jax.psvae import PSVAE
from psvae_jax.tasks import make_task
from psvae_jax.tasks.generator import DIT, PARTS


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def autoencoder(encoder_folder, tmp_path_factory):
  """A workdir with an autoencoder and nothing else."""
  workdir = tmp_path_factory.mktemp("autoencoder")
  tiny_generator_job.train_autoencoder(encoder_folder, workdir)
  return workdir


@pytest.fixture(scope="module")
def finished(autoencoder, tmp_path_factory):
  """Both generator stages, by the command's own code."""
  workdir = tmp_path_factory.mktemp("finished") / "job"
  shutil.copytree(autoencoder, workdir)
  for stage in PARTS:
    main.run(tiny_generator_job.config(stage), workdir)
  return workdir


def make_mesh(count=1, **sizes):
  return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])


def prepared(stage, workdir, **sections):
  """A task that is ready to step, its config and its mesh."""
  raw = tiny_generator_job.config(stage)
  for name, values in sections.items():
    raw[name].update(values)
  config = config_parser.parse(raw)
  task = make_task(stage, config, workdir)
  mesh = make_mesh()
  task.prepare(workdir)
  return task, config, mesh


def batches(task, config, workdir, mesh, count=1):
  iterator = stage_lib.make_train_iterator(task, config, task.name, workdir)
  return [sharding.put_batch(next(iterator), mesh) for _ in range(count)]


def fresh_state(task, config, mesh):
  """A state with every parameter random: gates at zero hide wrong wiring."""
  frozen = sharding.put_tree(task.frozen, mesh)
  tx = make_optimizer(task.modules, config.sections[task.name].train.steps)
  params = tiny.randomise(jax.jit(task.init)(jax.random.key(0), frozen)[0])
  state = train.train_state.create(params, {}, tx, task.modules)
  return jax.device_put(state, sharding.replicated(mesh)), frozen, tx


def metrics_of(workdir, stage):
  lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stage", PARTS)
def test_job_leaves_figures_and_pictures(finished, stage):
  summary = json.loads((finished / "summary.json").read_text())[stage]
  wanted = ["eval/loss", "eval/joint_accuracy", "eval/frechet_distance"]
  if stage == "edit":
    wanted += ["eval/edit_loss", "eval/edit_success", "eval/preservation_psnr"]
  assert set(wanted) <= set(summary)
  assert all(np.isfinite(value) for value in summary.values())
  pictures = ["generated", "guidance_grid", "denoising"]
  pictures += ["edits"] if stage == "edit" else []
  for name in pictures:
    assert (finished / stage / f"{name}.npz").is_file()
  assert (finished / "report.html").is_file()


def test_losses_cached_and_on_the_fly_are_equal(autoencoder, tmp_path):
  losses = {}
  for enabled in (True, False):
    task, config, mesh = prepared(
      "edit",
      autoencoder,
      cache=dict(enabled=enabled, root=str(tmp_path / "cache")),
    )
    state, frozen, _ = fresh_state(task, config, mesh)
    rng = jax.random.key(1)
    got = batches(task, config, autoencoder, mesh, 2)
    assert ("latent" in got[0]["t2i"]) == enabled
    losses[enabled] = [
      jax.jit(task.gradients)(state, frozen, batch, rng)[2]["loss"]
      for batch in got
    ]
    indices = [np.asarray(batch["edit"]["index"]) for batch in got]
    losses[enabled, "index"] = np.concatenate(indices)
  np.testing.assert_array_equal(losses[True, "index"], losses[False, "index"])
  np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)


def test_accumulated_gradients_are_those_of_the_batch(autoencoder):
  grads = {}
  for count in (1, 2):
    task, config, mesh = prepared("edit", autoencoder)
    task.section = config_parser.parse(
      tiny_generator_job.config("edit")
    ).sections["edit"]
    object.__setattr__(task.section.train, "accumulate", count)
    state, frozen, _ = fresh_state(task, config, mesh)
    (batch,) = batches(task, config, autoencoder, mesh)
    grads[count] = jax.jit(task.gradients)(
      state, frozen, batch, jax.random.key(1)
    )[0]
  chex.assert_trees_all_close(grads[1], grads[2], rtol=1e-4, atol=1e-6)


def test_gradient_reaches_every_parameter_of_an_edit_stage(autoencoder):
  task, config, mesh = prepared("edit", autoencoder)
  state, frozen, _ = fresh_state(task, config, mesh)
  (batch,) = batches(task, config, autoencoder, mesh)
  grads, _, metrics = jax.jit(task.gradients)(
    state, frozen, batch, jax.random.key(1)
  )
  chex.assert_trees_all_equal_structs(grads, state.params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads[DIT]):
    assert np.abs(np.asarray(grad)).max() > 0, jax.tree_util.keystr(path)
  mean = 0.5 * (metrics["loss_t2i"] + metrics["loss_edit"])
  np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-6)


def test_edit_starts_from_the_averages_of_t2i(finished):
  config = config_parser.parse(tiny_generator_job.config("edit"))
  task = make_task("edit", config, finished)
  mesh = make_mesh()
  task.prepare(finished)
  frozen = sharding.put_tree(task.frozen, mesh)
  tx = make_optimizer(task.modules, 4)
  state = stage_lib.init_state(
    task, tx, frozen, mesh, jax.random.key(5), finished
  )
  wanted = ckpt.restore_ema(
    stage_lib.checkpoints(finished, "t2i"),
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state.params,
    ),
    (DIT,),
    task.fingerprint,
  )
  chex.assert_trees_all_equal(state.params, wanted)
  chex.assert_trees_all_equal(state.ema_params, wanted)


def test_resumed_job_equals_an_uninterrupted_one(autoencoder, tmp_path):
  workdir = tmp_path / "job"
  shutil.copytree(autoencoder, workdir)
  raw = tiny_generator_job.config("t2i", steps=2)
  raw.t2i.optim.schedule = "constant"
  whole = tiny_generator_job.config("t2i")
  whole.t2i.optim.schedule = "constant"

  def run(raw, workdir):
    config = config_parser.parse(raw)
    task = make_task("t2i", config, workdir)
    # Its figures and pictures are the job's that `finished` ran.
    task.evaluate = lambda *args: {"eval/loss": 0.0}
    return train.run_stage(task, config, make_mesh(), workdir)

  run(raw, workdir)
  resumed = run(whole, workdir)
  straight = tmp_path / "straight"
  shutil.copytree(autoencoder, straight)
  wanted = run(whole, straight)
  steps = [line["step"] for line in metrics_of(workdir, "t2i")]
  assert steps == sorted(steps) and steps[-1] == 4
  chex.assert_trees_all_equal(
    jax.device_get(resumed.state), jax.device_get(wanted.state)
  )


MESHES = {
  "one": dict(count=1),
  "mixed": dict(count=8, data=2, fsdp=2, tensor=2),
}


def three_steps(autoencoder, mesh_name, dtype):
  """Gradients of the first step, and parameters after the third."""
  raw = tiny_generator_job.config("edit")
  raw.compute.dtype = dtype
  raw.edit.optim.eps = 1e-3
  config = config_parser.parse(raw)
  task = make_task("edit", config, autoencoder)
  mesh = make_mesh(**MESHES[mesh_name])
  task.prepare(autoencoder)
  with jax.set_mesh(mesh):
    frozen = sharding.put_tree(task.frozen, mesh)
    params, _ = jax.jit(task.init)(jax.random.key(0), task.frozen)
    params = jax.tree.map(
      lambda x: np.asarray(x, dtype), tiny.randomise(params)
    )
    tx = make_optimizer(task.modules, 4)
    state = train.train_state.create(params, {}, tx, task.modules)
    state = jax.device_put(state, sharding.infer_sharding(state, mesh))
    rng = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
    data = batches(task, config, autoencoder, mesh, 3)
    gradients, seen = task.gradients, {}

    def recorded(*args):
      seen["grads"], *others = gradients(*args)
      return seen["grads"], *others

    task.gradients = recorded
    train_step = train.make_train_step(task, tx, 0.9)

    @jax.jit  # one program gives both
    def step(state, frozen, batch, rng):
      return train_step(state, frozen, batch, rng)[0], seen["grads"]

    state, first = step(state, frozen, data[0], rng)
    for batch in data[1:]:
      state, _ = step(state, frozen, batch, rng)
  return jax.device_get((first, state.params))


# By default its stricter sibling in double precision.
@pytest.mark.slow
def test_float32_gradients_equal_on_one_and_eight_devices(autoencoder):
  one, params_one = three_steps(autoencoder, "one", "float32")
  eight, params_eight = three_steps(autoencoder, "mixed", "float32")
  scale = max(float(np.linalg.norm(x)) for x in jax.tree.leaves(one))

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    error = np.linalg.norm(a - b)
    # Small beside the rest: such a tensor's rounding is the sum's, not its own.
    assert error <= max(1e-5 * np.linalg.norm(a), 1e-6 * scale), name

  jax.tree_util.tree_map_with_path(check, one, eight)
  chex.assert_trees_all_close(params_one, params_eight, rtol=0, atol=1e-5)


def test_float64_parameters_equal_on_one_and_eight_devices(autoencoder):
  with jax.enable_x64(True):
    _, one = three_steps(autoencoder, "one", "float64")
    _, eight = three_steps(autoencoder, "mixed", "float64")
  assert {x.dtype for x in jax.tree.leaves(one)} == {np.dtype("float64")}
  chex.assert_trees_all_close(one, eight, rtol=0, atol=1e-9)


def test_another_autoencoder_is_refused(
  encoder_folder, autoencoder, finished, tmp_path
):
  other = tmp_path / "other"
  tiny_generator_job.train_autoencoder(encoder_folder, other, seed=1)
  raw = tiny_generator_job.config("t2i")
  raw.autoencoder = dict(path=str(other))
  names = [
    PSVAE.from_pretrained(folder).latent_fingerprint
    for folder in (autoencoder, other)
  ]
  with pytest.raises(ckpt.CheckpointError, match=names[0]):
    main.run(raw, finished)
  # Without checkpoints the statistics still say whose they are.
  workdir = tmp_path / "stats"
  workdir.mkdir()
  shutil.copy(finished / "latent_stats.json", workdir)
  with pytest.raises(ValueError, match=f"{names[0]}, not of {names[1]}"):
    main.run(raw, workdir)


def test_missing_autoencoder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="autoencoder.path=FOLDER"):
    main.run(tiny_generator_job.config("t2i"), tmp_path)


def test_source_dropout_never_leaves_the_instruction_alone(autoencoder):
  task, config, mesh = prepared("edit", autoencoder)
  frozen = sharding.put_tree(task.frozen, mesh)
  (batch,) = batches(task, config, autoencoder, mesh)
  seen = 0
  for seed in range(20):
    examples = jax.jit(task._examples, static_argnums=3)(
      frozen, batch["edit"], jax.random.key(seed), "edit"
    )
    alone = ~np.asarray(examples["source_mask"])
    text = np.asarray(examples["condition"]["text"])[alone]
    null = np.broadcast_to(frozen["null"]["text"], text.shape)
    np.testing.assert_array_equal(text, null)
    seen += alone.sum()
  assert seen > 0


def test_latents_are_normalised_over_the_training_split(autoencoder):
  task, config, mesh = prepared("t2i", autoencoder)
  frozen = sharding.put_tree(task.frozen, mesh)
  (batch,) = batches(task, config, autoencoder, mesh)
  latent = task._latent(frozen, batch, "latent", "image")
  stats = task.frozen["latent_stats"]
  wanted = (np.asarray(batch["latent"]) - stats["mean"]) / stats["std"]
  np.testing.assert_allclose(latent, wanted, rtol=1e-5, atol=1e-5)
  assert latent.dtype == jnp.float32
