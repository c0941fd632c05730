"""The loop end to end: resume, the bridge, device counts, one compilation."""

import json
import pathlib
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import checkpoint as ckpt
from psvae_jax import main, optim, sharding, train
from psvae_jax import stages as stage_lib
from psvae_jax.config import MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.pretrained.encoder import load_encoder
from psvae_jax.tasks import make_task


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def traces():
  """Stages whose step was traced by `finished`, once for every time."""
  return []


@pytest.fixture(scope="module")
def finished(encoder_folder, traces, tmp_path_factory):
  """An uninterrupted run of both stages on one device."""
  make_train_step = train.make_train_step

  def counting(task, tx, ema):
    step = make_train_step(task, tx, ema)

    def counted(*args):
      traces.append(task.name)
      return step(*args)

    return counted

  workdir = tmp_path_factory.mktemp("finished")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "make_train_step", counting)
    return workdir, run(encoder_folder, workdir)


def make_config(encoder_folder, steps=4):
  """Both stages with an adversary on DINO's features from the second step."""
  raw = tiny.adversarial_config(encoder_folder, steps, kind="dino")
  for stage in ("svae", "psvae"):
    raw[stage].loss.gan_start = 1
    raw[stage].optim.update(clip=1.0)
  return raw


def make_mesh(count=1, **sizes):
  return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])


def run(encoder_folder, workdir, stages=("svae", "psvae"), **train_changes):
  """Runs stages in order; returns stage → StageResult."""
  raw = make_config(encoder_folder)
  for stage in ("svae", "psvae"):
    raw[stage].train.update(train_changes)
  config = config_parser.parse(raw)
  return {
    stage: train.run_stage(
      make_task(stage, config, workdir), config, make_mesh(), workdir
    )
    for stage in stages
  }


def next_batch(encoder_folder, workdir, stage):
  """The batch a resumed run would take next."""
  config = config_parser.parse(make_config(encoder_folder))
  task = make_task(stage, config, workdir)
  iterator = stage_lib.make_train_iterator(task, config, stage, workdir)
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    frozen = sharding.put_tree(task.frozen, mesh)
    tx = optim.make_optimizer(task.modules, 4)
    abstract = stage_lib.abstract_state(task, tx, frozen, mesh)
    checkpointer = ckpt.Checkpointer(
      workdir / stage / "checkpoints", config.checkpoint, task.fingerprint
    )
    checkpointer.restore(abstract, iterator)
  return next(iterator)


class Killed(Exception):
  pass


@pytest.mark.parametrize("stage, at", [("svae", 3), ("psvae", 3)])
def test_killed_run_resumes_bit_equal(
  encoder_folder, finished, tmp_path, monkeypatch, capsys, stage, at
):
  """Stopped in the middle, then started again with the same command."""
  reference_folder, reference = finished
  put_batch = sharding.put_batch
  calls = {"left": at}

  def dying_put_batch(batch, mesh):
    if "mask" not in batch:  # a training batch
      if calls["left"] == 0:
        raise Killed
      calls["left"] -= 1
    return put_batch(batch, mesh)

  stages = ("svae", "psvae")
  before = stages[: stages.index(stage)]
  run(encoder_folder, tmp_path, stages=before)
  monkeypatch.setattr(sharding, "put_batch", dying_put_batch)
  with pytest.raises(Killed):
    run(encoder_folder, tmp_path, stages=(stage,))
  monkeypatch.undo()
  # The save goes on in the background of this process; let it finish, or the
  # run would start over, and prove nothing.
  deadline = time.monotonic() + 60
  while not ckpt.has_checkpoint(tmp_path / stage / "checkpoints"):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  capsys.readouterr()
  result = run(encoder_folder, tmp_path, stages=(stage,))[stage]
  assert f"{stage}: resumed at step 2 of 4" in capsys.readouterr().out
  chex.assert_trees_all_equal(
    jax.device_get(result.state), jax.device_get(reference[stage].state)
  )
  chex.assert_trees_all_equal(
    next_batch(encoder_folder, tmp_path, stage),
    next_batch(encoder_folder, reference_folder, stage),
  )
  assert result.metrics == reference[stage].metrics
  lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]
  assert steps == [1, 2, 3, 4, 4]  # the last one is the evaluation


def test_bridge_starts_stage_2_from_the_ema_of_stage_1(
  encoder_folder, finished
):
  workdir, results = finished
  config = config_parser.parse(make_config(encoder_folder))
  task = make_task("psvae", config, workdir)
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    frozen = sharding.put_tree(task.frozen, mesh)
    tx = optim.make_optimizer(task.modules, 4)
    state = stage_lib.init_state(
      task, tx, frozen, mesh, jax.random.key(5), workdir
    )
  ema = results["svae"].state.ema_params
  for name in ("semantic_encoder", "semantic_decoder", "pixel_decoder"):
    chex.assert_trees_all_equal(state.params[name], ema[name])
    chex.assert_trees_all_equal(state.ema_params[name], ema[name])
  chex.assert_trees_all_equal(state.params["encoder"], frozen["teacher"])
  assert int(state.step) == 0
  moments = jax.tree.leaves(state.opt_state)
  assert all(not np.any(np.array(m)) for m in moments)


def test_bridge_refuses_another_model(encoder_folder, finished):
  workdir, _ = finished
  raw = make_config(encoder_folder)
  raw.model.channels = 6
  config = config_parser.parse(raw)
  task = make_task("psvae", config, workdir)
  with pytest.raises(ckpt.CheckpointError, match="another model"):
    train.run_stage(task, config, make_mesh(), workdir)


def test_bridge_names_a_parameter_of_another_shape(encoder_folder, finished):
  workdir, _ = finished
  config = config_parser.parse(make_config(encoder_folder))
  task = make_task("psvae", config, workdir)
  leaf = jax.ShapeDtypeStruct(
    (3, 5), jnp.float32, sharding=sharding.replicated(make_mesh())
  )
  wanted = {"pixel_decoder": {"head": {"kernel": leaf}}}
  with pytest.raises(ckpt.CheckpointError, match=r"head/kernel: .*\(3, 5\)"):
    ckpt.restore_ema(
      workdir / "svae" / "checkpoints",
      wanted,
      ("pixel_decoder",),
      task.fingerprint,
    )


def test_stage_2_without_stage_1_says_so(encoder_folder, tmp_path):
  with pytest.raises(ckpt.CheckpointError, match="train the earlier stage"):
    run(encoder_folder, tmp_path, stages=("psvae",))


def test_frozen_encoder_is_saved_once(encoder_folder, finished):
  workdir, _ = finished
  (folder,) = (workdir / "frozen").iterdir()
  original, saved = (load_encoder(f) for f in (encoder_folder, folder))
  chex.assert_trees_all_equal(saved.params, original.params)


def test_keeps_the_newest_checkpoints(finished):
  workdir, _ = finished
  folder = workdir / "svae" / "checkpoints"
  assert sorted(p.name for p in folder.iterdir() if p.name.isdigit()) == [
    "2",
    "4",
  ]


def test_step_is_traced_once_and_never_blocks(finished, traces):
  """`transfer_guard` is on inside the loop, so a blocked step would raise."""
  assert traces == ["svae", "psvae"]


def test_changed_optimizer_is_a_clear_error(encoder_folder, tmp_path):
  run(encoder_folder, tmp_path, stages=("svae",))
  raw = make_config(encoder_folder, steps=6)
  raw.svae.optim.clip = 0.0
  config = config_parser.parse(raw)
  task = make_task("svae", config, tmp_path)
  with pytest.raises(ckpt.CheckpointError, match=r"optim\.clip"):
    train.run_stage(task, config, make_mesh(), tmp_path)


def test_main_runs_the_job_and_skips_what_is_done(
  encoder_folder, tmp_path, monkeypatch
):
  raw = tiny.config(encoder_folder, steps=2)
  raw.eval.probe = "scenes"
  raw.eval.num_probe_train = raw.eval.num_probe_test = 32
  raw.mesh.data = 8
  summary = main.run(raw, tmp_path)
  for stage in ("svae", "psvae"):
    assert {"eval/psnr", "eval/ssim", "eval/probe_accuracy"} <= set(
      summary[stage]
    )
    assert np.isfinite(summary[stage]["eval/psnr"])
  assert {"eval/probe_accuracy", "eval/probe_accuracy_random_encoder"} <= set(
    summary["encoder"]
  )
  assert summary["wall_seconds"]["total"] > 0
  assert (tmp_path / "report.html").stat().st_size > 1000
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0

  def fail(*args):
    raise AssertionError("a finished stage was trained again")

  monkeypatch.setattr(train, "run_stage", fail)
  assert main.run(raw, tmp_path) == summary
  raw.model.channels = 6
  with pytest.raises(ckpt.CheckpointError, match="another model"):
    main.run(raw, tmp_path)
  assert (
    json.loads((tmp_path / "config.json").read_text())["model"]["channels"] == 4
  )


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config=configs/nothing.py"], "nothing.py"),
    (["--config=configs/psvae.py:nothing"], "variant 'nothing'"),
    (["--config=configs/psvae.py", "--config.svae.train.stepz=3"], "stepz"),
    (["--config=configs/psvae.py", "--config.data.source=scene"], "'scenes'"),
    (["--config=configs/psvae.py:photos"], "--config.data.root=FOLDER"),
    (
      ["--config=configs/psvae.py:photos", "--config.data.root=nowhere"],
      "nowhere",
    ),
    ([], "--config is missing"),
  ],
)
def test_a_users_mistake_is_one_clear_line(flags, message, tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "psvae_jax.main", f"--workdir={tmp_path}", *flags],
    cwd=pathlib.Path(__file__).resolve().parents[1],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 1
  assert message in result.stderr
  assert "Traceback" not in result.stderr
