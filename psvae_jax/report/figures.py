"""Charts of a report, as SVG that stands in the page itself.

They are drawn by matplotlib in placeholder colours, which are then replaced
by CSS variables: one drawing serves the light and the dark page. No text of
the run reaches matplotlib (it would read "$" as mathematics); names stand in
the page around the drawing.
"""

import dataclasses
import io
import math
import re
from collections.abc import Sequence

import numpy as np

NUM_COLORS = 6  # of stages, before they repeat; the page defines --s0 … --s5

# Placeholder → CSS variable. Values only have to be unlikely and distinct.
_INK = "#fe0101"
_RULE = "#fe0202"
_SERIES = [f"#fe03{index:02x}" for index in range(NUM_COLORS)]
_VARIABLES = {
  _INK: "var(--muted)",
  _RULE: "var(--rule)",
  **{color: f"var(--s{i})" for i, color in enumerate(_SERIES)},
}

_SIZE_INCHES = (4.0, 2.1)
_SMALL_INCHES = (3.1, 1.8)  # for two a row on a phone
_LETTERS, _SMALL_LETTERS = 9, 12  # points, before the page scales the figure
_MAX_POINTS = 600
_MARKER_POINTS = 24  # few enough that each deserves a dot
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Curve:
  """One stage's values of one metric.

  Attributes:
    color: index of the stage's colour.
    steps: (n,) rising.
    values: (n,); non-finite values leave a gap, larger ones than float32 holds
      are drawn at its end.
    offset: where the stage begins on a shared axis.
    dashed: drawn so, to tell it from another of the same colour.
  """

  color: int
  steps: np.ndarray
  values: np.ndarray
  offset: float = 0.0
  dashed: bool = False

  def __post_init__(self) -> None:
    object.__setattr__(self, "values", _drawable(self.values))


def curve_svg(
  curves: Sequence[Curve],
  *,
  log_scale: bool = False,
  percent: bool = False,
  bounds: Sequence[float] = (),
  marks: Sequence[float] = (),
) -> str:
  """Returns a line chart as an `<svg>` element without fixed size.

  Args:
    curves: drawn in their stages' colours, each from its offset on.
    log_scale: logarithmic values; only for positive ones.
    percent: label shares in percent.
    bounds: where the stages end on the shared axis, rising; the last one is
      the axis' end. What the curves need by default.
    marks: places on the shared axis that get a dotted line.
  """
  figure, axes = _new_axes(percent)
  for curve in curves:
    _draw_curve(axes, curve)
  for bound in bounds[:-1]:
    axes.axvline(bound, color=_RULE, lw=1, linestyle=(0, (3, 3)), zorder=1)
  for mark in sorted(set(marks)):
    axes.axvline(mark, color=_INK, lw=1, linestyle=(0, (1, 2)), zorder=1)
  if log_scale:
    _set_log_scale(axes, curves)
  else:
    axes.set_ylim(*_value_limits(curves, percent))
  axes.set_xlim(0, 1.02 * max(bounds) if bounds and max(bounds) else None)
  return _to_svg(figure)


def bars_svg(
  values: np.ndarray, color: int, limits: tuple[float, float] | None = None
) -> str:
  """Returns a bar a value, in the order given, e.g. one a latent channel.

  Args:
    values: (n,).
    color: index of the stage's colour.
    limits: range of the value axis; what the values need by default.
  """
  figure, axes = _new_axes(small=True)
  values = _drawable(values)
  finite = np.where(np.isfinite(values), values, 0.0)
  axes.bar(np.arange(len(values)), finite, width=0.8, color=_SERIES[color])
  axes.set_ylim(*(limits or bar_limits([values])))
  return _to_svg(figure)


def bar_limits(series: Sequence[np.ndarray]) -> tuple[float, float]:
  """A value axis for bars that are to be compared; it holds zero."""
  values = _drawable(np.concatenate([np.zeros(1), *series]))
  values = values[np.isfinite(values)]
  low, high = float(values.min()), float(values.max())
  margin = 0.05 * (high - low) or 1.0
  return low - margin * (low < 0), high + margin * (high > 0 or low == 0)


def _drawable(values: np.ndarray) -> np.ndarray:
  """Values as float32 would hold them: an axis over larger ones overflows."""
  values = np.asarray(values, np.float64)
  clipped = np.clip(values, -_LARGEST, _LARGEST)
  clipped[np.abs(values) < _SMALLEST] = 0.0
  return np.where(np.isfinite(values), clipped, values)


def _value_limits(
  curves: Sequence[Curve], percent: bool
) -> tuple[float, float]:
  """Room around the values, but none for shares that cannot be."""
  values = np.concatenate([curve.values for curve in curves])
  values = values[np.isfinite(values)]
  low, high = float(values.min()), float(values.max())
  margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
  if percent:
    return max(low - margin, min(low, 0.0)), min(high + margin, max(high, 1.0))
  return low - margin, high + margin


def wants_log_scale(curves: Sequence[Curve]) -> bool:
  """Whether the values are positive and span more than a factor of 30."""
  values = np.concatenate([curve.values for curve in curves])
  values = values[np.isfinite(values)]
  return bool(
    len(values) and values.min() > 0 and values.max() > 30 * values.min()
  )


def _ticker():
  import matplotlib.ticker

  return matplotlib.ticker


def _new_axes(percent: bool = False, *, small: bool = False):
  """Returns an empty figure and its axes, without global matplotlib state."""
  from matplotlib.figure import Figure

  size = _SMALL_INCHES if small else _SIZE_INCHES
  letters = _SMALL_LETTERS if small else _LETTERS
  figure = Figure(figsize=size)
  # Room for the labels, which do not grow with the figure.
  left, bottom = 0.062 * letters / size[0], 0.028 * letters / size[1]
  figure.subplots_adjust(left=left, right=0.985, bottom=bottom, top=0.95)
  axes = figure.add_subplot()
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(_RULE)
  axes.grid(axis="y", color=_RULE, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(length=0, labelsize=letters, labelcolor=_INK, pad=4)
  axes.margins(x=0.02, y=0.1)
  axes.xaxis.set_major_locator(
    _ticker().MaxNLocator(4 if small else 5, integer=True)
  )
  axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
  axes.yaxis.set_major_locator(_ticker().MaxNLocator(3 if small else 4))
  axes.yaxis.set_major_formatter(
    lambda value, _: f"{_tick(100 * value)} %" if percent else _tick(value)
  )
  return figure, axes


def _draw_curve(axes, curve: Curve) -> None:
  color, style = _SERIES[curve.color], "--" if curve.dashed else "-"
  steps, values = _thin(curve.steps + curve.offset, curve.values)
  if len(values) <= _MARKER_POINTS:
    axes.plot(steps, values, style, color=color, lw=1.6, marker="o", ms=3)
    return
  smooth = _running_mean(values, max(3, len(values) // 25))
  axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
  axes.plot(steps, smooth, style, color=color, linewidth=1.6)


def _thin(steps: np.ndarray, values: np.ndarray):
  """Averages neighbours so that at most `_MAX_POINTS` points are left.

  Non-finite values do not count; where there is nothing else, there is a gap.
  """
  finite = np.isfinite(values)
  values = np.where(finite, values, np.nan)
  stride = -(-len(values) // _MAX_POINTS)
  if stride <= 1:
    return steps, values
  edges = np.arange(0, len(values), stride)
  sizes = np.diff(np.append(edges, len(values)))
  totals = np.add.reduceat(np.where(finite, values, 0.0), edges)
  counts = np.add.reduceat(finite.astype(float), edges)
  means = np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
  return np.add.reduceat(steps, edges) / sizes, means


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Centred mean over up to `window` neighbours; gaps stay gaps."""
  finite = np.isfinite(values)
  kernel = np.ones(2 * (window // 2) + 1)
  total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
  count = np.convolve(finite.astype(float), kernel, mode="same")
  return np.where(finite, total / np.maximum(count, 1), np.nan)


def _set_log_scale(axes, curves: Sequence[Curve]) -> None:
  ticker = _ticker()
  values = np.concatenate([curve.values for curve in curves])
  values = values[np.isfinite(values)]
  decades = math.log10(values.max() / values.min())
  axes.set_yscale("log")
  subs = (1.0, 3.0) if decades < 3 else (1.0,)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=5))
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.yaxis.set_major_formatter(lambda value, _: _tick(value))


def _tick(value: float) -> str:
  """Short label of an axis: 1500 → 1.5k, 1.5e+38 → 1.5e38."""
  text = f"{value:.4g}"
  for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if limit <= abs(value) < 1e12:
      text = f"{value / limit:g}{suffix}"
      break
  text = re.sub(r"e\+?(-?)0*", r"e\1", text)
  return text.replace("-", "−")


def _to_svg(figure) -> str:
  import matplotlib

  buffer = io.StringIO()
  # Text stays text, in the page's own font; a fixed salt makes the ids, and so
  # the whole page, a function of the data.
  settings = {"svg.fonttype": "none", "svg.hashsalt": "report"}
  with matplotlib.rc_context(settings):
    figure.savefig(
      buffer,
      format="svg",
      transparent=True,
      metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
    )
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]  # without XML declaration and DOCTYPE
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  # HTML knows both namespaces; ids of groups would repeat in one page.
  svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
  svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
  svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
  svg = re.sub(
    r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL
  )
  for placeholder, variable in _VARIABLES.items():
    svg = svg.replace(placeholder, variable)
  return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()
