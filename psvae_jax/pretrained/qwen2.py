"""Qwen2.5 backbones: Qwen2's published layout, read strictly.

Reads the Hugging Face layout of `model_type` "qwen2": whole language models
(`Qwen/Qwen2.5-*`, sharded or not) and bare `Qwen2Model`s. A language model's
output layer is not read, tied to the embedding or not.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models import qwen2
from psvae_jax.pretrained import files, mapping
from psvae_jax.pretrained.fields import Fields, show
from psvae_jax.pretrained.untrained import RANDOM, random_params

_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
# No model is near it: rotary frequencies, half as many, are made on the host.
_MAX_HEAD_WIDTH = 2**12
_EMBEDDING = "embed_tokens.weight"
_OUTPUT = "lm_head.weight"
_ATTENTION = ("query", "key", "value", "out")
_MLP = (("gate", "gate"), ("fc1", "up"), ("fc2", "down"))


def _published() -> dict[str, qwen2.Qwen2Config]:
  """Id → shape of the sizes that serve as a generator's backbone."""
  sizes = {  # hidden, SwiGLU, blocks, heads, key heads, vocabulary
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936),
    "7B": (3584, 18944, 28, 28, 4, 152064),
  }
  return {
    f"Qwen/Qwen2.5-{size}{tuned}": qwen2.Qwen2Config(
      vocab_size=vocab,
      hidden_size=width,
      intermediate_size=hidden,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      num_key_value_heads=key_heads,
    )
    for tuned in ("", "-Instruct")
    for size, (width, hidden, depth, heads, key_heads, vocab) in sizes.items()
  }


# What `parse_config` would give of the published config.json.
PUBLISHED = _published()


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
  """A decoder with its parameters.

  Attributes:
    module: the network.
    params: its parameters.
    name: where it came from, for messages and records.
    fingerprint: identifies architecture and parameters.
  """

  module: qwen2.Qwen2
  params: Any
  name: str
  fingerprint: str

  @property
  def width(self) -> int:
    """Feature dimension D."""
    return self.module.config.hidden_size

  def __call__(
    self,
    embeddings: jax.Array,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Features (B, N, D); compiled once for each shape, see `qwen2.Qwen2`."""
    # Explicit, so that a transfer guard sees no accidental copy.
    inputs = jax.device_put((embeddings, mask, positions))
    return _features(self.module, self.params, *inputs)

  def embed(self, tokens: np.ndarray | jax.Array) -> jax.Array:
    """Token ids (B, N) → embeddings (B, N, D)."""
    return _embed(self.module, self.params, jax.device_put(tokens))


# Modules hash by their fields: backbones of one architecture share programs.
@functools.partial(jax.jit, static_argnums=0)
def _features(module, params, embeddings, mask, positions):
  return module.apply({"params": params}, embeddings, mask, positions)


@functools.partial(jax.jit, static_argnums=0)
def _embed(module, params, tokens):
  return module.apply({"params": params}, tokens, method="embed_tokens")


def load_qwen2(
  name_or_path: str | os.PathLike,
  *,
  token_embedding: bool = False,
  remat: bool = False,
  unroll: int = 1,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
) -> Backbone:
  """Loads a decoder from a folder or from the Hugging Face hub.

  Args:
    name_or_path: folder or hub id with config.json and safetensors. Or
      "random:" and a key of `PUBLISHED`: that architecture, untrained.
    token_embedding: keep the token embedding, for `Backbone.embed`.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype, float32 or bfloat16.
    param_dtype: dtype that parameters are kept in; bfloat16 halves the memory
      of a large frozen backbone.

  Returns:
    The backbone, parameters on the default device.

  Raises:
    FileNotFoundError: the folder or one of its files does not exist.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  for what, value in (("dtype", dtype), ("param_dtype", param_dtype)):
    if jnp.dtype(value) not in (jnp.float32, jnp.bfloat16):
      raise ValueError(f"{what} must be float32 or bfloat16, got {value}")
  name = os.fspath(name_or_path)
  options = dict(remat=remat, unroll=unroll, dtype=dtype)
  if name.startswith(RANDOM):
    module = qwen2.Qwen2(_find_published(name), token_embedding, **options)
    params = random_params(_param_shapes(module))
  else:
    folder = files.resolve_folder(name_or_path, _FILES)
    config = parse_config(files.read_config(folder), folder / "config.json")
    module = qwen2.Qwen2(config, token_embedding, **options)
    params = _import(module, files.read_safetensors(folder), str(folder))
  identity = {
    "config": dataclasses.asdict(module.config),
    "params": files.fingerprint_params(params),
  }
  fingerprint = json.dumps(identity, sort_keys=True).encode()
  params = jax.tree.map(lambda x: x.astype(param_dtype), params)
  return Backbone(
    module=module,
    params=jax.device_put(params),
    name=name,
    fingerprint=hashlib.sha256(fingerprint).hexdigest(),
  )


def abstract_qwen2(
  name_or_path: str | os.PathLike,
  *,
  token_embedding: bool = False,
  remat: bool = False,
  unroll: int = 1,
  dtype: Any = jnp.float32,
) -> Backbone:
  """A backbone of shapes: `load_qwen2` without its weights.

  Nothing is downloaded or allocated.

  Args:
    name_or_path: folder with a config.json (tensors are not looked for), or a
      key of `PUBLISHED`, "random:" before it or not.
    token_embedding, remat, unroll, dtype: as for `load_qwen2`.

  Returns:
    The backbone; its parameters are `jax.ShapeDtypeStruct`s and its
    fingerprint is "".

  Raises:
    FileNotFoundError: the folder has no config.json.
    ValueError: an unknown id, or a malformed file.
  """
  name = os.fspath(name_or_path)
  folder = pathlib.Path(name).expanduser()
  if not name.startswith(RANDOM) and folder.is_dir():
    config = parse_config(files.read_config(folder), folder / "config.json")
  else:
    config = _find_published(name)
  module = qwen2.Qwen2(config, token_embedding, remat, unroll, dtype)
  return Backbone(module, _param_shapes(module), name, fingerprint="")


def _find_published(name: str) -> qwen2.Qwen2Config:
  published = name.removeprefix(RANDOM)
  if published not in PUBLISHED:
    raise ValueError(
      f"backbone {name!r} is no folder and no published architecture; "
      f"{nearest(published, PUBLISHED)}"
    )
  return PUBLISHED[published]


def _param_shapes(module: qwen2.Qwen2) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  width = module.config.hidden_size
  embeddings = jax.ShapeDtypeStruct((1, 8, width), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), embeddings)["params"]


def _import(
  module: qwen2.Qwen2, tensors: Mapping[str, np.ndarray], source: str
) -> dict[str, Any]:
  """Published tensors → parameters; all but the output layer must fit."""
  config = module.config
  # A whole language model's tensors are under "model.", a bare one's are not.
  whole = any(key.startswith("model.") for key in tensors)
  prefix = "model." if whole else ""
  table = (config.vocab_size, config.hidden_size)
  ignored = {_OUTPUT: table} if whole else {}
  if not module.token_embedding:
    ignored[prefix + _EMBEDDING] = table
  return mapping.import_params(
    _rules(module.token_embedding, prefix),
    tensors,
    _param_shapes(module),
    source=source,
    ignored=ignored,
  )


def _rules(token_embedding: bool, prefix: str) -> list[mapping.Rule]:
  """Our parameters and their published names."""
  rule = mapping.Rule
  layer, block = prefix + "layers.{}", "blocks/block"
  dense = {f"attention/{n}": f"self_attn.{n[0]}_proj" for n in _ATTENTION}
  dense |= {f"mlp/{ours}": f"mlp.{theirs}_proj" for ours, theirs in _MLP}
  table = [
    rule("final_norm/scale", f"{prefix}norm.weight"),
    rule(f"{block}/norm1/scale", f"{layer}.input_layernorm.weight"),
    rule(f"{block}/norm2/scale", f"{layer}.post_attention_layernorm.weight"),
    *(
      rule(f"{block}/{path}/kernel", f"{layer}.{key}.weight", mapping.LINEAR)
      for path, key in dense.items()
    ),
    *(
      rule(f"{block}/{path}/bias", f"{layer}.{key}.bias")
      for path, key in dense.items()
      if path.startswith("attention/") and not path.endswith("/out")
    ),
  ]
  if token_embedding:
    table.append(rule("embed/embedding", prefix + _EMBEDDING))
  return table


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> qwen2.Qwen2Config:
  """A published config.json → ours; errors name the file and the field."""
  if raw.get("model_type") != "qwen2":
    raise ValueError(
      f'{path}: model_type is {raw.get("model_type")!r}; only "qwen2" is '
      "supported"
    )

  read = Fields(raw, path)
  heads = key_heads = read.get("num_attention_heads", int)
  if read.has("num_key_value_heads"):
    key_heads = read.get("num_key_value_heads", int)
  # Defaults are those of transformers' Qwen2Config, for files that leave a
  # field out. Fields that say how big the model is have none.
  fields = {
    "vocab_size": read.get("vocab_size", int),
    "hidden_size": read.get("hidden_size", int),
    "intermediate_size": read.get("intermediate_size", int),
    "num_hidden_layers": read.get("num_hidden_layers", int),
    "num_attention_heads": heads,
    "num_key_value_heads": key_heads,
    "rms_norm_eps": read.get("rms_norm_eps", float, 1e-6),
  }
  rope = _rope_parameters(raw, path)
  fields["rope_theta"] = Fields(rope, path).get("rope_theta", float, 1e4)
  config = read.build(qwen2.Qwen2Config, **fields)
  read.expect(hidden_act="silu", use_sliding_window=False)
  _check_supported(raw, config, path)
  return config


def _rope_parameters(raw: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """How positions turn: transformers 5 nests it, older files do not."""
  rope = raw.get("rope_parameters", raw.get("rope_scaling")) or {}
  if not isinstance(rope, dict):
    raise ValueError(f"{path}: rope_parameters must be an object, got {rope!r}")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise ValueError(
      f'{path}: rope_type {kind!r} is not supported, only "default" is'
    )
  theta = rope.get("rope_theta", raw.get("rope_theta"))
  return {} if theta is None else {"rope_theta": theta}


def _check_supported(
  raw: dict[str, Any], config: qwen2.Qwen2Config, path: pathlib.Path
) -> None:
  """Raises a ValueError for what published Qwen2.5 models do not have."""
  if config.head_dim > _MAX_HEAD_WIDTH:
    raise ValueError(
      f"{path}: hidden_size {config.hidden_size} / num_attention_heads "
      f"{config.num_attention_heads} is above {_MAX_HEAD_WIDTH}"
    )
  if raw.get("head_dim") not in (None, config.head_dim):
    raise ValueError(
      f"{path}: head_dim {show(raw['head_dim'])} is not hidden_size / "
      f"num_attention_heads, {config.head_dim}"
    )
  kinds = raw.get("layer_types") or []
  if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
    raise ValueError(
      f'{path}: layer_types must be "full_attention" throughout; attention in '
      "a sliding window is not supported"
    )
