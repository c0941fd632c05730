"""Published tensors ↔ parameter trees, by a table of rules.

An architecture is a list of `Rule`s. One list serves loading and saving, and
loading is strict: a missing, extra or mis-shaped tensor is an error.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from psvae_jax.pretrained import files


@dataclasses.dataclass(frozen=True)
class Layout:
  """Axis order of one tensor in a published file, against ours.

  Both functions use array methods only (`transpose`, `reshape`), so that they
  also run on abstract shapes.
  """

  from_file: Callable[[Any], Any]
  to_file: Callable[[Any], Any]


SAME = Layout(lambda x: x, lambda x: x)
# torch.nn.Linear keeps (out, in), Dense (in, out).
LINEAR = Layout(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))
# torch.nn.Conv2d keeps (out, in, h, w), Conv (h, w, in, out).
CONV = Layout(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)


def patch_layout(patch_size: int, channels: int = 3) -> Layout:
  """A Conv2d of equal kernel and stride, as a Dense over flat patches."""

  def from_file(x):
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

  def to_file(x):
    x = x.reshape(patch_size, patch_size, channels, x.shape[-1])
    return x.transpose(3, 2, 0, 1)

  return Layout(from_file, to_file)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One parameter of ours and the published tensor(s) it is made from.

  Attributes:
    path: our parameter, "/"-separated.
    key: the published tensor. With "{}" in it, our parameter stacks the
      tensors of layers 0, 1, … along its leading axis.
    layout: how axes are ordered in the file, of one layer.
    part: (index, count) where the file keeps `count` tensors of equal shape
      in one, concatenated along its first axis, and this is the index-th.
  """

  path: str
  key: str
  layout: Layout = SAME
  part: tuple[int, int] = (0, 1)


def _file_shape(rule: Rule, shape: Sequence[int]) -> tuple[int, ...]:
  """Shape in the file of one layer of our parameter of shape `shape`."""
  if "{}" in rule.key:
    shape = shape[1:]
  abstract = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
  out = jax.eval_shape(rule.layout.to_file, abstract).shape
  return (out[0] * rule.part[1], *out[1:])


def _keys(rule: Rule, shape: Sequence[int]) -> list[str]:
  if "{}" not in rule.key:
    return [rule.key]
  return [rule.key.format(layer) for layer in range(shape[0])]


def _flatten(rules: Sequence[Rule], tree: Any) -> dict[str, Any]:
  flat = traverse_util.flatten_dict(tree, sep="/")
  if {rule.path for rule in rules} != set(flat) or len(rules) != len(flat):
    different = {rule.path for rule in rules} ^ set(flat)
    raise ValueError(
      "parameters and the mapping to published names differ: "
      f"{files.list_names(different)}"
    )
  return flat


def import_params(
  rules: Sequence[Rule],
  tensors: Mapping[str, np.ndarray],
  expected: Any,
  *,
  source: str,
  ignored: Mapping[str, tuple[int, ...] | None] | None = None,
) -> dict[str, Any]:
  """Builds a parameter tree from published tensors.

  Args:
    rules: the architecture; one rule for every parameter.
    tensors: the published tensors by key.
    expected: tree of our parameters' shapes, e.g. from `jax.eval_shape`.
    source: file or folder name for errors.
    ignored: tensors that the architecture knowingly leaves unused: key →
      shape, None for any. They may be absent.

  Returns:
    Nested dict of float32 numpy arrays.

  Raises:
    ValueError: naming every missing, unexpected and mis-shaped tensor, the
      latter with both shapes. Nothing is allocated before that.
  """
  flat = _flatten(rules, expected)
  used, missing, misshaped = set(), set(), set()
  for rule in rules:
    shape = flat[rule.path].shape
    if "{}" in rule.key and shape[0] > len(tensors):
      raise ValueError(
        f"{source}: config.json says {shape[0]} layers, the file has "
        f"{len(tensors)} tensors in all; they belong to different models"
      )
    want = _file_shape(rule, shape)
    for key in _keys(rule, shape):
      used.add(key)
      if key not in tensors:
        missing.add(key)
      elif tensors[key].shape != want:
        misshaped.add(f"{key} (file {tensors[key].shape}, model {want})")
  ignored = dict(ignored or {})
  for key in ignored.keys() & tensors.keys():
    want = ignored[key]
    if want is not None and tensors[key].shape != want:
      misshaped.add(f"{key} (file {tensors[key].shape}, model {want})")
  problems = {
    "missing": missing,
    "unexpected": set(tensors) - used - set(ignored),
    "wrong shape": misshaped,
  }
  if any(problems.values()):
    text = "; ".join(
      f"{problem}: {files.list_names(names)}"
      for problem, names in problems.items()
      if names
    )
    raise ValueError(f"{source} does not fit its config.json. {text}")

  out = {}
  for rule in rules:
    layers = [
      _take(rule, tensors[key]) for key in _keys(rule, flat[rule.path].shape)
    ]
    out[rule.path] = np.stack(layers) if "{}" in rule.key else layers[0]
  return traverse_util.unflatten_dict(out, sep="/")


def check_params(params: Any, expected: Any) -> None:
  """Raises a ValueError naming every leaf of `params` not as `expected`."""
  have = traverse_util.flatten_dict(params, sep="/")
  want = traverse_util.flatten_dict(expected, sep="/")
  have = {path: leaf.shape for path, leaf in have.items()}
  want = {path: leaf.shape for path, leaf in want.items()}
  wrong = [
    f"{path} (given {have.get(path)}, config {want.get(path)})"
    for path in have.keys() | want.keys()
    if have.get(path) != want.get(path)
  ]
  if wrong:
    raise ValueError(
      f"parameters do not fit the config: {files.list_names(wrong)}"
    )


def _take(rule: Rule, tensor: np.ndarray) -> np.ndarray:
  index, count = rule.part
  if count > 1:
    tensor = np.split(tensor, count)[index]
  return np.asarray(rule.layout.from_file(tensor), np.float32, order="C")


def export_params(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
  """The inverse of `import_params`.

  Args:
    rules: the architecture; one rule for every parameter.
    params: nested dict of arrays that this process can read whole.

  Returns:
    Published tensors by key, float32.

  Raises:
    ValueError: `params` and `rules` name different parameters.
  """
  flat = _flatten(rules, params)
  parts = {}
  for rule in rules:
    array = np.asarray(jax.device_get(flat[rule.path]), np.float32)
    layers = array if "{}" in rule.key else array[None]
    for key, layer in zip(_keys(rule, array.shape), layers, strict=True):
      slots = parts.setdefault(key, [None] * rule.part[1])
      slots[rule.part[0]] = rule.layout.to_file(layer)
  return {
    key: np.concatenate(slots) if len(slots) > 1 else slots[0]
    for key, slots in parts.items()
  }
