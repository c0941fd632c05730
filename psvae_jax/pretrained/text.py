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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import text
from psvae_jax.pretrained import files, mapping

# What a tokenizer is read from; the first two hold vocabularies.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "spiece.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
)
_FILES = (
  "config.json",
  "model*.safetensors",
  "model.safetensors.index.json",
  *_TOKENIZER_FILES,
)
_SHARED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"
# T5's own ids, so that its conventions hold for tokenizers trained here.
_PAD, _END, _UNKNOWN = _SPECIAL = ("<pad>", "</s>", "<unk>")
_BYTES = 256
_PROJECTIONS = ("query", "key", "value", "out")
# Our field: the published one. The rest of the names are the same.
_RENAMED = {"layer_norm_eps": "layer_norm_epsilon"}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Captions to token ids of one fixed length.

  Small and picklable: the vocabulary is read on first use, in whichever
  process that happens, so data workers can be handed one.

  Attributes:
    folder: local folder with the tokenizer's files.
    max_length: tokens per caption, padding and end-of-sequence included.
  """

  folder: str
  max_length: int

  def __post_init__(self):
    if self.max_length < 1:
      raise ValueError(f"max_length must be positive, got {self.max_length}")
    paths = [pathlib.Path(self.folder, name) for name in _TOKENIZER_FILES[:2]]
    if not any(path.is_file() for path in paths):
      raise FileNotFoundError(
        f"{self.folder} has neither {paths[0].name} nor {paths[1].name}; "
        "give a folder that holds a tokenizer"
      )

  def __reduce__(self):
    return Tokenizer, (self.folder, self.max_length)

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes captions; longer ones are cut, end-of-sequence kept.

    Args:
      captions: B strings.

    Returns:
      tokens (B, max_length) int32 and mask (B, max_length) bool, True where a
      token is not padding.

    Raises:
      ValueError: `captions` is one string, or an element is not valid text.
    """
    captions = _check_captions(captions)
    if not captions:
      shape = (0, self.max_length)
      return np.zeros(shape, np.int32), np.zeros(shape, bool)
    return self._encode(self._backend, captions)

  def __len__(self) -> int:
    """Number of token ids, special ones included."""
    return len(self._backend)

  def decode(self, tokens: np.ndarray) -> list[str]:
    """(B, L) token ids → B strings, without special tokens."""
    return self._backend.batch_decode(
      np.asarray(tokens).tolist(),
      skip_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )

  @property
  def fingerprint(self) -> str:
    """Hex SHA-256 over the tokenizer's files."""
    digest = hashlib.sha256()
    for path in self.paths():
      content = path.read_bytes()
      digest.update(f"{path.name}\n{len(content)}\n".encode())
      digest.update(content)
    return digest.hexdigest()

  def paths(self) -> list[pathlib.Path]:
    """The tokenizer's files."""
    paths = [pathlib.Path(self.folder, name) for name in _TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]

  def _encode(self, backend: Any, captions: list[str]):
    batch = backend(
      captions,
      padding="max_length",
      truncation=True,
      max_length=self.max_length,
      return_tensors="np",
    )
    mask = batch["attention_mask"].astype(bool)
    return batch["input_ids"].astype(np.int32), mask

  @functools.cached_property
  def _backend(self) -> Any:
    import transformers  # slow, and not needed by those who bring tokens

    try:
      backend = transformers.AutoTokenizer.from_pretrained(
        self.folder, local_files_only=True
      )
    except Exception as error:  # the library has no common error class
      raise ValueError(
        f"the tokenizer in {self.folder} cannot be read ({error})"
      ) from error
    if backend.pad_token_id is None:
      raise ValueError(f"the tokenizer in {self.folder} has no padding token")
    # This first call also fixes the backend's padding and truncation, which
    # must not change while other threads use it.
    _, mask = self._encode(backend, [""])
    if not mask.any():
      raise ValueError(
        f"the tokenizer in {self.folder} encodes the empty caption as nothing; "
        "it must append an end-of-sequence token"
      )
    return backend


def _check_captions(captions: Sequence[str]) -> list[str]:
  if isinstance(captions, str):
    raise ValueError("captions must be a list of strings, not one string")
  captions = list(captions)
  for index, caption in enumerate(captions):
    if not isinstance(caption, str):
      raise ValueError(f"caption {index} is not a string: {caption!r}")
    try:
      caption.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"caption {index} is not valid Unicode ({error}): {caption!r}"
      ) from error
  return captions


def train_tokenizer(
  texts: Iterable[str], folder: str | os.PathLike, vocab_size: int = 1024
) -> int:
  """Trains a byte-level BPE that `Tokenizer` and `AutoTokenizer` read.

  Any text can be encoded, and decodes to exactly itself. Ids 0, 1 and 2 are
  padding, end of sequence (always appended) and unknown (never produced).

  Args:
    texts: the text to learn merges from.
    folder: created if need be; tokenizer files in it are replaced.
    vocab_size: largest number of token ids; little text yields fewer.

  Returns:
    The number of token ids, which `T5Config.vocab_size` must reach.

  Raises:
    ValueError: `vocab_size` has no room for 256 bytes and 3 special tokens,
      or `texts` is one string.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  if vocab_size < _BYTES + len(_SPECIAL):
    raise ValueError(
      f"vocab_size {vocab_size} is too small: {_BYTES} bytes and "
      f"{len(_SPECIAL)} special tokens are always there"
    )
  texts = _check_captions(texts)
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=list(_SPECIAL),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {_END}",
    pair=f"$A {_END} $B {_END}",
    special_tokens=[(_END, tokenizer.token_to_id(_END))],
  )

  names = {"pad_token": _PAD, "eos_token": _END, "unk_token": _UNKNOWN}
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(
    folder / "tokenizer.json", json.loads(tokenizer.to_str(pretty=False))
  )
  files.write_json(folder / "special_tokens_map.json", names)
  files.write_json(
    folder / "tokenizer_config.json",
    {
      **names,
      "clean_up_tokenization_spaces": False,
      "model_input_names": ["input_ids", "attention_mask"],
      # A caption that happens to contain "</s>" is text like any other.
      "split_special_tokens": True,
      "tokenizer_class": "PreTrainedTokenizerFast",
    },
  )
  return tokenizer.get_vocab_size()


# eq=False: arrays have no plain equality; compare fingerprints.
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
  config = _parse_config(files.read_config(folder), source)
  if tokenizer is None:
    tokenizer_folder = folder
  else:
    tokenizer_folder = files.resolve_folder(tokenizer, _TOKENIZER_FILES)
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


def _parse_config(raw: dict[str, Any], path: pathlib.Path) -> text.T5Config:
  """A published config.json → ours; errors name the file and the field."""
  if raw.get("model_type") != "t5":
    raise ValueError(
      f'{path}: model_type is {raw.get("model_type")!r}; only "t5" is supported'
    )
  values = {}
  for field in dataclasses.fields(text.T5Config):
    key = _RENAMED.get(field.name, field.name)
    # Published configs leave out what they share with T5's first release,
    # whose values are our defaults too.
    value = raw.get(key, field.default)
    kind = type(field.default)
    if kind is float and isinstance(value, int):
      value = float(value)
    if type(value) is not kind or (kind is not str and value <= 0):
      raise ValueError(
        f"{path}: {key} is {value!r}; it must be a "
        + ("string" if kind is str else f"positive {kind.__name__}")
      )
    values[field.name] = value
  try:
    return text.T5Config(**values)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


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
    "eos_token_id": _SPECIAL.index(_END),
    "is_encoder_decoder": False,
    "model_type": "t5",
    "pad_token_id": _SPECIAL.index(_PAD),
    "use_cache": False,
  }
