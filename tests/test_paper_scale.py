"""One training step of the paper's model, adversary included, on the CPU.

Random weights, one image. Minutes and gigabytes, so not in the default run:

    python -m pytest -n0 -s -m slow tests/test_paper_scale.py

`-s` shows seconds and memory.
"""

import gc
import pathlib
import resource
import runpy
import time

import jax
import numpy as np
import pytest
import tiny

from psvae_jax.config import parser as config_parser
from psvae_jax.optim import make_optimizer
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.train import make_train_step
from psvae_jax.train_state import create

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_ENCODER = "random:facebook/dinov2-with-registers-base"


def make_task(argument, stage):
  """The shipped job at batch 1, with every rate at its peak from step 0."""
  get_config = runpy.run_path(str(_ROOT / "configs" / "psvae.py"))["get_config"]
  raw = get_config(f"{argument},encoder={_ENCODER}")
  raw.perceptual.weights = "random:vgg"
  section = raw[stage]
  section.train.batch_size = 1
  section.loss.gan_start = section.loss.gan_warmup = 0
  section.optim.warmup_steps = section.discriminator_optim.warmup_steps = 0
  return AutoencoderTask(stage, config_parser.parse(raw), _ROOT)


def run_steps(task, count):
  """(parameters before, state after, metrics of all steps, seconds of all)."""
  tx = make_optimizer(task.modules, task.section.train.steps)

  def init(rng, frozen):
    return create(*task.init(rng, frozen), tx, task.modules)

  step = jax.jit(
    make_train_step(task, tx, task.section.train.ema), donate_argnums=0
  )
  state = jax.jit(init)(jax.random.key(0), task.frozen)
  before = jax.device_get(state.params)
  batch = tiny.batch(1, task.image_size)
  metrics, seconds = [], []
  for _ in range(count):
    start = time.monotonic()
    state, values, _ = step(state, task.frozen, batch, jax.random.key(1))
    metrics.append({k: float(v) for k, v in values.items()})
    seconds.append(time.monotonic() - start)
  return before, state, metrics, seconds


@pytest.mark.parametrize("stage", list(ROUTES))
@pytest.mark.parametrize("argument", ["base", "base,decoder=vit"])
def test_a_step_of_each_stage(argument, stage):
  task = make_task(argument, stage)
  before, state, metrics, (first, second) = run_steps(task, 2)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(
    f"\n{argument} {stage}: a step {second:.1f} s, the first one with its "
    f"compilation {first:.0f} s, peak memory of the process {peak:.1f} GiB"
  )
  for values in metrics:
    assert all(np.isfinite(v) for v in values.values()), values
  assert metrics[0]["train/gan_weight"] > 0
  assert metrics[0]["train/loss_lpips"] > 0
  assert int(state.step) == 2
  # Nothing but the table's modules and the adversary is trained, and every
  # matrix of those moves.
  assert set(before) == {*ROUTES[stage].trains, "discriminator"}
  for path, old in jax.tree_util.tree_leaves_with_path(before):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    new = np.asarray(_at(state.params, path))
    assert np.isfinite(new).all(), name
    if name.endswith("kernel"):
      assert (new != old).mean() > 0.99, name
  del before, state, task
  gc.collect()


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree
