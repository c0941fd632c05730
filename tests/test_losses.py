"""Losses against numpy, torch and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax import losses
from psvae_jax.models.latent import DiagonalGaussian


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _posterior(*shape):
  return DiagonalGaussian(
    mean=jnp.asarray(_normal(0, *shape)),
    logvar=jnp.asarray(2 * _normal(1, *shape) - 1),
  )


# Semantic loss.


def test_semantic_loss_matches_numpy():
  pred, target = _normal(0, 2, 3, 4, 8), _normal(1, 2, 3, 4, 8)
  squared, cosine = losses.semantic_loss(pred, target)
  a, b = pred.astype(np.float64), target.astype(np.float64)
  np.testing.assert_allclose(squared, np.mean((a - b) ** 2), rtol=1e-6)
  cosines = np.sum(a * b, -1) / np.sqrt(
    (np.sum(a * a, -1) + 1e-6) * (np.sum(b * b, -1) + 1e-6)
  )
  np.testing.assert_allclose(cosine, np.mean(1 - cosines), rtol=1e-6)


def test_cosine_term_weighs_tokens_equally_and_ignores_their_scale():
  pred, target = _normal(0, 2, 3, 8), _normal(1, 2, 3, 8)
  scale = np.asarray([1.0, 10.0, 100.0], np.float32)[None, :, None]
  _, plain = losses.semantic_loss(pred, target)
  _, scaled = losses.semantic_loss(pred * scale, target)
  np.testing.assert_allclose(scaled, plain, rtol=1e-5)


@pytest.mark.parametrize("case", ["equal", "zero_pred", "zero_both"])
def test_semantic_gradient_is_finite_where_norms_are_awkward(case):
  target = jnp.asarray(_normal(0, 2, 3, 8))
  pred = target if case == "equal" else jnp.zeros_like(target)
  target = jnp.zeros_like(target) if case == "zero_both" else target
  grads = jax.grad(lambda p, t: sum(losses.semantic_loss(p, t)), (0, 1))(
    pred, target
  )
  assert all(np.isfinite(g).all() for g in grads)
  if case == "equal":  # a minimum of both terms
    np.testing.assert_allclose(grads[0], 0, atol=1e-6)
    np.testing.assert_allclose(
      sum(losses.semantic_loss(pred, target)), 0, atol=1e-6
    )


def test_semantic_loss_is_float32_for_bfloat16_features():
  pred, target = _normal(0, 2, 3, 8), _normal(1, 2, 3, 8)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (pred, target)]
  for got, expected in zip(
    losses.semantic_loss(*half),
    losses.semantic_loss(*(x.astype(jnp.float32) for x in half)),
    strict=True,
  ):
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


# KL.


def test_kl_matches_diffusers():
  torch = pytest.importorskip("torch")
  pytest.importorskip("torchvision_ops")  # before diffusers imports it
  vae = pytest.importorskip("diffusers.models.autoencoders.vae")
  moments = 3 * _normal(0, 2, 3, 4, 10)
  moments[0, 0, 0] = [40, -40, 0, 1, -1, 30, -40, 0, 25, -31]  # clamped
  posterior = DiagonalGaussian.from_moments(jnp.asarray(moments))
  reference = vae.DiagonalGaussianDistribution(
    torch.from_numpy(moments).permute(0, 3, 1, 2).double()
  )
  expected = reference.kl().mean().item()
  np.testing.assert_allclose(
    losses.kl_loss(posterior, "sum"), expected, rtol=1e-6
  )


@pytest.mark.parametrize("reduction", losses.KL_REDUCTIONS)
def test_kl_matches_torch_distributions(reduction):
  torch = pytest.importorskip("torch")
  posterior = _posterior(2, 3, 4, 5)
  mean = torch.asarray(np.array(posterior.mean, np.float64))
  std = torch.asarray(np.exp(0.5 * np.array(posterior.logvar, np.float64)))
  kl = torch.distributions.kl_divergence(
    torch.distributions.Normal(mean, std),
    torch.distributions.Normal(torch.zeros(()), torch.ones(())),
  ).numpy()
  expected = {
    "mean": kl.mean(),
    "sum": kl.sum(axis=(1, 2, 3)).mean(),
    "token": kl.sum(axis=-1).mean(),
  }[reduction]
  np.testing.assert_allclose(
    losses.kl_loss(posterior, reduction), expected, rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.kl_per_channel(posterior), kl.mean(axis=(0, 1, 2)), rtol=2e-6
  )


def test_kl_is_zero_at_the_prior_and_accurate_beside_it():
  prior = DiagonalGaussian(mean=jnp.zeros((1, 2)), logvar=jnp.zeros((1, 2)))
  assert losses.kl_loss(prior) == 0
  near = prior.replace(logvar=jnp.full((1, 2), 1e-2))
  expected = 0.5 * (np.expm1(1e-2) - 1e-2)
  np.testing.assert_allclose(losses.kl_loss(near), expected, rtol=1e-4)


def test_kl_refuses_an_unknown_reduction():
  with pytest.raises(ValueError, match="'batch'"):
    losses.kl_loss(_posterior(1, 2, 2, 3), "batch")


# Pixels.


def test_l1_matches_numpy():
  pred, target = _normal(0, 2, 4, 4, 3), _normal(1, 2, 4, 4, 3)
  np.testing.assert_allclose(
    losses.l1_loss(pred, target), np.mean(np.abs(pred - target)), rtol=1e-6
  )


def test_multiscale_gradient_loss_matches_numpy():
  pred, target = _normal(0, 2, 8, 12, 3), _normal(1, 2, 8, 12, 3)
  expected = 0.0
  for scale in range(3):
    step = 2**scale
    a, b = (
      np.stack(
        [
          [
            x[:, i : i + step, j : j + step].mean(axis=(1, 2))
            for j in range(0, 12, step)
          ]
          for i in range(0, 8, step)
        ]
      ).astype(np.float64)
      for x in (pred, target)
    )  # (rows, columns, batch, channels)
    expected += np.abs(a - b).mean()
    expected += np.abs(np.diff(a, axis=0) - np.diff(b, axis=0)).mean()
    expected += np.abs(np.diff(a, axis=1) - np.diff(b, axis=1)).mean()
  got = losses.multiscale_gradient_loss(pred, target, scales=3)
  np.testing.assert_allclose(got, expected / 3, rtol=1e-5)


def test_lost_detail_costs_more_than_a_wrong_shade():
  target = jnp.asarray(_normal(0, 1, 8, 8, 3))
  checker = 1 - 2 * ((np.arange(8)[:, None] + np.arange(8)) % 2)
  shade = losses.multiscale_gradient_loss(target + 0.1, target)
  detail = losses.multiscale_gradient_loss(
    target + 0.1 * checker[None, :, :, None], target
  )
  np.testing.assert_allclose(shade, 0.1, rtol=1e-5)
  # 0.1 + 0.2 + 0.2 at the first scale; pooling removes it from the others.
  np.testing.assert_allclose(detail, 0.5 / 3, rtol=1e-5)
  assert losses.multiscale_gradient_loss(target, target) == 0


@pytest.mark.parametrize("size, scales", [(48, 6), (4, 3), (48, 0)])
def test_too_many_scales_is_an_error(size, scales):
  x = jnp.zeros((1, size, size, 3))
  with pytest.raises(ValueError, match=f"{scales} scales"):
    losses.multiscale_gradient_loss(x, x, scales=scales)


@pytest.mark.parametrize(
  "loss",
  [losses.l1_loss, losses.semantic_loss, losses.multiscale_gradient_loss],
)
def test_shapes_that_would_broadcast_are_an_error(loss):
  with pytest.raises(ValueError, match=r"\(1, 8, 8, 3\)"):
    loss(jnp.zeros((2, 8, 8, 3)), jnp.zeros((1, 8, 8, 3)))
