"""Encoders in numpy and examples for caches, small and exact."""

import numpy as np

from psvae_jax import cache
from psvae_jax.data import views

LENGTH, WIDTH, SIZE = 12, 5, 8


class Examples:
  """Noise images with captions of different lengths."""

  def __init__(self, length, size=SIZE, extra=None):
    rng = np.random.default_rng(0)
    self._images = rng.integers(0, 256, (length, size, size, 3), np.uint8)
    self._extra = extra or {}

  def __len__(self):
    return len(self._images)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)
    return {
      "image": self._images[index],
      "caption": "x" * (1 + index % LENGTH),
      "index": np.int64(index),
      "path": f"{index}.png",
      **self._extra,
    }

  def __repr__(self):
    return f"Examples({len(self)})"


class Edits(Examples):
  """Edits of the same images, in `scenes.EditSource`'s names."""

  def __getitem__(self, index):
    element = super().__getitem__(index)
    return {
      "source": element["image"],
      "target": element["image"][::-1],
      "instruction": element["caption"],
      "caption": "another",
      "kind": "flip",
      "index": element["index"],
    }


def encode_images(images):
  """4 × 4 patches' channel means and maxima: (B, 2, 2, 6)."""
  patches = images.reshape(len(images), 2, 4, 2, 4, 3).astype(np.float32)
  return np.concatenate(
    [patches.mean((2, 4)) / 64 - 2, patches.max((2, 4)) / 256], -1
  )


def tokenize(captions):
  """One token a letter."""
  tokens = np.zeros((len(captions), LENGTH), np.int32)
  for row, caption in zip(tokens, captions, strict=True):
    row[: len(caption)] = np.arange(1, 1 + len(caption))
  return tokens, tokens > 0


def encode_text(captions):
  """Features that differ by token and length, not zero at padding."""
  tokens, mask = tokenize(captions)
  features = np.sin(
    tokens[..., None] + np.arange(WIDTH) + mask.sum(1)[:, None, None]
  )
  return tokens, mask, features.astype(np.float32)


def encoders(**changes):
  settings = {
    "images": encode_images,
    "autoencoder": "auto",
    "text": encode_text,
    "tokenizer": "letters",
    "text_length": LENGTH,
    "text_encoder": "sine",
  }
  return cache.Encoders(**{**settings, **changes})


def viewed(source=None, **options):
  return views.ViewedSource(
    Examples(23) if source is None else source,
    **{"image_size": SIZE, **options},
  )


def write(root, source=None, encoder=None, **options):
  """A cache of three files in batches of four."""
  defaults = {
    "shard_size": 10,
    "batch_size": 4,
    "num_threads": 0,
    "show_progress": False,
  }
  return cache.write_cache(
    root,
    viewed() if source is None else source,
    encoder or encoders(),
    **{**defaults, **options},
  )
