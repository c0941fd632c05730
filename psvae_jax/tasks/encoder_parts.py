"""What the jobs that train the miniature's own encoders share."""

import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import Config, TextModel
from psvae_jax.models.text import T5Config

MAX_SCALE = 100.0  # CLIP's bound on the logit scale


def t5_config(model: TextModel) -> T5Config:
  """The text encoder's shape in T5's terms."""
  return T5Config(
    vocab_size=model.vocab_size,
    d_model=model.width,
    d_kv=model.width // model.num_heads,
    d_ff=model.mlp_hidden,
    num_layers=model.depth,
    num_heads=model.num_heads,
  )


def unit(x: jax.Array) -> jax.Array:
  """x / |x| over the last axis; 0 stays 0."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def masked_mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """(T, L, D), bool (T, L) → (T, D)."""
  weights = mask[..., None].astype(jnp.float32)
  return (tokens * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)


def held_out_batches(
  row: Callable[[int], dict[str, Any]], count: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """This host's parts of batches of examples 0 … count − 1.

  Args:
    row: an example by its number.
    count: of examples.
    batch_size: over all hosts.

  Yields:
    What `row` gives, stacked, and "mask" (b,): False at repeats, which fill the
    last batch.
  """
  share = batch_size // jax.process_count()
  first = jax.process_index() * share
  for start in range(0, count, batch_size):
    places = np.arange(start + first, start + first + share)
    rows = [row(int(i)) for i in places % count]
    batch = {k: np.stack([one[k] for one in rows]) for k in rows[0]}
    yield {**batch, "mask": places < count}


def write_provenance(
  path: Path, what: str, command: str, config: Config, metrics: dict[str, Any]
) -> None:
  """How to make these weights again, and what they reached."""
  provenance = {
    "what": what,
    "command": command,
    "overrides": [a for a in sys.argv if a.startswith("--config.")],
    "config": dataclasses.asdict(config),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "metrics": metrics,
  }
  path.write_text(json.dumps(provenance, indent=2) + "\n")
