"""Distances to real latents: exact, whatever the parts, and told apart."""

import numpy as np
import pytest

from psvae_jax.evaluators import manifold
from psvae_jax.evaluators.manifold import LatentBank

SHAPE = (3, 3, 8)


def _latents(seed, count):
  """Points of a plane in the latent space, float32."""
  rng = np.random.default_rng(seed)
  basis = np.random.default_rng(99).normal(size=(2, 72))
  points = rng.normal(size=(count, 2)) @ basis
  return points.reshape(count, *SHAPE).astype(np.float32)


def _brute_force(latents, bank):
  a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (latents, bank))
  squares = np.square(a[:, None] - b).mean(-1)
  return np.sqrt(squares.min(1))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equals_all_distances_in_float64(offset):
  bank, samples = _latents(0, 400), _latents(1, 600)
  got = LatentBank(bank + offset).distances(samples + offset)
  expected = _brute_force(samples + offset, bank + offset)
  assert got.dtype == np.float64 and got.shape == (600,)
  # Which of two nearly equal ones is nearest is float32's choice.
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7 * offset)


def test_copies_are_at_no_distance():
  bank = _latents(0, 300)
  assert (LatentBank(bank).distances(bank[::7]) == 0).all()


def test_parts_change_nothing():
  bank, samples = LatentBank(_latents(0, 100)), _latents(1, 300)
  whole = bank.distances(samples)
  parts = [bank.distances(samples[i : i + 50]) for i in range(0, 300, 50)]
  np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9)
  assert bank.distances(samples[:0]).shape == (0,)


def test_tail_is_the_mean_of_the_farthest():
  distances = np.random.default_rng(0).permutation(np.arange(100.0))
  assert manifold.tail_mean(distances) == 97.0  # of 95 to 99
  assert manifold.tail_mean(np.array([1.0, 3.0])) == 3.0
  assert manifold.tail_mean(distances, share=1.0) == 49.5


def test_only_what_leaves_the_manifold_is_off_it():
  bank = LatentBank(_latents(0, 2000))
  real = bank.distances(_latents(1, 1000))
  same = manifold.manifold_metrics(bank.distances(_latents(2, 1000)), real)
  assert same["eval/off_manifold_share"] == pytest.approx(0.05, abs=0.02)
  assert same["eval/manifold_distance"] == pytest.approx(
    same["eval/manifold_distance_real"], rel=0.1
  )
  noise = np.random.default_rng(3).normal(size=(1000, *SHAPE))
  samples = _latents(2, 1000)
  samples[::2] += noise[::2].astype(np.float32)
  half = manifold.manifold_metrics(bank.distances(samples), real)
  assert half["eval/off_manifold_share"] == pytest.approx(0.525, abs=0.02)
  assert (
    half["eval/manifold_distance_tail"]
    > 2 * half["eval/manifold_distance_tail_real"]
  )


def test_not_finite_counts_as_off():
  real = np.linspace(0, 1, 100)
  assert manifold.share_beyond(np.array([np.nan, 0.5, 2.0, 0.1]), real) == 0.5


def test_bad_input():
  with pytest.raises(ValueError, match="no latents"):
    LatentBank(_latents(0, 0))
  with pytest.raises(ValueError, match="10 values, the bank's 72"):
    LatentBank(_latents(0, 3)).distances(np.zeros((2, 10)))
