"""What an evaluation asks of a generator, and nothing more."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Texts = Sequence[str] | Sequence[int]


class GenerativeModel(Protocol):
  """A trained generator with its autoencoder; numpy in, numpy out.

  N prompts have N seeds; image i depends on prompt i and seed i alone. Prompts
  of a class-conditional generator are labels. `settings` are fields of
  `config.SampleConfig`, in place of the generator's own.
  """

  def generate(
    self, prompts: Texts, seeds: np.ndarray, **settings: Any
  ) -> np.ndarray:
    """Prompts → uint8 (N, S, S, 3)."""

  def generate_latents(
    self, prompts: Texts, seeds: np.ndarray, **settings: Any
  ) -> np.ndarray:
    """What `generate` would decode: normalised float32 (N, h, w, C)."""

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Normalised latents → uint8 (N, S, S, 3)."""

  def denoising(
    self, prompts: Texts, seeds: np.ndarray, points: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Estimates of the end on the way there, first to last, and their times.

    Returns:
      uint8 (N, points, S, S, 3) and (points,).
    """

  def edit(
    self,
    images: np.ndarray,
    instructions: Sequence[str],
    seeds: np.ndarray,
    **settings: Any,
  ) -> np.ndarray:
    """Source images uint8 (N, S, S, 3) → uint8 (N, S, S, 3)."""

  def encode(self, images: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3) → normalised float32 (N, h, w, C)."""

  def features(self, images: np.ndarray) -> np.ndarray:
    """Mean-pooled patch tokens of the original encoder, float32 (N, D)."""

  def text_features(self, texts: Sequence[str]) -> np.ndarray:
    """Mean of the text encoder's real tokens, float32 (N, T)."""
