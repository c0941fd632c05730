"""Tensor names of a published vision transformer → rules of its parameters.

Families of encoders name the same tensors differently. Each gives its names
here; which tensors there are is said by the network's config alone.
"""

from collections.abc import Collection, Mapping

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping

# torch.nn.Embedding keeps (tokens, D), and a single token may be (D,).
TABLE = mapping.Layout(
  lambda x: x.reshape(1, *x.shape), lambda x: x.reshape(x.shape[1:])
)
VECTOR = mapping.Layout(lambda x: x.reshape(1, 1, -1), lambda x: x.reshape(-1))


def vit_rules(
  config: vit.ViTConfig,
  final_norm: vit.FinalNorm,
  names: Mapping[str, str],
  layouts: Mapping[str, mapping.Layout] | None = None,
) -> list[mapping.Rule]:
  """Published tensor of every parameter of `vit.ViT(config, final_norm)`.

  Args:
    config: of the network.
    final_norm: of the network.
    names: published names, without ".weight" and ".bias", of "patch_embed",
      "pre_norm" and "norm", and, with "{}" for the layer, of a block's "norm1",
      "norm2", "query", "key", "value", "out", "fc1", "fc2" and "gate"; with
      nothing left out those of "cls_token", "register_tokens", "pos_embed",
      "scale1" and "scale2". Names of what the network lacks are not looked at.
      Where "gate" and "fc1" have one name, it is one tensor of both, in this
      order.
    layouts: of "cls_token" and "pos_embed", if not (1, tokens, D) in the file.

  Returns:
    One rule for every parameter.
  """
  layouts, table = layouts or {}, []

  def token(name):
    layout = layouts.get(name, mapping.SAME)
    table.append(mapping.Rule(name, names[name], layout))

  def norm(path, name):
    key = names[name]
    table.append(mapping.Rule(f"{path}/norm/scale", f"{key}.weight"))
    table.append(mapping.Rule(f"{path}/norm/bias", f"{key}.bias"))

  def dense(path, name, bias=True, layout=mapping.LINEAR, part=(0, 1)):
    key = names[name]
    table.append(mapping.Rule(f"{path}/kernel", f"{key}.weight", layout, part))
    if bias:
      table.append(mapping.Rule(f"{path}/bias", f"{key}.bias", part=part))

  if config.cls_token:
    token("cls_token")
  if config.num_registers:
    token("register_tokens")
  if config.positions != "rotary":
    token("pos_embed")
  layout = mapping.patch_layout(config.patch_size)
  dense("patch_embed", "patch_embed", config.patch_bias, layout)
  if config.pre_norm:
    norm("pre_norm", "pre_norm")
  if final_norm == "affine":
    norm("norm", "norm")

  block = "blocks/block"
  for name in ("norm1", "norm2"):
    norm(f"{block}/{name}", name)
  for name in ("query", "key", "value"):
    bias = config.qkv_bias and (name != "key" or config.key_bias)
    dense(f"{block}/attention/{name}", name, bias)
  dense(f"{block}/attention/out", "out")
  gate = fc1 = (0, 1)
  if config.swiglu:
    if names["gate"] == names["fc1"]:
      gate, fc1 = (0, 2), (1, 2)
    dense(f"{block}/mlp/gate", "gate", part=gate)
  dense(f"{block}/mlp/fc1", "fc1", part=fc1)
  dense(f"{block}/mlp/fc2", "fc2")
  if config.layerscale_init is not None:
    for name in ("scale1", "scale2"):
      table.append(mapping.Rule(f"{block}/{name}/scale", names[name]))
  return table


def clip_names(prefix: str) -> dict[str, str]:
  """The names of CLIP, which SigLIP has too, after `prefix`."""
  layer = f"{prefix}encoder.layers.{{}}"
  projections = {"query": "q", "key": "k", "value": "v", "out": "out"}
  return {
    **{name: f"{layer}.self_attn.{n}_proj" for name, n in projections.items()},
    **{f"norm{n}": f"{layer}.layer_norm{n}" for n in (1, 2)},
    **{f"fc{n}": f"{layer}.mlp.fc{n}" for n in (1, 2)},
    "cls_token": f"{prefix}embeddings.class_embedding",
    "pos_embed": f"{prefix}embeddings.position_embedding.weight",
    "patch_embed": f"{prefix}embeddings.patch_embedding",
    # The published spelling.
    "pre_norm": f"{prefix}pre_layrnorm",
    "norm": f"{prefix}post_layernorm",
  }


def find_prefix(prefix: str, keys: Collection[str]) -> str:
  """`prefix`, or "" where a file has `keys` and none begins with it."""
  if keys and not any(key.startswith(prefix) for key in keys):
    return ""
  return prefix


def identity_norm(
  config: vit.ViTConfig, final_norm: vit.FinalNorm, key: str
) -> dict[str, np.ndarray]:
  """The final norm's tensors where the network has none and the file must."""
  if final_norm == "affine":
    return {}
  return {
    f"{key}.weight": np.ones(config.width, np.float32),
    f"{key}.bias": np.zeros(config.width, np.float32),
  }


def check_unlike(
  config: vit.ViTConfig, layout: str, wanted: Mapping[str, object]
) -> None:
  """Checks the fields that a published layout cannot say.

  Args:
    config: of the network that is to be saved.
    layout: whose layout it is, for the error.
    wanted: field of `config` → the one value that the layout has.

  Raises:
    ValueError: another value.
  """
  for name, value in wanted.items():
    found = getattr(config, name)
    if found != value:
      raise ValueError(
        f"{layout}'s published layout has {name}={value} alone: an encoder "
        f"with {name}={found} cannot be saved in it"
      )
