"""The report's account of the run: settings, time spent, faults, config."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from psvae_jax.progress import format_seconds
from psvae_jax.report import page
from psvae_jax.report.data import QUARANTINE_FILE, Run, Stage
from psvae_jax.report.metrics import is_number

_MISSING = "–"
_MAX_FAULTS = 20  # the file has them all
# Loss weights, in the order of the data flow.
_WEIGHTS = {
  "semantic": "semantic",
  "kl": "KL",
  "pixel": "pixel",
}
_PIXEL_WEIGHTS = {"l1": "L1", "mse": "MSE", "perceptual": "perceptual"}


def run_section(run: Run) -> str:
  """Everything about the job that is not a result."""
  parts = [
    ("Settings", _settings(run)),
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
  data, model = _mapping(run.config, "data"), _mapping(run.config, "model")
  source = data.get("source")
  if not isinstance(source, str):
    return ""
  named = data.get("builder") or data.get("root")
  words = f"{source}, {named}" if isinstance(named, str) and named else source
  side = model.get("output_size")
  return f"{words}, {side} × {side}" if is_number(side) else words


def model_phrase(run: Run) -> str:
  """Encoder, latent and decoder in a few words."""
  model = _mapping(run.config, "model")
  words = []
  if isinstance(model.get("encoder"), str):
    words.append(f"encoder {model['encoder'] or 'embedded miniature'}")
  if is_number(model.get("channels")):
    words.append(f"{model['channels']} latent channels")
  kind = _mapping(model, "pixel_decoder").get("kind")
  if isinstance(kind, str):
    words.append(f"{kind} pixel decoder")
  return ", ".join(words)


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


def _settings(run: Run) -> str:
  """A row a setting, a column a stage."""
  stages = [stage for stage in run.stages if stage.config]
  if not stages:
    return ""
  rows = [
    (
      "Steps",
      [f"{s.planned_steps:,}" if s.planned_steps else "" for s in stages],
    ),
    ("Batch size", [_batch(s) for s in stages]),
    ("Optimizer", [_optimizer(s, "optim") for s in stages]),
    ("Loss weights", [_weights(s.config, _WEIGHTS) for s in stages]),
    ("Pixel loss", [_weights(s.config, _PIXEL_WEIGHTS) for s in stages]),
    ("Adversarial term", [_adversary(s) for s in stages]),
  ]
  body = [
    ((name, ""), [(cell or _MISSING, False) for cell in cells])
    for name, cells in rows
    if any(cells)
  ]
  head = [("", ""), *((stage.title, "") for stage in stages)]
  return page.table(head, body, wrap=True) if body else ""


def _batch(stage: Stage) -> str:
  if not stage.batch_size:
    return ""
  parts = _mapping(stage.config, "train").get("accumulate")
  if is_number(parts) and parts > 1:
    return f"{stage.batch_size:,} in {parts:,} parts"
  return f"{stage.batch_size:,}"


def _optimizer(stage: Stage, name: str) -> str:
  optim = _mapping(stage.config, name)
  if not isinstance(optim.get("name"), str):
    return ""
  rate = optim.get("learning_rate")
  return f"{optim['name']}, {rate:g}" if is_number(rate) else optim["name"]


def _weights(config: Mapping[str, Any], names: Mapping[str, str]) -> str:
  loss = _mapping(config, "loss")
  return ", ".join(
    f"{title} {loss[name]:g}"
    for name, title in names.items()
    if is_number(loss.get(name)) and loss[name]
  )


def _adversary(stage: Stage) -> str:
  if not stage.adversarial_marks:
    return ""
  loss = _mapping(stage.config, "loss")
  adaptive = " × λ" if loss.get("gan_adaptive", True) else ""
  first, last = stage.adversarial_marks[0], stage.adversarial_marks[-1]
  words = f"{loss['gan']:g}{adaptive}, from step {first:,}"
  return words + (f" (decoder from {last:,})" if last > first else "")


def _timings(run: Run) -> str:
  """Wall time, what of it was not training, and throughput, by stage."""
  wall = wall_seconds(run)
  all_spent = _mapping(run.summary, "timings")
  columns: dict[str, dict[str, str]] = {}
  for stage in run.stages:
    seconds = wall.get(stage.name)
    cells = {} if seconds is None else {"Wall time": format_seconds(seconds)}
    for kind, part in _mapping(all_spent, stage.name).items():
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


def _mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """Entry `name` of a mapping if it is a mapping itself, else {}."""
  found = value.get(name)
  return found if isinstance(found, Mapping) else {}
