"""Networks by name: which kind one is, how it is loaded and shown its input."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.pretrained import files
from psvae_jax.pretrained.untrained import RANDOM
from psvae_jax.verification.inputs import (
  TEXTS,
  TOKENS,
  Inputs,
  make_inputs,
  make_tokens,
)

_LARGE = 500  # pixels: DINOv2 was published for 518, and is used at 224
_SIDE = 224
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


def _subject(
  kind: str,
  name: str,
  network: Any,
  architecture: dict[str, Any],
  inputs: Inputs,
  run: Callable[[], dict[str, np.ndarray]],
) -> Subject:
  """A subject of a network that knows its own parameters and fingerprint."""
  return Subject(
    kind,
    name,
    architecture,
    network.params,
    network.fingerprint,
    inputs,
    run,
    network,
  )


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
  return _subject("encoder", name, encoder, architecture, inputs, run)


def _text(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.text import load_text_encoder

  del size
  encoder = load_text_encoder(name, max_length=TOKENS)

  def run():
    return of_texts(*jax.device_get(encoder(TEXTS)))

  return _subject(
    "text",
    name,
    encoder,
    _plain(encoder.module.config),
    Inputs(TEXTS, texts=TEXTS),
    run,
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

  return _subject(
    "clip", name, model, {"image_size": model.image_size}, inputs, run
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

  return _subject(
    "clip_text",
    name,
    encoder,
    _plain(encoder.module.config),
    Inputs(TEXTS, texts=TEXTS),
    run,
  )


def _qwen2(name: str, size: int | None) -> Subject:
  from psvae_jax.pretrained.qwen2 import load_qwen2

  del size
  backbone = load_qwen2(name, token_embedding=True)
  inputs = make_tokens(backbone.module.config.vocab_size)

  def run():  # without a mask it is causal, as text's is
    return {"features": np.asarray(backbone(backbone.embed(inputs.tokens)))}

  return _subject(
    "qwen2", name, backbone, _plain(backbone.module.config), inputs, run
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
  return _subject("autoencoder", name, model, architecture, inputs, run)


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

  return _subject(
    "lpips", name, network, {"network": network.network}, inputs, run
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

  return _subject(
    "inception", name, network, {"port": network.port}, inputs, run
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
