"""Saves every step until it is killed; started by `test_kill.py`.

Says what it resumed from, after checking every bit of it, and then each step
that is known to be on the disk.
"""

import sys
from pathlib import Path

import grain
import jax
import numpy as np

from psvae_jax.checkpoint import Checkpointer
from psvae_jax.config import CheckpointConfig

_ARRAYS = 6


def make_state(step, size):
  """What step `step` must hold; every array has `size` floats."""
  rng = np.random.default_rng(step)
  params = {
    f"layer_{i}": rng.standard_normal(size, np.float32) for i in range(_ARRAYS)
  }
  return jax.device_put({"step": np.int32(step), "params": params})


def position(step):
  """The data iterator after `step` batches."""
  iterator = iter(grain.MapDataset.range(10**6).shuffle(0).to_iter_dataset())
  for _ in range(step):
    next(iterator)
  return iterator


def resume(checkpointer, size):
  """Restores and compares; returns the step and the data iterator there."""
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make_state(0, size),
  )
  iterator = position(0)
  restored = checkpointer.restore(abstract, iterator)
  if restored is None:
    return 0, iterator
  state, metadata = restored
  step = metadata["step"]
  jax.tree.map(np.testing.assert_array_equal, state, make_state(step, size))
  assert next(iterator) == next(position(step))
  return step, position(step)


def open_checkpointer(folder):
  return Checkpointer(folder, CheckpointConfig(every_steps=1, keep=2), "kill")


def main(folder, size):
  checkpointer = open_checkpointer(folder)
  leftovers = len(list(folder.glob("*tmp*")))
  step, iterator = resume(checkpointer, size)
  print("resumed", step, leftovers, flush=True)
  while True:
    next(iterator)
    step += 1
    if not checkpointer.save(step, make_state(step, size), iterator, {}):
      sys.exit("a save failed")
    # The one before has ended: `save` waits for it.
    print("committed", step - 1, flush=True)


if __name__ == "__main__":
  main(Path(sys.argv[1]), int(sys.argv[2]))
