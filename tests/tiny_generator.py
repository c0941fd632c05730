"""A tiny generator with random parameters, without a task or training."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
import tiny_autoencoder

from psvae_jax.config import DiTConfig, GeneratorModel
from psvae_jax.models import generator as generator_lib
from psvae_jax.pretrained.text import TextEncoder, load_text_encoder
from psvae_jax.tasks.generator import EMBEDDED_TEXT_ENCODER

DIT = DiTConfig(
  width=16, depth=2, num_heads=2, head_width=16, head_depth=1, head_num_heads=2
)
LENGTH = 12


@dataclasses.dataclass(frozen=True)
class TinyGenerator:
  """What a sampler takes.

  Attributes:
    generator: the modules.
    params: the DiT's, randomised.
    frozen: see `models.generator`.
    text_encoder: None with classes.
  """

  generator: generator_lib.Generator
  params: Any
  frozen: dict[str, Any]
  text_encoder: TextEncoder | None

  @property
  def tokenizer(self):
    return self.text_encoder and self.text_encoder.tokenizer


def build(encoder_folder: Path, num_classes: int = 0) -> TinyGenerator:
  """Builds it around a saved encoder; with classes instead of text if any."""
  base = tiny_autoencoder.build(encoder_folder)
  text_encoder = None
  if not num_classes:
    text_encoder = load_text_encoder(EMBEDDED_TEXT_ENCODER, max_length=LENGTH)
  config = GeneratorModel(
    condition="class" if num_classes else "text",
    dit=DIT,
    text_length=LENGTH,
    num_classes=num_classes,
  )
  generator = generator_lib.build(
    config,
    base.config.compute,
    base.model,
    text_encoder and text_encoder.module,
  )
  rng = np.random.default_rng(0)
  channels = base.config.model.channels
  frozen = {
    "autoencoder": {name: base.params[name] for name in generator_lib.MODULES},
    "text_encoder": {},
    "latent_stats": {
      "mean": rng.normal(size=channels).astype(np.float32),
      "std": rng.uniform(0.5, 2, channels).astype(np.float32),
    },
    "null": {"labels": np.array([num_classes], np.int32)},
  }
  if text_encoder is not None:
    frozen["text_encoder"] = jax.device_get(text_encoder.params)
    text, mask = jax.device_get(text_encoder([""]))
    text = np.where(mask[..., None], text, 0)
    frozen["null"] = {"text": text, "text_mask": mask}
  params = tiny.randomise(jax.jit(generator.init)(jax.random.key(0)))
  return TinyGenerator(generator, params, frozen, text_encoder)
