"""The report's tables of figures: results, probe, the adversarial term."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from psvae_jax.report import page, references
from psvae_jax.report.data import Run, Stage
from psvae_jax.report.metrics import (
  LATENT_METRICS,
  describe,
  format_value,
  is_number,
  is_of_edits,
  is_part,
  rank,
)

_MISSING = "–"
# Feature space → its metric; columns of the probe's table.
_PROBES = {
  ("f′", "encoder"): "eval/probe_accuracy",
  ("z", "latent"): "eval/probe_accuracy_latent",
  ("f″", "decoded"): "eval/probe_accuracy_decoded",
}
_ADVERSARIAL = ("eval/sharpness", "eval/psnr", "eval/ssim")


def results_section(run: Run) -> str:
  """The generator's figures, then the autoencoder's."""
  generator, rest = run.part(generator=True), run.part(generator=False)
  if not generator.stages:
    return _autoencoder_tables(rest)
  return _generator_tables(generator) + _titled(
    "Autoencoder", _autoencoder_tables(rest)
  )


def _generator_tables(run: Run) -> str:
  """Generated images, edits, and parts."""
  names = _result_names(run)
  parts = {name for name in names if is_part(name)}
  edits = {name for name in names - parts if is_of_edits(name)}
  images = metric_table(run, names - parts - edits)
  # Of stages that edit; the others would be empty columns.
  editors = [s for s in run.stages if s.name == "edit"]
  edit_run = dataclasses.replace(run, stages=editors)
  pieces = [
    _titled("Generated images", images),
    _titled("Edits", metric_table(edit_run, edits)),
    _references_note(run),
  ]
  if parts:
    pieces.append(page.details("In parts", metric_table(run, parts)))
  return "\n".join(filter(None, pieces))


def _references_note(run: Run) -> str:
  """What the columns beside the stages are."""
  found = [
    f"{references.TITLES[name]}: {note}"
    for name, note in references.NOTES.items()
    if name in run.columns()
  ]
  return page.note("; ".join(found) + ".") if found else ""


def _result_names(run: Run) -> set[str]:
  """Metrics of the results, and not of training."""
  return {
    name
    for section in run.columns().values()
    for name, value in section.items()
    if is_number(value) and not name.startswith(("train/", "perf/"))
  }


def _autoencoder_tables(run: Run) -> str:
  """Reconstruction figures, the probe, the adversarial term, and parts."""
  names = _result_names(run)
  parts = {name for name in names if is_part(name)}
  aside = {
    n for n in names if n.startswith("eval/") and n[5:] in LATENT_METRICS
  }
  main = names - parts - aside - set(_PROBES.values())
  pieces = [
    metric_table(run, main),
    _titled("Linear probe of the scene’s attributes", _probe_table(run)),
    _titled("Before and after the adversarial term", _adversarial_table(run)),
  ]
  if parts:
    pieces.append(
      page.details("Checker and probe in parts", metric_table(run, parts))
    )
  return "\n".join(filter(None, pieces))


def metric_table(run: Run, names: Iterable[str]) -> str:
  """A row a metric, a column a stage or reference that has any of them."""
  names = sorted(names, key=rank)
  if not names:
    return ""
  stages = {stage.name: stage for stage in run.stages}
  columns = {
    column: section
    for column, section in run.columns().items()
    if column in stages or any(is_number(section.get(n)) for n in names)
  }
  head = [("", "")]
  for column in columns:
    so_far = ""
    if column in stages and not stages[column].final:
      step = stages[column].evaluated_step
      so_far = f"at step {step:,}" if step else "not evaluated yet"
    head.append((run.column_title(column), so_far))
  rows = []
  for name in names:
    metric = describe(name)
    shown = {
      column: format_value(name, section[name])
      for column, section in columns.items()
      if name in section
    }
    # References are there to be compared with, not to win.
    own = {c: columns[c][name] for c in shown if c in stages}
    best = _best(own, shown, metric.better)
    missing = {
      column: _MISSING if column in stages else "" for column in columns
    }
    cells = [
      (shown.get(column, missing[column]), column in best) for column in columns
    ]
    rows.append(((metric.label + _arrow(metric.better), metric.note), cells))
  return page.table(head, rows)


def latents_table(run: Run) -> str:
  """The latents' figures, averaged over channels."""
  names = {
    f"eval/{name}"
    for name in LATENT_METRICS
    if any(is_number(s.figures().get(f"eval/{name}")) for s in run.stages)
  }
  return metric_table(run, names)


def _titled(title: str, html: str) -> str:
  return f"<h3>{page.text(title)}</h3>{html}" if html else ""


def _arrow(better: str) -> str:
  return {"higher": "\u00a0↑", "lower": "\u00a0↓"}.get(better, "")


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


def _probe_table(run: Run) -> str:
  """A row a stage, the frozen encoder or a floor; a column a feature space."""
  columns = run.columns()
  rows = []
  for column, section in columns.items():
    values = [section.get(name) for name in _PROBES.values()]
    if not any(map(is_number, values)):
      continue
    if column == "chance":  # the same whatever the features
      values = [values[0]] * len(values)
    cells = [
      (format_value("probe_accuracy", v) if is_number(v) else "", False)
      for v in values
    ]
    rows.append(((run.column_title(column), _probe_note(column)), cells))
  if not rows:
    return ""
  head = [("Balanced accuracy", ""), *_PROBES]
  return page.table(head, rows)


def _probe_note(column: str) -> str:
  notes = {
    "encoder": "What there was to keep.",
    "random_encoder": "The same network, never trained.",
  }
  return notes.get(column, "")


def _adversarial_table(run: Run) -> str:
  """Figures just before the decoder felt the discriminator, and at the end."""
  parts = [_before_and_after(stage) for stage in run.stages]
  return "\n".join(filter(None, parts))


def _before_and_after(stage: Stage) -> str:
  if not stage.adversarial_marks:
    return ""
  felt = stage.adversarial_marks[-1]
  evaluated = [r for r in stage.records if is_number(r.get("eval/sharpness"))]
  before = [record for record in evaluated if record["step"] <= felt]
  after = [record for record in evaluated if record["step"] > felt]
  if not after:
    return page.note(
      f"{stage.title}: it acts on the decoder from step {felt:,}; nothing was"
      " evaluated after that yet."
    )
  if not before:
    return page.note(
      f"{stage.title}: it acts on the decoder from step {felt:,}, and nothing"
      " was evaluated before that to compare with (config.eval.every_steps)."
    )
  pair = (
    max(before, key=lambda record: record["step"]),
    max(after, key=lambda record: record["step"]),
  )
  head = [(stage.title, "")]
  head += [
    (word, f"at step {record['step']:,}")
    for word, record in zip(("Before", "After"), pair, strict=True)
  ]
  return page.table(head, _rows(_ADVERSARIAL, pair))


def _rows(
  names: Sequence[str], records: Sequence[dict[str, Any]]
) -> Iterable[tuple[tuple[str, str], list[tuple[str, bool]]]]:
  for name in names:
    if any(is_number(record.get(name)) for record in records):
      metric = describe(name)
      cells = [
        format_value(name, record[name])
        if is_number(record.get(name))
        else _MISSING
        for record in records
      ]
      yield (
        (metric.label + _arrow(metric.better), metric.note),
        [(cell, False) for cell in cells],
      )
