"""The autoencoder's stages: what trains, and which loss reaches what.

`ROUTES` is the only place that knows the difference between stages. A loss
reaches a module if and only if the table says so; everything else is cut by
`stop_gradient`, and the tests read the table and check the gradients.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import losses
from psvae_jax.config import AutoencoderLossConfig, Config
from psvae_jax.evaluators.autoencoder import AutoencoderEvaluator
from psvae_jax.models import autoencoder as model_lib
from psvae_jax.models.latent import DiagonalGaussian
from psvae_jax.models.layers import wide
from psvae_jax.pretrained.encoder import load_encoder, save_encoder
from psvae_jax.tasks.base import Batch, EvalContext, Metrics, Params

E = "encoder"
SE = "semantic_encoder"
SD = "semantic_decoder"
PD = "pixel_decoder"


@dataclasses.dataclass(frozen=True)
class Route:
  """Gradient routes of one stage: loss → modules it reaches.

  Attributes:
    semantic_tuned: L_s of f′ = E(image) against the teacher; empty where E is
      the teacher itself.
    semantic_decoded: L_s of f″ against the teacher.
    kl: KL of the posterior.
    pixel: pixel loss of the decoded image.
    starts_from: the stage whose parameters start this one.
  """

  semantic_tuned: tuple[str, ...]
  semantic_decoded: tuple[str, ...]
  kl: tuple[str, ...]
  pixel: tuple[str, ...]
  starts_from: str | None = None

  def __post_init__(self):
    for name, reach in self.losses.items():
      # E's output is computed once for all losses: a loss that goes through
      # semantic_encoder goes on into E wherever E trains.
      if SE in reach and (E in reach) != (E in self.trains):
        raise ValueError(f"route of {name} passes {SE} but not {E}: {reach}")

  @property
  def losses(self) -> dict[str, tuple[str, ...]]:
    return {
      "semantic_tuned": self.semantic_tuned,
      "semantic_decoded": self.semantic_decoded,
      "kl": self.kl,
      "pixel": self.pixel,
    }

  @property
  def trains(self) -> tuple[str, ...]:
    """Trained modules, in the order of the data flow."""
    reached = {module for reach in self.losses.values() for module in reach}
    return tuple(name for name in model_lib.MODULES if name in reached)


ROUTES: dict[str, Route] = {
  # Stage 1: compress frozen features; pixels see stop_gradient(z).
  "svae": Route(
    semantic_tuned=(),
    semantic_decoded=(SE, SD),
    kl=(SE,),
    pixel=(PD,),
  ),
  # Stage 2: everything trains, the frozen copy of E holds the semantics.
  "psvae": Route(
    semantic_tuned=(E,),
    semantic_decoded=(E, SE, SD),
    kl=(E, SE),
    pixel=(E, SE, PD),
    starts_from="svae",
  ),
}


def _cut(x: Any, module: str, reach: tuple[str, ...]) -> Any:
  """Stops the gradient behind `module` unless the loss reaches it."""
  return x if module in reach else jax.lax.stop_gradient(x)


@dataclasses.dataclass(frozen=True)
class Outputs:
  """Everything a loss may read, with this stage's cuts in place."""

  teacher: jax.Array
  features: jax.Array
  posterior: DiagonalGaussian
  decoded: jax.Array
  image: jax.Array
  reconstruction: jax.Array


def forward(
  model: model_lib.Autoencoder,
  route: Route,
  params: Params,
  frozen: Params,
  images: jax.Array,
  rng: jax.Array,
) -> Outputs:
  """One forward pass of the training graph.

  Args:
    model: the modules.
    route: which gradients flow.
    params: trained modules' parameters.
    frozen: {"teacher": …}: the original E, which is also E itself where E does
      not train (one forward pass then serves both).
    images: uint8 (B, S, S, 3) at the product's size.
    rng: latent noise, drawn for the global batch.
  """
  dtype = wide(model.encoder.dtype)
  x = images.astype(dtype) / 127.5 - 1.0
  teacher = jax.lax.stop_gradient(model.features(frozen["teacher"], x))
  features = model.features(params[E], x) if E in route.trains else teacher
  posterior = model.posterior(params[SE], features)
  z = posterior.sample(rng)
  decoded = model.decode_features(
    params[SD], _cut(z, SE, route.semantic_decoded)
  )
  reconstruction = model.decode_pixels(params[PD], _cut(z, SE, route.pixel))
  return Outputs(teacher, features, posterior, decoded, x, reconstruction)


def pixel_loss(
  weights: AutoencoderLossConfig, pred: jax.Array, target: jax.Array
) -> tuple[jax.Array, Metrics]:
  """L1 + MSE + perceptual, unweighted as a whole.

  Args:
    weights: the stage's loss section.
    pred, target: (B, S, S, 3) float32 in [−1, 1].
  """
  metrics = {
    "loss_l1": losses.l1_loss(pred, target),
    "loss_mse": jnp.mean(jnp.square(pred - target)),
  }
  total = weights.l1 * metrics["loss_l1"] + weights.mse * metrics["loss_mse"]
  if weights.perceptual:
    value = losses.multiscale_gradient_loss(pred, target)
    metrics["loss_perceptual"] = value
    total += weights.perceptual * value
  return total, metrics


class AutoencoderTask:
  """One stage of the autoencoder; implements `tasks.base.Task`.

  Args:
    stage: a key of `ROUTES`.
    config: the job.
    workdir: folder of the experiment.
  """

  def __init__(self, stage: str, config: Config, workdir: Path) -> None:
    self.name = stage
    self.config = config
    self.route = ROUTES[stage]
    self.section = config.sections[stage]
    encoder = load_encoder(
      config.model.encoder or str(EMBEDDED_ENCODER),
      final_norm=config.model.final_norm,
      remat=config.compute.remat,
      unroll=config.compute.unroll,
      dtype=jnp.dtype(config.compute.dtype),
    )
    self.model = model_lib.build(
      config.model,
      config.compute,
      encoder.module,
      encoder.mean,
      encoder.std,
    )
    self._encoder = encoder
    self.frozen = {"teacher": encoder.params}
    self.fingerprint = fingerprint(config, encoder)
    self.image_size = config.model.output_size
    multiplier = {E: self.section.optim.encoder_multiplier}
    self.multipliers = {
      name: multiplier.get(name, 1.0) for name in self.route.trains
    }
    self.bridge = None
    if self.route.starts_from is not None:
      earlier = self.route.starts_from
      self.bridge = (earlier, ROUTES[earlier].trains)
    self._evaluator = AutoencoderEvaluator(self.model, config)

  def init(self, rng: jax.Array, frozen: Params) -> Params:
    params = self.model.init(rng, frozen["teacher"])
    if E in self.route.trains:
      params[E] = jax.tree.map(jnp.copy, frozen["teacher"])
    return {name: params[name] for name in self.route.trains}

  def loss_terms(
    self, params: Params, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[dict[str, jax.Array], Metrics]:
    """Weighted terms by their name in `Route`, and unweighted metrics."""
    weights = self.section.loss
    out = forward(self.model, self.route, params, frozen, batch["image"], rng)
    terms, metrics = {}, {}
    if self.route.semantic_tuned:
      mse, cosine = losses.semantic_loss(out.features, out.teacher)
      terms["semantic_tuned"] = weights.semantic * (mse + cosine)
      metrics["loss_semantic_tuned"] = mse + cosine
    mse, cosine = losses.semantic_loss(out.decoded, out.teacher)
    terms["semantic_decoded"] = weights.semantic * (mse + cosine)
    metrics["loss_semantic_decoded"] = mse + cosine
    metrics["loss_kl"] = losses.kl_loss(out.posterior, weights.kl_reduction)
    terms["kl"] = weights.kl * metrics["loss_kl"]
    pixel, pixel_metrics = pixel_loss(weights, out.reconstruction, out.image)
    terms["pixel"] = weights.pixel * pixel
    return terms, {**metrics, **pixel_metrics, "loss_pixel": pixel}

  def gradients(
    self, params: Params, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Metrics]:
    """Gradients of the summed terms.

    An adversarial stage computes its discriminator's gradients here too, from
    the same forward pass and the same pre-step parameters.
    """

    def loss_fn(params):
      terms, metrics = self.loss_terms(params, frozen, batch, rng)
      loss = sum(terms.values())
      return loss, {"loss": loss, **metrics}

    return jax.grad(loss_fn, has_aux=True)(params)

  def example_transform(self) -> Callable | None:
    return None

  def evaluate(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    params = {E: frozen["teacher"], **params}
    return self._evaluator.evaluate(params, context.mesh, context.folder)

  def references(
    self, frozen: Params, context: EvalContext
  ) -> dict[str, dict[str, float]]:
    """The frozen encoder's probe and its floors; nothing without a probe."""
    metrics = self._evaluator.encoder_floor(frozen["teacher"], context.mesh)
    return {"encoder": metrics} if metrics else {}

  def export(
    self, params: Params, metrics: dict[str, float], workdir: Path
  ) -> None:
    """Saves E as it was loaded, once: stage 1's checkpoints do not hold it."""
    folder = workdir / "frozen" / self._encoder.fingerprint[:16]
    if not (folder / "config.json").exists():  # written last
      encoder = self._encoder
      save_encoder(
        folder,
        encoder.module.config,
        encoder.params,
        encoder.mean,
        encoder.std,
      )


EMBEDDED_ENCODER = Path(__file__).parent.parent / "assets" / "encoder"


def fingerprint(config: Config, encoder: Any) -> str:
  """Identity of an autoencoder: model section, preprocessing, E's bytes.

  Steps, learning rates and data are not part of it.
  """
  model = dataclasses.asdict(config.model)
  model.pop("encoder")  # a folder may move; its bytes count
  content = json.dumps(
    {
      "model": model,
      "mean": list(encoder.mean),
      "std": list(encoder.std),
      "encoder": encoder.fingerprint,
    },
    sort_keys=True,
  )
  return hashlib.sha256(content.encode()).hexdigest()[:16]
