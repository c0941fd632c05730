"""The report's account of the run: settings, time spent, faults, config."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from psvae_jax import report_page as page
from psvae_jax.progress import format_seconds
from psvae_jax.report_data import QUARANTINE_FILE, Run, Stage
from psvae_jax.report_metrics import is_number

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
  html = [f"<h3>{title}</h3>{part}" for title, part in parts if part]
  if run.config:
    text = json.dumps(run.config, indent=2, ensure_ascii=False)
    html.append(
      page.details(
        "Resolved configuration of the last job", page.preformatted(text)
      )
    )
  return "\n".join(html)


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
    ("in the pixel loss", [_weights(s.config, _PIXEL_WEIGHTS) for s in stages]),
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
  """Wall time by stage, what of it was not training, and throughput."""
  wall = wall_seconds(run)
  spent = {
    stage.name: {
      kind: seconds
      for kind, seconds in _mapping(
        _mapping(run.summary, "timings"), stage.name
      ).items()
      if is_number(seconds)
    }
    for stage in run.stages
  }
  kinds = list(dict.fromkeys(k for kinds in spent.values() for k in kinds))
  rows = []
  for stage in run.stages:
    _, rates = stage.series("perf/images_per_second")
    rates = rates[np.isfinite(rates)]
    seconds = wall.get(stage.name)
    if seconds is None and not len(rates):
      continue
    cells = [
      _MISSING if seconds is None else format_seconds(seconds),
      *[_share(spent[stage.name].get(kind), seconds) for kind in kinds],
      f"{stage.last_step:,}",
      f"{np.median(rates):.4g}" if len(rates) else _MISSING,
    ]
    rows.append(((stage.title, ""), [(cell, False) for cell in cells]))
  known = {stage.name for stage in run.stages} | {"total"}
  extra = [(name, v) for name, v in wall.items() if name not in known]
  if "total" in wall:
    extra.append(("In all", wall["total"]))
  for name, seconds in extra:
    cells = [format_seconds(seconds), *[""] * (len(kinds) + 2)]
    rows.append(((name, ""), [(cell, False) for cell in cells]))
  if not rows:
    return ""
  head = ["", "Wall time"]
  head += [kind.replace("_", " ").capitalize() for kind in kinds]
  head += ["Steps", "Images/s, median"]
  return page.table([(cell, "") for cell in head], rows) + page.note(
    "Wall time includes compilation and evaluation, and adds up over"
    " restarts; images/s is training alone."
  )


def _share(seconds: float | None, whole: float | None) -> str:
  if seconds is None:
    return _MISSING
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
