"""Streaming statistics: splits, padding, restarts."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from psvae_jax.evaluators.feature_statistics import FeatureStatistics
from psvae_jax.evaluators.inception_score import InceptionScore

RNG = np.random.default_rng(0)
FEATURES = {
  "pool": RNG.normal(size=(60, 5)).astype(np.float32) + 9,
  "logits": RNG.normal(size=(60, 7)).astype(np.float32),
}
FIGURES = {"psnr": RNG.normal(size=60).astype(np.float32) + 25}


def _empty():
  return FeatureStatistics(["pool"], InceptionScore(60))


def _add(statistics, rows, padding=0):
  def padded(x):
    return np.concatenate([x[rows], np.full_like(x[:padding], np.nan)])

  index = np.concatenate([rows, np.full(padding, -1, int)])
  return statistics.update(
    {k: padded(v) for k, v in FEATURES.items()},
    {k: padded(v) for k, v in FIGURES.items()},
    index,
    index >= 0,
  )


def _figures(statistics):
  moments = statistics.moments["pool"]
  return [
    moments.mean,
    moments.covariance.ravel(),
    statistics.score.result(),
    [statistics.means.result()["psnr"], statistics.count],
  ]


def test_any_split_gives_the_same():
  whole = _empty()
  _add(whole, np.arange(60))
  assert whole.count == 60
  parts = [_empty() for _ in range(3)]
  for i, rows in enumerate(np.array_split(RNG.permutation(60), 13)):
    _add(parts[i % 3], rows, padding=i % 4)
  _add(parts[0], np.arange(0), padding=4)
  total = _empty()
  for part in parts:
    total.merge(part)
  for got, want in zip(_figures(total), _figures(whole), strict=True):
    error = np.abs(np.subtract(got, want)).max()
    assert error <= 1e-12 * np.abs(want).max()


def test_a_restart_gives_the_same_bits():
  straight, first, second = _empty(), _empty(), _empty()
  _add(straight, np.arange(40))
  _add(straight, np.arange(40, 60), padding=2)
  _add(first, np.arange(40))
  second.restore(first.to_arrays())
  _add(second, np.arange(40, 60), padding=2)
  for got, want in zip(_figures(second), _figures(straight), strict=True):
    np.testing.assert_array_equal(got, want)
  with pytest.raises(KeyError):
    _empty().restore({})


def test_other_kinds_do_not_merge():
  with pytest.raises(ValueError, match="cannot merge statistics of"):
    _empty().merge(FeatureStatistics(["spatial"]))


_HOST = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import numpy as np
from psvae_jax.evaluators.feature_statistics import FeatureStatistics
from psvae_jax.evaluators.inception_score import InceptionScore
rng = np.random.default_rng(0)
pool, logits = rng.normal(size=(50, 5)) + 9, rng.normal(size=(50, 7))

def statistics(rows):
  found = FeatureStatistics(["pool"], InceptionScore(50))
  figures = {"psnr": pool[rows, 0].astype(np.float32)}
  found.update({"pool": pool[rows], "logits": logits[rows]}, figures, rows)
  return found

def figures(s):
  m = s.moments["pool"]
  return np.concatenate([m.mean, m.covariance.ravel(), s.score.result(),
                         [s.means.result()["psnr"], s.count]])

# The second host has none.
for cut in (20, 50):
  rows = np.arange(cut) if rank == 0 else np.arange(cut, 50)
  got = figures(statistics(rows).over_hosts())
  want = figures(statistics(np.arange(50)))
  assert np.abs(got / want - 1).max() < 1e-12, (got, want)
print("equal")
"""


@pytest.mark.slow
def test_two_hosts_have_the_statistics_of_both():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  hosts = [
    subprocess.Popen(
      [sys.executable, "-c", _HOST, str(rank), port],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment,
    )
    for rank in range(2)
  ]
  for host in hosts:
    said, _ = host.communicate(timeout=120)
    assert host.returncode == 0 and "equal" in said, said
