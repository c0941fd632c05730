"""The FID network: a folder with the published weights.

`python -m psvae_jax.convert inception` writes it from the file of `pytorch-fid`
or of `torch-fidelity`, two ports of one TensorFlow graph: `config.json` beside
`model.safetensors`, in the ports' names and layouts.

"random:inception" is the same network with seeded random weights and no
download: for tests and dry runs, never for results.
"""

import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from psvae_jax.config import nearest
from psvae_jax.models import inception, resize
from psvae_jax.pretrained import files, mapping
from psvae_jax.pretrained.untrained import RANDOM

MODEL_TYPE = "fid_inception"
GRAPH = "inception-2015-12-05"

_PORTS = {"pt_inception": "pytorch-fid", "weights-inception": "torch-fidelity"}

# Published name and layout of a unit's parameters.
_UNIT = {
  "kernel": ("conv.weight", mapping.CONV),
  "scale": ("bn.weight", mapping.SAME),
  "bias": ("bn.bias", mapping.SAME),
  "mean": ("bn.running_mean", mapping.SAME),
  "variance": ("bn.running_var", mapping.SAME),
}
_HELP = (
  "make it with `python -m psvae_jax.convert inception --weights=FILE "
  "--out=FOLDER`; `python -m psvae_jax.convert inception --help` says where "
  f'the file is published. "{RANDOM}inception" runs without weights, as a test'
)


def _tf1(images: jax.Array) -> jax.Array:
  # In this order, on the range [0, 255]: the graph's own first operations.
  side = (inception.SIDE, inception.SIDE)
  return (resize.resize_bilinear_tf1(images, side) - 128.0) / 128.0


def _torch(images: jax.Array) -> jax.Array:
  side = (inception.SIDE, inception.SIDE)
  return 2.0 * resize.resize_bilinear(images / 255.0, side) - 1.0


# How images come to the network's size and range. "tf1": the graph's own way,
# which ADM's evaluator and torch-fidelity keep. "torch": pytorch-fid's.
RESIZES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "tf1": _tf1,
  "torch": _torch,
}


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class InceptionNetwork:
  """The frozen network and its parameters.

  Attributes:
    module: the network.
    params: its parameters, float32 host arrays. Put them on the device or
      mesh once, and give them to `features`.
    name: where it came from, for messages and records.
    fingerprint: `files.fingerprint_params(params)`.
    port: whose file the weights were, for a figure's protocol.
  """

  module: inception.Inception
  params: Any
  name: str
  fingerprint: str
  port: str

  def features(
    self, params: Any, images: jax.Array, resize: str = "tf1"
  ) -> dict[str, jax.Array]:
    """Computes features; pure.

    Args:
      params: as `self.params`, on the device; an argument so that a compiled
        step does not hold them as a constant.
      images: (B, H, W, 3) of any size, uint8 or floating point in [0, 255].
      resize: a key of `RESIZES`.

    Returns:
      See `models.inception.Inception`.

    Raises:
      ValueError: an unknown resize.
    """
    return self.module.apply({"params": params}, prepare(images, resize))


def prepare(images: jax.Array, resize: str = "tf1") -> jax.Array:
  """Images in [0, 255], (B, H, W, 3), as the network takes them.

  Raises:
    ValueError: an unknown resize.
  """
  if resize not in RESIZES:
    raise ValueError(f"no resize {resize!r}; {nearest(resize, RESIZES)}")
  return RESIZES[resize](jnp.asarray(images, jnp.float32))


def load_inception(name_or_path: str | os.PathLike) -> InceptionNetwork:
  """Loads the FID network from a folder that `psvae_jax.convert` wrote.

  Args:
    name_or_path: the folder, or "random:inception".

  Raises:
    FileNotFoundError: the folder or one of its files does not exist; the
      message says how to make it.
    ValueError: no name, another network, or a malformed or ill-fitting file;
      the message names it.
  """
  name = os.fspath(name_or_path)
  module = inception.Inception()
  if name.startswith(RANDOM):
    if name != f"{RANDOM}inception":
      raise ValueError(f"no network {name!r}; valid: {RANDOM}inception")
    params, port = _random_params(), "random"
  else:
    folder = pathlib.Path(name).expanduser()
    if not name:
      raise ValueError(f"Inception: no folder is given; {_HELP}")
    if not folder.is_dir():
      raise FileNotFoundError(
        f"Inception: folder {name} does not exist; {_HELP}"
      )
    try:
      port = _read_port(folder)
      tensors = files.read_safetensors(folder)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{error}; {_HELP}") from error
    params = from_published(tensors, source=str(folder))
  return InceptionNetwork(
    module, params, name, files.fingerprint_params(params), port
  )


def rules() -> list[mapping.Rule]:
  """Published tensor of every parameter of `models.inception.Inception`."""
  table = []
  shapes = _param_shapes()
  for path in traverse_util.flatten_dict(shapes, sep="/"):
    unit, _, parameter = path.rpartition("/")
    if unit == "fc":
      table.append(mapping.Rule(path, "fc.weight", mapping.LINEAR))
      continue
    key, layout = _UNIT[parameter]
    table.append(mapping.Rule(path, f"{unit.replace('/', '.')}.{key}", layout))
  return table


def from_published(
  tensors: Mapping[str, np.ndarray], *, source: str
) -> dict[str, Any]:
  """Parameters out of a published file's tensors.

  Args:
    tensors: by key. The classifier's bias and BatchNorm's counters, which
      features do not use, may be among them.
    source: the file's name, for errors.

  Raises:
    ValueError: naming every missing, unexpected and mis-shaped tensor.
  """
  table = rules()
  counter = ".num_batches_tracked"
  unused = {
    rule.key.removesuffix(".running_var") + counter: ()
    for rule in table
    if rule.key.endswith(".running_var")
  }
  return mapping.import_params(
    table,
    tensors,
    _param_shapes(),
    source=source,
    ignored={**unused, "fc.bias": None},
  )


def port_of(file_name: str) -> str:
  """Whose file it is: "pytorch-fid", "torch-fidelity", or its name.

  Both publish the same tensors: the name is all that tells them apart.
  """
  for start, port in _PORTS.items():
    if file_name.startswith(start):
      return port
  return file_name


def save_inception(
  folder: pathlib.Path,
  params: Any,
  port: str,
  provenance: Mapping[str, Any] | None = None,
) -> None:
  """Writes what `load_inception` reads.

  Args:
    folder: exists; files of the same names are replaced.
    params: the network's parameters.
    port: whose file they were, e.g. "pytorch-fid".
    provenance: more fields of config.json, e.g. the file they came from.
  """
  mapping.check_params(params, _param_shapes())
  tensors = mapping.export_params(rules(), params)
  files.write_safetensors(folder / "model.safetensors", tensors)
  config = {"model_type": MODEL_TYPE, "graph": GRAPH, "port": port}
  files.write_json(folder / "config.json", {**(provenance or {}), **config})


def _read_port(folder: pathlib.Path) -> str:
  raw = files.read_config(folder)
  path = folder / "config.json"
  for field, value in (("model_type", MODEL_TYPE), ("graph", GRAPH)):
    if raw.get(field) != value:
      raise ValueError(
        f"{path}: {field} {raw.get(field)!r} is not the FID network's "
        f"({value!r}); {_HELP}"
      )
  if not isinstance(raw.get("port"), str):
    raise ValueError(f"{path}: port {raw.get('port')!r} is not a name")
  return raw["port"]


def _random_params() -> Any:
  """Untrained parameters, the same on every machine and backend."""

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kind = path[-1].key
    if kind == "variance":
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    noise = rng.standard_normal(leaf.shape, np.float32)
    if kind == "kernel":
      return np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5) * noise
    return np.float32(kind == "scale") + np.float32(0.1) * noise

  return jax.tree_util.tree_map_with_path(draw, _param_shapes())


@functools.cache
def _param_shapes() -> Any:
  """The network's parameters as shapes; tracing them takes a second."""
  images = jax.ShapeDtypeStruct((1, inception.SIDE, inception.SIDE, 3), "f4")
  init = inception.Inception().init
  return jax.eval_shape(init, jax.random.key(0), images)["params"]
