"""The adversarial term of a pixel loss: everything between x, x̂ and two losses.

The generator's and the discriminator's loss are computed from the same forward
pass and the same parameters, those before the step. The decoder feels the term
through its gradient at x̂ alone, so the discriminator is differentiated here,
once, and the autoencoder elsewhere.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import losses
from psvae_jax.config import AutoencoderLossConfig
from psvae_jax.models import diffaug
from psvae_jax.models.discriminator import Discriminator
from psvae_jax.tasks.base import Metrics, Params

_SETTLING = 100  # power iterations: within 1 % of σ for random kernels


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the discriminator says of a batch; zeros before its start step.

  Attributes:
    image_grad: gradient of the generator's loss at x̂, (B, S, S, 3).
    grads: gradient of the discriminator's loss at its parameters.
    metrics: unweighted losses and mean logits.
  """

  image_grad: jax.Array
  grads: Params
  metrics: Metrics


jax.tree_util.register_dataclass(Verdict)


@dataclasses.dataclass(frozen=True)
class Adversary:
  """A discriminator and the schedule of its term.

  Attributes:
    discriminator: the networks.
    operations: DiffAug's, on what the discriminator sees.
    loss: the stage's loss section: weight, start and warm-up.
  """

  discriminator: Discriminator
  operations: tuple[str, ...]
  loss: AutoencoderLossConfig

  def started(self, step: jax.Array) -> jax.Array:
    """Whether the discriminator trains in the step after `step` steps."""
    return step >= self.loss.gan_start

  def felt(self, step: jax.Array) -> jax.Array:
    """Whether the pixel decoder feels it."""
    return step >= self.loss.gan_start + self.loss.gan_warmup

  def draw(self, rng: jax.Array, batch: int, image_size: int) -> Params:
    """Augmentations of a global batch, arrays that lead with `batch`.

    Data and reconstructions are augmented apart: with the same crop on both,
    a pair could be told by comparing it.
    """
    if not self.operations:
      return {}
    rngs = jax.random.split(rng)
    return {
      name: diffaug.draw(key, batch, image_size, self.operations)
      for name, key in zip(("real", "fake"), rngs, strict=True)
    }

  def judge(
    self,
    params: Params,
    state: Params,
    frozen: Params,
    real: jax.Array,
    fake: jax.Array,
    draws: Params,
    step: jax.Array,
  ) -> Verdict:
    """Losses and gradients of one (micro-)batch.

    Args:
      params: the discriminator's parameters.
      state: its other arrays.
      frozen: of the network it may stand on.
      real: images x, (B, S, S, 3) float in [−1, 1].
      fake: reconstructions x̂, likewise; no gradient leaves through them.
      draws: this batch's rows of `draw`.
      step: steps done.
    """

    def logits(params, images, draws):
      if self.operations:
        images = diffaug.augment(images, draws, self.operations)
      return self.discriminator.logits(params, state, frozen, images)

    def evaluate(params, real, fake, draws):
      draws = draws or {"real": {}, "fake": {}}
      of_real, pull_real = jax.vjp(
        lambda p: logits(p, real, draws["real"]), params
      )
      # One forward of x̂ serves both losses.
      of_fake, pull_fake = jax.vjp(
        lambda p, x: logits(p, x, draws["fake"]), params, fake
      )
      generator, at_fake = jax.value_and_grad(losses.generator_loss)(of_fake)
      discriminator, (at_real, at_fake_d) = jax.value_and_grad(
        losses.hinge_loss, argnums=(0, 1)
      )(of_real, of_fake)
      grads = jax.tree.map(
        jnp.add, pull_real(at_real)[0], pull_fake(at_fake_d)[0]
      )
      metrics = {
        "loss_generator": generator,
        "loss_discriminator": discriminator,
        "logits_real": jnp.mean(of_real),
        "logits_fake": jnp.mean(of_fake),
      }
      return Verdict(pull_fake(at_fake)[1], grads, metrics)

    def wait(params, real, fake, draws):
      shapes = jax.eval_shape(evaluate, params, real, fake, draws)
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    fake = jax.lax.stop_gradient(fake)
    if not self.loss.gan_start:
      return evaluate(params, real, fake, draws)
    return jax.lax.cond(
      self.started(step), evaluate, wait, params, real, fake, draws
    )

  def advance(self, params: Any, state: Any, step: jax.Array) -> Params:
    """The discriminator's other arrays after this step."""
    advanced = self.discriminator.advance(params, state)
    return jax.tree.map(
      lambda new, old: jnp.where(self.started(step), new, old), advanced, state
    )

  def settle(self, params: Any, state: Any) -> Params:
    """The discriminator's other arrays for parameters they were not made with.

    Spectral vectors follow from the kernels: a random one underestimates the
    norm, most where a kernel has one strong direction.
    """
    return jax.lax.fori_loop(
      0, _SETTLING, lambda _, s: self.discriminator.advance(params, s), state
    )
