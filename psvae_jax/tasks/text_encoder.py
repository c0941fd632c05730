"""Trains the embedded miniature's text encoder, from language alone.

Published text encoders have read a great deal; this one reads captions and
edit instructions, and learns which of them say the same. Each statement comes
in two wordings, which must find each other among the batch's other statements
and their foils (InfoNCE, arXiv 1807.03748, on mean-pooled tokens). And every
word says where its object stands ("left of", from either end of the sentence):
a generator needs that of each token, and the paraphrases' loss alone is slow to
find that word order means anything.

Foils name combinations that are held out too: of images, not of language.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psvae_jax import sharding
from psvae_jax.config import Config, TextEncoderModel
from psvae_jax.data import pipeline, scene_types, wordings
from psvae_jax.evaluators.image_metrics import MeanAccumulator
from psvae_jax.models.text import T5Encoder
from psvae_jax.optim import TrainedModule
from psvae_jax.pretrained import text as text_files
from psvae_jax.pretrained.tokenizer import Tokenizer, train_tokenizer
from psvae_jax.tasks.base import Batch, EvalContext, Metrics, Params
from psvae_jax.tasks.data import TrainData
from psvae_jax.tasks.encoder_parts import (
  MAX_SCALE,
  held_out_batches,
  masked_mean,
  t5_config,
  unit,
  write_provenance,
)
from psvae_jax.train_state import TrainState

_BIAS_GAIN = 20.0  # of the relative bias at the start, over T5's
_NUM_STATEMENTS = 10_000_000  # where the config names no number: they are drawn


class Heads(nn.Module):
  """What only training reads.

  Tokens (T, L, D) and pooled text (T, D) → unit vectors (T, K), the logit scale
  and logits (T, L, roles) of where each token's object stands.
  """

  embed_dim: int

  @nn.compact
  def __call__(
    self, tokens: jax.Array, pooled: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    roles = nn.Dense(len(wordings.ROLES), name="roles")(tokens)
    x = unit(nn.Dense(self.embed_dim, use_bias=False, name="text")(pooled))
    init = nn.initializers.constant(np.log(10.0))
    scale = jnp.exp(self.param("log_scale", init, ()))
    return x, jnp.minimum(scale, MAX_SCALE), roles


def paraphrase_loss(
  first: jax.Array,
  second: jax.Array,
  foils: jax.Array,
  scale: jax.Array,
  meaning: jax.Array,
) -> jax.Array:
  """InfoNCE of two wordings, each against the other's batch and all foils.

  Args:
    first, second: (B, K) unit vectors; row i of both says the same.
    foils: (F, K) of statements that are nearly one of these.
    scale: logit scale.
    meaning: int (B + F,) of statements and foils; equal ones are no negatives
      of each other.
  """
  count = first.shape[0]
  same = meaning[:count, None] == meaning[None]
  left_out = same & ~jnp.eye(count, meaning.shape[0], dtype=bool)

  def one(queries, keys):
    logits = scale * queries @ jnp.concatenate([keys, foils]).T
    logits = jnp.where(left_out, -1e9, logits)
    labels = jnp.arange(count)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  return 0.5 * (one(first, second) + one(second, first))


def role_loss(logits: jax.Array, roles: jax.Array) -> jax.Array:
  """Mean cross-entropy over tokens with a role.

  Args:
    logits: (…, roles).
    roles: int (…), negative at tokens without one.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.maximum(roles, 0)
  )
  there = roles >= 0
  return jnp.sum(losses * there) / jnp.maximum(jnp.sum(there), 1)


class StatementSource:
  """Random access to statements: {"text": str, "index": int64}."""

  def __init__(self, split: str, length: int, seed: int) -> None:
    self._split, self._length, self._seed = split, length, seed

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    text = wordings.statement(self._split, int(index), self._seed)
    return {"text": text, "index": np.int64(index)}

  def __repr__(self) -> str:
    return (
      f"StatementSource(split={self._split!r}, length={self._length}, "
      f"seed={self._seed})"
    )


@dataclasses.dataclass(frozen=True)
class WordingTransform:
  """Draws two wordings of a statement and some of its foils, as tokens.

  Gives "tokens" int32, "token_mask" bool and "roles" int32 (2 + foils, L), -1
  at tokens without a role, and "meaning" int32 (1 + foils,), a hash of what the
  statement and each foil say.

  Attributes:
    tokenizer: captions to ids.
    pieces: the text of each id; a caption's make up the caption.
    foils: how many.
  """

  tokenizer: Tokenizer
  pieces: tuple[str, ...]
  foils: int

  def __call__(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    text = element["text"]
    foils = [wordings.foil(text, rng) for _ in range(self.foils)]
    said = [wordings.reword(x, rng) for x in (text, text, *foils)]
    tokens, mask = self.tokenizer(said)
    meanings = [_hash(wordings.meaning(x)) for x in (text, *foils)]
    return {
      "index": element["index"],
      "tokens": tokens,
      "token_mask": mask,
      "roles": np.stack(
        [self._roles(*row) for row in zip(said, tokens, strict=True)]
      ),
      "meaning": np.array(meanings, np.int32),
    }

  def _roles(self, text: str, tokens: np.ndarray) -> np.ndarray:
    """The role of each token, by the last letter it adds to the text."""
    letters = np.array([len(self.pieces[token]) for token in tokens])
    ends = np.cumsum(letters)
    out = np.full(tokens.shape, -1, np.int32)
    for start, end, role in wordings.roles(text):
      # Padding and the end of the sequence add no letter.
      out[(letters > 0) & (start < ends) & (ends <= end)] = role
    return out


class TextEncoderTask:
  """Implements `tasks.base.Task`.

  Args:
    stage: "text_encoder".
    config: the job.
    workdir: the encoder is written to `<workdir>/<stage>/export`.
  """

  bridge = None
  image_size = scene_types.IMAGE_SIZE  # of the scenes that nobody draws

  def __init__(self, stage: str, config: Config, workdir: Path) -> None:
    model: TextEncoderModel = config.model
    section = config.sections[stage]
    self.name = stage
    self.config = config
    self.section = section
    self._folder = Path(workdir) / stage / "export"
    # Not in the export: that may be finished, and this job be refused.
    folder = Path(workdir) / stage / "tokenizer"
    train_tokenizer(corpus(), folder, vocab_size=model.text.vocab_size)
    self.tokenizer = Tokenizer(str(folder), max_length=model.text.max_length)
    self._text_config = t5_config(model.text)
    self.text = T5Encoder(
      self._text_config,
      unroll=config.compute.unroll,
      remat=config.compute.remat,
      dtype=jnp.dtype(config.compute.dtype),
    )
    self.heads = Heads(model.embed_dim)
    self.modules = {
      "text_encoder": TrainedModule(section.optim),
      "heads": TrainedModule(section.optim),
    }
    self.frozen: Params = {}
    self.description = {"model": dataclasses.asdict(model)}
    content = json.dumps(self.description["model"], sort_keys=True)
    self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    self._found = jax.jit(self._found_fn)

  def prepare(self, workdir: Path) -> None:
    """Nothing: all there is to this stage is its data."""

  def init(self, rng: jax.Array, frozen: Params) -> tuple[Params, Params]:
    rngs = jax.random.split(rng)
    tokens = jnp.zeros((1, self.config.model.text.max_length), jnp.int32)
    modules = {
      "text_encoder": self.text.init(rngs[0], tokens, tokens == 0),
      "heads": self.heads.init(
        rngs[1],
        jnp.zeros((1, 1, self._text_config.d_model)),
        jnp.zeros((1, self._text_config.d_model)),
      ),
    }
    params = {name: value["params"] for name, value in modules.items()}
    bias = params["text_encoder"]["relative_bias"]
    # As T5 starts, word order hardly shows, and to a bag of words most foils
    # are the same as what they are foils of: a saddle that is left slowly.
    bias["embedding"] = _BIAS_GAIN * bias["embedding"]
    return params, {}

  def settle(self, params: Params, model_state: Params) -> Params:
    return model_state

  def _embed(
    self, params: Params, batch: Batch
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unit vectors (B, 2 + foils, K), the logit scale, and logits of roles
    (B, 2 + foils, L, roles)."""
    tokens, mask = batch["tokens"], batch["token_mask"]
    rows = tokens.shape[:2]
    tokens = tokens.reshape(-1, tokens.shape[-1])
    mask = mask.reshape(tokens.shape)
    states = self.text.apply({"params": params["text_encoder"]}, tokens, mask)
    pooled = masked_mean(states, mask)
    heads = {"params": params["heads"]}
    x, scale, roles = self.heads.apply(heads, states, pooled)
    return x.reshape(*rows, -1), scale, roles.reshape(*rows, *roles.shape[1:])

  def gradients(
    self, state: TrainState, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Params, Metrics]:
    weights = self.section.loss

    def loss_fn(params):
      x, scale, logits = self._embed(params, batch)
      # Statements first, then all foils.
      meaning = batch["meaning"]
      meaning = jnp.concatenate([meaning[:, 0], meaning[:, 1:].reshape(-1)])
      foils = x[:, 2:].reshape(-1, x.shape[-1])
      paraphrase = paraphrase_loss(x[:, 0], x[:, 1], foils, scale, meaning)
      roles = role_loss(logits, batch["roles"])
      loss = weights.paraphrase * paraphrase + weights.roles * roles
      return loss, {
        "loss": loss,
        "loss_paraphrase": paraphrase,
        "loss_roles": roles,
        "foil_accuracy": jnp.mean(_beats_foils(x)),
        "logit_scale": scale,
      }

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return grads, state.model_state, metrics

  def _transform(self) -> WordingTransform:
    count = len(self.tokenizer)
    pieces = self.tokenizer.decode(np.arange(count)[:, None])
    return WordingTransform(
      self.tokenizer, tuple(pieces), self.section.loss.foils
    )

  def train_data(self, workdir: Path) -> TrainData:
    data = self.config.data
    length = data.num_train or _NUM_STATEMENTS
    source = StatementSource("train", length, data.seed)
    size = self.section.train.batch_size
    part = pipeline.Part(source, size, transform=self._transform())
    return TrainData(part)

  def _found_fn(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
    x, _, logits = self._embed(params, batch)
    roles = batch["roles"]
    right = (jnp.argmax(logits, axis=-1) == roles) | (roles < 0)
    found = {
      "foil_accuracy": _beats_foils(x),
      "role_accuracy": jnp.all(right, axis=(1, 2)).astype(jnp.float32),
      "mask": batch["mask"],
    }
    return jax.tree.map(sharding.constrain, found)

  def evaluate(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    """Shares of the validation split's statements.

    A language this small has most of them in training too.

    `eval/foil_accuracy`: whose two wordings are nearer to each other than the
    first is to any foil. `eval/role_accuracy`: all of whose words, wordings and
    foils, say where their objects stand.
    """
    means = MeanAccumulator()
    size, count = self.config.eval.batch_size, self.config.eval.num_images
    source = StatementSource("validation", count, 0)
    transform = self._transform()

    def row(i):
      return transform(source[i], np.random.default_rng(i))

    for batch in held_out_batches(row, count, size):
      out = self._found(params, sharding.put_batch(batch, context.mesh))
      means.update(out, out.pop("mask"))
    return {f"eval/{k}": v for k, v in means.result().items()}

  def references(
    self, frozen: Params, context: EvalContext
  ) -> dict[str, dict[str, float]]:
    return {}

  def export(
    self, params: Params, metrics: dict[str, float], workdir: Path
  ) -> None:
    """Writes the encoder as a Hugging Face folder, with provenance."""
    text_files.save_text_encoder(
      self._folder,
      self._text_config,
      jax.device_get(params["text_encoder"]),
      self.tokenizer,
    )
    write_provenance(
      self._folder / "provenance.json",
      "the embedded miniature's text encoder, trained on paraphrases",
      "python -m psvae_jax.main --config=configs/encoder.py:text",
      self.config,
      metrics,
    )


def _beats_foils(x: jax.Array) -> jax.Array:
  """(B, 2 + foils, K) → float32 (B,): 1 where the wordings are nearest."""
  near = jnp.sum(x[:, 0] * x[:, 1], axis=-1)
  foils = jnp.einsum("bk,bfk->bf", x[:, 0], x[:, 2:])
  return (near > foils.max(axis=1)).astype(jnp.float32)


def _hash(text: str) -> int:
  """31 bits."""
  digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") >> 1


def corpus() -> list[str]:
  """The sentences the tokenizer learns its words from."""
  rng = np.random.default_rng(0)
  texts = [wordings.statement("train", i) for i in range(4096)]
  return [wordings.reword(text, rng) for text in texts for _ in range(3)]
