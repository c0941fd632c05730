"""Trains the embedded miniature's image encoder, and a text encoder with it.

Both come out in the published models' own file formats. Supervision is the
caption alone, never the scene's ground truth:

* contrastive: image and caption find each other among the batch's captions and
  hard negatives (the image's own caption with one thing wrong), CLIP's softmax
  (arXiv 2103.00020), on patch tokens pooled by learned queries;
* words: the caption's words, as a set, each from the patches that show it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psvae_jax import sharding
from psvae_jax.config import Config, EncoderModel
from psvae_jax.data import captions
from psvae_jax.data.scenes import SceneSource, foil_caption, sample_edit
from psvae_jax.data.sources import make_source
from psvae_jax.evaluators.image_metrics import MeanAccumulator
from psvae_jax.evaluators.scenes import SceneProbe
from psvae_jax.models.text import T5Encoder
from psvae_jax.models.vit import ViT, ViTConfig
from psvae_jax.optim import TrainedModule
from psvae_jax.pretrained import text as text_files
from psvae_jax.pretrained.encoder import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  save_encoder,
)
from psvae_jax.pretrained.tokenizer import (
  SPECIAL_TOKENS,
  Tokenizer,
  train_tokenizer,
)
from psvae_jax.tasks.base import Batch, EvalContext, Metrics, Params
from psvae_jax.tasks.data import TrainData, image_part
from psvae_jax.tasks.encoder_parts import (
  MAX_SCALE,
  held_out_batches,
  masked_mean,
  t5_config,
  unit,
  write_provenance,
)
from psvae_jax.train_state import TrainState


class Heads(nn.Module):
  """Projections that only training uses.

  Both read single patch tokens before they pool. Losses on the tokens' mean
  would make every token repeat the image's summary, and none say what is
  where.

  Attributes:
    embed_dim: dimension of the shared image-text space.
    vocab_size: words to predict.
    num_queries: learned queries that pool the image for the contrastive loss.
  """

  embed_dim: int
  vocab_size: int
  num_queries: int = 4

  @nn.compact
  def __call__(
    self, tokens: jax.Array, text: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Patch tokens (B, N, D) and texts (T, D) to what the losses read.

    Returns:
      unit image embeddings (B, K), unit text embeddings (T, K), word logits
      (B, V) and the logit scale.
    """
    scores = nn.Dense(self.num_queries, name="queries")(tokens)
    weights = jax.nn.softmax(scores, axis=1)
    pooled = jnp.einsum("bnq,bnd->bqd", weights, tokens)
    pooled = pooled.reshape(tokens.shape[0], -1)
    dense = nn.Dense(self.embed_dim, use_bias=False, name="image")
    image_embed = unit(dense(pooled))
    text_embed = unit(
      nn.Dense(self.embed_dim, use_bias=False, name="text")(text)
    )
    # Most words are absent from most captions: start near that prior.
    words = nn.Dense(
      self.vocab_size,
      bias_init=nn.initializers.constant(-4.0),
      name="words",
    )(tokens)
    # A word is in the picture if some patch shows it: log-mean-exp is a soft
    # maximum over patches (multiple-instance learning).
    words = jax.nn.logsumexp(words, axis=1) - np.log(tokens.shape[1])
    log_scale = self.param(
      "log_scale", nn.initializers.constant(np.log(10.0)), ()
    )
    scale = jnp.minimum(jnp.exp(log_scale), MAX_SCALE)
    return image_embed, text_embed, words, scale


def contrastive_loss(
  image: jax.Array, text: jax.Array, scale: jax.Array, tokens: jax.Array
) -> jax.Array:
  """CLIP's loss with extra captions; the i-th caption belongs to image i.

  Args:
    image: (B, K) unit vectors.
    text: (B + F, K) unit vectors: captions, then captions of no image.
    scale: logit scale.
    tokens: (B + F, L) token ids; a caption equal to an image's own is left out
      of that image's negatives.
  """
  count = image.shape[0]
  logits = scale * image @ text.T
  same = jnp.all(tokens[:count, None] == tokens[None], axis=-1)
  own = jnp.eye(count, tokens.shape[0], dtype=bool)
  logits = jnp.where(same & ~own, -1e9, logits)
  labels = jnp.arange(count)
  to_text = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  to_image = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :count].T, labels
  )
  return 0.5 * (to_text.mean() + to_image.mean())


def word_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Binary cross-entropy of "the caption has this word", summed over words.

  Args:
    logits: (B, V).
    tokens: (B, L); those of `SPECIAL_TOKENS` are not words.
  """
  vocab = logits.shape[-1]
  present = jax.nn.one_hot(tokens, vocab).max(axis=1)
  losses = optax.sigmoid_binary_cross_entropy(logits, present)
  is_word = jnp.arange(vocab) >= len(SPECIAL_TOKENS)
  return jnp.mean(jnp.sum(losses * is_word, axis=-1))


@dataclasses.dataclass(frozen=True)
class CaptionTransform:
  """Tokenises the caption of an element and a foil of its scene."""

  source: SceneSource
  tokenizer: Tokenizer

  def __call__(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    scene = self.source.scene(int(element["index"]))
    texts = [element["caption"], foil_caption(scene, rng)]
    tokens, mask = self.tokenizer(texts)
    return {
      "image": element["image"],
      "index": element["index"],
      "tokens": tokens,
      "token_mask": mask,
    }


class EncoderTask:
  """Implements `tasks.base.Task`.

  Args:
    stage: "encoder".
    config: the job.
    workdir: where the tokenizer is written, `<workdir>/<stage>/text_encoder`.
  """

  bridge = None

  def __init__(self, stage: str, config: Config, workdir: Path) -> None:
    model: EncoderModel = config.model
    self.name = stage
    self.config = config
    self.section = config.sections[stage]
    self.image_size = model.vision.image_size
    self._vit_config = ViTConfig(**dataclasses.asdict(model.vision))
    self._folder = Path(workdir) / stage / "export"
    text_folder = Path(workdir) / stage / "tokenizer"
    train_tokenizer(corpus(), text_folder, vocab_size=model.text.vocab_size)
    self.tokenizer = Tokenizer(
      str(text_folder), max_length=model.text.max_length
    )
    self._text_config = t5_config(model.text)
    shared = dict(
      unroll=config.compute.unroll,
      remat=config.compute.remat,
      dtype=jnp.dtype(config.compute.dtype),
    )
    self.vision = ViT(self._vit_config, **shared)
    self.text = T5Encoder(self._text_config, **shared)
    self.heads = Heads(model.embed_dim, model.text.vocab_size)
    multiplier = self.section.optim.encoder_multiplier
    self.modules = {
      "encoder": TrainedModule(self.section.optim, multiplier),
      "text_encoder": TrainedModule(self.section.optim),
      "heads": TrainedModule(self.section.optim),
    }
    self.frozen: Params = {}
    self.description = {"model": dataclasses.asdict(model)}
    content = json.dumps(dataclasses.asdict(model), sort_keys=True)
    self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    self._probe = SceneProbe(self.image_size, config.eval)
    self._pooled = jax.jit(self._pooled_fn)
    self._matches = jax.jit(self._matches_fn)

  def prepare(self, workdir: Path) -> None:
    """Nothing: all there is to this stage is its data."""

  def init(self, rng: jax.Array, frozen: Params) -> tuple[Params, Params]:
    rngs = jax.random.split(rng, 3)
    side = self.image_size
    images = jnp.zeros((1, side, side, 3), jnp.float32)
    tokens = jnp.zeros((1, self.config.model.text.max_length), jnp.int32)
    modules = {
      "encoder": self.vision.init(rngs[0], images),
      "text_encoder": self.text.init(rngs[1], tokens, tokens == 0),
      "heads": self.heads.init(
        rngs[2],
        jnp.zeros((1, 1, self._vit_config.width)),
        jnp.zeros((1, self._text_config.d_model)),
      ),
    }
    return {name: value["params"] for name, value in modules.items()}, {}

  def settle(self, params: Params, model_state: Params) -> Params:
    return model_state

  def _embed(
    self, params: Params, batch: Batch
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    images = self._patch_tokens(params["encoder"], batch["image"])
    images = images.reshape(images.shape[0], -1, images.shape[-1])
    # (B, 2, L) → captions first, then foils.
    tokens = _captions_then_foils(batch["tokens"])
    mask = _captions_then_foils(batch["token_mask"])
    states = self.text.apply({"params": params["text_encoder"]}, tokens, mask)
    text = masked_mean(states, mask)
    return self.heads.apply({"params": params["heads"]}, images, text)

  def _patch_tokens(self, params: Params, images: jax.Array) -> jax.Array:
    """uint8 (B, S, S, 3) → (B, h, w, D)."""
    unit = images.astype(jnp.float32) / 255.0
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return self.vision.apply({"params": params}, (unit - mean) / std)

  def _pooled_fn(
    self, params: Params, images: jax.Array
  ) -> dict[str, jax.Array]:
    pooled = self._patch_tokens(params, images).mean(axis=(1, 2))
    return {"features": sharding.constrain(pooled)}

  def gradients(
    self, state: TrainState, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Params, Metrics]:
    weights = self.section.loss

    def loss_fn(params):
      image, text, words, scale = self._embed(params, batch)
      tokens = _captions_then_foils(batch["tokens"])
      contrastive = contrastive_loss(image, text, scale, tokens)
      word = word_loss(words, batch["tokens"][:, 0])
      loss = weights.contrastive * contrastive + weights.words * word
      count = image.shape[0]
      own = jnp.sum(image * text[:count], axis=-1)
      foil = jnp.sum(image * text[count:], axis=-1)
      return loss, {
        "loss": loss,
        "loss_contrastive": contrastive,
        "loss_words": word,
        "foil_accuracy": jnp.mean(own > foil),
        "logit_scale": scale,
      }

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return grads, state.model_state, metrics

  def train_data(self, workdir: Path) -> TrainData:
    part = image_part(
      self.config,
      self.section.train.batch_size,
      self.image_size,
      workdir,
      self.example_transform(),
    )
    return TrainData(part)

  def example_transform(self) -> Callable:
    source = make_source(self.config.data, "train", self.image_size)
    return CaptionTransform(source, self.tokenizer)

  def _matches_fn(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Whether each caption lies nearer to its image than its foil does."""
    image, text, _, _ = self._embed(params, batch)
    count = image.shape[0]
    own = jnp.sum(image * text[:count], axis=-1)
    foil = jnp.sum(image * text[count:], axis=-1)
    out = {
      "foil_accuracy": (own > foil).astype(jnp.float32),
      "mask": batch["mask"],
    }
    return jax.tree.map(sharding.constrain, out)

  def evaluate(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    """Probe of the frozen tokens, and captions told from their foils."""
    scores = self._probe.scores(
      lambda images: self._pooled(params["encoder"], images), context.mesh
    )["features"]
    metrics = {
      f"eval/probe_{name}": value
      for name, value in scores.items()
      if name.startswith("accuracy")
    }
    means = MeanAccumulator()
    size, count = self.config.eval.batch_size, self.config.eval.num_images
    source = SceneSource("validation", count, self.image_size)
    transform = CaptionTransform(source, self.tokenizer)

    def row(i):
      return transform(source[i], np.random.default_rng(i))

    for batch in held_out_batches(row, count, size):
      out = self._matches(params, sharding.put_batch(batch, context.mesh))
      means.update(out, out.pop("mask"))
    return metrics | {f"eval/{k}": v for k, v in means.result().items()}

  def references(
    self, frozen: Params, context: EvalContext
  ) -> dict[str, dict[str, float]]:
    return {}

  def export(
    self, params: Params, metrics: dict[str, float], workdir: Path
  ) -> None:
    """Writes both encoders as Hugging Face folders, with provenance."""
    params = jax.device_get(params)
    save_encoder(
      self._folder / "encoder",
      self._vit_config,
      params["encoder"],
      IMAGENET_MEAN,
      IMAGENET_STD,
    )
    text_files.save_text_encoder(
      self._folder / "text_encoder",
      self._text_config,
      params["text_encoder"],
      self.tokenizer,
    )
    write_provenance(
      self._folder / "provenance.json",
      "the embedded miniature's image encoder, trained on scenes",
      "python -m psvae_jax.main --config=configs/encoder.py",
      self.config,
      metrics,
    )


def _captions_then_foils(x: jax.Array) -> jax.Array:
  """(B, 2, L) → (2B, L)."""
  return jnp.concatenate([x[:, 0], x[:, 1]])


def corpus() -> list[str]:
  """The sentences the tokenizer learns its words from."""
  scenes = SceneSource("train", 2048)
  texts = [
    captions.caption(scenes.scene(i), variant)
    for i in range(len(scenes))
    for variant in range(captions.NUM_VARIANTS)
  ]
  texts += [sample_edit("train", i).instruction for i in range(1024)]
  return texts
