"""Writes `report.html`: what a job did, in one file that opens from disk.

    python -m psvae_jax.report WORKDIR

It reads the files of the workdir and nothing else, may be called at any time,
and shows what is there: one stage or several, finished or running.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from psvae_jax import writers
from psvae_jax.progress import format_seconds
from psvae_jax.report import data, figures, page
from psvae_jax.report.curves import curves_section
from psvae_jax.report.features import features_section
from psvae_jax.report.generated import edits_section, generated_section
from psvae_jax.report.images import images_section
from psvae_jax.report.latents import latents_section
from psvae_jax.report.metrics import describe, format_value, is_number
from psvae_jax.report.run import (
  autoencoder_model,
  data_phrase,
  fault_phrase,
  generator_model,
  phrase,
  run_section,
  wall_seconds,
)
from psvae_jax.report.tables import results_section

REPORT_FILE = "report.html"

_AUTOENCODER_TILES = (
  "eval/psnr",
  "eval/ssim",
  "eval/probe_accuracy",
  "eval/sharpness",
)
_GENERATOR_TILES = (
  "eval/joint_accuracy",
  "eval/joint_accuracy_one_object",
  "eval/frechet_distance",
  "eval/edit_success",
)


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

  def aside(html: str) -> str:
    """Beside a generator, what only the autoencoder has is folded."""
    folds = html and any(stage.is_generator for stage in run.stages)
    return page.details("Of the autoencoder", html) if folds else html

  sections = "\n".join(
    filter(
      None,
      [
        page.section("results", "Results", results_section(run)),
        page.section("generated", "Generated images", generated_section(run)),
        page.section("edits", "Edits", edits_section(run)),
        page.section("images", "Reconstructions", images_section(run)),
        page.section("features", "Features", aside(features_section(run))),
        page.section("curves", "Curves", curves_section(run, colors)),
        page.section(
          "latents", "Latent space", aside(latents_section(run, colors))
        ),
        page.section("run", "The run", run_section(run)),
      ],
    )
  )
  parts = [_header(run), page.contents(sections)]
  if not run.stages:
    parts.append(page.note("Nothing has been recorded yet."))
  parts.append(sections)
  parts += [page.warning(f"Left out: {notice}") for notice in run.notices]
  path = workdir / REPORT_FILE
  html = page.page(
    f"{_title(run)} · {run.name}", "\n".join(filter(None, parts))
  )
  writers.write_text_atomic(path, html)
  return path


def _title(run: data.Run) -> str:
  return " → ".join(stage.title for stage in run.stages) or run.name


def _header(run: data.Run) -> str:
  generator = generator_model(run)
  wall = wall_seconds(run)
  updated = ""
  if run.updated:
    updated = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(run.updated))
  parts = [
    f'<header><p class="kicker">psvae_jax · {page.text(run.name)}</p>',
    f"<h1>{page.text(_title(run))}</h1>",
    page.tiles(_tiles(run.part(generator=True), _GENERATOR_TILES)),
    page.tiles(_tiles(run.part(generator=False), _AUTOENCODER_TILES)),
    page.facts(
      [
        ("Stages", "; ".join(_progress(stage) for stage in run.stages)),
        ("Data", data_phrase(run)),
        ("Autoencoder" if generator else "Model", autoencoder_model(run)),
        ("Generator", generator),
        ("Device", phrase(run.summary.get("device", ""))),
        ("Wall time", format_seconds(wall["total"]) if wall else ""),
        ("Faults", fault_phrase(run)),
        ("Last written", updated),
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


def _tiles(
  run: data.Run, names: Iterable[str]
) -> Iterable[tuple[str, str, str]]:
  """The figures that matter most, of the last stage that has them.

  The ceiling and the stage before stand below for comparison.
  """
  ceilings = run.columns().get("ceiling", {})
  for name in names:
    having = [s for s in run.stages if is_number(s.figures().get(name))]
    if having:
      *before, last = having
      beside = []
      if is_number(ceilings.get(name)):
        # Of a distance it is not the highest figure but the lowest.
        best = "ceiling" if describe(name).better == "higher" else "at best"
        beside.append(f"{best} {format_value(name, ceilings[name])}")
      if before:
        value = format_value(name, before[-1].figures()[name])
        beside.append(f"{before[-1].title} {value}")
      label = f"{describe(name).label} · {last.title}"
      value = format_value(name, last.figures()[name])
      yield value, label, ", ".join(beside)


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
