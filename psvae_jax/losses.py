"""Autoencoder losses as pure functions of arrays, computed in float32.

Every function returns unweighted scalars; weights belong to the config.
The networks that some of them compare with live elsewhere.
"""

import jax
import jax.numpy as jnp

from psvae_jax.models.latent import DiagonalGaussian
from psvae_jax.models.layers import wide

# Inside the norms of the cosine: keeps the gradient finite at a zero vector.
COSINE_EPS = 1e-6

KL_REDUCTIONS = ("mean", "sum", "token")


def semantic_loss(
  pred: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Distance of features to the frozen encoder's, paper section 3.3.

  The paper gives neither reduction nor relative weight; the project's reading
  is a mean over every element and a mean over tokens, added 1 : 1. The cosine
  is a·b / (‖a‖·‖b‖) with ‖a‖ = sqrt(Σa² + 1e-6): both value and gradient are
  finite at pred = target (where stage 2 starts) and at zero vectors.

  Args:
    pred: (…, D) features f′ or f″.
    target: (…, D) teacher features f; pass them through `stop_gradient`.

  Returns:
    mean of (pred − target)², and mean over tokens of 1 − cosine.
  """
  pred, target = _pair(pred, target)
  squared = jnp.mean(jnp.square(pred - target))
  dot = jnp.sum(pred * target, axis=-1)
  norms = _norm(pred) * _norm(target)
  return squared, jnp.mean(1.0 - dot / norms)


def kl_loss(posterior: DiagonalGaussian, reduction: str = "mean") -> jax.Array:
  """KL(posterior ‖ N(0, I)) in nats.

  Args:
    posterior: over latents (B, …, C).
    reduction: "mean" over batch and every latent dimension (the default of
      this project); "sum" over the dimensions of an image, then mean over the
      batch (LDM); "token" sums channels, then means over batch and tokens. At
      16×16×96 "sum" is 24 576 × "mean", so a KL weight means nothing without
      its reduction.
  """
  kl = _kl(posterior)
  if reduction == "mean":
    return jnp.mean(kl)
  if reduction == "sum":
    return jnp.sum(kl) / kl.shape[0]
  if reduction == "token":
    return jnp.mean(jnp.sum(kl, axis=-1))
  raise ValueError(
    f"KL reduction must be one of {KL_REDUCTIONS}, got {reduction!r}"
  )


def kl_per_channel(posterior: DiagonalGaussian) -> jax.Array:
  """Mean KL of each latent channel, (C,) nats: zeros are unused channels."""
  kl = _kl(posterior)
  return jnp.mean(kl, axis=tuple(range(kl.ndim - 1)))


def l1_loss(pred: jax.Array, target: jax.Array) -> jax.Array:
  """Mean absolute error over every element."""
  pred, target = _pair(pred, target)
  return jnp.mean(jnp.abs(pred - target))


def multiscale_gradient_loss(
  pred: jax.Array, target: jax.Array, scales: int = 3
) -> jax.Array:
  """Perceptual term that knows nothing of any trained network.

  The miniature's stand-in for LPIPS. LPIPS, or anything else built on learned
  features, would leak semantics into baselines that are meant to have none.
  L1 alone blurs small shapes. The L1 of finite differences makes lost detail
  cost more than a wrong shade of equal L1, and averaging down compares areas
  rather than pixels, which forgives an edge that is slightly off. At scale
  s ∈ {0 … scales−1} both images are average-pooled by 2^s, and the term is

    mean|e| + mean|e[y+1] − e[y]| + mean|e[x+1] − e[x]|,   e = pred − target,

  averaged over scales. Pooling and differences are linear, hence e alone is
  enough.

  Args:
    pred: (B, H, W, C).
    target: (B, H, W, C).
    scales: number of resolutions; H and W divide by 2^(scales−1) and keep at
      least two pixels at the coarsest.
  """
  pred, target = _pair(pred, target)
  _, height, width, _ = pred.shape
  factor = 2 ** (scales - 1)
  if scales < 1 or any(s % factor or s < 2 * factor for s in (height, width)):
    raise ValueError(
      f"{scales} scales need an image of at least {2 * factor} pixels a "
      f"side, in multiples of {factor}; got {height}x{width}. Choose fewer "
      "scales."
    )
  error = pred - target
  total = jnp.zeros((), pred.dtype)
  for scale in range(scales):
    if scale:
      error = _halve(error)
    total += jnp.mean(jnp.abs(error))
    total += jnp.mean(jnp.abs(error[:, 1:] - error[:, :-1]))
    total += jnp.mean(jnp.abs(error[:, :, 1:] - error[:, :, :-1]))
  return total / scales


def generator_loss(fake_logits: jax.Array) -> jax.Array:
  """Adversarial loss of the decoder: −mean of the logits of its images."""
  return -jnp.mean(fake_logits.astype(wide(fake_logits.dtype)))


def hinge_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """Hinge loss of the discriminator, ½(E[(1 − D(x))₊] + E[(1 + D(x̂))₊]).

  The ½ is LDM's and RAE's; only the discriminator's own optimizer sees it.

  Args:
    real_logits: of data, any shape with every example weighing alike.
    fake_logits: of reconstructions.
  """
  real = real_logits.astype(wide(real_logits.dtype))
  fake = fake_logits.astype(wide(fake_logits.dtype))
  real_term = jnp.mean(jax.nn.relu(1.0 - real))
  return 0.5 * (real_term + jnp.mean(jax.nn.relu(1.0 + fake)))


def adaptive_weight(
  pixel_grad: jax.Array, generator_grad: jax.Array
) -> jax.Array:
  """λ = ‖∇ pixel‖ / (‖∇ gan‖ + 1e-4), at most 1e4 (taming, arXiv 2012.09841).

  Args:
    pixel_grad: gradient of the rest of the pixel loss at the decoder's last
      kernel, over the global batch.
    generator_grad: gradient of `generator_loss` at the same kernel.

  Returns:
    A scalar that carries no gradient.
  """
  pixel_norm, norm = (
    jnp.sqrt(jnp.sum(jnp.square(g.astype(wide(g.dtype)))))
    for g in (pixel_grad, generator_grad)
  )
  weight = jnp.clip(pixel_norm / (norm + 1e-4), 0.0, 1e4)
  return jax.lax.stop_gradient(weight)


def _pair(pred: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
  if pred.shape != target.shape:  # broadcasting would hide a wrong shape
    raise ValueError(
      f"a loss compares arrays of one shape, got {pred.shape} and "
      f"{target.shape}"
    )
  dtype = wide(jnp.promote_types(pred.dtype, target.dtype))
  return pred.astype(dtype), target.astype(dtype)


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + COSINE_EPS)


def _kl(posterior: DiagonalGaussian) -> jax.Array:
  mean = posterior.mean.astype(wide(posterior.mean.dtype))
  logvar = posterior.logvar.astype(wide(posterior.logvar.dtype))
  # expm1: σ² − 1 − log σ² near σ = 1 would lose its leading digits.
  return 0.5 * (jnp.square(mean) + jnp.expm1(logvar) - logvar)


def _halve(x: jax.Array) -> jax.Array:
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.mean(axis=(2, 4))
