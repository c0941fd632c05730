"""The linear probe: its ceiling, its floor, its algebra, its invariances."""

import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.evaluators import probe

SIZES = {"count": 2, "colour": 7, "shape": 6, "size": 2, "object": 42}


def _targets(seed, count):
  """Scenes of one or two objects, as multi-hot families."""
  rng = np.random.default_rng(seed)
  targets = {k: np.zeros((count, size)) for k, size in SIZES.items()}
  for i in range(count):
    objects = rng.integers(1, 3)
    targets["count"][i, objects - 1] = 1
    for _ in range(objects):
      colour, shape, size = rng.integers((7, 6, 2))
      targets["colour"][i, colour] = 1
      targets["shape"][i, shape] = 1
      targets["size"][i, size] = 1
      targets["object"][i, 6 * colour + shape] = 1
  return targets


def _features(targets, width=80, noise=0.0, seed=5):
  """A fixed random linear map of all labels, plus noise, float32 (N, D)."""
  labels = np.concatenate(list(targets.values()), axis=1)
  mixing = np.random.default_rng(99).normal(size=(labels.shape[1], width))
  blur = np.random.default_rng(seed).normal(size=(len(labels), width))
  return (labels @ mixing + noise * blur).astype(np.float32)


TRAIN, TEST = _targets(0, 700), _targets(1, 500)


def _accuracy(noise, **kwargs):
  return probe.probe_accuracy(
    _features(TRAIN, noise=noise, seed=2),
    TRAIN,
    _features(TEST, noise=noise, seed=3),
    TEST,
    **kwargs,
  )


def test_perfect_features_score_one():
  assert _accuracy(0.0)["accuracy"] > 0.9995
  got = _accuracy(0.0, l2=1e-4)  # next to no shrinkage: not one mistake
  assert set(got) == {"accuracy", "l2"} | {f"accuracy_{k}" for k in SIZES}
  for family in SIZES:
    assert got[f"accuracy_{family}"] == 1.0, family
  assert got["accuracy"] == 1.0


def test_noise_scores_chance_and_more_signal_scores_more():
  rng = np.random.default_rng(4)
  got = probe.probe_accuracy(
    rng.normal(size=(700, 80)), TRAIN, rng.normal(size=(500, 80)), TEST
  )
  for family in SIZES:
    assert abs(got[f"accuracy_{family}"] - 0.5) < 0.05, family
  assert abs(got["accuracy"] - 0.5) < 0.03
  weak, strong = _accuracy(8.0)["accuracy"], _accuracy(3.0)["accuracy"]
  assert 0.55 < weak < strong - 0.05 < 0.95


def test_accuracy_is_the_mean_over_families():
  got = _accuracy(4.0)
  families = [got[f"accuracy_{k}"] for k in SIZES]
  np.testing.assert_allclose(got["accuracy"], np.mean(families), rtol=1e-15)


def test_chance_is_exactly_one_half():
  got = probe.chance_accuracy(TRAIN, TEST)
  got.pop("l2")
  assert len(got) == 1 + len(SIZES)
  assert set(got.values()) == {0.5}


def test_balanced_accuracy_against_a_count_by_hand():
  targets = {"a": np.array([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0]])}
  flat = targets["a"].astype(float)
  said = np.array([[1, 1], [1, 1], [0, 0], [1, 0], [0, 0]], bool)
  # Label 0: 2 of 3 hits, 1 of 2 rejections; label 1: 1 of 2, 2 of 3.
  got = probe._family_accuracies(said, flat, {"a": 2})
  np.testing.assert_allclose(got["a"], (2 / 3 + 1 / 2) / 2, rtol=1e-15)


def test_ridge_solves_its_normal_equations():
  x = _features(TRAIN, noise=1.0).astype(np.float64)
  y = TRAIN["colour"]
  l2 = 0.03
  got = probe.fit_ridge(x, y, l2)
  standard = (x - x.mean(0)) / x.std(0)
  gram = standard.T @ standard / len(x) + l2 * np.eye(x.shape[1])
  weights = np.linalg.solve(gram, standard.T @ (y - y.mean(0)) / len(x))
  np.testing.assert_allclose(
    got.weights * x.std(0)[:, None], weights, atol=1e-10
  )
  np.testing.assert_allclose(
    got.scores(x), standard @ weights + y.mean(0), atol=1e-10
  )


def test_thresholds_come_from_fits_without_the_example():
  x = _features(TRAIN, noise=1.0)[:60, :20].astype(np.float64)
  x = (x - x.mean(0)) / x.std(0)
  y = TRAIN["colour"][:60]
  l2 = 0.1
  left_out = np.empty_like(y)
  for i in range(60):
    rest = np.arange(60) != i
    # The same penalty as in the full fit: its scale and weight by 60 examples.
    design = np.concatenate([x[rest], np.ones((59, 1))], axis=1)
    penalty = 60 * l2 * np.diag([1.0] * 20 + [0.0])
    w = np.linalg.solve(design.T @ design + penalty, design.T @ y[rest])
    left_out[i] = np.append(x[i], 1.0) @ w
  midpoints = [
    (s[t == 1].mean() + s[t == 0].mean()) / 2
    for s, t in zip(left_out.T, y.T, strict=True)
  ]
  got = probe.fit_ridge(x, y, l2).thresholds
  np.testing.assert_allclose(got, midpoints, atol=1e-10)


def test_invariant_to_affine_scaling_of_features():
  rng = np.random.default_rng(6)
  scale = 2.0 ** rng.integers(-12, 12, 80) * rng.choice([-1, 1], 80)
  offset = rng.normal(size=80) * 3
  train = _features(TRAIN, noise=4.0, seed=2).astype(np.float64)
  test = _features(TEST, noise=4.0, seed=3).astype(np.float64)
  got = probe.probe_accuracy(
    train * scale + offset * np.abs(scale),
    TRAIN,
    test * scale + offset * np.abs(scale),
    TEST,
  )
  assert got == _accuracy(4.0)


def test_constant_features_do_no_harm():
  train = _features(TRAIN, noise=4.0, seed=2)
  test = _features(TEST, noise=4.0, seed=3)

  def pad(x, value):
    # float64: the mean of many 0.1 is not 0.1, so their deviation is not zero.
    return np.concatenate([x, np.full((len(x), 3), value)], axis=1)

  got = probe.probe_accuracy(pad(train, 0.1), TRAIN, pad(test, 7.3), TEST)
  assert got == _accuracy(4.0)


def test_deterministic_and_independent_of_family_order():
  turned = {k: TRAIN[k] for k in reversed(SIZES)}
  train = _features(TRAIN, noise=4.0, seed=2)
  test = _features(TEST, noise=4.0, seed=3)
  first = probe.probe_accuracy(train, TRAIN, test, TEST)
  assert probe.probe_accuracy(train, turned, test, TEST) == first
  assert probe.probe_accuracy(train, TRAIN, test, TEST) == first


def test_l2_is_chosen_or_given():
  assert _accuracy(4.0)["l2"] in probe.L2_GRID
  assert _accuracy(4.0, l2=0.5)["l2"] == 0.5
  # Equally good weights: the strongest.
  assert probe.chance_accuracy(TRAIN, TEST)["l2"] == max(probe.L2_GRID)


def test_more_features_than_examples():
  train, test = _targets(7, 120), _targets(8, 300)
  got = probe.probe_accuracy(
    _features(train, 256, noise=1.0, seed=2),
    train,
    _features(test, 256, noise=1.0, seed=3),
    test,
  )
  assert 0.7 < got["accuracy"] < 1.0


def test_labels_that_cannot_be_scored_are_left_out():
  test = {k: v.copy() for k, v in TEST.items()}
  test["size"][:] = 1  # always shown: no negatives
  test["colour"][:, 3] = 0  # never shown
  features = _features(TEST)
  train = _features(TRAIN)
  got = probe.probe_accuracy(train, TRAIN, features, test, l2=1e-4)
  assert "accuracy_size" not in got
  assert got["accuracy_colour"] == 1.0 and got["accuracy"] == 1.0
  only = {"size": test["size"]}
  with pytest.raises(ValueError, match="use more of them"):
    probe.probe_accuracy(train, {"size": TRAIN["size"]}, features, only)


def test_label_unknown_to_training_scores_chance():
  train = {"colour": TRAIN["colour"].copy()}
  train["colour"][:, 0] = 0
  test = {"colour": TEST["colour"]}
  got = probe.probe_accuracy(
    _features(TRAIN), train, _features(TEST), test, l2=1e-4
  )
  np.testing.assert_allclose(got["accuracy"], (6 + 0.5) / 7, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 8, 50, 64])
def test_collected_examples_leave_padding_out(batch_size):
  features = _features(TEST)[:50]
  examples = probe.ProbeExamples()
  for start in range(0, 50, batch_size):
    rows = np.arange(start, start + batch_size)
    mask, rows = rows < 50, np.minimum(rows, 49)
    padded = jnp.where(mask[:, None], features[rows], jnp.nan)
    examples.update(padded, {k: v[rows] for k, v in TEST.items()}, mask)
  got, targets = examples.result()
  np.testing.assert_array_equal(got, features)
  for family in SIZES:
    np.testing.assert_array_equal(targets[family], TEST[family][:50])


def test_mean_pool():
  tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  want = tokens.mean((1, 2))
  np.testing.assert_allclose(
    probe.mean_pool(tokens), want, rtol=1e-5, atol=1e-7
  )
  got = probe.mean_pool(jnp.asarray(tokens.reshape(2, 12, 5), jnp.bfloat16))
  assert got.dtype == jnp.float32 and got.shape == (2, 5)


def test_bad_inputs_are_refused():
  x, y = _features(TRAIN), TRAIN["colour"]
  with pytest.raises(ValueError, match="diverge"):
    probe.fit_ridge(np.where(x > 3, np.nan, x), y, 1.0)
  with pytest.raises(ValueError, match="zeros and ones"):
    probe.fit_ridge(x, y * 2, 1.0)
  with pytest.raises(ValueError, match="positive"):
    probe.fit_ridge(x, y, 0.0)
  with pytest.raises(ValueError, match="700 examples"):
    probe.fit_ridge(x, y[:-1], 1.0)
  with pytest.raises(ValueError, match="families or labels"):
    probe.probe_accuracy(x, TRAIN, _features(TEST), {"colour": TEST["colour"]})
  with pytest.raises(ValueError, match="width"):
    probe.probe_accuracy(x, TRAIN, _features(TEST, 81), TEST)
  with pytest.raises(ValueError, match="split empty"):
    probe.ProbeExamples().result()
