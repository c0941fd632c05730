"""SIGKILL at random moments: no checkpoint is lost, no run changes."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import kill_saving
import numpy as np
import orbax.checkpoint as ocp
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_STEPS = 12
_SAVING = pathlib.Path(__file__).with_name("kill_saving.py")
_FLAGS = (
  "--config=configs/psvae.py",
  f"--config.svae.train.steps={_STEPS}",
  f"--config.psvae.train.steps={_STEPS}",
  "--config.svae.train.log_every=1",
  "--config.psvae.train.log_every=1",
  "--config.checkpoint.every_steps=2",
  "--config.eval.num_images=64",
  "--config.eval.probe=none",
)


def start(workdir):
  return subprocess.Popen(
    [sys.executable, "-m", "psvae_jax.main", *_FLAGS, f"--workdir={workdir}"],
    cwd=_ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.DEVNULL,
  )


def lines(workdir):
  return sum(
    len(path.read_text().splitlines())
    for path in workdir.glob("*/metrics.jsonl")
  )


def final_state(workdir, stage):
  """Every saved array of the last checkpoint, and the data position."""
  folder = workdir / stage / "checkpoints" / str(_STEPS)
  state = ocp.StandardCheckpointer().restore(folder / "state")
  metadata = json.loads((folder / "metadata" / "metadata").read_text())
  return (
    {k: state[k] for k in ("step", "params", "opt_state", "ema_params")},
    metadata["data"],
  )


def kill_while_saving(folder, size, delay):
  """Starts the saving script and kills it `delay` of the way through a save.

  Args:
    folder: the checkpoints.
    size: floats an array.
    delay: fraction of a save, 0 when its temporary folder appears; above 1 for
      what follows it: the rename and the removal of old steps.

  Returns:
    The step resumed from, temporary folders found after the start, the last
    step that was reported as committed, whether the kill fell into a save, and
    how long a save takes.
  """
  process = subprocess.Popen(
    [sys.executable, str(_SAVING), str(folder), str(size)],
    cwd=_ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    first = process.stdout.readline().split()
    assert first[:1] == ["resumed"], first
    started = time.monotonic()
    for _ in range(2):  # the first save of a process also sets things up
      assert process.stdout.readline().startswith("committed")
      seconds, started = time.monotonic() - started, time.monotonic()
    while not list(folder.glob("*tmp*")):
      assert time.monotonic() - started < 60
    time.sleep(delay * seconds)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    assert process.wait() == -signal.SIGKILL
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  resumed, leftovers = int(first[1]), int(first[2])
  done = [int(line.split()[1]) for line in rest if line.startswith("committed")]
  in_save = bool(list(folder.glob("*tmp*")))
  return resumed, leftovers, max([resumed + 1, *done]), in_save, seconds


def check_kills(folder, size, kills):
  """`kills` kills during a save, spread evenly and randomly over it.

  Saves vary in length, so some kills come too late; those count for nothing
  but must do no harm either.
  """
  rng, committed, in_save, tried = random.Random(0), 0, 0, 0
  while in_save < kills and tried < 3 * kills:
    delay = (in_save + rng.random()) / kills
    resumed, leftovers, newest, during, seconds = kill_while_saving(
      folder, size, delay
    )
    # The script itself compares what it resumed from bit for bit.
    assert resumed >= committed
    assert leftovers == 0
    committed, in_save, tried = newest, in_save + during, tried + 1
  print(f"{in_save} of {tried} kills fell into a save of {seconds:.2f} s")
  assert in_save == kills
  step, _ = kill_saving.resume(kill_saving.open_checkpointer(folder), size)
  assert step >= committed


def test_three_kills_during_a_save_lose_no_checkpoint(tmp_path):
  check_kills(tmp_path / "checkpoints", size=400_000, kills=3)


@pytest.mark.slow
def test_twenty_kills_during_a_save_lose_no_checkpoint(tmp_path):
  """One to three minutes on two cores."""
  check_kills(tmp_path / "checkpoints", size=1_250_000, kills=20)


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
  """About three minutes on two cores: five starts, each compiling anew."""
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  assert start(straight).wait(timeout=600) == 0
  random.seed(0)
  kills = sorted(random.sample(range(2, 2 * _STEPS), 3))
  for step in kills:
    process = start(killed)
    deadline = time.monotonic() + 600
    while lines(killed) < step and process.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(random.uniform(0.01, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  assert start(killed).wait(timeout=600) == 0
  for stage in ("svae", "psvae"):
    expected, found = (final_state(d, stage) for d in (straight, killed))
    chex.assert_trees_all_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert any(np.any(x) for x in _leaves(found[0]["params"]))


def _leaves(tree):
  if isinstance(tree, dict):
    return [leaf for value in tree.values() for leaf in _leaves(value)]
  return [np.asarray(tree)]
