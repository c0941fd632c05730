"""What a report is made of: the files of a workdir.

`read_run` takes whatever is there. A piece that is missing is left out; a piece
that cannot be read is left out and named in `Run.notices`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax import writers
from psvae_jax.data import quarantine
from psvae_jax.report import references
from psvae_jax.report.arrays import read_arrays
from psvae_jax.report.metrics import is_number, rank
from psvae_jax.report.pictures import Pictures, read_pictures

CONFIG_FILE = "config.json"
SAMPLES_DIR = "samples"
LATENTS_FILE = "latents.npz"
QUARANTINE_FILE = "quarantine.jsonl"
LATENT_STATS_FILE = "latent_stats.json"

STAGE_TITLES = {
  "encoder": "Encoder",
  "vae": "VAE",
  "rae": "RAE",
  "rae_hd": "RAE-HD",
  "svae": "S-VAE",
  "pvae": "P-VAE",
  "psvae": "PS-VAE",
  "t2i": "Text to image",
  "edit": "Editing",
  "text_encoder": "Text encoder",
}
GENERATOR_STAGES = ("t2i", "edit")


@dataclasses.dataclass
class Stage:
  """One stage as far as it got.

  Attributes:
    name: folder and config section.
    title: name for a reader.
    records: lines of `metrics.jsonl`.
    samples: arrays by name, by name of the sample set.
    latents: per-channel statistics (C,) by name, {} if there are none.
    final: the stage's section of the summary, {} before it has finished.
    planned_steps: from the config; 0 if it does not say.
    batch_size: from the config; 0 if it does not say.
    config: the stage's section of the config it was trained with.
    job: that whole config, {} if there is none.
    pictures: what a generator's evaluations left.
  """

  name: str
  title: str
  records: list[dict[str, Any]]
  samples: dict[str, dict[str, np.ndarray]]
  latents: dict[str, np.ndarray]
  final: dict[str, Any]
  planned_steps: int = 0
  batch_size: int = 0
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  job: dict[str, Any] = dataclasses.field(default_factory=dict)
  pictures: Pictures = Pictures()

  @property
  def is_generator(self) -> bool:
    """Whether it trains the generator on another stage's latents."""
    return self.name in GENERATOR_STAGES

  @property
  def adversarial_marks(self) -> tuple[int, ...]:
    """Steps at which the discriminator, then the decoder, enter the game.

    One if they are the same, none without an adversarial term.
    """
    loss = _mapping(self.config.get("loss"))
    if not (is_number(loss.get("gan")) and loss["gan"] > 0):
      return ()
    start = _count(loss.get("gan_start"))
    return tuple(sorted({start, start + _count(loss.get("gan_warmup"))}))

  @property
  def skipped_steps(self) -> int:
    """Steps whose loss or gradient was not finite."""
    return max(
      (
        int(record["train/skipped_steps"])
        for record in (*self.records, self.final)
        if is_number(record.get("train/skipped_steps"))
        and math.isfinite(record["train/skipped_steps"])
      ),
      default=0,
    )

  @property
  def last_step(self) -> int:
    return max((record["step"] for record in self.records), default=0)

  @property
  def evaluated_step(self) -> int:
    """Step of the last evaluation; 0 before the first."""
    return max(
      (
        record["step"]
        for record in self.records
        if any(name.startswith("eval/") for name in record)
      ),
      default=0,
    )

  @property
  def unfinished(self) -> bool:
    """Whether the stage is still running, or was stopped before its end."""
    return not self.final and self.last_step < (self.planned_steps or math.inf)

  def metric_names(self) -> list[str]:
    names = {
      name
      for record in self.records
      for name, value in record.items()
      if name != "step" and is_number(value)
    }
    return sorted(names, key=rank)

  def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps (n,) and values (n,), rising in step.

    A step that was recorded twice counts with its last value.
    """
    points = {
      record["step"]: float(record[name])
      for record in self.records
      if is_number(record.get(name))
    }
    steps = sorted(points)
    return np.array(steps, float), np.array([points[s] for s in steps], float)

  def figures(self) -> dict[str, Any]:
    """Final figures, or the last evaluation's while the stage is running."""
    if self.final:
      return self.final
    last: dict[str, Any] = {}
    for record in self.records:
      last.update(
        {name: v for name, v in record.items() if name.startswith("eval/")}
      )
    return last


@dataclasses.dataclass
class Run:
  """Everything a report shows.

  Attributes:
    name: the workdir's folder name.
    config: resolved config of the last job, {} if there is none.
    summary: `summary.json`, {} if there is none.
    stages: in order of training.
    updated: time of the last write, seconds since the epoch; 0 if unknown.
    notices: sentences on what was left out and why.
    quarantine: entries of `quarantine.jsonl`, one a record.
    latent_stats: of the generator's latents, {} if there are none.
  """

  name: str
  config: dict[str, Any]
  summary: dict[str, Any]
  stages: list[Stage]
  updated: float
  notices: list[str]
  quarantine: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  latent_stats: dict[str, Any] = dataclasses.field(default_factory=dict)

  def columns(self) -> dict[str, dict[str, Any]]:
    """Figures by column of the result table: stages, then references.

    What a figure is to be compared with becomes further columns of its row,
    see `references`.
    """
    sections = {stage.name: stage.figures() for stage in self.stages}
    for name, section in self.summary.items():
      if name not in sections and _has_figures(section):
        sections[name] = section
    columns: dict[str, dict[str, Any]] = {name: {} for name in sections}
    others: dict[str, dict[str, Any]] = {c: {} for c in references.COLUMNS}
    for column, section in sections.items():
      for name, value in section.items():
        if reference := references.reference_of(name):
          others[reference[0]][reference[1]] = value
        else:
          columns[column][name] = value
    columns.update({name: value for name, value in others.items() if value})
    return columns

  def part(self, *, generator: bool) -> "Run":
    """The run as if it had only the generator's stages, or only the others.

    References of the summary, e.g. the frozen encoder, stay with the others.
    """
    stages = [s for s in self.stages if s.is_generator == generator]
    own = {stage.name for stage in stages}
    trained = {stage.name for stage in self.stages}
    summary = {
      name: section
      for name, section in self.summary.items()
      if name in own
      or not (name in trained or (generator and _has_figures(section)))
    }
    return dataclasses.replace(self, stages=stages, summary=summary)

  def column_title(self, name: str) -> str:
    for stage in self.stages:
      if stage.name == name:
        return stage.title
    return references.TITLES.get(name, name)


def read_run(workdir: Path) -> Run:
  """Reads what a job has written so far.

  Args:
    workdir: the job's folder.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(
      f"{workdir} is not a folder; pass the --workdir of a training job."
    )
  notices: list[str] = []
  config = _read_json(workdir / CONFIG_FILE, notices)
  try:
    summary = writers.read_summary(workdir)
  except ValueError as error:
    summary = {}
    notices.append(f"{writers.SUMMARY_FILE} cannot be read: {error}")
  stages = []
  for name in _stage_names(workdir, config, summary):
    section = summary.get(name)
    # What the stage was trained with; later jobs may ask for something else.
    trained = _read_json(workdir / name / CONFIG_FILE, notices)
    job = trained or config
    own = _mapping(_stage_config(job, name))
    train = _mapping(own.get("train"))
    stages.append(
      Stage(
        name=name,
        title=STAGE_TITLES.get(name, name),
        records=writers.read_metrics(workdir / name / writers.METRICS_FILE),
        samples=_read_samples(workdir / name / SAMPLES_DIR, notices),
        latents=_read_latents(workdir / name / LATENTS_FILE, notices),
        final=dict(section) if _has_figures(section) else {},
        planned_steps=_count(train.get("steps")),
        batch_size=_count(train.get("batch_size")),
        config=own,
        job=job,
        pictures=read_pictures(workdir / name, notices),
      )
    )
  files = [workdir / CONFIG_FILE, workdir / writers.SUMMARY_FILE]
  files += [workdir / stage.name / writers.METRICS_FILE for stage in stages]
  return Run(
    name=workdir.resolve().name,
    config=config,
    summary=summary,
    stages=stages,
    updated=max((f.stat().st_mtime for f in files if f.exists()), default=0),
    notices=notices,
    quarantine=quarantine.read(workdir / QUARANTINE_FILE),
    latent_stats=_read_json(workdir / LATENT_STATS_FILE, notices),
  )


def _stage_names(
  workdir: Path, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> list[str]:
  """Stages that left something, in order of training.

  The config names the stages of the last job. Jobs of one experiment share a
  workdir, so there may be others: those stand before, unless the summary, which
  keeps the order in which stages finished, has them later.
  """
  found = {
    folder.name
    for folder in workdir.iterdir()
    if (folder / writers.METRICS_FILE).exists()
    or (folder / SAMPLES_DIR).is_dir()
  }
  stages = config.get("stages")
  listed = list(stages) if isinstance(stages, (list, tuple)) else []
  listed = [str(name) for name in listed if str(name) in found]
  finished = list(summary)
  first = min((finished.index(s) for s in listed if s in finished), default=0)
  others = sorted(
    found.difference(listed),
    key=lambda s: (finished.index(s) if s in finished else -1, s),
  )
  later = [
    s
    for s in others
    if s in finished
    and finished.index(s) > first
    and any(name in finished for name in listed)
  ]
  return [s for s in others if s not in later] + listed + later


def _stage_config(config: Mapping[str, Any], name: str) -> Any:
  return config.get(name, _mapping(config.get("sections")).get(name))


def _read_json(path: Path, notices: list[str]) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))
  except ValueError as error:
    notices.append(f"{path.name} is not valid JSON: {error}")
    return {}


def _read_samples(
  folder: Path, notices: list[str]
) -> dict[str, dict[str, np.ndarray]]:
  paths = sorted(folder.glob("*.npz"))
  # "x.partial.npz" is a file that a running job has not finished.
  paths = [path for path in paths if not path.stem.endswith(".partial")]
  sets = {path.stem: read_arrays(path, notices) for path in paths}
  return {name: arrays for name, arrays in sets.items() if arrays}


def _read_latents(path: Path, notices: list[str]) -> dict[str, np.ndarray]:
  arrays = read_arrays(path, notices) if path.exists() else {}
  return {
    name: array
    for name, array in arrays.items()
    if array.ndim == 1 and array.size and array.dtype.kind in "fiu"
  }


def _has_figures(section: Any) -> bool:
  """Whether a section of the summary holds metrics (names with a slash)."""
  return isinstance(section, dict) and any("/" in name for name in section)


def _mapping(value: Any) -> dict[str, Any]:
  return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
  return value if isinstance(value, int) and value > 0 else 0
