"""Precision and recall: the definition, blocks, copies."""

import numpy as np
import pytest

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.evaluators.precision_recall import precision_recall

RNG = np.random.default_rng(0)
MADE = RNG.normal(size=(70, 6)).astype(np.float32) + 20
REAL = 1.4 * RNG.normal(size=(53, 6)).astype(np.float32) + 20.5


def _by_definition(generated, real, k):
  """One pair at a time."""

  def inside(points, centres):
    radii = [
      sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[
        k - 1
      ]
      for i, c in enumerate(centres)
    ]
    return np.mean(
      [
        any(
          np.linalg.norm(p - c) <= r
          for c, r in zip(centres, radii, strict=True)
        )
        for p in points
      ]
    )

  generated, real = generated.astype(float), real.astype(float)
  return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("k, block", [(3, (8, 16)), (1, (1024, 4096))])
def test_equals_the_definition_in_blocks_of_any_size(k, block):
  want = _by_definition(MADE, REAL, k)
  assert 0 < want[1] < 1
  assert precision_recall(MADE, REAL, neighbours=k, block=block) == want


def test_rows_are_split_over_a_mesh():
  mesh = sharding.make_mesh(MeshConfig())
  assert sharding.batch_shards(mesh) == 8
  got = precision_recall(MADE, REAL, mesh=mesh, block=(4, 16))
  assert got == _by_definition(MADE, REAL, 3)


def test_equals_torch_fidelity():
  pytest.importorskip("torchvision_ops")
  torch = pytest.importorskip("torch")
  fidelity = pytest.importorskip("torch_fidelity.metric_prc")
  want = fidelity.calculate_precision_recall_full(
    torch.from_numpy(MADE), torch.from_numpy(REAL), neighborhood=3
  )
  got = precision_recall(MADE, REAL, block=(32, 32))
  assert got == pytest.approx(want, rel=1e-6)


def test_copies_and_strangers():
  # Four of each: the balls have no size, and float32 must still see copies.
  copies = np.repeat(REAL[:12], 4, axis=0)
  assert precision_recall(copies, copies, block=(8, 16)) == (1.0, 1.0)
  assert precision_recall(REAL + 1000, REAL, block=(16, 32)) == (0.0, 0.0)
  collapsed = REAL[:1] + 1e-4 * RNG.normal(size=(40, 6)).astype(np.float32)
  precision, recall = precision_recall(collapsed, REAL, block=(16, 32))
  assert precision == 1.0 and recall < 0.1


def test_bad_input():
  with pytest.raises(ValueError, match="more than 3 images of each kind, got"):
    precision_recall(MADE[:3], REAL)
  with pytest.raises(ValueError, match="of one D"):
    precision_recall(MADE[:, :4], REAL)
  broken = MADE.copy()
  broken[0, 0] = np.nan
  assert np.isnan(precision_recall(broken, REAL, block=(16, 32))).all()
