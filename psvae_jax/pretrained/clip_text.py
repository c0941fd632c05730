"""CLIP's text encoder: its published layout.

Reads the Hugging Face layout of a whole `CLIPModel`, whose image half is not
looked at, and of `CLIPTextModel` and `CLIPTextModelWithProjection`, which image
generators keep in a folder of their own.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models import clip_text
from psvae_jax.pretrained import clip_tokens, files, mapping
from psvae_jax.pretrained.fields import Fields
from psvae_jax.pretrained.tokenizer import TOKENIZER_FILES, Tokenizer
from psvae_jax.pretrained.untrained import RANDOM, random_params

FILES = (
  "config.json",
  "model*.safetensors",
  "model.safetensors.index.json",
  *TOKENIZER_FILES,
)
PREFIX = "text_model."
_PROJECTION = "text_projection.weight"
WHOLE, _TEXT = "clip", "clip_text_model"
# Older files keep the numbers 0 … 76 as a tensor.
IGNORED = {f"{PREFIX}embeddings.position_ids": None}


def _published() -> dict[str, clip_text.ClipTextConfig]:
  """Id → shape of the text half."""
  sizes = {  # width, blocks, heads, embedding
    "openai/clip-vit-base-patch32": (512, 12, 8, 512),
    "openai/clip-vit-base-patch16": (512, 12, 8, 512),
    "openai/clip-vit-large-patch14": (768, 12, 12, 768),
    "openai/clip-vit-large-patch14-336": (768, 12, 12, 768),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (1024, 24, 16, 1024),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": (1280, 32, 20, 1280),
  }
  return {
    name: clip_text.ClipTextConfig(
      hidden_size=width,
      intermediate_size=4 * width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      hidden_act="quick_gelu" if name.startswith("openai/") else "gelu",
      eos_token_id=clip_text.LEGACY_END,
      projection_dim=embedding,
    )
    for name, (width, depth, heads, embedding) in sizes.items()
  }


# What `parse_config` would give of the published config.json.
PUBLISHED = _published()


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class ClipTextEncoder:
  """CLIP's text encoder with its parameters and tokenizer.

  Attributes:
    module: the network.
    params: its parameters.
    tokenizer: of captions, see `clip_tokens`; None for an untrained network.
    name: where it came from, for messages and records.
    fingerprint: identifies architecture, parameters and tokenizer: equal
      fingerprints give equal embeddings.
  """

  module: clip_text.ClipText
  params: Any
  tokenizer: Tokenizer | None
  name: str
  fingerprint: str

  @property
  def max_length(self) -> int:
    """Tokens per caption L."""
    return self.module.config.max_position_embeddings

  @property
  def width(self) -> int:
    """Feature dimension D."""
    return self.module.config.hidden_size

  def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """B captions → tokens (B, L) int32, mask (B, L) bool; see clip_tokens."""
    return clip_tokens.tokenize(self.tokenizer, captions, self.name)

  def __call__(self, captions: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Features (B, L, D) float32 of B captions, and their mask (B, L) bool."""
    tokens, mask = jax.device_put(self.tokenize(captions))
    return _apply(self.module, self.params, tokens)[0], mask

  def embed(self, captions: Sequence[str]) -> jax.Array:
    """B captions → embeddings (B, P) float32, projected, of any length."""
    tokens, _ = jax.device_put(self.tokenize(captions))
    return _apply(self.module, self.params, tokens)[1]


# Modules hash by their fields: encoders of one architecture share programs.
@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, tokens):
  return module.apply({"params": params}, tokens)


def load_clip_text(
  name_or_path: str | os.PathLike,
  *,
  tokenizer: str | os.PathLike | None = None,
  remat: bool = False,
  unroll: int = 1,
  dtype: Any = jnp.float32,
) -> ClipTextEncoder:
  """Loads CLIP's text encoder from a folder or from the Hugging Face hub.

  Args:
    name_or_path: folder or hub id with config.json, safetensors and, unless
      `tokenizer` is given, a tokenizer. Or "random:" and a key of `PUBLISHED`:
      that architecture, untrained; it needs no tokenizer until captions come.
    tokenizer: folder or hub id of the tokenizer, where it is another one.
    remat: recompute activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype; what comes out is float32 whatever it is.

  Returns:
    The encoder, parameters float32 on the default device.

  Raises:
    FileNotFoundError: a folder or one of its files does not exist.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  name = os.fspath(name_or_path)
  options = dict(remat=remat, unroll=unroll, dtype=dtype)
  folder = None
  if name.startswith(RANDOM):
    config = find_published(name, PUBLISHED)
    module = clip_text.ClipText(config, **options)
    params = random_params(param_shapes(module))
  else:
    folder = files.resolve_folder(name_or_path, FILES)
    raw = files.read_config(folder)
    config = parse_config(raw, folder / "config.json")
    tensors = _text_tensors(files.read_safetensors(folder))
    if _PROJECTION not in tensors and raw["model_type"] == _TEXT:
      config = dataclasses.replace(config, projection_dim=None)
    module = clip_text.ClipText(config, **options)
    params = mapping.import_params(
      rules(config),
      tensors,
      param_shapes(module),
      source=str(folder),
      ignored=IGNORED,
    )
  tokenize = clip_tokens.load_tokenizer(tokenizer, folder, config)
  return ClipTextEncoder(
    module=module,
    params=jax.device_put(params),
    tokenizer=tokenize,
    name=name,
    fingerprint=fingerprint(dataclasses.asdict(config), params, tokenize),
  )


def fingerprint(
  config: Mapping[str, Any], params: Any, tokenizer: Tokenizer | None
) -> str:
  """Hex SHA-256 of what decides embeddings."""
  identity = {
    "config": config,
    "params": files.fingerprint_params(params),
    "tokenizer": tokenizer and tokenizer.fingerprint,
  }
  text = json.dumps(identity, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def find_published(name: str, published: Mapping[str, Any]) -> Any:
  """What "random:ID" names."""
  key = name.removeprefix(RANDOM)
  if key not in published:
    raise ValueError(
      f"no published CLIP is called {key!r}; {nearest(key, published)}"
    )
  return published[key]


def param_shapes(module: clip_text.ClipText) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


def rules(config: clip_text.ClipTextConfig) -> list[mapping.Rule]:
  """Our parameters and their published names."""
  layer, block = PREFIX + "encoder.layers.{}", "blocks/block"
  norms = {
    "final_norm/norm": f"{PREFIX}final_layer_norm",
    f"{block}/norm1/norm": f"{layer}.layer_norm1",
    f"{block}/norm2/norm": f"{layer}.layer_norm2",
  }
  dense = {
    f"{block}/mlp/{name}": f"{layer}.mlp.{name}" for name in ("fc1", "fc2")
  }
  projections = {"query": "q", "key": "k", "value": "v", "out": "out"}
  for ours, theirs in projections.items():
    dense[f"{block}/attention/{ours}"] = f"{layer}.self_attn.{theirs}_proj"
  rule = mapping.Rule
  table = [
    rule("embed/embedding", f"{PREFIX}embeddings.token_embedding.weight"),
    rule("pos_embed", f"{PREFIX}embeddings.position_embedding.weight"),
  ]
  for path, key in norms.items():
    table.append(rule(f"{path}/scale", f"{key}.weight"))
  for path, key in dense.items():
    table.append(rule(f"{path}/kernel", f"{key}.weight", mapping.LINEAR))
  for path, key in (norms | dense).items():
    table.append(rule(f"{path}/bias", f"{key}.bias"))
  if config.projection_dim is not None:
    table.append(rule("projection/kernel", _PROJECTION, mapping.LINEAR))
  return table


def _text_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Drops a whole CLIP's image half; bare names get their prefix."""
  bare = ("embeddings.", "encoder.", "final_layer_norm.")
  other = ("vision_model.", "visual_projection.", "logit_scale")
  return {
    PREFIX + key if key.startswith(bare) else key: value
    for key, value in tensors.items()
    if not key.startswith(other)
  }


def parse_config(
  raw: dict[str, Any], path: pathlib.Path
) -> clip_text.ClipTextConfig:
  """A published config.json → ours; errors name the file and the field."""
  kind = raw.get("model_type")
  if kind not in (WHOLE, _TEXT):
    raise ValueError(
      f"{path}: model_type is {kind!r}; CLIP's text encoder is in "
      f'"{WHOLE}" and "{_TEXT}"'
    )
  read = whole = Fields(raw, path)
  if kind == WHOLE:
    # Older files say it all twice; as in transformers this one counts.
    older = whole.has("text_config_dict")
    read = whole.section("text_config_dict" if older else "text_config")
  # Published files leave out what is as in transformers' CLIPTextConfig, whose
  # values are our defaults too.
  fields = {
    field.name: read.get(field.name, type(field.default), field.default)
    for field in dataclasses.fields(clip_text.ClipTextConfig)
    if field.name != "projection_dim"
  }
  # A whole CLIP's own number counts, not the one of its text section.
  fields["projection_dim"] = whole.get("projection_dim", int, 512)
  return read.build(clip_text.ClipTextConfig, **fields)
