"""Charts, pictures and numbers of a report."""

import base64
import io
import math
import re

import numpy as np
import PIL.Image
import pytest

from psvae_jax.report.figures import (
  Curve,
  _tick,
  bar_limits,
  bars_svg,
  curve_svg,
  wants_log_scale,
)
from psvae_jax.report.images import data_uri
from psvae_jax.report.metrics import describe, format_value


def test_marks_stand_where_the_adversarial_term_begins():
  curve = Curve(0, np.arange(100.0), np.ones(100))
  plain = curve_svg([curve], bounds=[40, 100])
  marked = curve_svg([curve], bounds=[40, 100], marks=[80, 80, 85])
  places = re.compile(r'<path d="M ([\d.]+) [\d.]+ \nL \1 ')
  lines = {float(x) for x in places.findall(marked)}
  new = sorted(lines - {float(x) for x in places.findall(plain)})
  (bound,) = (float(x) for x in places.findall(plain))
  assert len(new) == 2
  assert (new[0] - bound) / (new[1] - bound) == pytest.approx(40 / 45, abs=1e-3)


def test_large_pictures_are_reduced_and_small_ones_exact():
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (48, 48, 3), np.uint8)
  np.testing.assert_array_equal(decoded(data_uri(small)), small)
  large = rng.integers(0, 256, (512, 384, 3), np.uint8)
  assert decoded(data_uri(large)).shape == (256, 192, 3)


def decoded(address):
  data = base64.b64decode(address.split(",")[1])
  return np.asarray(PIL.Image.open(io.BytesIO(data)))


def test_long_curves_are_thinned_and_keep_their_range():
  steps = np.arange(1.0, 50_001)
  svg = curve_svg([Curve(0, steps, np.sin(steps / 8000))])
  assert len(svg) < 60_000
  assert "var(--s0)" in svg
  assert not re.search("#[0-9a-f]{6}", svg.replace("#ffffff", ""))


def test_a_few_bad_values_leave_no_hole_in_a_thinned_curve():
  values = np.full(30_000, 0.5)
  values[::40] = math.nan
  values[1::40] = math.inf
  svg = curve_svg([Curve(0, np.arange(30_000.0), values)])
  lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--s0\)', svg)
  assert len(lines) == 2  # as it is, and smoothed
  for line in lines:
    assert line.count("M") == 1  # drawn in one stroke
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", line)]
    assert max(xs) - min(xs) > 200  # of 288 units


@pytest.mark.parametrize(
  "values",
  [
    [1e308, -1e308, 0.5],
    [1e308, 0.5, 0.25],
    [5e-324, 1e308, 1.0],
    [1e308] * 3,
    [1e308, math.inf, -math.inf],
  ],
)
@pytest.mark.parametrize("count", [3, 3000])
def test_values_outside_float32_break_no_axis(values, count):
  with np.errstate(over="raise", invalid="raise"):
    values = np.resize(np.array(values), count)
    curve = Curve(0, np.arange(float(count)), values)
    log_scale = wants_log_scale([curve])
    svgs = [
      curve_svg([curve], log_scale=log_scale),
      curve_svg([curve], percent=True),
      bars_svg(values, 0),
      bars_svg(values[:3], 0, bar_limits([values, np.ones(3)])),
    ]
  for svg in svgs:
    assert "var(--s0)" in svg
    numbers = re.findall(r"[ML] (\S+) (\S+)", svg)
    assert numbers
    assert np.isfinite(np.array(numbers, float)).all()


@pytest.mark.parametrize(
  ("value", "label"),
  [
    (0.0, "0"),
    (-1500.0, "−1.5k"),
    (2e10, "20G"),
    (1e-5, "1e−5"),
    (-1.5e38, "−1.5e38"),
    (1e30, "1e30"),
  ],
)
def test_labels_of_an_axis_are_short(value, label):
  assert _tick(value) == label


@pytest.mark.parametrize(
  ("name", "value", "text"),
  [
    ("eval/psnr", 27.3, "27.30 dB"),
    ("eval/probe_accuracy", 0.9315, "93.2 %"),
    ("eval/checker_shape", 0.5, "50.0 %"),
    ("anything", 3.0, "3"),
    ("anything", -0.123456, "−0.1235"),
    ("anything", math.nan, "NaN"),
    ("anything", -math.inf, "−∞"),
    ("anything", "text", "text"),
  ],
)
def test_values_read_well(name, value, text):
  assert format_value(name, value) == text


def test_unknown_metrics_keep_their_name():
  assert describe("train/never_seen").label == "train/never_seen"
  assert describe("train/grad_norm/pixel_decoder").label == (
    "Gradient norm, pixel decoder"
  )
