"""Trains the generator: text-to-image, and editing after it.

One DiT learns the velocity of rectified flow on the autoencoder's normalised
latents. A batch is either encoded already (`cache.py`) or holds images and
tokens, which the step encodes; both give the same examples. An edit stage's
batch has two parts of fixed size, "t2i" and "edit": two forward passes of one
step, so that text-to-image is not forgotten.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psvae_jax import flow
from psvae_jax.config import Config
from psvae_jax.config.generator_checks import edit_rows
from psvae_jax.evaluators.edits import EditEvaluator
from psvae_jax.evaluators.generator import GeneratorEvaluator
from psvae_jax.models import generator as generator_lib
from psvae_jax.models.layers import wide
from psvae_jax.optim import TrainedModule
from psvae_jax.pretrained.encoder import load_encoder
from psvae_jax.pretrained.text import load_text_encoder
from psvae_jax.psvae import PSVAE
from psvae_jax.sampling import ImageSampler
from psvae_jax.sharding import mean_over, split_batch
from psvae_jax.tasks.autoencoder import EMBEDDED_ENCODER
from psvae_jax.tasks.base import Batch, Bridge, EvalContext, Metrics, Params
from psvae_jax.tasks.data import TrainData
from psvae_jax.tasks.flow_loss import FlowLoss
from psvae_jax.tasks.latent_data import LatentData
from psvae_jax.tasks.local_encoder import LocalEncoder
from psvae_jax.tasks.trained_generator import TrainedGenerator
from psvae_jax.train_state import TrainState

DIT = "dit"
# Stage → the parts of its batches.
PARTS = {"t2i": ("t2i",), "edit": ("t2i", "edit")}
EMBEDDED_TEXT_ENCODER = Path(__file__).parent.parent / "assets" / "text_encoder"


class GeneratorTask:
  """One stage of the generator; implements `tasks.base.Task`.

  Args:
    stage: a key of `PARTS`.
    config: the job.
    workdir: folder of the experiment; holds the autoencoder unless
      `config.autoencoder` names another.
  """

  def __init__(self, stage: str, config: Config, workdir: Path) -> None:
    self.name = stage
    self.config = config
    self.section = config.sections[stage]
    try:
      self.autoencoder = PSVAE.from_pretrained(
        config.autoencoder.path or workdir,
        stage=config.autoencoder.stage or None,
        batch_size=config.eval.batch_size,
      )
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"{error}. A generator needs a trained autoencoder: train "
        "configs/psvae.py in this workdir first, or name another with "
        "--config.autoencoder.path=FOLDER"
      ) from error
    self.text_encoder = None
    if config.model.condition == "text":
      self.text_encoder = load_text_encoder(
        config.model.text_encoder or EMBEDDED_TEXT_ENCODER,
        max_length=config.model.text_length,
      )
    self.generator = generator_lib.build(
      config.model,
      config.compute,
      self.autoencoder.model,
      self.text_encoder and self.text_encoder.module,
    )
    params = jax.device_get(self.autoencoder.params)
    self.frozen = {
      "autoencoder": {k: params[k] for k in generator_lib.MODULES},
      "text_encoder": {},
    }
    if self.text_encoder is not None:
      self.frozen["text_encoder"] = jax.device_get(self.text_encoder.params)
    self.frozen["null"] = self._null()
    self.frozen["original_encoder"] = _original_encoder(
      self.autoencoder, config, workdir
    )
    self.description = describe(config, self.autoencoder, self.text_encoder)
    self.fingerprint = fingerprint(self.description)
    self.image_size = self.autoencoder.output_size
    self.modules = {DIT: TrainedModule(self.section.optim)}
    self.bridge = Bridge("t2i", (DIT,)) if stage == "edit" else None
    self._dtype = wide(jnp.dtype(config.compute.dtype))
    self._data: LatentData | None = None
    self._encoder = LocalEncoder(
      self.generator, self.frozen["autoencoder"], config.eval.batch_size
    )
    self._sampler: ImageSampler | None = None
    self._flow_loss = {
      part: FlowLoss(functools.partial(self._encoded, part), self._velocity)
      for part in PARTS[stage]
    }
    self._evaluator = GeneratorEvaluator(config, self.image_size)
    self._edit_evaluator = EditEvaluator(config, self.image_size)

  @property
  def shift(self) -> float:
    """Time shift of training."""
    if self.section.loss.shift:
      return self.section.loss.shift
    return max(1.0, flow.dimension_shift(*self.generator.latent_shape))

  def _null(self) -> dict[str, np.ndarray]:
    """The condition of no prompt."""
    if self.text_encoder is None:
      return {"labels": np.array([self.config.model.num_classes], np.int32)}
    text, mask = self.text_encoder([""])
    text, mask = jax.device_get((text, mask))
    return {"text": np.where(mask[..., None], text, 0), "text_mask": mask}

  def init(self, rng: jax.Array, frozen: Params) -> tuple[Params, Params]:
    del frozen
    return {DIT: self.generator.init(rng)}, {}

  def settle(self, params: Params, model_state: Params) -> Params:
    del params
    return model_state

  def gradients(
    self, state: TrainState, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Params, Metrics]:
    """Gradients of the mean squared error of the velocity over all examples."""
    given = batch if self.name == "edit" else {"t2i": batch}
    parts = {
      name: self._examples(frozen, part, jax.random.fold_in(rng, i), name)
      for i, (name, part) in enumerate(sorted(given.items()))
    }

    def loss_fn(params, parts):
      return self._loss(params, parts)

    def gradients(parts):
      grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params[DIT], parts)
      return {DIT: grads}, metrics

    count = self.section.train.accumulate
    if count == 1:
      grads, metrics = gradients(parts)
    else:
      grads, metrics = mean_over(gradients, split_batch(parts, count))
    return grads, state.model_state, metrics

  def _examples(
    self, frozen: Params, batch: Batch, rng: jax.Array, part: str
  ) -> dict[str, Any]:
    """Everything of a step that has a row an example, drawn globally.

    Returns:
      "latent" x₀ (B, h, w, C) normalised, "noise" like it, "t" (B,),
      "condition", and for edits "source" and "source_mask".
    """
    weights = self.section.loss
    rngs = jax.random.split(rng, 4)
    examples = self._encoded(part, frozen, batch)
    latent, condition = examples["latent"], examples["condition"]
    size = latent.shape[:1]
    dropped = jax.random.bernoulli(rngs[2], weights.text_dropout, size)
    examples |= {
      "noise": jax.random.normal(rngs[0], latent.shape, latent.dtype),
      "t": flow.draw_times(
        rngs[1],
        size,
        weights.time_mean,
        weights.time_std,
        self.shift,
        weights.stratified,
      ).astype(latent.dtype),
      "condition": self.generator.drop(frozen, condition, dropped),
    }
    if part == "edit":
      kept = jax.random.bernoulli(rngs[3], 1 - weights.source_dropout, size)
      # Guidance never asks for the instruction without the source.
      examples["source_mask"] = kept
      examples["condition"] = self.generator.drop(
        frozen, examples["condition"], ~kept
      )
    return examples

  def _latent(
    self, frozen: Params, batch: Batch, cached: str, image: str
  ) -> jax.Array:
    """Normalised latents of a batch's images, encoded before or here."""
    if cached in batch:
      z = batch[cached]
    else:
      z = self.generator.posterior_mean(frozen, batch[image])
      z = z.astype(self.config.cache.dtype)
    return self.generator.normalise(frozen, z.astype(self._dtype))

  def _condition(self, frozen: Params, batch: Batch) -> generator_lib.Condition:
    """What a batch's examples are conditioned on."""
    if self.text_encoder is None:
      label = batch["label"]  # below 0 where the class is not known
      null = self.config.model.num_classes
      return {"labels": jnp.where(label < 0, null, label)}
    mask = batch["token_mask"]
    if "text" in batch:
      text = batch["text"]
    else:
      text = self.generator.encode_text(frozen, batch["tokens"], mask)
      text = jnp.where(mask[..., None], text, 0)
      text = text.astype(self.config.cache.dtype)
    return {"text": text.astype(self._dtype), "text_mask": mask}

  def _loss(
    self, params: Params, parts: dict[str, Any]
  ) -> tuple[jax.Array, Metrics]:
    """Mean over all examples of all parts, and figures."""
    errors, metrics = [], {}
    for name, part in parts.items():
      x_t = flow.interpolate(part["latent"], part["noise"], part["t"])
      v = self._velocity(params, x_t, part["t"], part)
      target = flow.velocity(part["latent"], part["noise"])
      error = jnp.mean(jnp.square(v - target), axis=(1, 2, 3))
      errors.append(error)
      if len(parts) > 1:
        metrics[f"loss_{name}"] = jnp.mean(error)
    loss = jnp.mean(jnp.concatenate(errors))
    return loss, {**metrics, "loss": loss}

  def prepare(self, workdir: Path) -> None:
    """Writes the caches and the latents' statistics, unless they are there.

    Raises:
      ValueError: the workdir holds another autoencoder's.
    """
    self._data = self._latent_data(workdir)
    self.stats = self._data.prepare(PARTS[self.name])
    self._encoder.release()
    self.frozen["latent_stats"] = self.stats.arrays

  def _latent_data(self, workdir: Path) -> LatentData:
    return LatentData(
      self.config,
      workdir,
      self.autoencoder,
      self.text_encoder,
      self._encoder,
    )

  def train_data(self, workdir: Path) -> TrainData:
    data = self._data or self._latent_data(workdir)
    size = self.section.train.batch_size
    if self.name == "t2i":
      return TrainData(data.part("t2i", size), data.tokenize)
    edits = edit_rows(self.section)
    parts = {
      "t2i": data.part("t2i", size - edits),
      "edit": data.part("edit", edits),
    }
    return TrainData(
      {name: part for name, part in parts.items() if part.batch_size},
      data.tokenize,
    )

  def evaluate(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    """Held-out loss and, of samples, everything that `evaluators` measure.

    Before the last step it is the loss and a quick look.
    """
    model = TrainedGenerator(
      self._sampler_on(context.mesh), params[DIT], frozen, self.config.sample
    )
    metrics = self._held_out_loss(params, frozen, context)
    done = context.step is None or context.step >= self.section.train.steps
    quick = not done
    metrics |= self._evaluator.evaluate(
      model,
      context.folder,
      quick=quick,
      step=context.step,
      quarantine=context.quarantine,
    )
    if self.name == "edit":
      metrics |= self._edit_evaluator.evaluate(
        model, context.folder, quick=quick, quarantine=context.quarantine
      )
    return metrics

  def _sampler_on(self, mesh: Mesh) -> ImageSampler:
    """Made once: its programs are compiled for one mesh."""
    if self._sampler is None:
      self._sampler = ImageSampler(
        self.generator,
        batch_size=self.config.eval.batch_size,
        mesh=mesh,
        tokenizer=self.text_encoder and self.text_encoder.tokenizer,
      )
    return self._sampler

  def _held_out_loss(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    """`FlowLoss` of every part of the stage's batches."""
    metrics = {}
    for part in PARTS[self.name]:
      batches = self._data.held_out(part, self.config.eval.num_images)
      found = self._flow_loss[part](params[DIT], frozen, batches, context.mesh)
      if part == "edit":
        found = {
          name.replace("eval/", "eval/edit_"): x for name, x in found.items()
        }
      metrics |= found
    return metrics

  def _encoded(self, part: str, frozen: Params, batch: Batch) -> dict[str, Any]:
    """A batch as latents and condition, nothing dropped."""
    examples = {
      "latent": self._latent(frozen, batch, "latent", "image"),
      "condition": self._condition(frozen, batch),
    }
    if part == "edit":
      examples["source"] = self._latent(
        frozen, batch, "source_latent", "source"
      )
    return examples

  def _velocity(
    self, params: Params, x_t: jax.Array, t: jax.Array, examples: dict[str, Any]
  ) -> jax.Array:
    return self.generator.velocity(
      params,
      x_t,
      t,
      examples["condition"],
      examples.get("source"),
      examples.get("source_mask"),
    )

  def references(
    self, frozen: Params, context: EvalContext
  ) -> dict[str, dict[str, float]]:
    return {}

  def export(
    self, params: Params, metrics: dict[str, float], workdir: Path
  ) -> None:
    """Nothing: checkpoints, statistics and config are in the workdir."""


def _original_encoder(
  autoencoder: PSVAE, config: Config, workdir: Path
) -> Params:
  """Parameters of E as it was before the autoencoder tuned it."""
  folder = Path(config.autoencoder.path or workdir)
  copies = [path.parent for path in sorted(folder.glob("frozen/*/config.json"))]
  model = autoencoder.model.config
  encoder = load_encoder(
    copies[0] if copies else model.encoder or EMBEDDED_ENCODER,
    final_norm=model.final_norm,
  )
  return jax.device_get(encoder.params)


def describe(
  config: Config, autoencoder: PSVAE, text_encoder: Any
) -> dict[str, Any]:
  """What a generator is: its shape, the latents' and the text's origin.

  Steps, learning rates, data and how it samples are not part of it.
  """
  model = dataclasses.asdict(config.model)
  model.pop("text_encoder")  # a folder may move; its bytes count
  return {
    "model": model,
    "autoencoder": autoencoder.latent_fingerprint,
    "text_encoder": text_encoder.fingerprint if text_encoder else "",
  }


def fingerprint(description: dict[str, Any]) -> str:
  """Identity of what `describe` returns."""
  content = json.dumps(description, sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]
