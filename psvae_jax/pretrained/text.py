"""Text encoders: a tokenizer and a T5 encoder in one published folder.

Reads and writes the Hugging Face layout of `t5` models, so that the embedded
miniature, `google/t5-v1_1-*` converted to safetensors and the text encoders
of other image generators are all one kind of folder, which
`transformers.T5EncoderModel` and `AutoTokenizer` read too.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import text
from psvae_jax.pretrained import files, mapping
from psvae_jax.pretrained.fields import Fields, show
from psvae_jax.pretrained.tokenizer import (
  END,
  PAD,
  SPECIAL_TOKENS,
  TOKENIZER_FILES,
  Tokenizer,
)

_FILES = (
  "config.json",
  "model*.safetensors",
  "model.safetensors.index.json",
  *TOKENIZER_FILES,
)
_SHARED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"
_PROJECTIONS = ("query", "key", "value", "out")
# No model is near this; larger numbers in a config file overflow shapes.
_MAX_SIZE = 2**24
# Our field: the published one. The rest of the names are the same.
_RENAMED = {"layer_norm_eps": "layer_norm_epsilon"}


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
  """A T5 encoder with its parameters and tokenizer.

  Attributes:
    module: the network.
    params: its parameters.
    tokenizer: captions to token ids; picklable on its own.
    name: where it came from, for messages and records.
    fingerprint: identifies architecture, parameters, tokenizer and length:
      equal fingerprints give equal features.
  """

  module: text.T5Encoder
  params: Any
  tokenizer: Tokenizer
  name: str
  fingerprint: str

  @property
  def max_length(self) -> int:
    """Tokens per caption L."""
    return self.tokenizer.max_length

  @property
  def width(self) -> int:
    """Feature dimension D."""
    return self.module.config.d_model

  def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """B captions → tokens (B, L) int32, mask (B, L) bool; see `Tokenizer`."""
    return self.tokenizer(captions)

  def __call__(self, captions: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Encodes captions; compiled once for each number of captions.

    Args:
      captions: B strings.

    Returns:
      Features (B, L, D) in the module's dtype, meaningless where padded, and
      mask (B, L) bool, True where not padded.
    """
    # Explicit, so that a transfer guard sees no accidental copy.
    tokens, mask = jax.device_put(self.tokenize(captions))
    return _features(self.module, self.params, tokens, mask), mask


# Modules hash by their fields: encoders of one architecture share programs.
@functools.partial(jax.jit, static_argnums=0)
def _features(module, params, tokens, mask):
  return module.apply({"params": params}, tokens, mask)


def load_text_encoder(
  name_or_path: str | os.PathLike,
  *,
  max_length: int = 128,
  tokenizer: str | os.PathLike | None = None,
  remat: bool = False,
  unroll: int = 1,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
) -> TextEncoder:
  """Loads a T5 encoder from a folder or from the Hugging Face hub.

  A whole T5 model is fine too: its decoder and output layer are ignored.

  Args:
    name_or_path: folder or hub id with config.json and safetensors.
    max_length: tokens per caption.
    tokenizer: folder or hub id of the tokenizer, where it is another one.
    remat: recompute activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype and that of the features, float32 or bfloat16.
    param_dtype: dtype that parameters are kept in; bfloat16 halves the memory
      of a large frozen encoder.

  Returns:
    The encoder, parameters on the default device.

  Raises:
    FileNotFoundError: a folder or one of its files does not exist.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  for what, value in (("dtype", dtype), ("param_dtype", param_dtype)):
    if jnp.dtype(value) not in (jnp.float32, jnp.bfloat16):
      raise ValueError(f"{what} must be float32 or bfloat16, got {value}")
  folder = files.resolve_folder(name_or_path, _FILES)
  source = folder / "config.json"
  config = parse_config(files.read_config(folder), source)
  if tokenizer is None:
    tokenizer_folder = folder
  else:
    tokenizer_folder = files.resolve_folder(tokenizer, TOKENIZER_FILES)
  tokenize = Tokenizer(os.fspath(tokenizer_folder.resolve()), max_length)
  if len(tokenize) > config.vocab_size:
    raise ValueError(
      f"the tokenizer in {tokenizer_folder} has {len(tokenize)} token ids, but "
      f"{source} says vocab_size {config.vocab_size}; they belong to different "
      "models"
    )
  module = text.T5Encoder(config, remat=remat, unroll=unroll, dtype=dtype)
  params = mapping.import_params(
    _rules(config),
    _encoder_tensors(files.read_safetensors(folder), folder),
    _param_shapes(module),
    source=str(folder),
  )
  identity = {
    "config": dataclasses.asdict(config),
    "params": files.fingerprint_params(params),
    "tokenizer": tokenize.fingerprint,
    "max_length": max_length,
  }
  fingerprint = json.dumps(identity, sort_keys=True).encode()
  params = jax.tree.map(lambda x: x.astype(param_dtype), params)
  return TextEncoder(
    module=module,
    params=jax.device_put(params),
    tokenizer=tokenize,
    name=os.fspath(name_or_path),
    fingerprint=hashlib.sha256(fingerprint).hexdigest(),
  )


def save_text_encoder(
  folder: str | os.PathLike,
  config: text.T5Config,
  params: Any,
  tokenizer: Tokenizer | None = None,
) -> None:
  """Writes an encoder as `load_text_encoder` and transformers read it.

  Args:
    folder: created if need be; files of the same names are replaced.
    config: the network's hyper-parameters.
    params: its parameters.
    tokenizer: its files are copied to `folder`, where they are not already.

  Raises:
    ValueError: `params` do not fit `config`. Nothing is written then.
  """
  mapping.check_params(params, _param_shapes(text.T5Encoder(config)))
  tensors = mapping.export_params(_rules(config), params)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if tokenizer and folder.resolve() != pathlib.Path(tokenizer.folder).resolve():
    for path in tokenizer.paths():
      shutil.copyfile(path, folder / path.name)
  files.write_safetensors(folder / "model.safetensors", tensors)
  files.write_json(folder / "config.json", _format_config(config))


def _param_shapes(module: text.T5Encoder) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 8), jnp.bool_)
  return jax.eval_shape(module.init, jax.random.key(0), tokens, mask)["params"]


def _rules(config: text.T5Config) -> list[mapping.Rule]:
  """Our parameters and their published names."""
  layer, block = "encoder.block.{}.layer", "blocks/block"
  first = layer.format(0)
  dense = {f"attention/{n}": f"0.SelfAttention.{n[0]}" for n in _PROJECTIONS}
  feed = "1.DenseReluDense"
  if config.gated:
    dense |= {"mlp/gate": f"{feed}.wi_0", "mlp/fc1": f"{feed}.wi_1"}
  else:
    dense |= {"mlp/fc1": f"{feed}.wi"}
  dense |= {"mlp/fc2": f"{feed}.wo"}
  rule = mapping.Rule
  return [
    rule("embed/embedding", _SHARED),
    rule(
      "relative_bias/embedding",
      f"{first}.0.SelfAttention.relative_attention_bias.weight",
    ),
    rule("final_norm/scale", "encoder.final_layer_norm.weight"),
    rule(f"{block}/norm1/scale", f"{layer}.0.layer_norm.weight"),
    rule(f"{block}/norm2/scale", f"{layer}.1.layer_norm.weight"),
    *(
      rule(f"{block}/{path}/kernel", f"{layer}.{key}.weight", mapping.LINEAR)
      for path, key in dense.items()
    ),
  ]


def _encoder_tensors(
  tensors: Mapping[str, np.ndarray], folder: pathlib.Path
) -> dict[str, np.ndarray]:
  """Drops a whole model's other half and the second copy of the embedding."""
  tensors = {
    key: value
    for key, value in tensors.items()
    if not key.startswith("decoder.") and key != "lm_head.weight"
  }
  tied = tensors.pop(_TIED, None)
  if tied is not None:
    shared = tensors.setdefault(_SHARED, tied)
    if not np.array_equal(shared, tied):
      raise ValueError(
        f"{folder}: {_TIED} differs from {_SHARED}; T5 has one embedding"
      )
  return tensors


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> text.T5Config:
  """A published config.json → ours; errors name the file and the field."""
  if raw.get("model_type") != "t5":
    raise ValueError(
      f'{path}: model_type is {raw.get("model_type")!r}; only "t5" is supported'
    )
  values, read = {}, Fields(raw, path)
  for field in dataclasses.fields(text.T5Config):
    key = _RENAMED.get(field.name, field.name)
    # Published configs leave out what they share with T5's first release,
    # whose values are our defaults too.
    value = read.get(key, type(field.default), field.default)
    if not isinstance(value, str) and not 0 < value <= _MAX_SIZE:
      raise ValueError(
        f"{path}: {key} is {show(value)}; it must be positive, and at most "
        f"{_MAX_SIZE}"
      )
    values[field.name] = value
  return read.build(text.T5Config, **values)


def _format_config(config: text.T5Config) -> dict[str, Any]:
  """config.json of transformers' T5EncoderModel."""
  published = {
    _RENAMED.get(name, name): value
    for name, value in dataclasses.asdict(config).items()
  }
  return {
    **published,
    "architectures": ["T5EncoderModel"],
    "dropout_rate": 0.0,
    "dtype": "float32",
    "eos_token_id": SPECIAL_TOKENS.index(END),
    "is_encoder_decoder": False,
    "model_type": "t5",
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "use_cache": False,
  }
