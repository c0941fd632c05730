"""CLIP: images and captions in one space, for the CLIP score.

Reads the Hugging Face layout of a whole `CLIPModel`: `openai/clip-vit-*`, or
OpenCLIP's in the same layout. A name "random:ID" is the published architecture
with seeded random parameters and no download: for benchmarks and tests, never
for results.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import clip_text as clip_text_model
from psvae_jax.models import layers, vit
from psvae_jax.pretrained import (
  clip_images,
  clip_text,
  clip_tokens,
  clip_vision,
  files,
  mapping,
)
from psvae_jax.pretrained.tokenizer import Tokenizer
from psvae_jax.pretrained.untrained import RANDOM, random_params

_FILES = (*clip_text.FILES, *clip_images.FILES)
_PROJECTION = "visual_projection.weight"
_SCALE = "logit_scale"
# exp of what CLIP's training starts from, 1 / 0.07.
_INITIAL_SCALE = float(np.exp(2.6592))
_LENGTH_FLOOR = 1e-12


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """CLIP with its parameters, preprocessing and tokenizer.

  Attributes:
    vision: the image network; its CLS token is projected.
    text: the text network, with its projection.
    params: "vision", "visual_projection" and "text".
    images: preprocessing.
    tokenizer: of captions, see `clip_tokens`; None for an untrained network.
    logit_scale: what training multiplied cosines by; the CLIP score does not.
    name: where it came from, for messages and records.
    fingerprint: identifies all that decides embeddings.
  """

  vision: vit.ViT
  text: clip_text_model.ClipText
  params: dict[str, Any]
  images: clip_images.ClipImages
  tokenizer: Tokenizer | None
  logit_scale: float
  name: str
  fingerprint: str

  @property
  def image_size(self) -> int:
    """Side of the images that the network sees."""
    return self.images.crop

  @property
  def width(self) -> int:
    """Dimension P of the common space."""
    return self.text.config.projection_dim

  def image_embeds(
    self, images: np.ndarray | Sequence[np.ndarray]
  ) -> jax.Array:
    """Embeds images; compiled once for each number of images.

    Args:
      images: (B, H, W, 3) uint8 of any size, or B arrays (H, W, 3).

    Returns:
      (B, P) float32 of unit length.

    Raises:
      ValueError: an image is not uint8 (H, W, 3).
    """
    # Explicit, so that a transfer guard sees no accidental copy.
    pixels = jax.device_put(self.images(images))
    return _embed_images(self.vision, self.images, self.params, pixels)

  def text_embeds(self, texts: Sequence[str]) -> jax.Array:
    """Embeds captions; compiled once for each number of captions.

    Args:
      texts: N strings; those too long are cut, with a warning.

    Returns:
      (N, P) float32 of unit length.

    Raises:
      ValueError: there is no tokenizer, or a text is not valid.
    """
    tokens = jax.device_put(self.tokenize(texts))
    return _embed_tokens(self.text, self.params, tokens)

  def tokenize(self, texts: Sequence[str]) -> np.ndarray:
    """N strings → token ids (N, L) int32, which `embed_tokens` takes."""
    return clip_tokens.tokenize(self.tokenizer, texts, self.name)[0]

  def embed_pixels(self, params: Any, pixels: jax.Array) -> jax.Array:
    """Embeds prepared images; pure, to be compiled into larger programs.

    Args:
      params: as `self.params`, on the device.
      pixels: (B, S, S, 3) levels in [0, 255], as `self.images` leaves them.

    Returns:
      (B, P) float32 of unit length.
    """
    return _embed_images(self.vision, self.images, params, pixels)

  def embed_tokens(self, params: Any, tokens: jax.Array) -> jax.Array:
    """Embeds token ids (N, L); pure. Returns (N, P) float32, unit length."""
    return _embed_tokens(self.text, params, tokens)


# Modules hash by their fields: networks of one architecture share programs.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_images(module, images, params, pixels):
  features = module.apply(
    {"params": params["vision"]}, images.normalize(pixels)
  )
  kernel = params["visual_projection"]["kernel"]
  return _unit(jnp.dot(features, kernel.astype(features.dtype)))


@functools.partial(jax.jit, static_argnums=0)
def _embed_tokens(module, params, tokens):
  return _unit(module.apply({"params": params["text"]}, tokens)[1])


def _unit(x: jax.Array) -> jax.Array:
  """Rows of length 1; zeros stay."""
  x = x.astype(layers.wide(x.dtype))
  length = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(length, _LENGTH_FLOOR)


def load_clip(
  name_or_path: str | os.PathLike,
  *,
  tokenizer: str | os.PathLike | None = None,
  dtype: Any = jnp.float32,
) -> Clip:
  """Loads CLIP from a folder or from the Hugging Face hub.

  Args:
    name_or_path: folder or hub id with config.json, safetensors,
      preprocessor_config.json and, unless `tokenizer` is given, a tokenizer.
      Or "random:" and a published id: that architecture, untrained; it needs
      no tokenizer until captions come.
    tokenizer: folder or hub id of the tokenizer, where it is another one.
    dtype: compute dtype of both networks; embeddings are float32 whatever it
      is.

  Returns:
    The networks, parameters float32 on the default device.

  Raises:
    FileNotFoundError: a folder or one of its files does not exist.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  name = os.fspath(name_or_path)
  if name.startswith(RANDOM):
    folder = None
    vision, text = _modules(*_published(name), dtype)
    images = clip_images.ClipImages(*[vision.config.image_size] * 2)
    params, scale = random_params(_param_shapes(vision, text)), _INITIAL_SCALE
  else:
    folder = files.resolve_folder(name_or_path, _FILES)
    vision, text = _modules(*_read_configs(folder), dtype)
    images = clip_images.read(folder, vision.config.image_size)
    tensors = files.read_safetensors(folder)
    params = _import(vision, text, tensors, str(folder))
    scale = float(np.exp(tensors[_SCALE]))
  tokenize = clip_tokens.load_tokenizer(tokenizer, folder, text.config)
  configs = (vision.config, text.config, images)
  return Clip(
    vision=vision,
    text=text,
    params=jax.device_put(params),
    images=images,
    tokenizer=tokenize,
    logit_scale=scale,
    name=name,
    fingerprint=clip_text.fingerprint(
      [dataclasses.asdict(config) for config in configs], params, tokenize
    ),
  )


def _published(
  name: str,
) -> tuple[vit.ViTConfig, clip_text_model.ClipTextConfig]:
  """Both halves of what "random:ID" names."""
  vision, text = clip_vision.PUBLISHED, clip_text.PUBLISHED
  known = {key: (vision[key], text[key]) for key in vision.keys() & text.keys()}
  return clip_text.find_published(name, known)


def _read_configs(
  folder: pathlib.Path,
) -> tuple[vit.ViTConfig, clip_text_model.ClipTextConfig]:
  path = folder / "config.json"
  raw = files.read_config(folder)
  if raw.get("model_type") != clip_text.WHOLE:
    raise ValueError(
      f"{path}: model_type is {raw.get('model_type')!r}; a CLIP score needs "
      f'both halves of a "{clip_text.WHOLE}"'
    )
  return clip_vision.parse_config(raw, path), clip_text.parse_config(raw, path)


def _modules(
  vision: vit.ViTConfig, text: clip_text_model.ClipTextConfig, dtype: Any
) -> tuple[vit.ViT, clip_text_model.ClipText]:
  return (
    vit.ViT(vision, dtype=dtype, output="cls"),
    clip_text_model.ClipText(text, dtype=dtype),
  )


def _param_shapes(vision: vit.ViT, text: clip_text_model.ClipText) -> Any:
  """The parameters as shapes; nothing is allocated."""
  side, width = vision.config.image_size, vision.config.width
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  projection = (width, text.config.projection_dim)
  key = jax.random.key(0)
  return {
    "vision": jax.eval_shape(vision.init, key, images)["params"],
    "visual_projection": {
      "kernel": jax.ShapeDtypeStruct(projection, jnp.float32)
    },
    "text": clip_text.param_shapes(text),
  }


def _import(
  vision: vit.ViT,
  text: clip_text_model.ClipText,
  tensors: Mapping[str, np.ndarray],
  source: str,
) -> dict[str, Any]:
  """Published tensors → parameters; everything must fit."""
  halves = {
    "vision": clip_vision.rules(vision.config, vision.final_norm, tensors),
    "text": clip_text.rules(text.config),
  }
  rules = [
    dataclasses.replace(rule, path=f"{half}/{rule.path}")
    for half, table in halves.items()
    for rule in table
  ]
  rules.append(
    mapping.Rule("visual_projection/kernel", _PROJECTION, mapping.LINEAR)
  )
  if _SCALE not in tensors or tensors[_SCALE].size != 1:
    raise ValueError(f"{source} does not fit its config.json: no {_SCALE}")
  return mapping.import_params(
    rules,
    tensors,
    _param_shapes(vision, text),
    source=source,
    ignored={
      **clip_text.IGNORED,
      "vision_model.embeddings.position_ids": None,
      _SCALE: None,
    },
  )
