"""Generators without parameters, whose figures are known."""

import colorsys
import dataclasses

import numpy as np

from psvae_jax.data import captions, scene_edits, scene_sampling, scene_types
from psvae_jax.data.scene_render import render

_WORDS = 64  # of text features


class TrueScenes:
  """Draws what the caption says, and does what the instruction says.

  Latents are the pixels, so the autoencoder is perfect. Features are how much
  of each colour an image has.
  """

  def __init__(self, image_size=48, seed=0):
    self.image_size = image_size
    self.drawn = 0
    self._scenes = {}
    for split in ("heldout", "validation"):
      for index in range(400):
        scene = scene_sampling.sample_scene(split, index, seed)
        self._scenes.setdefault(captions.caption(scene), scene)
    self._edits = {}
    for index in range(60):
      edit = scene_edits.sample_edit("validation", index, seed)
      source = render(edit.source, image_size).tobytes()
      self._edits[source, edit.instruction] = edit
      # Drawn from its caption the target stands elsewhere.
      self._scenes.setdefault(
        captions.caption(edit.target), _turned(edit.target)
      )
    hues = [colorsys.hsv_to_rgb(h / 360, 1, 1) for h in scene_types.HUES]
    self._hues = np.array(hues) - np.mean(hues, axis=1, keepdims=True)

  def scene(self, prompt, seed):
    """Another picture of the same objects at the same places."""
    scene = self._scenes[prompt]
    return scene_sampling.renew_nuisances(scene, "train", int(seed))

  def generate(self, prompts, seeds, **settings):
    self.drawn += len(prompts)
    scenes = [self.scene(p, s) for p, s in zip(prompts, seeds, strict=True)]
    return np.stack([render(scene, self.image_size) for scene in scenes])

  def generate_latents(self, prompts, seeds, **settings):
    return self.encode(self.generate(prompts, seeds, **settings))

  def decode(self, latents):
    return np.clip(np.rint((latents + 1) * 127.5), 0, 255).astype(np.uint8)

  def denoising(self, prompts, seeds, points):
    images = self.generate(prompts, seeds)
    return np.stack([images] * points, 1), np.linspace(1, 0, points)

  def edit(self, images, instructions, seeds, **settings):
    pairs = zip(images, instructions, strict=True)
    edits = [self._edits[image.tobytes(), text] for image, text in pairs]
    return np.stack([render(edit.target, self.image_size) for edit in edits])

  def encode(self, images):
    return images.astype(np.float32) / 127.5 - 1

  def features(self, images):
    pixels = self.encode(images)
    chroma = pixels - pixels.mean(-1, keepdims=True)
    amounts = np.maximum(chroma @ self._hues.T - 0.3, 0).mean((1, 2))
    return (10 * amounts).astype(np.float32)

  def text_features(self, texts):
    """Which words a text has."""
    rows = np.zeros((len(texts), _WORDS), np.float32)
    for row, text in zip(rows, texts, strict=True):
      for word in text.split():
        row[sum(map(ord, word)) % _WORDS] += 1
    return rows


def _turned(scene):
  """The scene with its picture's halves exchanged, as its caption allows.

  One object goes to the opposite place; of two, both move across their
  relation's axis.
  """
  flips = ("x", "y")
  if scene.relation is not None:
    flips = flips[1:] if scene.relation < 2 else flips[:1]
  return dataclasses.replace(
    scene,
    objects=tuple(
      dataclasses.replace(o, **{name: 1 - getattr(o, name) for name in flips})
      for o in scene.objects
    ),
  )


class Noise(TrueScenes):
  """Draws and edits noise; its latents are far off."""

  def generate(self, prompts, seeds, **settings):
    self.drawn += len(prompts)
    shape = (self.image_size, self.image_size, 3)
    return np.stack(
      [np.random.default_rng(int(s)).integers(0, 256, shape) for s in seeds]
    ).astype(np.uint8)

  def edit(self, images, instructions, seeds, **settings):
    return self.generate(instructions, seeds)
