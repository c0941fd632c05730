"""A trained generator as one object: text → images, and edits.

    pipe = psvae_jax.TextToImage.from_pretrained("runs/psvae")
    x = pipe(["a red circle"], seed=0)                   # uint8 (B, H, W, 3)
    y = pipe.edit(x, ["make the circle green"], seed=0)         # instruction
    y = pipe.edit(x, ["a green circle"], strength=0.6, seed=0)  # noise

Image i is made from seed + i (or from seed[i], of a list): alone, in any batch
and on any device it is the same image, up to rounding.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from psvae_jax import saved_generator
from psvae_jax.config import SampleConfig
from psvae_jax.pretrained.tokenizer import Tokenizer
from psvae_jax.samplers import SOLVERS
from psvae_jax.sampling import ImageSampler, check_seeds
from psvae_jax.saved_generator import SavedGenerator

# A prompt's own length is counted up to here.
_MAX_COUNTED = 4096
_SHOWN = 40  # characters of a prompt in a message
_MAX_SCALE = 1000.0  # of guidance and shift: far beyond use, safe in float32


class TextToImage:
  """Makes and edits images with a trained generator.

  Args:
    saved: the generator and what it stands on.
    batch_size: most images at once; changes memory and speed, not results
      beyond rounding.

  Attributes:
    saved: see above.
    settings: how it samples unless told otherwise.
  """

  def __init__(self, saved: SavedGenerator, *, batch_size: int = 16) -> None:
    self.saved = saved
    self.settings: SampleConfig = saved.sample
    tokenizer = saved.text_encoder and saved.text_encoder.tokenizer
    self._sampler = ImageSampler(
      saved.generator, batch_size=batch_size, tokenizer=tokenizer
    )
    self._params = jax.device_put(saved.params)
    self._frozen = jax.device_put(saved.frozen)

  @classmethod
  def from_pretrained(
    cls,
    path: str | os.PathLike,
    *,
    stage: str | None = None,
    autoencoder: str | os.PathLike | None = None,
    batch_size: int = 16,
  ) -> "TextToImage":
    """Loads a workdir, finished or still in training, or an exported folder.

    Args:
      path: the folder that `python -m psvae_jax.main --workdir` or
        `python -m psvae_jax.export --out` wrote; or "embedded", the miniature
        that comes with the package.
      stage: "t2i" or "edit"; by default the last one that has a checkpoint.
      autoencoder: where the generator's autoencoder is now, if it has moved.
      batch_size: see the class.

    Raises:
      FileNotFoundError: no such folder, or no generator in it yet.
      ValueError: another job's folder, a stage that it does not have, another
        autoencoder than the generator's own, or a damaged file.
      CheckpointError: the checkpoints do not belong to the workdir's config,
        its autoencoder or text encoder, or are damaged.
    """
    saved = saved_generator.load(path, stage=stage, autoencoder=autoencoder)
    return cls(saved, batch_size=batch_size)

  @property
  def stage(self) -> str:
    """ "t2i", or "edit" if it understands instructions."""
    return self.saved.stage

  @property
  def output_size(self) -> int:
    """Side of its images, pixels."""
    return self.saved.autoencoder.output_size

  def __call__(
    self,
    prompts: Sequence[str] | Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    solver: str | None = None,
  ) -> np.ndarray:
    """Makes one image a prompt.

    Args:
      prompts: B strings; of a class-conditional generator, B labels.
      seed: of the first image, the next one's is seed + 1 …; or B seeds.
      steps: of the time grid.
      guidance: scale of the prompt's; 1 is none.
      shift: time shift of the grid.
      solver: "euler", "heun", "midpoint" or "ancestral".

    Returns:
      uint8 (B, S, S, 3).

    Raises:
      ValueError: no prompts, one that is not a string, or a bad value.

    Warns:
      UserWarning: a prompt is longer than what the generator reads of it.
    """
    prompts = self._check_prompts(prompts)
    settings = self._with(
      steps=steps, guidance=guidance, shift=shift, solver=solver
    )
    seeds = _seeds(seed, len(prompts))
    return self._sampler.generate(
      self._params, self._frozen, prompts, seeds, settings
    )

  def edit(
    self,
    image: np.ndarray | jax.Array,
    prompt: str | Sequence[str] | int | Sequence[int],
    *,
    strength: float | None = None,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    image_guidance: float | None = None,
    shift: float | None = None,
    solver: str | None = None,
  ) -> np.ndarray:
    """Edits images: by an instruction, or with `strength` by noise.

    Without `strength`, `prompt` says what to change ("make the circle green")
    and the generator sees the image beside the one it makes; that is learned in
    stage "edit". With it, `prompt` describes the result ("a green circle"): the
    image gets noise up to time `strength`, and is denoised under the prompt.

    Args:
      image: uint8 (H, W, 3) or (B, H, W, 3) at the product's size.
      prompt: one for all images, or B of them.
      strength: in [0, 1]; 0 returns the reconstruction, 1 forgets the image.
      seed, steps, guidance, shift, solver: as for a call.
      image_guidance: scale of the image's guidance, in instruction edits.

    Returns:
      uint8, of the shape of `image`.

    Raises:
      ValueError: an image of another size, shape or dtype, a bad value, or an
        instruction for a generator that has not learned them.
    """
    images = self._check_images(image)
    if isinstance(prompt, (str, int, np.integer)):
      prompt = [prompt] * len(images)
    prompts = self._check_prompts(prompt)
    if len(prompts) != len(images):
      raise ValueError(
        f"there are {len(prompts)} prompts for {len(images)} images; give one "
        "prompt, or one an image"
      )
    settings = self._with(
      steps=steps,
      guidance=guidance,
      image_guidance=image_guidance,
      shift=shift,
      solver=solver,
    )
    seeds = _seeds(seed, len(prompts))
    start = (self._params, self._frozen, images, prompts)
    if strength is None:
      self._check_stage()
      made = self._sampler.edit(*start, seeds, settings)
    else:
      strength = _check_strength(strength)
      if image_guidance is not None:
        raise ValueError(
          "image_guidance has no meaning with strength: the image is not seen, "
          "only started from"
        )
      made = self._sampler.vary(*start, strength, seeds, settings)
    return made[0] if np.ndim(image) == 3 else made

  def __repr__(self) -> str:
    return (
      f"TextToImage({self.stage}, {self.output_size}×{self.output_size} "
      f"pixels, {self.saved.fingerprint})"
    )

  def _with(self, **changes: Any) -> SampleConfig:
    """The saved settings with those changed that are not None, checked."""
    changes = {name: x for name, x in changes.items() if x is not None}
    for name, value in changes.items():
      _check_setting(name, value)
    return dataclasses.replace(self.settings, **changes)

  def _check_stage(self) -> None:
    if self.stage != "edit":
      raise ValueError(
        f"this generator (stage {self.stage!r}) has not learned to follow "
        "instructions; train it on with --config=configs/edit.py, or give "
        "strength=0.6 and a prompt that describes the result"
      )

  def _check_images(self, image: Any) -> np.ndarray:
    images = np.asarray(jax.device_get(image))
    if images.dtype != np.uint8:
      raise ValueError(f"images must be uint8 in [0, 255], got {images.dtype}")
    if images.ndim not in (3, 4) or images.shape[-1] != 3:
      raise ValueError(
        "images must be RGB, of the shape (H, W, 3) or (B, H, W, 3), got "
        f"{images.shape}"
      )
    images = images if images.ndim == 4 else images[None]
    size = self.output_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f"images are {images.shape[1]}×{images.shape[2]}; this generator edits "
        f"{size}×{size}: crop and resize them first (python -m psvae_jax.edit "
        "does)"
      )
    if not len(images):
      raise ValueError("there are no images to edit")
    return images

  def _check_prompts(self, prompts: Any) -> Any:
    text_encoder = self.saved.text_encoder
    example = '["a red circle"]' if text_encoder else "[0, 1]"
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
      raise ValueError(
        f"prompts must be a list, e.g. {example}, got {prompts!r}"
      )
    if not len(prompts):
      raise ValueError(f"there are no prompts; give at least one: {example}")
    if text_encoder is None:
      return np.asarray(prompts)
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
      if not isinstance(prompt, str):
        raise ValueError(
          f"prompt {i} must be a string, got {prompt!r} "
          f"({type(prompt).__name__})"
        )
    _warn_of_long(prompts, text_encoder.tokenizer)
    return prompts


def _warn_of_long(prompts: list[str], tokenizer: Tokenizer) -> None:
  """Says which prompts are cut, and what is left of them."""
  prompts = list(dict.fromkeys(prompts))
  tokens, mask = tokenizer(prompts)
  full = [i for i in range(len(prompts)) if mask[i].all()]
  if not full:
    return
  longer = Tokenizer(tokenizer.folder, _MAX_COUNTED)
  lengths = longer([prompts[i] for i in full])[1].sum(axis=1)
  for i, length in zip(full, lengths, strict=True):
    if length <= tokenizer.max_length:
      continue
    shown = prompts[i][:_SHOWN] + "…" * (len(prompts[i]) > _SHOWN)
    least = "at least " if length == _MAX_COUNTED else ""
    (kept,) = tokenizer.decode(tokens[i : i + 1])
    warnings.warn(
      f"the prompt {shown!r} has {least}{length} tokens, of which this "
      f"generator reads {tokenizer.max_length}: it is cut to {kept.strip()!r}",
      stacklevel=4,
    )


def _seeds(seed: int | Sequence[int], count: int) -> Any:
  """One seed an image; the sampler checks their values."""
  if np.ndim(seed) == 0:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
      raise ValueError(f"seed must be an integer or a list of them: {seed!r}")
    return [int(seed) + i for i in range(count)]
  if len(seed) != count:
    raise ValueError(
      f"there are {len(seed)} seeds for {count} images; give one integer, or "
      "one an image"
    )
  return seed


def check_settings(*, seed: int = 0, **settings: Any) -> None:
  """Checks what a call takes by name, before there is a generator.

  Args:
    seed: of the first image.
    **settings: steps, guidance, …; None is the saved one.

  Raises:
    ValueError: a value out of range; names it.
  """
  check_seeds([seed])
  strength = settings.pop("strength", None)
  if strength is not None:
    _check_strength(strength)
  for name, value in settings.items():
    if value is not None:
      _check_setting(name, value)


def _check_strength(strength: Any) -> float:
  if not _is_number(strength) or not 0 <= strength <= 1:
    raise ValueError(
      f"strength must lie in [0, 1], got {strength!r}: 0 keeps the image, 1 "
      "forgets it"
    )
  return float(strength)


def _check_setting(name: str, value: Any) -> None:
  """One field of `SampleConfig` as a caller gives it."""
  if name == "solver":
    if value not in SOLVERS:
      raise ValueError(
        f"solver must be one of {', '.join(SOLVERS)}, got {value!r}"
      )
  elif name == "steps":
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
      raise ValueError(f"steps must be an integer, got {value!r}")
    if value < 1:
      raise ValueError(f"steps must be at least 1, got {value}")
  elif name == "shift":
    if not _is_number(value) or not 1 / _MAX_SCALE <= value <= _MAX_SCALE:
      raise ValueError(
        f"shift must lie in [{1 / _MAX_SCALE:g}, {_MAX_SCALE:g}], got {value!r}"
      )
  elif not _is_number(value) or not 0 <= value <= _MAX_SCALE:
    raise ValueError(f"{name} must lie in [0, {_MAX_SCALE:g}], got {value!r}")


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or np.ndim(value):
    return False
  try:
    return math.isfinite(value)
  except (TypeError, OverflowError):
    return False
