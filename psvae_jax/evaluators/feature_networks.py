"""Networks that describe images for figures, compiled and on a mesh.

    networks = [inception("weights/inception"), dinov2("facebook/dinov2-large")]
    extract = FeatureExtractor(networks, mesh)
    rows = local_rows(extract(images)["pool"])

Metrics are computed in float32 with full products, whatever the autoencoder
is computed in.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding
from psvae_jax.evaluators import pil_resize
from psvae_jax.evaluators.feature_statistics import LOGITS
from psvae_jax.evaluators.reference_npz import POOL, SPATIAL

DINOV2 = "dinov2"
RESIZES = ("tf1", "torch")

_NAMES = ("inception", "encoder")  # in protocols: where weights came from

# The side at which Stein et al. (2023) compute FD-DINOv2.
_DINOV2_SIZE = 224


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
  """One network, and what it gives.

  Attributes:
    name: "inception", "dinov2".
    params: its parameters.
    features: (params, images uint8 (B, H, W, 3)) → kind → float32 (B, D);
      pure.
    kinds: what `features` gives.
    protocol: what a figure made with it must say, JSON values; its weights'
      fingerprint among them.
  """

  name: str
  params: Any
  features: Callable[[Any, jax.Array], dict[str, jax.Array]]
  kinds: tuple[str, ...]
  protocol: Mapping[str, Any]

  @property
  def identity(self) -> dict[str, Any]:
    """The protocol without the name, by which nothing is computed."""
    return {k: v for k, v in self.protocol.items() if k not in _NAMES}

  def widths(self, size: int) -> dict[str, int]:
    """Kind → D, for images of `size` × `size`; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    shapes = jax.eval_shape(self.features, self.params, images)
    return {kind: shape.shape[1] for kind, shape in shapes.items()}


def inception(
  name_or_path: str | os.PathLike, resize: str = "tf1"
) -> FeatureNetwork:
  """The FID network: "pool", "spatial" (sFID's) and "logits".

  Args:
    name_or_path: see `pretrained.inception.load_inception`.
    resize: "tf1", as ADM's evaluator and torch-fidelity, or "torch", as
      pytorch-fid.

  Raises:
    FileNotFoundError, ValueError: see `load_inception`; an unknown resize.
  """
  from psvae_jax.pretrained.inception import load_inception

  if resize not in RESIZES:
    raise ValueError(
      f"the Inception resize {resize!r} is none of {', '.join(RESIZES)}"
    )
  network = load_inception(name_or_path)

  def features(params, images):
    x = images.astype(jnp.float32)
    found = network.features(params, x, resize=resize)
    return {
      POOL: found["2048"],
      SPATIAL: found["spatial"],
      LOGITS: found["logits"],
    }

  return FeatureNetwork(
    "inception",
    network.params,
    features,
    (POOL, SPATIAL, LOGITS),
    {
      "inception": network.name,
      "inception_port": network.port,
      "inception_fingerprint": network.fingerprint[:16],
      "inception_resize": resize,
    },
  )


def dinov2(name_or_path: str | os.PathLike) -> FeatureNetwork:
  """An encoder's CLS token at 224 × 224, for FD-DINOv2.

  Stein et al. (2023) take DINOv2 ViT-L/14, "facebook/dinov2-large". Images of
  another size are resized with Pillow's bicubic, as theirs.

  Args:
    name_or_path: see `pretrained.encoder.load_encoder`.

  Raises:
    FileNotFoundError, ValueError: see `load_encoder`; or its patches do not
      tile 224 pixels.
  """
  from psvae_jax.pretrained.encoder import load_encoder

  encoder = load_encoder(name_or_path, output="cls")
  if _DINOV2_SIZE % encoder.patch_size:
    raise ValueError(
      f"{encoder.name} has patches of {encoder.patch_size} pixels, which do "
      f"not tile the {_DINOV2_SIZE} × {_DINOV2_SIZE} of FD-DINOv2; take e.g. "
      "facebook/dinov2-large"
    )

  def features(params, images):
    side = (_DINOV2_SIZE, _DINOV2_SIZE)
    x = pil_resize.resize_bicubic(images, side) / 127.5 - 1.0
    x = encoder.module.apply({"params": params}, encoder.normalize(x))
    return {DINOV2: x.astype(jnp.float32)}

  return FeatureNetwork(
    "dinov2",
    encoder.params,
    features,
    (DINOV2,),
    {
      "encoder": encoder.name,
      "encoder_fingerprint": encoder.fingerprint[:16],
      "encoder_features": "CLS token after the final norm",
      "encoder_resize": f"Pillow bicubic to {_DINOV2_SIZE} × {_DINOV2_SIZE}",
    },
  )


class FeatureExtractor:
  """Runs networks on batches that are split over a mesh.

  Args:
    networks: no two give one kind of features.
    mesh: parameters are put there once, batches are split over its data and
      fsdp axes.
  """

  def __init__(self, networks: Sequence[FeatureNetwork], mesh: Mesh) -> None:
    self._params = [sharding.put_tree(n.params, mesh) for n in networks]
    split = sharding.batch_sharding(mesh)
    self._functions = [
      jax.jit(_precise(network.features), out_shardings=split)
      for network in networks
    ]

  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Features of uint8 images (B, H, W, 3) on the mesh; kind → (B, D).

    Nothing is waited for.
    """
    found = {}
    for params, function in zip(self._params, self._functions, strict=True):
      found |= function(params, images)
    return found


def _precise(function: Callable) -> Callable:
  def traced(*arguments):
    with jax.default_matmul_precision("highest"):
      return function(*arguments)

  return traced


def local_rows(value: jax.Array) -> np.ndarray:
  """The rows of an array split over its first axis that this host holds."""
  if value.is_fully_addressable:
    return np.asarray(jax.device_get(value))
  shards = {s.index[0].start or 0: s.data for s in value.addressable_shards}
  parts = [np.asarray(shards[start]) for start in sorted(shards)]
  return np.concatenate(parts)
