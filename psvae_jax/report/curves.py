"""The report's curves: every metric over steps, stages end to end."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from psvae_jax.report import figures, page
from psvae_jax.report.data import Run
from psvae_jax.report.metrics import (
  LATENT_METRICS,
  at_time,
  describe,
  format_value,
  is_part,
  rank,
)
from psvae_jax.report.references import reference_of

# Drawn dashed in the chart of another: metric → (that other, its title there).
_JOINED = {
  "train/logits_fake": ("train/logits_real", "Logits: real, fake (dashed)")
}
_ADVERSARIAL = (
  "loss_generator",
  "loss_discriminator",
  "logits_real",
  "logits_fake",
  "gan_weight",
)


def _last(name: str) -> str:
  return name.rsplit("/", 1)[-1]


# Title → which metrics; the first group that takes a metric has it.
_GROUPS: tuple[tuple[str, Callable[[str], bool]], ...] = (
  ("Loss by time", lambda name: bool(at_time(name))),
  ("Evaluation, in parts", is_part),
  ("Evaluation", lambda name: name.startswith("eval/")),
  ("Adversarial term", lambda name: _last(name) in _ADVERSARIAL),
  (
    "Training",
    lambda name: name.startswith("train/") and name.count("/") == 1,
  ),
  ("Throughput", lambda name: name.startswith("perf/")),
  ("Gradients and updates", lambda name: "_norm" in name),
  ("Other", lambda name: True),
)
_SHOWN_IN_ORDER = (
  "Evaluation",
  "Training",
  "Adversarial term",
  "Throughput",
  "Other",
  "Loss by time",
  "Evaluation, in parts",
  "Gradients and updates",
)
# For a closer look; on a phone they would be metres of scrolling.
_FOLDED = (
  "Loss by time",
  "Evaluation, in parts",
  "Throughput",
  "Gradients and updates",
)


def curves_section(run: Run, colors: dict[str, int]) -> str:
  """Every metric but the latents', in groups; the generator's first."""
  generator = _curves(_histories(run.part(generator=True)), colors)
  rest = _curves(run.part(generator=False), colors)
  if generator and rest:
    return generator + page.details("Of the autoencoder", rest)
  return generator + rest


def _histories(run: Run) -> Run:
  """Without what only a stage's end has measured: the tables say it all."""
  names = {
    name
    for stage in run.stages
    for name in stage.metric_names()
    if name.startswith("eval/")
  }
  once = {n for n in names if all(len(s.series(n)[0]) < 2 for s in run.stages)}
  stages = [
    dataclasses.replace(
      stage,
      records=[
        {name: v for name, v in record.items() if name not in once}
        for record in stage.records
      ],
    )
    for stage in run.stages
  ]
  return dataclasses.replace(run, stages=stages)


def _curves(run: Run, colors: dict[str, int]) -> str:
  names = sorted(
    {n for stage in run.stages for n in stage.metric_names()}, key=rank
  )
  groups: dict[str, list[str]] = {}
  for name in names:
    aside = is_latent(name) or reference_of(name)
    if not aside and not _is_uneventful(run, name):
      title = next(title for title, takes in _GROUPS if takes(name))
      groups.setdefault(title, []).append(name)
  parts = []
  for title in _SHOWN_IN_ORDER:
    items = metric_panels(run, groups.get(title, []), colors)
    if items and title in _FOLDED:
      parts.append(page.details(title, items))
    elif items:
      parts.append(f"<h3>{page.text(title)}</h3>{items}")
  if not parts:
    return ""
  return _lead(run, colors) + "\n".join(parts)


def _is_uneventful(run: Run, name: str) -> bool:
  """Whether a count of faults has stayed at zero."""
  return name == "train/skipped_steps" and not any(
    stage.skipped_steps for stage in run.stages
  )


def is_latent(name: str) -> bool:
  return name.startswith("eval/") and name[5:] in LATENT_METRICS


def metric_panels(
  run: Run, names: Sequence[str], colors: dict[str, int]
) -> str:
  """A chart a metric; those that belong together share one."""
  joined = {
    name: other for name, (other, _) in _JOINED.items() if other in names
  }
  items = []
  for name in names:
    if name not in joined:
      dashed = [n for n, other in joined.items() if other == name]
      dashed = [n for n in dashed if n in names]
      items.append(_panel(run, name, dashed, colors))
  return page.panels(items)


def _lead(run: Run, colors: dict[str, int]) -> str:
  entries = [(colors[stage.name], stage.title) for stage in run.stages]
  several = len(entries) > 1
  words = "Over training steps"
  words += ", stages one after another" if several else ""
  words += ". Figures: last value."
  begins = [stage.title for stage in run.stages if stage.adversarial_marks]
  if begins:
    words += (
      f" Dotted line: where the adversarial term of {' and '.join(begins)}"
      " begins (discriminator, then decoder, if they begin apart)."
    )
  return (page.legend(entries) if several else "") + page.note(words)


def _panel(
  run: Run, name: str, dashed: Sequence[str], colors: dict[str, int]
) -> str:
  """One chart; the axis is every chart's, so that they line up."""
  offset, bounds, curves, marks = 0.0, [], [], []
  for stage in run.stages:
    for each in (name, *dashed):
      steps, values = stage.series(each)
      if len(steps):
        color = colors[stage.name]
        curves.append(figures.Curve(color, steps, values, offset, each != name))
    marks += [
      offset + mark
      for mark in stage.adversarial_marks
      if 0 < mark <= stage.last_step
    ]
    offset += stage.last_step
    bounds.append(offset)
  metric = describe(name)
  label = _JOINED[dashed[0]][1] if dashed else metric.label
  value = " · ".join(_last_value(run, each) for each in (name, *dashed))
  if not any(np.isfinite(curve.values).any() for curve in curves):
    drawing = page.note("No finite value.")
  else:
    log_scale = "loss" in name or "_norm" in name
    log_scale = log_scale and figures.wants_log_scale(curves)
    drawing = figures.curve_svg(
      curves,
      log_scale=log_scale,
      percent=metric.style == "%",
      bounds=bounds,
      marks=marks,
    )
  return page.panel(label, value, drawing, hint=name)


def _last_value(run: Run, name: str) -> str:
  """A metric's newest value, as a reader wants to see it."""
  values = [stage.series(name)[1] for stage in run.stages]
  return format_value(name, float(np.concatenate(values)[-1]))
