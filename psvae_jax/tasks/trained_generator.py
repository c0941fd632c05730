"""A generator in training, as evaluations see one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from psvae_jax.config import SampleConfig
from psvae_jax.sampling import ImageSampler
from psvae_jax.tasks.base import Params


class TrainedGenerator:
  """`evaluators.generative_model.GenerativeModel` of given parameters.

  Args:
    sampler: compiled once for all evaluations.
    params: the DiT's.
    frozen: the task's, where the sampler expects them.
    settings: how it samples unless told otherwise.
  """

  def __init__(
    self,
    sampler: ImageSampler,
    params: Params,
    frozen: Params,
    settings: SampleConfig,
  ) -> None:
    self._sampler, self._settings = sampler, settings
    self._params, self._frozen = params, frozen

  def _prompts(self, prompts: Sequence[str]) -> Any:
    """Texts as they are, labels as numbers."""
    if self._sampler.generator.text_encoder is None:
      return np.array([int(p) for p in prompts], np.int32)
    return list(prompts)

  def _with(self, settings: dict[str, Any]) -> SampleConfig:
    return dataclasses.replace(self._settings, **settings)

  def generate(
    self, prompts: Sequence[str], seeds: np.ndarray, **settings: Any
  ) -> np.ndarray:
    return self._sampler.generate(
      self._params,
      self._frozen,
      self._prompts(prompts),
      seeds,
      self._with(settings),
    )

  def generate_latents(
    self, prompts: Sequence[str], seeds: np.ndarray, **settings: Any
  ) -> np.ndarray:
    return self._sampler.generate(
      self._params,
      self._frozen,
      self._prompts(prompts),
      seeds,
      self._with(settings),
      latents=True,
    )

  def decode(self, latents: np.ndarray) -> np.ndarray:
    return self._sampler.decode(self._frozen, latents)

  def denoising(
    self, prompts: Sequence[str], seeds: np.ndarray, points: int
  ) -> tuple[np.ndarray, np.ndarray]:
    return self._sampler.denoise(
      self._params,
      self._frozen,
      self._prompts(prompts),
      seeds,
      self._settings,
      points,
    )

  def edit(
    self,
    images: np.ndarray,
    instructions: Sequence[str],
    seeds: np.ndarray,
    **settings: Any,
  ) -> np.ndarray:
    return self._sampler.edit(
      self._params,
      self._frozen,
      images,
      list(instructions),
      seeds,
      self._with(settings),
    )

  def encode(self, images: np.ndarray) -> np.ndarray:
    return self._sampler.encode(self._frozen, images)

  def features(self, images: np.ndarray) -> np.ndarray:
    return self._sampler.image_features(self._frozen, images)

  def text_features(self, texts: Sequence[str]) -> np.ndarray:
    return self._sampler.text_features(self._frozen, list(texts))
