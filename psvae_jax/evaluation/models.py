"""Autoencoders as an evaluation sees them: images in, reconstructions out.

Whatever a model's own size, all are compared at one. A model of another size
gets images that were resized to its own, as 8-bit files would be, and its
reconstructions are resized back; the protocol says so.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax.evaluators import pil_resize
from psvae_jax.evaluators.image_metrics import to_uint8
from psvae_jax.pretrained import files

# (params, uint8 images (B, S, S, 3)) → float32 (B, S, S, 3) in [−1, 1], pure.
Reconstruct = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """One autoencoder.

  Attributes:
    name: what the user called it.
    fingerprint: of the model and its weights.
    params: its parameters.
    reconstruct: images of its own or another size it takes → the same size,
      not clipped.
    size: side of the images it was made for, pixels.
    divisor: it takes any multiple of that too; 0 if it takes `size` only.
    dtype: what it is computed in.
    description: in a line.
  """

  name: str
  fingerprint: str
  params: Any
  reconstruct: Reconstruct
  size: int
  divisor: int
  dtype: str
  description: str

  def takes(self, size: int) -> bool:
    """Whether it reconstructs images of this size as they are."""
    if size == self.size:
      return True
    return bool(self.divisor) and size % self.divisor == 0

  def at(self, size: int, rounding: str) -> Callable[..., Any]:
    """(params, uint8 (B, size, size, 3)) → uint8 of the same shape, (B,).

    The second is 1 where a reconstruction is finite, else 0.

    Args:
      size: side of the images.
      rounding: "round" or "truncate".
    """
    own = (self.size, self.size)

    def reconstruct(params, images):
      if self.takes(size):
        made = self.reconstruct(params, images)
        return to_uint8(made, rounding), _is_finite(made)
      small = pil_resize.resize_bicubic(images, own).astype(jnp.uint8)
      made = self.reconstruct(params, small)
      levels = to_uint8(made, rounding)
      back = pil_resize.resize_bicubic(levels, (size, size))
      return back.astype(jnp.uint8), _is_finite(made)

    return reconstruct

  def resize(self, size: int) -> str:
    """How images come to the model's size, for a protocol."""
    if self.takes(size):
      return f"none, {size} × {size}"
    return (
      f"Pillow bicubic {size} → {self.size} before and {self.size} → {size} "
      "after, 8 bits each time"
    )


def _is_finite(images: jax.Array) -> jax.Array:
  """(B, …) → float32 (B,), 1 where every value is finite."""
  finite = jnp.isfinite(images)
  return finite.all(axis=tuple(range(1, images.ndim))).astype(jnp.float32)


def load(name: str, dtype: str | None = None) -> Model:
  """Loads an autoencoder: ours, or another that can be imported.

  Args:
    name: see `autoencoders.load_autoencoder`; of a workdir, "PATH@STAGE" is a
      stage of it.
    dtype: compute dtype of imported ones; ours compute as they were trained.

  Raises:
    FileNotFoundError, ValueError, CheckpointError: see `load_autoencoder`.
  """
  # Late: tests of the other parts need none of it.
  from psvae_jax.autoencoders import ImportedAutoencoder, load_autoencoder

  path, _, stage = name.rpartition("@")
  if path and Path(path).expanduser().is_dir():
    loaded = load_autoencoder(path, stage=stage)
  else:
    loaded = load_autoencoder(name)
  if isinstance(loaded, ImportedAutoencoder):
    return of_imported(name, loaded, dtype or "float32")
  return of_psvae(name, loaded)


def of_imported(name: str, vae: Any, dtype: str = "float32") -> Model:
  """Another project's, an `ImportedAutoencoder`."""
  model = vae.model.clone(dtype=jnp.dtype(dtype))

  def reconstruct(params, images):
    x = images.astype(jnp.float32) / 127.5 - 1.0
    variables = {"params": params}
    z = model.apply(variables, x, method="encode")
    pixels = model.apply(variables, z.astype(jnp.float32), method="decode")
    return pixels.astype(jnp.float32)

  return Model(
    name=name,
    fingerprint=vae.fingerprint,
    params=vae.params,
    reconstruct=reconstruct,
    size=vae.output_size,
    divisor=getattr(model.config, "factor", 0),
    dtype=dtype,
    description=repr(vae),
  )


def of_psvae(name: str, vae: Any) -> Model:
  """One of ours, a `PSVAE`."""
  model = vae.model

  def reconstruct(params, images):
    x = images.astype(jnp.float32) / 127.5 - 1.0
    features = model.features(params["encoder"], x)
    z = model.posterior(params["semantic_encoder"], features).mode()
    pixels = model.decode_pixels(params["pixel_decoder"], z)
    return pixels.astype(jnp.float32)

  used = ("encoder", "semantic_encoder", "pixel_decoder")
  params = {module: vae.params[module] for module in used}
  return Model(
    name=name,
    # Of the weights: the model's own fingerprint is that of its kind.
    fingerprint=files.fingerprint_params(params)[:16],
    params=params,
    reconstruct=reconstruct,
    size=vae.output_size,
    divisor=0,
    dtype=jnp.dtype(model.encoder.dtype).name,
    description=repr(vae),
  )


def common_size(models: Sequence[Model], size: int | None) -> int:
  """The size at which models are compared.

  Args:
    models: at least one.
    size: what the user asked for; None takes the models' own.

  Raises:
    ValueError: they have several, and the user chose none.
  """
  if size is not None:
    return size
  sizes = {model.size for model in models}
  if len(sizes) > 1:
    each = ", ".join(f"{model.name} {model.size}" for model in models)
    raise ValueError(
      f"the models make images of different sizes ({each}), whose figures do "
      "not compare; give --size=N to evaluate all of them at one"
    )
  return sizes.pop()
