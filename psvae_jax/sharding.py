"""Where every array lives: the mesh, the parameter table, the batch.

Sharding is data. `RULES` maps a regular expression over a parameter's path to
the mesh axes of its trailing dimensions; the first match wins. Optimizer
moments and the EMA repeat the parameter's path, so the same table covers them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from psvae_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (path pattern, axes of the trailing dimensions). Leading dimensions (the
# depth of a scanned stack, a convolution's window) stay whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"(query|key|value|fc1|gate)/kernel$", ("fsdp", "tensor")),
  (r"(query|key|value|fc1|gate)/bias$", ("tensor",)),
  (r"(attention/out|fc2)/kernel$", ("tensor", "fsdp")),
  (r"(embedding|kernel)$", (None, "fsdp")),
  (r".*", ()),
)


def make_mesh(
  config: MeshConfig, devices: Iterable[jax.Device] | None = None
) -> Mesh:
  """Builds the (data, fsdp, tensor) mesh over all devices.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [config.data, config.fsdp, config.tensor]
  named = dict(zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ConfigError(
      f"config.mesh={named}: sizes are positive, and at most one is -1"
    )
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise ConfigError(
      f"config.mesh={named} needs {abs(math.prod(sizes))} "
      f"devices, this job has {len(devices)}; set one axis to -1"
    )
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """PartitionSpec of one array; an axis that does not divide is left out."""
  axes = next(axes for rule, axes in RULES if re.search(rule, name))
  axes = axes[max(0, len(axes) - len(shape)) :]
  spec: list[str | None] = [None] * (len(shape) - len(axes)) + list(axes)
  for i, axis in enumerate(spec):
    if axis and shape[i] % mesh.shape[axis]:
      logging.warning(
        "%s: dimension %d of %s does not divide by mesh axis %s=%d; kept whole",
        name,
        i,
        shape,
        axis,
        mesh.shape[axis],
      )
      spec[i] = None
  return P(*spec) if any(spec) else P()


def infer_sharding(tree: Any, mesh: Mesh) -> Any:
  """Shardings for a tree of arrays or shapes, by each leaf's path."""

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, _spec(name, tuple(leaf.shape), mesh))

  return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The batch dimension is split over data and fsdp together."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
  """This host's slice of a batch → global arrays on the mesh.

  Args:
    batch: arrays, or named parts of them.
    mesh: where to.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch)
  )


def put_tree(tree: Any, mesh: Mesh) -> Any:
  """Host arrays, the same on every host → arrays sharded by the table."""
  shardings = infer_sharding(tree, mesh)

  def one(value, sharding):
    value = np.asarray(value)
    return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
    )

  return jax.tree.map(one, tree, shardings)


def replicate(tree: Any) -> Any:
  """Arrays on the mesh → the same arrays, whole on every device."""
  return jax.tree.map(
    lambda x: jax.device_put(x, replicated(x.sharding.mesh)), tree
  )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """Pins an activation's sharding inside jit; no mesh set, no constraint."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*axes))


def constrain_batch(x: jax.Array) -> jax.Array:
  """Splits an activation over its examples, and over nothing else.

  Without a mesh, and for fewer examples than it can split (as when parameters
  are made), the activation stays as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % batch_shards(mesh):
    return x
  return constrain(x, BATCH_AXES)


def split_batch(tree: Any, count: int) -> Any:
  """A batch → `count` equal micro-batches: (B, …) → (count, B / count, …).

  Micro-batch i takes the rows i, i + count, …: every device then keeps the
  rows it has, where contiguous micro-batches would move them all.
  """

  def one(x):
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, BATCH_AXES)

  return jax.tree.map(one, tree)


def mean_over(function: Callable, parts: Any) -> Any:
  """Mean of `function` over micro-batches, one after another.

  Args:
    function: micro-batch → tree of floating point arrays that are means over
      its examples (losses, their gradients).
    parts: what `split_batch` returns.
  """
  count = jax.tree.leaves(parts)[0].shape[0]
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)
  )

  def body(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  total, _ = jax.lax.scan(body, zeros, parts)
  return jax.tree.map(lambda x: x / count, total)
