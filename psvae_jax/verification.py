"""What a network is and what it computes, in figures that can be compared.

Every kind of network gets the same small input, the same on every machine:
pictures of the embedded data set and scikit-image's, a few texts, or token ids.
Of each output there are a norm, a spread and its first numbers, so that two
programs, or two machines, can be compared without exchanging arrays.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.pretrained import files
from psvae_jax.pretrained.untrained import RANDOM

TEXTS = ("a red circle", "two dogs on a beach, at sunset", "")
TOKENS = 32  # of a text
_ROWS, _STRIDE = 2, 7919  # of token ids: all over a vocabulary

_LARGE = 500  # pixels: DINOv2 was published for 518, and is used at 224
_SIDE = 224
_LEADING = 8
_SCENES = 2
_PICTURES = {"train": (0, 1), "validation": (0, 2)}  # of `BundledSource`
# What a config.json says → kind; whatever else has a model type is an encoder.
_MODEL_TYPES = {
  "lpips": "lpips",
  "fid_inception": "inception",
  "t5": "text",
  "clip": "clip",
  "clip_text_model": "clip_text",
  "qwen2": "qwen2",
}
_DINO = "vit"
_NO_DINO = "is DINO, the discriminator's network, which verify does not cover"


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """What a network is shown.

  Attributes:
    names: of pictures, texts or rows of tokens, for people.
    pictures: uint8 (N, S, S, 3); None of a text encoder.
    texts: likewise; None of what sees pictures only.
    tokens: int32 (N, L) ids; None of all but a language model.
  """

  names: tuple[str, ...]
  pictures: np.ndarray | None = None
  texts: tuple[str, ...] | None = None
  tokens: np.ndarray | None = None

  def describe(self) -> dict[str, Any]:
    """Names, shape and checksum."""
    digest = hashlib.sha256()
    out = {"names": list(self.names)}
    if self.pictures is not None:
      out["shape"] = list(self.pictures.shape)
      digest.update(self.pictures.tobytes())
    if self.texts is not None:
      out["texts"] = list(self.texts)
      digest.update("\n".join(self.texts).encode())
    if self.tokens is not None:
      out["shape"] = list(self.tokens.shape)
      digest.update(self.tokens.astype("<i4").tobytes())
    return {**out, "sha256": digest.hexdigest()[:16]}


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """A loaded network, ready to be looked at.

  Attributes:
    kind: a key of `KINDS`.
    name: as it was given.
    architecture: plain values.
    params: module → parameters.
    fingerprint: the loader's.
    inputs: what it is shown.
    run: what it makes of them: output's name → array.
    network: the loader's object.
  """

  kind: str
  name: str
  architecture: dict[str, Any]
  params: Mapping[str, Any]
  fingerprint: str
  inputs: Inputs
  run: Callable[[], dict[str, np.ndarray]]
  network: Any


def make_inputs(size: int) -> Inputs:
  """The fixed pictures at one size: scenes, then photographs.

  Args:
    size: side in pixels. Scenes are drawn at it; photographs are cropped to
      their centre square and resized by Pillow's bicubic filter.
  """
  from psvae_jax.data import bundled, scenes, transforms

  source = scenes.SceneSource("validation", _SCENES, size)
  names = [f"scene {i}" for i in range(_SCENES)]
  pictures = [source[i]["image"] for i in range(_SCENES)]
  crop = transforms.center_crop(size)
  for split, places in _PICTURES.items():
    photographs = bundled.BundledSource(split)
    for place in places:
      element = photographs[place]
      names.append(element["path"])
      pictures.append(crop(element, None)["image"])
  return Inputs(tuple(names), np.stack(pictures))


def make_tokens(vocab_size: int) -> Inputs:
  """The fixed token ids of a vocabulary."""
  ids = np.arange(_ROWS * TOKENS) * _STRIDE % vocab_size
  names = tuple(f"tokens {i}" for i in range(_ROWS))
  return Inputs(names, tokens=ids.reshape(_ROWS, TOKENS).astype(np.int32))


def find_kind(name: str) -> str:
  """Which kind of network a folder or id is.

  Raises:
    ValueError: its config.json says nothing of it, or says that it is DINO.
    FileNotFoundError: there is no such folder, or the hub does not give it.
  """
  from psvae_jax import exported
  from psvae_jax.pretrained import dino

  plain = name.removeprefix(RANDOM)
  if plain == exported.EMBEDDED:
    return "autoencoder"
  kinds = _published()
  if plain in kinds:
    return kinds[plain]
  if plain in dino.PUBLISHED:
    raise ValueError(f"{name} {_NO_DINO}")
  if name.startswith(RANDOM):
    raise ValueError(f"no network {name!r}; {nearest(plain, kinds)}")
  folder = files.resolve_folder(name, ("config.json", "vae/config.json"))
  if (folder / "vae" / "config.json").is_file():  # diffusers' whole pipeline
    return "autoencoder"
  raw = files.read_config(folder)
  if "stages" in raw or raw.get("format") == exported.FORMAT:
    return "autoencoder"
  if "_class_name" in raw:  # diffusers'
    return "autoencoder"
  model_type = raw.get("model_type")
  if not isinstance(model_type, str):
    raise ValueError(
      f"{folder / 'config.json'} has no model_type that says what it is; "
      f"give --kind, one of {', '.join(KINDS)}"
    )
  if model_type == _DINO:
    raise ValueError(
      f"{folder / 'config.json'}: model_type {model_type!r} {_NO_DINO}"
    )
  return _MODEL_TYPES.get(model_type, "encoder")


def _published() -> dict[str, str]:
  """Kind of every id whose architecture is known without its files."""
  from psvae_jax import autoencoders
  from psvae_jax.models.lpips import NETWORKS
  from psvae_jax.pretrained import architectures, clip_text, qwen2, text_shapes

  kinds = {
    "encoder": architectures.PUBLISHED,
    "clip": clip_text.PUBLISHED,  # both halves, where both are known
    "qwen2": qwen2.PUBLISHED,
    "text": text_shapes.PUBLISHED,
    "autoencoder": autoencoders.published(),
    "lpips": NETWORKS,
    "inception": ("inception",),
  }
  return {name: kind for kind, names in kinds.items() for name in names}


def load(
  name: str, kind: str | None = None, size: int | None = None
) -> Subject:
  """Loads a network by its folder or id.

  Args:
    name: a folder, an id of the hub, "random:ID" or "embedded".
    kind: a key of `KINDS`; None finds out.
    size: side of the pictures; None takes one that the network is made for.

  Raises:
    ValueError, FileNotFoundError: see `find_kind` and the loaders.
  """
  name = os.fspath(name)
  kind = kind or find_kind(name)
  if kind not in KINDS:
    raise ValueError(f"no kind {kind!r}; {nearest(kind, KINDS)}")
  return KINDS[kind](name, size)


def _encoder(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.encoder import load_encoder

  encoder = load_encoder(name)
  own, patch = encoder.module.config.image_size, encoder.patch_size
  side = size or (own if own < _LARGE else _SIDE // patch * patch)
  inputs = make_inputs(side)

  def run():
    return {"features": np.asarray(encoder(inputs.pictures))}

  if size is None and side != own:
    try:  # not every architecture takes another size than its own
      jax.eval_shape(encoder, jax.ShapeDtypeStruct((1, side, side, 3), "u1"))
    except ValueError:
      return _encoder(name, own)
  architecture = {
    **_plain(encoder.module.config),
    "mean": list(encoder.mean),
    "std": list(encoder.std),
  }
  return Subject(
    "encoder",
    name,
    architecture,
    encoder.params,
    encoder.fingerprint,
    inputs,
    run,
    encoder,
  )


def _text(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.text import load_text_encoder

  del size
  encoder = load_text_encoder(name, max_length=TOKENS)

  def run():
    return of_texts(*jax.device_get(encoder(TEXTS)))

  return Subject(
    "text",
    name,
    _plain(encoder.module.config),
    encoder.params,
    encoder.fingerprint,
    Inputs(TEXTS, texts=TEXTS),
    run,
    encoder,
  )


def of_texts(features: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
  """Outputs of `TEXTS`: features of each one's own tokens.

  Args:
    features: (B, L, D), a row for each text.
    mask: (B, L) bool, False where padded.
  """
  return {
    f"features of {text!r}": np.asarray(one[seen], np.float32)
    for text, one, seen in zip(TEXTS, features, mask, strict=True)
  }


def _clip(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.clip import load_clip

  model = load_clip(name)
  pictures = make_inputs(size or model.image_size)
  inputs = dataclasses.replace(pictures, texts=TEXTS[:2])

  def run():
    out = {"image_embeds": np.asarray(model.image_embeds(inputs.pictures))}
    if not name.startswith(RANDOM):  # which have no tokenizer
      out["text_embeds"] = np.asarray(model.text_embeds(inputs.texts))
    return out

  return Subject(
    "clip",
    name,
    {"image_size": model.image_size},
    model.params,
    model.fingerprint,
    inputs,
    run,
    model,
  )


def _clip_text(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.clip_text import load_clip_text

  del size
  if name.startswith(RANDOM):
    raise ValueError(f"{name} has no tokenizer; give a folder or an id")
  encoder = load_clip_text(name)

  def run():
    features, mask = jax.device_get(encoder(TEXTS))
    return {
      "text_embeds": np.asarray(encoder.embed(TEXTS)),
      **of_texts(features, mask),
    }

  return Subject(
    "clip_text",
    name,
    _plain(encoder.module.config),
    encoder.params,
    encoder.fingerprint,
    Inputs(TEXTS, texts=TEXTS),
    run,
    encoder,
  )


def _qwen2(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.qwen2 import load_qwen2

  del size
  backbone = load_qwen2(name, token_embedding=True)
  inputs = make_tokens(backbone.module.config.vocab_size)

  def run():  # without a mask it is causal, as text's is
    return {"features": np.asarray(backbone(backbone.embed(inputs.tokens)))}

  return Subject(
    "qwen2",
    name,
    _plain(backbone.module.config),
    backbone.params,
    backbone.fingerprint,
    inputs,
    run,
    backbone,
  )


def _autoencoder(name: str, size: int | None) -> Subject:
  from psvae_jax.autoencoders import load_autoencoder

  model = load_autoencoder(name, batch_size=1)
  inputs = make_inputs(size or model.image_size)

  def run():
    z = np.asarray(model.encode(inputs.pictures))
    return {"latents": z, "reconstructions": np.asarray(model.decode(z))}

  architecture = {
    "model": type(model).__name__,
    "image_size": model.image_size,
    "output_size": model.output_size,
    "grid": model.grid,
    "channels": model.channels,
  }
  return Subject(
    "autoencoder",
    name,
    architecture,
    model.params,
    model.fingerprint,
    inputs,
    run,
    model,
  )


def _lpips(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.lpips import load_lpips

  network = load_lpips(name)
  inputs = make_inputs(size or 64)

  def run():
    images = inputs.pictures.astype(np.float32) / 127.5 - 1.0
    distance = jax.jit(network.distance)
    others = {
      "to the next picture": np.roll(images, -1, axis=0),
      "to its mirror image": images[:, :, ::-1],
    }
    return {
      f"distances {what}": np.asarray(distance(network.params, images, other))
      for what, other in others.items()
    }

  return Subject(
    "lpips",
    name,
    {"network": network.network},
    network.params,
    network.fingerprint,
    inputs,
    run,
    network,
  )


def _inception(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.inception import RESIZES, load_inception

  network = load_inception(name)
  inputs = make_inputs(size or 256)

  def run():
    out = {}
    for resize in RESIZES:
      features = jax.jit(network.features, static_argnames="resize")(
        network.params, inputs.pictures.astype(np.float32), resize=resize
      )
      out |= {f"{key}, {resize}": np.asarray(features[key]) for key in features}
    return out

  return Subject(
    "inception",
    name,
    {"port": network.port},
    network.params,
    network.fingerprint,
    inputs,
    run,
    network,
  )


# Kind → how it is loaded and shown its inputs.
KINDS: dict[str, Callable[[str, int | None], Subject]] = {
  "encoder": _encoder,
  "text": _text,
  "clip": _clip,
  "clip_text": _clip_text,
  "qwen2": _qwen2,
  "autoencoder": _autoencoder,
  "lpips": _lpips,
  "inception": _inception,
}


def report(
  subject: Subject, outputs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Everything about a network, in plain values.

  Args:
    subject: the network.
    outputs: what `subject.run()` returned.
  """
  modules = {
    name: {
      "parameters": sum(int(x.size) for x in jax.tree.leaves(tree)),
      "sha256": files.fingerprint_params(tree)[:16],
    }
    for name, tree in sorted(subject.params.items())
  }
  return {
    "name": subject.name,
    "kind": subject.kind,
    "architecture": subject.architecture,
    "fingerprint": subject.fingerprint,
    "parameters": sum(m["parameters"] for m in modules.values()),
    "modules": modules,
    "inputs": subject.inputs.describe(),
    "outputs": {name: summarize(x) for name, x in outputs.items()},
    "versions": {"jax": jax.__version__, "numpy": np.__version__},
    "device": jax.devices()[0].device_kind,
    "precision": jax.config.jax_default_matmul_precision or "default",
  }


def summarize(array: np.ndarray) -> dict[str, Any]:
  """Figures of one output, computed in float64.

  Returns:
    `shape`; `levels`, whether it is rounded to whole numbers; `norm` and
    `norm_std`, mean and standard deviation of the vectors' lengths along the
    last axis; `mean`, `std`, `least` and `most` of all numbers; `leading`, the
    first ones; `spread`, as many at equal distances, in C order.
  """
  x = np.asarray(array, np.float64)
  norms = np.sqrt(np.sum(np.square(x), axis=-1))
  figures = {
    "norm": norms.mean(),
    "norm_std": norms.std(),
    "mean": x.mean(),
    "std": x.std(),
    "least": x.min(),
    "most": x.max(),
  }
  return {
    "shape": list(array.shape),
    "levels": bool(np.issubdtype(array.dtype, np.integer)),
    **{name: float(value) for name, value in figures.items()},
    "leading": x.ravel()[:_LEADING].tolist(),
    "spread": x.ravel()[:: max(x.size // _LEADING, 1)][:_LEADING].tolist(),
  }


def _plain(config: Any) -> dict[str, Any]:
  """A dataclass's fields as values that JSON has."""
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = _plain(value)
    if isinstance(value, tuple):
      value = list(value)
    out[field.name] = value if isinstance(value, _JSON) else str(value)
  return out


_JSON = str | int | float | bool | list | dict | None
