"""One stream of images through networks: resumable, of bounded memory.

A pass leaves two kinds of files in its folder: `<fingerprint>.npz`, the sums so
far, replaced in one step every few batches; and `<fingerprint>.<kind>.rows`,
features an image as float32, for figures that need them one by one. The
fingerprint is of all that decides the sums (data, model, networks, settings),
so that a pass never goes on with, or shows, the sums of another. Batches have
fixed borders: a pass that was killed adds the same numbers in the same order
as one that was not, and ends with the same bits.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding
from psvae_jax.data import pipeline
from psvae_jax.evaluation.image_sets import ImageSet
from psvae_jax.evaluators import npz_files
from psvae_jax.evaluators.feature_networks import local_rows
from psvae_jax.evaluators.feature_statistics import FeatureStatistics
from psvae_jax.evaluators.inception_score import InceptionScore
from psvae_jax.progress import Progress
from psvae_jax.writers import encode_json

FORMAT = 1  # of the files; another one is not read

# A batch on the mesh ("image", and "index" on the host) → features by kind
# (B, D) and figures by name (B,), not waited for.
Step = Callable[
  [jax.Array, np.ndarray], tuple[dict[str, jax.Array], dict[str, jax.Array]]
]


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
  """What to do with a set of images.

  Attributes:
    label: what the progress bar calls it.
    images: the images.
    step: what is computed of a batch.
    identity: what decides the sums beside images and batch size, JSON values.
    moments: kinds of features to take moments of.
    rows: kinds of features to keep an image at a time.
    score: whether to take the inception score.
  """

  label: str
  images: ImageSet
  step: Step
  identity: Mapping[str, Any]
  moments: Sequence[str] = ()
  rows: Sequence[str] = ()
  score: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
  """What a pass has found.

  Attributes:
    statistics: the sums.
    rows: kind → float32 (N, D), memory-mapped.
    bad: numbers of the images that could not be read.
  """

  statistics: FeatureStatistics
  rows: Mapping[str, np.ndarray]
  bad: Sequence[int]

  @property
  def count(self) -> int:
    """Images that count."""
    return self.statistics.count


def run(
  work: Pass,
  folder: Path,
  mesh: Mesh,
  *,
  batch_size: int = 32,
  save_every: int = 20,
  on_batch: Callable[[int], None] = lambda number: None,
) -> Result:
  """Runs a pass to its end, from where an earlier run stopped.

  Args:
    work: what to do.
    folder: for its files.
    mesh: images are split over its data and fsdp.
    batch_size: images at once, rounded up to what the mesh splits.
    save_every: batches between two saves.
    on_batch: called after each batch with how many are done.

  Raises:
    ValueError: an image of another size; all images are unreadable.
    quarantine.DataError: too many are.
    OSError: the disk is full; the same call goes on when there is room.
  """
  batch_size = whole_batch(batch_size, len(work.images), mesh)
  state = _open_state(work, folder, batch_size)
  total = -(-len(work.images) // batch_size)
  with Progress(
    f"{work.label} ({len(work.images)} images)",
    total,
    images_per_step=batch_size,
    start=state.done,
    enabled=state.done < total,
  ) as progress:
    batches = work.images.batches(batch_size, state.done)
    for batch, features, figures in _computed(work.step, batches, mesh):
      state.add(batch, features, figures)
      if state.done % save_every == 0 or state.done == total:
        state.save()
      progress.advance(state.done)
      on_batch(state.done)
  return state.result()


def whole_batch(batch_size: int, count: int, mesh: Mesh) -> int:
  """A batch that the mesh splits evenly, no larger than is of use."""
  shards = sharding.batch_shards(mesh)
  return -(-min(batch_size, count) // shards) * shards


def _computed(
  step: Step, batches: Iterator[pipeline.Batch], mesh: Mesh
) -> Iterator[tuple[pipeline.Batch, dict[str, Any], dict[str, Any]]]:
  """Batches with their results; each is fetched after the next has started."""
  waiting = None
  for batch in batches:
    image = sharding.put_batch({"image": batch["image"]}, mesh)["image"]
    started = (batch, *step(image, batch["index"]))
    if waiting is not None:
      yield _fetched(*waiting)
    waiting = started
  if waiting is not None:
    yield _fetched(*waiting)


def _fetched(
  batch: pipeline.Batch, features: Any, figures: Any
) -> tuple[pipeline.Batch, dict[str, Any], dict[str, Any]]:
  return (
    batch,
    {name: local_rows(value) for name, value in features.items()},
    {name: local_rows(value) for name, value in figures.items()},
  )


def _open_state(work: Pass, folder: Path, batch_size: int) -> "_State":
  """The state that an earlier run has saved, or an empty one."""
  state = _State(work, folder, batch_size)
  try:
    state.restore()
  except (KeyError, ValueError, OSError) as error:
    print(
      f"warning: {state.path} cannot be used ({error}); {work.label} begins "
      "anew",
      flush=True,
    )
    return _State(work, folder, batch_size)
  return state


class _State:
  """Sums and rows of a pass, in memory and in its files."""

  def __init__(self, work: Pass, folder: Path, batch_size: int) -> None:
    count = len(work.images)
    self._total = count
    self._statistics = FeatureStatistics(
      work.moments, InceptionScore(count) if work.score else None
    )
    self._identity = json.dumps(
      encode_json(
        {
          "format": FORMAT,
          "images": work.images.fingerprint,
          "count": count,
          "size": work.images.size,
          "batch_size": batch_size,
          "moments": sorted(work.moments),
          "rows": sorted(work.rows),
          "score": work.score,
          **work.identity,
        }
      ),
      sort_keys=True,
    )
    name = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
    self.path = Path(folder) / f"{name}.npz"
    self._bad: list[int] = []
    self.done = 0
    self._rows = {
      kind: _Rows(self.path.with_suffix(f".{kind}.rows")) for kind in work.rows
    }

  def add(
    self,
    batch: pipeline.Batch,
    features: dict[str, np.ndarray],
    figures: dict[str, np.ndarray],
  ) -> None:
    """Adds the next batch."""
    mask, size = batch["mask"], len(batch["mask"])
    self._statistics.update(features, figures, batch["index"], mask)
    for kind, rows in self._rows.items():
      rows.append(features[kind][mask])
    start = self.done * size
    # Padding is at the end of the last batch alone; elsewhere, a row that does
    # not count is an image that could not be read.
    missing = [start + int(row) for row in np.flatnonzero(~mask)]
    self._bad += [i for i in missing if i < self._total]
    self.done += 1

  def save(self) -> None:
    """Puts everything into the files."""
    for rows in self._rows.values():
      rows.flush()
    arrays = {
      "identity": np.array(self._identity),
      "done": np.int64(self.done),
      "bad": np.array(self._bad, np.int64),
      **{
        f"rows/{kind}": np.array([rows.count, rows.width], np.int64)
        for kind, rows in self._rows.items()
      },
      **self._statistics.to_arrays(),
    }
    npz_files.write_npz(self.path, arrays)

  def result(self) -> Result:
    if not self._statistics.count:
      raise ValueError("none of the images could be read")
    return Result(
      self._statistics,
      {kind: rows.array() for kind, rows in self._rows.items()},
      tuple(self._bad),
    )

  def restore(self) -> None:
    """Takes over what an earlier run has saved, if there is anything.

    Raises:
      KeyError, ValueError, OSError: it is damaged; this object is then of no
        more use.
    """
    if not self.path.is_file():
      return
    arrays = npz_files.read_npz(self.path)
    if str(arrays["identity"]) != self._identity:
      raise ValueError("it is of another evaluation")
    for kind, rows in self._rows.items():
      rows.restore(*(int(x) for x in arrays[f"rows/{kind}"]))
    self._statistics.restore(arrays)
    self._bad = [int(i) for i in arrays["bad"]]
    self.done = int(arrays["done"])


class _Rows:
  """Rows of float32 that are appended to a file."""

  def __init__(self, path: Path) -> None:
    self._path = path
    self.count, self.width = 0, 0
    self._file: Any = None

  def restore(self, count: int, width: int) -> None:
    """Takes over the first `count` rows of the file.

    Raises:
      ValueError: it is shorter.
    """
    size = self._path.stat().st_size if count else 0
    if size < count * width * 4:
      raise ValueError(f"{self._path} is cut off")
    self.count, self.width = count, width

  def append(self, rows: np.ndarray) -> None:
    """Adds rows (n, D)."""
    if self._file is None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self._path, "r+b" if self.count else "wb")
      # What an earlier run wrote after its last save is written again.
      self._file.truncate(self.count * self.width * 4)
      self._file.seek(0, os.SEEK_END)
    self._file.write(np.ascontiguousarray(rows, np.float32).tobytes())
    self.count += len(rows)
    self.width = rows.shape[1]

  def flush(self) -> None:
    """Returns when all rows are on the disk."""
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())

  def array(self) -> np.ndarray:
    """All rows, read from the file as they are used."""
    self.flush()
    shape = (self.count, self.width)
    if not self.count:
      return np.zeros(shape, np.float32)
    return np.memmap(self._path, np.float32, "r", shape=shape)
