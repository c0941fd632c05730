"""LPIPS's networks: a folder with a published backbone and published heads.

`python -m psvae_jax.convert vgg16` (or `alexnet`) writes such a folder from
torchvision's classifier and the `lpips` package's heads: `config.json` beside
`model.safetensors`, whose names and layouts are those of the two files.

"random:vgg" and "random:alex" are the same networks with seeded random
weights and no download: for tests and dry runs, never for results.
"""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models import lpips
from psvae_jax.pretrained import files, mapping
from psvae_jax.pretrained.untrained import RANDOM

MODEL_TYPE = "lpips"
VERSION = "0.1"  # of the heads

# Places of the convolutions in torchvision's `features`.
_PLACES = {
  "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
  "alex": (0, 3, 6, 8, 10),
}
# The converter's commands.
_COMMANDS = {"vgg": "vgg16", "alex": "alexnet"}
# Of the classifier behind the features, which LPIPS does not use.
_UNUSED = {
  "vgg": ("classifier.0", "classifier.3", "classifier.6"),
  "alex": ("classifier.1", "classifier.4", "classifier.6"),
}
_HEAD = mapping.Layout(
  lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1)
)


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class PerceptualNetwork:
  """A frozen perceptual network and its parameters.

  Attributes:
    module: the network.
    params: its parameters, float32 host arrays. Put them on the device or
      mesh once, and give them to `distance`.
    name: where it came from, for messages and records.
    fingerprint: `files.fingerprint_params(params)`.
  """

  module: lpips.Lpips
  params: Any
  name: str
  fingerprint: str

  @property
  def network(self) -> str:
    """Which one: "vgg" or "alex"."""
    return self.module.network

  def distance(
    self, params: Any, images: jax.Array, references: jax.Array
  ) -> jax.Array:
    """LPIPS of images and references; pure, differentiable in both.

    Args:
      params: as `self.params`, on the device; an argument so that a compiled
        step does not hold them as a constant.
      images: (B, H, W, 3) in [−1, 1].
      references: of the same shape.

    Returns:
      (B,) float32.
    """
    return self.module.apply({"params": params}, images, references)


def load_lpips(
  name_or_path: str | os.PathLike,
  *,
  network: str | None = None,
  remat: bool = False,
  dtype: Any = jnp.float32,
  convolution: str = "native",
) -> PerceptualNetwork:
  """Loads LPIPS from a folder that `python -m psvae_jax.convert` wrote.

  Args:
    name_or_path: the folder; or "random:vgg" or "random:alex".
    network: "vgg" or "alex", which the folder must hold; None takes what its
      config.json says.
    remat: recompute activations in the backward pass.
    dtype: compute dtype of the network; distances are float32.
    convolution: "native" or "matmul"; see `models.convolution`.

  Raises:
    FileNotFoundError: the folder or one of its files does not exist; the
      message says how to make it.
    ValueError: no name, another network, or a malformed or ill-fitting file;
      the message names it.
  """
  name = os.fspath(name_or_path)
  if network is not None:
    _check_network(network, "network")
  options = dict(remat=remat, dtype=jnp.dtype(dtype), convolution=convolution)
  if name.startswith(RANDOM):
    found = name.removeprefix(RANDOM)
    if found not in lpips.NETWORKS:
      raise ValueError(
        f"no LPIPS network {name!r}; "
        f"{nearest(name, [RANDOM + key for key in lpips.NETWORKS])}"
      )
    _check_same(found, network, name)
    module = lpips.Lpips(found, **options)
    params = _random_params(module)
  else:
    folder = pathlib.Path(name).expanduser()
    found = _read_network(folder, name, network)
    module = lpips.Lpips(found, **options)
    params = mapping.import_params(
      rules(found),
      _with_help(files.read_safetensors, folder, found),
      _param_shapes(module),
      source=str(folder),
    )
  return PerceptualNetwork(
    module, params, name, files.fingerprint_params(params)
  )


def rules(network: str) -> list[mapping.Rule]:
  """Published tensor of every parameter of `models.lpips.Lpips(network)`."""
  table, places = [], iter(_PLACES[network])
  for i, stage in enumerate(lpips.NETWORKS[network]):
    table.append(mapping.Rule(f"head{i}", f"lin{i}.model.1.weight", _HEAD))
    for j in range(len(stage.convs)):
      path, key = f"stage{i}/conv{j}", f"features.{next(places)}"
      table += [
        mapping.Rule(f"{path}/kernel", f"{key}.weight", mapping.CONV),
        mapping.Rule(f"{path}/bias", f"{key}.bias"),
      ]
  return table


def from_published(
  network: str,
  backbone: Mapping[str, np.ndarray],
  heads: Mapping[str, np.ndarray],
  *,
  source: str,
) -> dict[str, Any]:
  """Parameters out of the two published files.

  Args:
    network: "vgg" or "alex".
    backbone: tensors of torchvision's `vgg16` or `alexnet`.
    heads: tensors of the `lpips` package's `vgg.pth` or `alex.pth`.
    source: the files' names, for errors.

  Raises:
    ValueError: naming every missing, unexpected and mis-shaped tensor.
  """
  unused = {
    f"{layer}.{kind}": None
    for layer in _UNUSED[network]
    for kind in ("weight", "bias")
  }
  return mapping.import_params(
    rules(network),
    {**backbone, **heads},
    _param_shapes(lpips.Lpips(network)),
    source=source,
    ignored=unused,
  )


def save_lpips(
  folder: pathlib.Path,
  network: str,
  params: Any,
  provenance: Mapping[str, Any] | None = None,
) -> None:
  """Writes what `load_lpips` reads.

  Args:
    folder: exists; files of the same names are replaced.
    network: "vgg" or "alex".
    params: its parameters.
    provenance: more fields of config.json, e.g. the files it came from.
  """
  mapping.check_params(params, _param_shapes(lpips.Lpips(network)))
  tensors = mapping.export_params(rules(network), params)
  files.write_safetensors(folder / "model.safetensors", tensors)
  config = {"model_type": MODEL_TYPE, "network": network, "version": VERSION}
  files.write_json(folder / "config.json", {**(provenance or {}), **config})


def how_to_make(network: str = "vgg") -> str:
  """The command that writes the folder, for error messages."""
  command = _COMMANDS[network]
  return (
    f"make it with `python -m psvae_jax.convert {command} --weights=FILE "
    f"--heads=FILE --out=FOLDER`; `python -m psvae_jax.convert {command} "
    "--help` says where both files are published. "
    f'"{RANDOM}{network}" runs without weights, as a test'
  )


def _with_help(read: Any, folder: pathlib.Path, network: str) -> Any:
  try:
    return read(folder)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{error}; {how_to_make(network)}") from error


def _read_network(folder: pathlib.Path, name: str, wanted: str | None) -> str:
  """What the folder's config.json says, checked."""
  if not name or not folder.is_dir():
    what = f"folder {name} does not exist" if name else "no folder is given"
    kind = FileNotFoundError if name else ValueError
    raise kind(f"LPIPS: {what}; {how_to_make(wanted or 'vgg')}")
  raw = _with_help(files.read_config, folder, wanted or "vgg")
  path = folder / "config.json"
  if raw.get("model_type") != MODEL_TYPE:
    raise ValueError(
      f"{path}: model_type {raw.get('model_type')!r} is not LPIPS's "
      f"({MODEL_TYPE!r}); {how_to_make(wanted or 'vgg')}"
    )
  if raw.get("version") != VERSION:
    raise ValueError(
      f"{path}: version {raw.get('version')!r} of the heads is not supported; "
      f"supported: {VERSION}"
    )
  _check_network(raw.get("network"), f"{path}: network")
  _check_same(raw["network"], wanted, str(folder))
  return raw["network"]


def _check_network(network: Any, where: str) -> None:
  if network not in tuple(lpips.NETWORKS):
    raise ValueError(
      f"{where} {network!r} is none of LPIPS's; "
      f"{nearest(str(network), lpips.NETWORKS)}"
    )


def _check_same(found: str, wanted: str | None, where: str) -> None:
  if wanted is not None and found != wanted:
    raise ValueError(f"{where} is LPIPS with {found!r}, not with {wanted!r}")


def _random_params(module: lpips.Lpips) -> Any:
  """Untrained parameters, the same on every machine and backend."""

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.standard_normal(leaf.shape, np.float32)
    if name.startswith("head"):
      return np.abs(noise)
    if name.endswith("bias"):
      return np.float32(0.1) * noise
    return np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5) * noise

  return jax.tree_util.tree_map_with_path(draw, _param_shapes(module))


def _param_shapes(module: lpips.Lpips) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images, images)[
    "params"
  ]
