"""The report's account of the run: settings, time spent, faults, config."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from psvae_jax.progress import format_seconds
from psvae_jax.report import page
from psvae_jax.report.data import QUARANTINE_FILE, Run
from psvae_jax.report.metrics import is_number
from psvae_jax.report.settings import (
  autoencoder_phrase,
  autoencoder_settings,
  condition_phrase,
  generator_settings,
  mapping,
  transformer_phrase,
)

_MAX_FAULTS = 20  # the file has them all


def run_section(run: Run) -> str:
  """Everything about the job that is not a result."""
  of = " of the autoencoder" if run.part(generator=True).stages else ""
  parts = [
    ("Settings of the generator", generator_settings(run)),
    (f"Settings{of}", autoencoder_settings(run)),
    ("Time", _timings(run)),
    ("Faults", _faults(run)),
  ]
  html = [
    page.preformatted(phrase(run.summary.get("command", ""), " ")),
    *(f"<h3>{title}</h3>{part}" for title, part in parts if part),
  ]
  if versions := phrase(run.summary.get("versions", "")):
    html.append(page.note(f"Versions: {versions}."))
  if run.config:
    text = json.dumps(run.config, indent=2, ensure_ascii=False)
    html.append(
      page.details(
        "Resolved configuration of the last job", page.preformatted(text)
      )
    )
  return "\n".join(filter(None, html))


def phrase(value: Any, separator: str = ", ") -> str:
  """A mapping, list or anything else in one line."""
  if isinstance(value, Mapping):
    return separator.join(f"{name} {item}" for name, item in value.items())
  if isinstance(value, list):
    return separator.join(map(str, value))
  return str(value)


def data_phrase(run: Run) -> str:
  """Data and image size in a few words; "" if the config does not say."""
  data = mapping(run.config, "data")
  source = data.get("source")
  if not isinstance(source, str):
    return ""
  named = data.get("builder") or data.get("root")
  words = f"{source}, {named}" if isinstance(named, str) and named else source
  side = _model(run, generator=False).get("output_size")
  return f"{words}, {side} × {side}" if is_number(side) else words


def autoencoder_model(run: Run) -> str:
  """The autoencoder in a few words."""
  return autoencoder_phrase(_model(run, generator=False))


def generator_model(run: Run) -> str:
  """The generator in a few words; "" if there is none."""
  model = _model(run, generator=True)
  parts = [transformer_phrase(model), condition_phrase(model)]
  return "; ".join(filter(None, parts))


def _model(run: Run, *, generator: bool) -> Mapping[str, Any]:
  """Model section of the last stage of a kind, or of the last job."""
  configs = [s.job for s in run.part(generator=generator).stages if s.job]
  return mapping(configs[-1] if configs else run.config, "model")


def wall_seconds(run: Run) -> dict[str, float]:
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


def fault_phrase(run: Run) -> str:
  """Faults in a sentence; "" if there were none."""
  parts = []
  if run.quarantine:
    count = len(run.quarantine)
    noun = "record" if count == 1 else "records"
    parts.append(f"{count:,} unusable {noun} left out of the data")
  for stage in run.stages:
    if count := stage.skipped_steps:
      noun = "step" if count == 1 else "steps"
      parts.append(f"{count:,} non-finite {noun} of {stage.title} skipped")
  return ", ".join(parts)


def _timings(run: Run) -> str:
  """Wall time, what of it was not training, and throughput, by stage."""
  wall = wall_seconds(run)
  all_spent = mapping(run.summary, "timings")
  columns: dict[str, dict[str, str]] = {}
  for stage in run.stages:
    seconds = wall.get(stage.name)
    cells = {} if seconds is None else {"Wall time": format_seconds(seconds)}
    for kind, part in mapping(all_spent, stage.name).items():
      if is_number(part):
        cells[str(kind).replace("_", " ").capitalize()] = _share(part, seconds)
    _, rates = stage.series("perf/images_per_second")
    rates = rates[np.isfinite(rates)]
    if len(rates):
      cells["Images/s, median"] = f"{np.median(rates):.4g}"
    if cells:
      columns[stage.title] = cells
  known = {stage.name for stage in run.stages} | {"total"}
  for name, seconds in wall.items():
    if name not in known:
      columns[name] = {"Wall time": format_seconds(seconds)}
  if "total" in wall:
    columns["In all"] = {"Wall time": format_seconds(wall["total"])}
  if not columns:
    return ""
  # Stages may differ in what they have; parts stand below the wall time.
  names = dict.fromkeys(name for cells in columns.values() for name in cells)
  first = [n for n in names if n == "Wall time"]
  last = [n for n in names if n == "Images/s, median"]
  names = first + [n for n in names if n not in first + last] + last
  rows = [
    ((name, ""), [(cells.get(name, ""), False) for cells in columns.values()])
    for name in names
  ]
  head = [("", ""), *((title, "") for title in columns)]
  return page.table(head, rows) + page.note(
    "Wall time includes compilation and evaluation, and adds up over"
    " restarts; images/s is training alone."
  )


def _share(seconds: float, whole: float | None) -> str:
  words = format_seconds(seconds)
  return f"{words} ({100 * seconds / whole:.0f} %)" if whole else words


def _faults(run: Run) -> str:
  """Counts, and the first unreadable records by name."""
  phrase = fault_phrase(run)
  if not phrase:
    return ""
  html = page.note(f"{phrase[0].upper()}{phrase[1:]}.")
  if not run.quarantine:
    return html
  shown = run.quarantine[:_MAX_FAULTS]
  rows = [
    (
      (str(r.get("path") or f"record {r.get('index', '?')}"), ""),
      [(str(r.get(k, "")), False) for k in ("split", "index", "kind", "cause")],
    )
    for r in shown
  ]
  head = [(name, "") for name in ("Record", "Split", "Index", "Kind", "Cause")]
  title = "Unusable records"
  if len(shown) < len(run.quarantine):
    title += f", first {len(shown)}; all are in {QUARANTINE_FILE}"
  return html + page.details(title, page.table(head, rows, wrap=True))
