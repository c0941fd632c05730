"""SIGKILL at random moments: the same command completes the same run."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_STEPS = 12
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
  positions = sorted((folder / "data").rglob("*.json"))
  assert positions
  return (
    {k: state[k] for k in ("step", "params", "opt_state", "ema_params")},
    [path.read_bytes() for path in positions],
  )


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
