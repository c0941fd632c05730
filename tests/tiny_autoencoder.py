"""A tiny autoencoder with parameters, without a task or a training loop."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny

from psvae_jax.config import Config
from psvae_jax.config import parser as config_parser
from psvae_jax.models import autoencoder as model_lib
from psvae_jax.pretrained.encoder import load_encoder


@dataclasses.dataclass(frozen=True)
class TinyAutoencoder:
  """Everything an evaluation takes.

  Attributes:
    config: the job.
    model: the modules.
    params: module → host parameters, the encoder being the teacher.
    teacher: the frozen encoder's host parameters.
  """

  config: Config
  model: model_lib.Autoencoder
  params: dict[str, Any]
  teacher: Any


def build(encoder_folder: Path, **sections: dict[str, Any]) -> TinyAutoencoder:
  """Builds it around a saved encoder; `sections` change the tiny config."""
  raw = tiny.config(encoder_folder)
  for name, changes in sections.items():
    raw[name].update(changes)
  config = config_parser.parse(raw)
  encoder = load_encoder(str(encoder_folder))
  model = model_lib.build(
    config.model, config.compute, encoder.module, encoder.mean, encoder.std
  )
  teacher = jax.tree.map(np.asarray, encoder.params)
  params = jax.device_get(jax.jit(model.init)(jax.random.key(0), teacher))
  return TinyAutoencoder(config, model, {**params, "encoder": teacher}, teacher)
