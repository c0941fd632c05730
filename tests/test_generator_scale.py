"""One training step of the paper's generators at full width, on the CPU.

Random weights, two blocks in place of all, one cached example. Gigabytes, so
not in the default run:

    python -m pytest -n0 -s -m slow tests/test_generator_scale.py

`-s` shows seconds and memory.
"""

import gc
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import cli, generator_table
from psvae_jax.config import parser as config_parser
from psvae_jax.optim import TrainedModule, make_optimizer
from psvae_jax.tasks.generator import DIT, GeneratorTask
from psvae_jax.train import make_train_step
from psvae_jax.train_state import create

pytestmark = pytest.mark.slow

_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


class CachedTask(GeneratorTask):
  """The task on cached examples: what would encode them is shapes alone."""

  def __init__(self, config):
    raw = cli.load_config(f"{_CONFIGS}/psvae.py:base")
    model = generator_table.abstract_generator(config, config_parser.parse(raw))
    self.name = "t2i"
    self.config = config
    self.section = config.sections["t2i"]
    self.generator = model.generator
    self.text_encoder = model.generator.text_encoder
    self.modules = {DIT: TrainedModule(self.section.optim)}
    channels = self.generator.latent_shape[-1]
    stats = {"mean": np.zeros(channels), "std": np.ones(channels)}
    rows = self.examples(1, seed=1)
    self.frozen = {
      "latent_stats": jax.tree.map(np.float32, stats),
      "null": {"text": rows["text"], "text_mask": rows["token_mask"]},
    }

  def examples(self, count, seed=0):
    """What the cache would hold."""
    rng = np.random.default_rng(seed)
    length, width = self.config.model.text_length, 2048
    dtype = jnp.dtype(self.config.cache.dtype)
    return {
      "latent": _normal(rng, count, *self.generator.latent_shape).astype(dtype),
      "text": _normal(rng, count, length, width),
      "token_mask": np.arange(length)[None] < rng.integers(9, length, count),
    }


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", ["0.65B", "1.7B"])
def test_a_step_at_full_width(size):
  overrides = {
    "data.root": "images",
    "model.dit.depth": "2",
    "t2i.train.batch_size": "1",
    "t2i.optim.warmup_steps": "0",
  }
  raw = cli.load_config(f"{_CONFIGS}/t2i.py:{size}")
  config = config_parser.parse(config_parser.override(raw, overrides))
  task = CachedTask(config)
  tx = make_optimizer(task.modules, config.sections["t2i"].train.steps)
  params, _ = jax.jit(task.init)(jax.random.key(0), task.frozen)
  # A new generator's gates are closed, and next to nothing would move.
  params = tiny.randomise(params, scale=0.02)
  state = jax.jit(lambda p: create(p, {}, tx, task.modules))(params)
  step = jax.jit(make_train_step(task, tx, 0.999), donate_argnums=0)
  batch = task.examples(1)
  losses, seconds = [], []
  for _ in range(2):
    start = time.monotonic()
    state, metrics, _ = step(state, task.frozen, batch, jax.random.key(1))
    losses.append(float(metrics["train/loss"]))
    seconds.append(time.monotonic() - start)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(
    f"\n{size}, depth 2, {count / 1e6:.0f} M parameters: a step "
    f"{seconds[1]:.1f} s, the first one with its compilation "
    f"{seconds[0]:.0f} s, peak memory of the process {peak:.1f} GiB"
  )
  assert np.all(np.isfinite(losses)) and int(state.step) == 2
  for path, old in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    new = state.params
    for key in path:
      new = new[key.key]
    new = np.asarray(new)
    assert np.isfinite(new).all(), name
    if name.endswith("kernel"):
      assert (new != old).mean() > 0.99, name
  del state, params
  gc.collect()
