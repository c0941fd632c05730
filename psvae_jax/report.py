"""Writes `report.html`: what a job did, in one file that opens from disk.

    python -m psvae_jax.report WORKDIR

It reads the files of the workdir and nothing else, may be called at any time,
and shows what is there: one stage or several, finished or running.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax import report_data as data
from psvae_jax import report_figures as figures
from psvae_jax import report_page as page
from psvae_jax import writers
from psvae_jax.progress import format_seconds
from psvae_jax.report_images import images_section
from psvae_jax.report_metrics import describe, format_value, is_number, rank

REPORT_FILE = "report.html"

_LATENT_METRICS = (
  "kl",
  "latent_mean",
  "latent_std",
  "latent_variance",
  "collapsed_channels",
)
_TILES = ("eval/psnr", "eval/ssim", "eval/probe_accuracy")


def write_report(workdir: Path) -> Path:
  """Writes the report of what is in `workdir` so far.

  Args:
    workdir: folder of a job; see the design of the workdir in `writers`.

  Returns:
    Path of the page, replaced atomically.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  workdir = Path(workdir)
  run = data.read_run(workdir)
  colors = {s.name: i % figures.NUM_COLORS for i, s in enumerate(run.stages)}
  sections = [
    _header(run),
    page.section("results", "Results", _results(run)),
    page.section("images", "Images", images_section(run.stages)),
    page.section("curves", "Curves", _curves(run, colors)),
    page.section("latents", "Latent space", _latents(run, colors)),
    page.section("timings", "Timings", _timings(run)),
    page.section("config", "Configuration", _configuration(run)),
  ]
  if not run.stages:
    sections.insert(1, page.note("Nothing has been recorded yet."))
  sections += [page.warning(f"Left out: {notice}") for notice in run.notices]
  path = workdir / REPORT_FILE
  html = page.page(
    f"{_title(run)} · {run.name}", "\n".join(filter(None, sections))
  )
  writers.write_text_atomic(path, html)
  return path


def _title(run: data.Run) -> str:
  return " → ".join(stage.title for stage in run.stages) or run.name


def _header(run: data.Run) -> str:
  wall = _wall_seconds(run)
  updated = ""
  if run.updated:
    updated = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(run.updated))
  parts = [
    f'<header><p class="kicker">psvae_jax · {page.text(run.name)}</p>',
    f"<h1>{page.text(_title(run))}</h1>",
    page.tiles(_tiles(run)),
    page.facts(
      [
        ("Stages", "; ".join(_progress(stage) for stage in run.stages)),
        ("Device", _plain(run.summary.get("device", ""))),
        ("Wall time", format_seconds(wall["total"]) if wall else ""),
        ("Last written", updated),
        ("Versions", _plain(run.summary.get("versions", ""))),
      ]
    ),
    *[page.warning(text) for text in _alarms(run)],
    "</header>",
  ]
  return "\n".join(filter(None, parts))


def _progress(stage: data.Stage) -> str:
  steps = f"{stage.last_step:,}"
  if stage.planned_steps:
    steps += f" of {stage.planned_steps:,}"
  state = ", unfinished" if stage.unfinished else ""
  return f"{stage.title} {steps} steps{state}"


def _tiles(run: data.Run) -> Iterable[tuple[str, str]]:
  """The figures that matter most, of the last stage that has them."""
  for name in _TILES:
    for stage in reversed(run.stages):
      value = stage.figures().get(name)
      if is_number(value):
        label = f"{describe(name).label} · {stage.title}"
        yield format_value(name, value), label
        break


def _alarms(run: data.Run) -> Iterable[str]:
  """A sentence a stage whose training met NaN or infinity."""
  for stage in run.stages:
    names = []
    for name in stage.metric_names():
      steps, values = stage.series(name)
      bad = steps[~np.isfinite(values)]
      if len(bad) and not name.startswith("perf/"):
        names.append(f"{name} (first at step {int(bad[0]):,})")
    if names:
      yield f"Non-finite values in {stage.title}: {', '.join(names)}."


def _results(run: data.Run) -> str:
  columns = run.columns()
  names = {
    name
    for section in columns.values()
    for name, value in section.items()
    if not name.startswith(("train/", "perf/")) and is_number(value)
  }
  if not names:
    return ""
  stages = {stage.name: stage for stage in run.stages}
  columns = {
    name: section
    for name, section in columns.items()
    if name in stages or names.intersection(section)
  }
  head = [("", "")]
  for column in columns:
    so_far = ""
    if column in stages and not stages[column].final:
      so_far = f"at step {stages[column].evaluated_step:,}"
    head.append((run.column_title(column), so_far))
  rows = []
  for name in sorted(names, key=rank):
    metric = describe(name)
    shown = {
      column: format_value(name, section[name])
      for column, section in columns.items()
      if name in section
    }
    # References are there to be compared with, not to win.
    own = {c: columns[c][name] for c in shown if c in stages}
    best = _best(own, shown, metric.better)
    missing = {column: "–" if column in stages else "" for column in columns}
    cells = [
      (shown.get(column, missing[column]), column in best) for column in columns
    ]
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓"}.get(metric.better, "")
    rows.append(((metric.label + arrow, metric.note), cells))
  return page.table(head, rows)


def _best(
  values: dict[str, Any], shown: dict[str, str], better: str
) -> set[str]:
  """Columns that hold the best value, as far as the reader can see.

  Args:
    values: by column.
    shown: the same, as printed: equal prints are a tie.
    better: "higher", "lower" or "" for no contest.
  """
  finite = {c: v for c, v in values.items() if is_number(v) and np.isfinite(v)}
  if not better or len({shown[column] for column in finite}) < 2:
    return set()
  choose = max if better == "higher" else min
  best = choose(finite, key=finite.__getitem__)
  return {column for column in finite if shown[column] == shown[best]}


def _curves(run: data.Run, colors: dict[str, int]) -> str:
  names = sorted(
    {n for stage in run.stages for n in stage.metric_names()}, key=rank
  )
  rest = [name for name in names if not _is_latent(name)]
  parts = []
  for title, belongs in _GROUPS:
    chosen = [name for name in rest if belongs(name)]
    rest = [name for name in rest if name not in chosen]
    if chosen:
      items = page.panels([_panel(run, name, colors) for name in chosen])
      if title in _FOLDED:
        parts.append(page.details(title, items))
      else:
        parts.append(f"<h3>{page.text(title)}</h3>{items}")
  if not parts:
    return ""
  entries = [(colors[stage.name], stage.title) for stage in run.stages]
  lead = page.legend(entries) if len(entries) > 1 else ""
  several = ", stages one after another" if len(entries) > 1 else ""
  lead += page.note(f"Over training steps{several}. Figures: last value.")
  return lead + "\n".join(parts)


_GROUPS: tuple[tuple[str, Callable[[str], bool]], ...] = (
  ("Evaluation", lambda name: name.startswith("eval/")),
  (
    "Training",
    lambda name: name.startswith("train/") and name.count("/") == 1,
  ),
  ("Throughput", lambda name: name.startswith("perf/")),
  ("Gradients and updates", lambda name: "_norm" in name),
  ("Other", lambda name: True),
)
_FOLDED = ("Gradients and updates",)  # for a look when something went wrong


def _is_latent(name: str) -> bool:
  return name.startswith("eval/") and name[5:] in _LATENT_METRICS


def _panel(run: data.Run, name: str, colors: dict[str, int]) -> str:
  """One metric's chart: stages that have it, end to end if several."""
  found = [s for s in run.stages if len(s.series(name)[0])]
  offset, curves, last = 0.0, [], np.nan
  for stage in run.stages:
    if stage in found:
      steps, values = stage.series(name)
      curves.append(figures.Curve(colors[stage.name], steps, values, offset))
      last = values[-1]
    if len(found) > 1:
      offset += stage.last_step
  metric = describe(name)
  if not any(np.isfinite(curve.values).any() for curve in curves):
    drawing = page.note("No finite value.")
  else:
    log_scale = "loss" in name or "_norm" in name
    log_scale = log_scale and figures.wants_log_scale(curves)
    drawing = figures.curve_svg(
      curves, log_scale=log_scale, percent=metric.style == "%"
    )
  return page.panel(
    metric.label, format_value(name, float(last)), drawing, hint=name
  )


def _latents(run: data.Run, colors: dict[str, int]) -> str:
  """Channel statistics of the last stage that has them, and their history."""
  parts = []
  for stage in reversed(run.stages):
    if not stage.latents:
      continue
    titles = {
      "std": "Std of μ",
      "mean": "Mean of μ",
      "variance": "Posterior variance",
      "kl": "KL",
    }
    items = [
      page.panel(
        titles.get(name, name),
        f"{np.nanmean(array):.3g}".replace("-", "−"),
        figures.bars_svg(array.astype(np.float64), colors[stage.name]),
      )
      for name, array in stage.latents.items()
    ]
    parts.append(
      f"<h3>By channel, {page.text(stage.title)}</h3>"
      + page.note("Figures: mean over channels.")
      + page.panels(items)
    )
    break
  names = sorted(
    {n for s in run.stages for n in s.metric_names() if _is_latent(n)},
    key=rank,
  )
  if names:
    items = page.panels([_panel(run, name, colors) for name in names])
    parts.append(f"<h3>Over training</h3>{items}")
  return "\n".join(parts)


def _wall_seconds(run: data.Run) -> dict[str, float]:
  """Seconds by stage and in "total"; {} if unknown."""
  recorded = run.summary.get("wall_seconds")
  if is_number(recorded):
    return {"total": recorded}
  if not isinstance(recorded, dict):
    return {}
  seconds = {k: v for k, v in recorded.items() if is_number(v)}
  if seconds and "total" not in seconds:
    seconds["total"] = sum(seconds.values())
  return seconds


def _timings(run: data.Run) -> str:
  wall = _wall_seconds(run)
  rows = []
  for stage in run.stages:
    _, rates = stage.series("perf/images_per_second")
    rates = rates[np.isfinite(rates)]
    seconds = wall.get(stage.name)
    if seconds is None and not len(rates):
      continue
    cells = [
      "–" if seconds is None else format_seconds(seconds),
      f"{stage.last_step:,}",
      f"{stage.batch_size:,}" if stage.batch_size else "–",
      f"{np.median(rates):.4g}" if len(rates) else "–",
    ]
    rows.append(((stage.title, ""), [(cell, False) for cell in cells]))
  known = {stage.name for stage in run.stages} | {"total"}
  extra = [(name, v) for name, v in wall.items() if name not in known]
  if "total" in wall:
    extra.append(("In all", wall["total"]))
  for name, seconds in extra:
    cells = [format_seconds(seconds), "", "", ""]
    rows.append(((name, ""), [(cell, False) for cell in cells]))
  if not rows:
    return ""
  head = ["", "Wall time", "Steps", "Batch size", "Images/s, median"]
  return page.note(
    "Wall time includes compilation and evaluation, and adds up over"
    " restarts; images/s is training alone."
  ) + page.table([(cell, "") for cell in head], rows)


def _configuration(run: data.Run) -> str:
  if not run.config:
    return ""
  text = json.dumps(run.config, indent=2, ensure_ascii=False)
  html = page.preformatted(text)
  return page.details("Resolved configuration of the last job", html)


def _plain(value: Any) -> str:
  """Returns a mapping or list as a phrase."""
  if isinstance(value, dict):
    return ", ".join(f"{name} {item}" for name, item in value.items())
  if isinstance(value, list):
    return ", ".join(map(str, value))
  return str(value)


if __name__ == "__main__":
  if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit("usage: python -m psvae_jax.report WORKDIR")
  print(write_report(Path(sys.argv[1])))
