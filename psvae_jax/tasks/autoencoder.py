"""One stage of the autoencoder: its losses, and their gradients.

Which stage it is, `routes.ROUTES` alone knows.
"""

import dataclasses
import functools
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
from psvae_jax.models import discriminator as discriminator_lib
from psvae_jax.models.latent import DiagonalGaussian
from psvae_jax.models.layers import wide
from psvae_jax.models.pixels import last_layer
from psvae_jax.optim import TrainedModule
from psvae_jax.pretrained.dino import load_dino
from psvae_jax.pretrained.encoder import Encoder, load_encoder, save_encoder
from psvae_jax.pretrained.lpips import PerceptualNetwork
from psvae_jax.sharding import mean_over, split_batch
from psvae_jax.tasks import perceptual as perceptual_lib
from psvae_jax.tasks.adversarial import Adversary, Verdict
from psvae_jax.tasks.base import (
  Batch,
  Bridge,
  EvalContext,
  Metrics,
  Params,
)
from psvae_jax.tasks.data import TrainData, image_part
from psvae_jax.tasks.perceptual import PERCEPTUAL
from psvae_jax.tasks.routes import PD, ROUTES, SD, SE, D, E, Route
from psvae_jax.train_state import TrainState


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
  noise: jax.Array,
) -> Outputs:
  """One forward pass of the training graph.

  Args:
    model: the modules.
    route: which gradients flow.
    params: trained modules' parameters.
    frozen: {"teacher": …}: the original E, which is also E itself where E does
      not train (one forward pass then serves both).
    images: (B, S, S, 3) at the product's size, levels in [0, 255].
    noise: (B, h, w, C) standard normal, this batch's part of the global draw.
  """
  dtype = wide(model.encoder.dtype)
  x = images.astype(dtype) / 127.5 - 1.0
  teacher = jax.lax.stop_gradient(model.features(frozen["teacher"], x))
  features = model.features(params[E], x) if E in route.trains else teacher
  posterior = model.posterior(params[SE], features)
  z = posterior.at(noise)
  decoded = model.decode_features(
    params[SD], _cut(z, SE, route.semantic_decoded)
  )
  reconstruction = model.decode_pixels(params[PD], _cut(z, SE, route.pixel))
  return Outputs(teacher, features, posterior, decoded, x, reconstruction)


def pixel_loss(
  weights: AutoencoderLossConfig,
  pred: jax.Array,
  target: jax.Array,
  lpips: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
  """L1 + MSE + perceptual terms, unweighted as a whole.

  Args:
    weights: the stage's loss section.
    pred, target: (B, S, S, 3) float32 in [−1, 1].
    lpips: (pred, target) → (B,) distances; needed where it has a weight.
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
  if weights.lpips:
    metrics["loss_lpips"] = jnp.mean(lpips(pred, target))
    total += weights.lpips * metrics["loss_lpips"]
  return total, metrics


@dataclasses.dataclass(frozen=True)
class _Pass:
  """A forward pass of one (micro-)batch that waits for the weight of the GAN.

  Attributes:
    pull: cotangents of (sum of the other terms, x̂) → gradient of the modules.
    other: that sum.
    pixel: the pixel loss without its adversarial part.
    pixel_grad: its gradient at x̂.
    verdict: the discriminator's, or None without one.
    metrics: unweighted figures.
  """

  pull: Callable
  other: jax.Array
  pixel: jax.Array
  pixel_grad: jax.Array
  verdict: Verdict | None
  metrics: Metrics


class AutoencoderTask:
  """One stage of the autoencoder; implements `tasks.base.Task`.

  Args:
    stage: a key of `ROUTES`.
    config: the job.
    workdir: folder of the experiment.
    encoder: E, where it is not to be loaded by its name in the config; it may
      be abstract (`pretrained.encoder.abstract_encoder`), for tracing alone.
    perceptual: the network of LPIPS, likewise (`perceptual.abstract`).
  """

  def __init__(
    self,
    stage: str,
    config: Config,
    workdir: Path,
    encoder: Encoder | None = None,
    perceptual: PerceptualNetwork | None = None,
  ) -> None:
    self.name = stage
    self.config = config
    self.route = ROUTES[stage]
    self.section = config.sections[stage]
    shared = dict(
      remat=config.compute.remat,
      unroll=config.compute.unroll,
      dtype=jnp.dtype(config.compute.dtype),
    )
    if encoder is None:
      loaded = load_encoder(
        config.model.encoder or str(EMBEDDED_ENCODER),
        final_norm=config.model.final_norm,
        **shared,
      )
      # On the host: the loop puts its own copy on the mesh.
      params = jax.device_get(loaded.params)
      encoder = dataclasses.replace(loaded, params=params)
    self.model = model_lib.build(
      config.model,
      config.compute,
      encoder.module,
      encoder.mean,
      encoder.std,
    )
    self._encoder = encoder
    self.frozen = {"teacher": encoder.params}
    self.description = describe(config, encoder)
    self.fingerprint = fingerprint(self.description)
    self.image_size = config.model.output_size
    optim = self.section.optim
    multiplier = {E: optim.encoder_multiplier}
    self.modules = {
      name: TrainedModule(optim, multiplier.get(name, 1.0))
      for name in self.route.trains
    }
    self.perceptual = None
    if self.section.loss.lpips:
      self.perceptual = perceptual or perceptual_lib.load(config)
      self.frozen[PERCEPTUAL] = self.perceptual.params
    self._adversary = None
    if self.section.loss.gan:
      dino = None
      if config.discriminator.kind == "dino":
        dino = load_dino(config.discriminator.weights, **shared)
        self.frozen[D] = dino.params
      self._adversary = Adversary(
        discriminator_lib.build_discriminator(
          config.discriminator, config.compute, dino
        ),
        config.discriminator.augment,
        self.section.loss,
      )
      self.modules[D] = TrainedModule(
        self.section.discriminator_optim,
        start=self.section.loss.gan_start,
        ema=False,
      )
    self.bridge = None
    if self.route.starts_from is not None:
      earlier = self.route.starts_from
      self.bridge = Bridge(
        earlier, ROUTES[earlier].trains, (D,) if D in self.modules else ()
      )
    self._evaluator = AutoencoderEvaluator(self.model, config)

  @property
  def discriminator(self) -> discriminator_lib.Discriminator | None:
    """The adversary's networks; None in a stage without the term."""
    return self._adversary and self._adversary.discriminator

  def prepare(self, workdir: Path) -> None:
    """Nothing: all there is to this stage is its data."""

  def init(self, rng: jax.Array, frozen: Params) -> tuple[Params, Params]:
    params = self.model.init(rng, frozen["teacher"])
    if E in self.route.trains:
      params[E] = jax.tree.map(jnp.copy, frozen["teacher"])
    state = {}
    if self._adversary is not None:
      params[D], state[D] = self._adversary.discriminator.init(
        jax.random.fold_in(rng, 1), self.image_size, frozen.get(D, {})
      )
    return {name: params[name] for name in self.modules}, state

  def settle(self, params: Params, model_state: Params) -> Params:
    if self._adversary is None:
      return model_state
    return {D: self._adversary.settle(params[D], model_state[D])}

  def latent_terms(self, out: Outputs) -> tuple[dict[str, jax.Array], Metrics]:
    """Weighted terms by their name in `Route`, all but "pixel"; figures."""
    weights = self.section.loss
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
    return terms, metrics

  def pixel_loss(
    self, frozen: Params, pred: jax.Array, target: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """The function of this name, with this stage's weights and networks.

    No gradient reaches the frozen networks.
    """
    lpips = None
    if self.perceptual is not None:
      params = jax.lax.stop_gradient(frozen[PERCEPTUAL])
      lpips = functools.partial(self.perceptual.distance, params)
    return pixel_loss(self.section.loss, pred, target, lpips)

  def gradients(
    self, state: TrainState, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Params, Metrics]:
    """Gradients of all losses at the parameters before the step.

    The autoencoder is differentiated once: the pixel loss enters as its
    gradient at x̂, that of the rest and that of the adversarial part added
    under the weight λ. λ needs the decoder's last kernel only. With
    accumulation it is computed over the whole batch in a first sweep.
    """
    count = self.section.train.accumulate
    parts = split_batch(self._global_draws(batch["image"], rng), count)

    def start(part):
      return self._forward(state, frozen, part)

    if count == 1:
      only = start(jax.tree.map(lambda x: x[0], parts))
      weight = self._gan_weight(state.step, lambda: self._at_last_layer(only))
      grads, metrics = self._finish(only, weight)
    else:

      def sweep():
        return mean_over(lambda part: self._at_last_layer(start(part)), parts)

      weight = self._gan_weight(state.step, sweep, costly=True)
      grads, metrics = mean_over(
        lambda part: self._finish(start(part), weight), parts
      )
    model_state = state.model_state
    if self._adversary is not None:
      model_state = {
        D: self._adversary.advance(
          state.params[D], state.model_state[D], state.step
        )
      }
    return grads, model_state, metrics

  def _global_draws(self, images: jax.Array, rng: jax.Array) -> Params:
    """Everything of a step that has a row an example."""
    size, grid = images.shape[0], self.model.grid
    shape = (size, grid, grid, self.config.model.channels)
    dtype = wide(self.model.encoder.dtype)
    draws = {"image": images, "noise": jax.random.normal(rng, shape, dtype)}
    if self._adversary is not None:
      draws["augment"] = self._adversary.draw(
        jax.random.fold_in(rng, 1), size, self.image_size
      )
    return draws

  def _forward(self, state: TrainState, frozen: Params, part: Params) -> _Pass:
    """Runs one (micro-)batch up to where the adversarial weight is needed."""
    trained = {name: state.params[name] for name in self.route.trains}

    def outputs(params):
      out = forward(
        self.model, self.route, params, frozen, part["image"], part["noise"]
      )
      terms, metrics = self.latent_terms(out)
      return (sum(terms.values()), out.reconstruction), (out.image, metrics)

    (other, fake), pull, (real, metrics) = jax.vjp(
      outputs, trained, has_aux=True
    )
    (pixel, pixel_metrics), pixel_grad = jax.value_and_grad(
      lambda x: self.pixel_loss(frozen, x, real), has_aux=True
    )(fake)
    metrics = {**metrics, **pixel_metrics}
    verdict = None
    if self._adversary is not None:
      verdict = self._adversary.judge(
        state.params[D],
        state.model_state[D],
        frozen.get(D, {}),
        real,
        fake,
        part["augment"],
        state.step,
      )
      metrics |= verdict.metrics
    return _Pass(
      lambda at_other, at_fake: pull((at_other, at_fake))[0],
      other,
      pixel,
      pixel_grad,
      verdict,
      metrics,
    )

  def _at_last_layer(self, done: _Pass) -> tuple[jax.Array, jax.Array]:
    """Gradients of pixel and generator loss at the decoder's last kernel.

    The compiler drops the rest of the backward pass, which nothing reads.
    """
    nothing = jnp.zeros_like(done.other)
    return tuple(
      last_layer(self.model.pixel_decoder, done.pull(nothing, cotangent)[PD])
      for cotangent in (done.pixel_grad, done.verdict.image_grad)
    )

  def _gan_weight(
    self, step: jax.Array, at_last_layer: Callable, costly: bool = False
  ) -> Any:
    """Weight of the generator loss in the pixel loss; 0 before it is felt.

    Args:
      step: steps done.
      at_last_layer: computes the two gradients that λ compares.
      costly: whether to do so only where λ is wanted.
    """
    if self._adversary is None:
      return None
    weights, felt = self.section.loss, self._adversary.felt(step)
    nothing = jnp.zeros((), wide(self.model.encoder.dtype))

    def weight():
      if not weights.gan_adaptive:
        return nothing + weights.gan
      return weights.gan * losses.adaptive_weight(*at_last_layer())

    if costly:
      return jax.lax.cond(felt, weight, lambda: nothing)
    return jnp.where(felt, weight(), nothing)

  def _finish(self, done: _Pass, weight: Any) -> tuple[Params, Metrics]:
    """Gradients of every module once the adversarial weight is known."""
    pixel, at_fake, metrics = done.pixel, done.pixel_grad, dict(done.metrics)
    if done.verdict is not None:
      pixel = pixel + weight * metrics["loss_generator"]
      at_fake = at_fake + weight * done.verdict.image_grad
      metrics["gan_weight"] = weight
    scale = self.section.loss.pixel
    loss = done.other + scale * pixel
    grads = done.pull(jnp.ones_like(done.other), scale * at_fake)
    if done.verdict is not None:
      grads[D] = done.verdict.grads
    return grads, {**metrics, "loss_pixel": pixel, "loss": loss}

  def train_data(self, workdir: Path) -> TrainData:
    size = self.section.train.batch_size
    return TrainData(image_part(self.config, size, self.image_size, workdir))

  def evaluate(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    params = {E: frozen["teacher"], **params}
    return self._evaluator.evaluate(
      params,
      context.mesh,
      context.folder,
      frozen["teacher"],
      quarantine=context.quarantine,
    )

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


def describe(config: Config, encoder: Any) -> dict[str, Any]:
  """What an autoencoder is: model section, preprocessing, E's bytes.

  Steps, learning rates, data and the adversary are not part of it.
  """
  model = dataclasses.asdict(config.model)
  model.pop("encoder")  # a folder may move; its bytes count
  return {
    "model": model,
    "mean": list(encoder.mean),
    "std": list(encoder.std),
    "encoder": encoder.fingerprint,
  }


def fingerprint(description: dict[str, Any]) -> str:
  """Identity of what `describe` returns."""
  content = json.dumps(description, sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]
