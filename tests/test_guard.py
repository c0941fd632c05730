"""Steps that are not finite: skipped, named, and in a row the end of a run."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import checkpoint as ckpt
from psvae_jax import guard, optim, sharding, train, train_state
from psvae_jax.config import MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.tasks import make_task


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def test_check_flags_what_is_not_finite():
  metrics = {"b": jnp.float32(1), "a": jnp.float32(np.nan), "c": jnp.inf}
  metrics["update_norm/x"] = jnp.float32(np.nan)  # takes no part
  finite, flags = jax.jit(guard.check)(metrics)
  assert not bool(finite)
  assert flags.tolist() == [False, True, False]  # a, b, c
  finite, flags = guard.check({"b": jnp.float32(1)})
  assert bool(finite) and flags.tolist() == [True]


def feed(watch, rows, first=1):
  names = ("train/loss", "train/grad_norm/encoder", "train/update_norm/a")
  for step, row in enumerate(rows, first):
    flags = jnp.array([row, row])
    watch.record(step, flags, names, np.array([10 * step, 10 * step + 1]))


def test_guard_counts_rows_and_writes_what_it_skipped(tmp_path):
  watch = guard.Guard(tmp_path, max_skipped=3)
  feed(watch, [True, False, False, True, False, False])
  found = watch.flush(keep=1)
  assert [s.step for s in found] == [2, 3, 5]
  assert found[0].examples == (20, 21) and found[0].batch == 1
  assert found[0].modules == ("encoder",)
  assert watch.error() is None
  feed(watch, [False], first=7)
  watch.flush()
  error = str(watch.error())
  assert "3 steps in a row" in error
  assert "step 5 (batch 4)" in error and "gradient of encoder" in error
  lines = (tmp_path / guard.SKIPPED_FILE).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [2, 3, 5, 6, 7]
  assert watch.total == 5
  feed(watch, [True, True], first=8)  # too late
  watch.flush()
  assert watch.error() is not None
  resumed = guard.Guard(tmp_path, 3, total=2, start_step=3)
  lines = (tmp_path / guard.SKIPPED_FILE).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [2, 3]
  assert resumed.total == 2 and resumed.error() is None


def test_a_full_disk_does_not_stop_the_guard(tmp_path, monkeypatch):
  watch = guard.Guard(tmp_path, max_skipped=3)
  (tmp_path / guard.SKIPPED_FILE).mkdir()  # any write fails
  feed(watch, [False])
  assert len(watch.flush()) == 1


def poison(monkeypatch, bad_steps):
  """NaN in one pixel of the batches of `bad_steps` (1-based), for real."""
  put_batch = sharding.put_batch
  seen = {"batches": 0}

  def poisoned(batch, mesh):
    if "mask" in batch:  # evaluation
      return put_batch(batch, mesh)
    seen["batches"] += 1
    image = batch["image"].astype(np.float32)
    if seen["batches"] in bad_steps:
      image[0, 3, 5, 1] = np.nan
    return put_batch({**batch, "image": image}, mesh)

  monkeypatch.setattr(sharding, "put_batch", poisoned)


def run(encoder_folder, workdir, monkeypatch, bad_steps, stage="svae"):
  raw = tiny.config(encoder_folder, steps=8)
  raw.guard = dict(max_skipped=3)
  raw[stage].train.log_every = 4
  raw.checkpoint.every_steps = 100
  config = config_parser.parse(raw)
  task = make_task(stage, config, workdir)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  poison(monkeypatch, bad_steps)
  return train.run_stage(task, config, mesh, workdir)


def test_nan_in_a_batch_is_skipped_and_named(
  encoder_folder, tmp_path, monkeypatch, capsys
):
  result = run(encoder_folder, tmp_path, monkeypatch, {2, 3, 6})
  assert int(result.state.step) == 8
  chex.assert_tree_all_finite(jax.device_get(result.state))
  assert result.metrics["train/skipped_steps"] == 3
  output = capsys.readouterr().out
  assert "skipped step 2 (batch 1): not finite:" in output
  assert "the gradient of pixel_decoder, semantic_decoder," in output
  lines = (tmp_path / "svae" / guard.SKIPPED_FILE).read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["step"] for record in records] == [2, 3, 6]
  assert all(len(record["examples"]) == 8 for record in records)
  # Moments of the optimizer have seen the five good steps alone.
  counts = {
    int(leaf)
    for leaf in jax.tree.leaves(result.state.opt_state)
    if leaf.ndim == 0
  }
  assert counts == {5}


def test_a_row_of_nan_stops_with_the_state_saved(
  encoder_folder, tmp_path, monkeypatch
):
  """Exactly as many as allowed, and good batches after them."""
  with pytest.raises(guard.NonFiniteError) as error:
    run(encoder_folder, tmp_path, monkeypatch, {2, 3, 4})
  message = str(error.value)
  assert "3 steps in a row" in message
  assert "step 2 (batch 1)" in message and "semantic_encoder" in message
  assert "saved at step 5" in message
  folder = tmp_path / "svae"
  assert ckpt.has_checkpoint(folder / "checkpoints")
  lines = (folder / guard.SKIPPED_FILE).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]
  monkeypatch.undo()
  # The same command goes on from there, and remembers.
  result = run(encoder_folder, tmp_path, monkeypatch, set())
  assert int(result.state.step) == 8
  assert result.metrics["train/skipped_steps"] == 3
  chex.assert_tree_all_finite(jax.device_get(result.state))


def test_the_step_in_flight_is_counted_when_the_run_stops(
  encoder_folder, tmp_path, monkeypatch
):
  with pytest.raises(guard.NonFiniteError):
    run(encoder_folder, tmp_path, monkeypatch, {3, 4, 5, 6, 7, 8})
  lines = (tmp_path / "svae" / guard.SKIPPED_FILE).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [3, 4, 5, 6]


def test_a_full_disk_at_the_stop_is_said_too(
  encoder_folder, tmp_path, monkeypatch
):
  def fail(self):
    raise ckpt.CheckpointError("no space")

  monkeypatch.setattr(ckpt.Checkpointer, "close", fail)
  with pytest.raises(guard.NonFiniteError, match="step 2 .* no space"):
    run(encoder_folder, tmp_path, monkeypatch, {2, 3, 4})


def test_skipped_step_leaves_every_array_as_it_was(encoder_folder, tmp_path):
  """The discriminator, its optimizer and all moments included."""
  raw = tiny.adversarial_config(encoder_folder)
  task = make_task("psvae", config_parser.parse(raw), tmp_path)
  params, model_state = jax.jit(task.init)(jax.random.key(0), task.frozen)
  tx = optim.make_optimizer(task.modules, 4)
  state = train_state.create(params, model_state, tx, task.modules)
  step = jax.jit(train.make_train_step(task, tx, 0.9))
  batch = {"image": tiny.batch(8, 32)["image"].astype(np.float32)}
  state, _, flags = step(state, task.frozen, batch, jax.random.key(0))
  assert bool(jnp.all(flags))
  batch["image"][2, 0, 0, 0] = np.nan
  after, metrics, flags = step(state, task.frozen, batch, jax.random.key(0))
  assert not bool(jnp.all(flags))
  chex.assert_trees_all_equal(after, state.replace(step=after.step))
  assert int(after.step) == 2
  assert not np.isfinite(metrics["train/grad_norm/discriminator"])


def test_bfloat16_with_the_adversary_for_200_steps(encoder_folder, tmp_path):
  raw = tiny.adversarial_config(encoder_folder, steps=200)
  raw.compute.dtype = "bfloat16"
  raw.discriminator.channels = 4
  raw.psvae.loss.gan_start = 50
  task = make_task("psvae", config_parser.parse(raw), tmp_path)
  params, model_state = jax.jit(task.init)(jax.random.key(0), task.frozen)
  tx = optim.make_optimizer(task.modules, 200)
  state = train_state.create(params, model_state, tx, task.modules)
  step = jax.jit(train.make_train_step(task, tx, 0.9), donate_argnums=0)
  losses = []
  for n in range(200):
    batch = tiny.batch(2, 32, seed=n % 4)
    state, metrics, flags = step(state, task.frozen, batch, jax.random.key(0))
    assert bool(jnp.all(flags)), (n, sorted(metrics), flags)
    losses.append(float(metrics["train/loss_l1"]))
  chex.assert_tree_all_finite(jax.device_get(state))
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    np.dtype("float32")
  }
  assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
