"""Writes the latents and the text of a data set once, for the generator.

    source = views.ViewedSource(examples, image_size=256, views=2, augment=…)
    encoders = Encoders(images=…, autoencoder=…, text=…, tokenizer=…, …)
    cached = write_cache(root, source, encoders, dtype="float16", …)
    batches = pipeline.train_iterator(cached, batch_size=256, seed=0)

The folder holds `shard_size` records a file. A file is written under a
temporary name and renamed when it is complete, so a job that is killed goes on
with the first file that is missing. `manifest.json`, written last, says what
the cache is of; until then `unfinished.json` does, and a job that would write
something else there is refused.

Every host writes the files k with k mod hosts = its number, in a folder that
all of them see.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from psvae_jax import workdir as workdir_lib
from psvae_jax.data import cached as cached_lib
from psvae_jax.data import record_files, views
from psvae_jax.encoding import EncodeImages, Encoders, encoded_batches
from psvae_jax.latent_stats import LatentMoments, LatentStats
from psvae_jax.pretrained import files
from psvae_jax.progress import Progress
from psvae_jax.writers import disk_is_full

UNFINISHED_FILE = "unfinished.json"

__all__ = ["EncodeImages", "Encoders", "measure_stats", "write_cache"]


def write_cache(
  root: str | os.PathLike,
  source: views.ViewedSource,
  encoders: Encoders,
  *,
  dtype: str = "float16",
  shard_size: int = 4096,
  batch_size: int = 256,
  num_threads: int = 2,
  prefetch: int = 4,
  process_index: int = 0,
  process_count: int = 1,
  barrier: Callable[[], None] = lambda: None,
  show_progress: bool = True,
) -> cached_lib.CachedSource:
  """Writes what is missing of a cache, and opens it.

  Args:
    root: the cache's folder, made if need be; seen by all hosts.
    source: the examples.
    encoders: what to store of them.
    dtype: of latents and text features: "float32", "bfloat16", "float16".
    shard_size: records a file.
    batch_size: examples that are encoded at once, on each host.
    num_threads: threads that prepare batches; 0 does it in the caller.
    prefetch: batches prepared ahead.
    process_index: this host's number.
    process_count: number of hosts.
    barrier: returns when every host has called it.
    show_progress: whether this host says how far it is.

  Returns:
    The cache, whichever job has written it.

  Raises:
    CacheError: the folder holds a cache of something else, or another job is
      writing it.
    ValueError: a bad setting, or latents or text features that are not finite
      or too large for `dtype`.
    OSError: the disk is full; what is complete stays, and the same command
      goes on from there.
  """
  if min(shard_size, batch_size) < 1:
    raise ValueError(
      "shard_size and batch_size must be at least 1, not "
      f"{shard_size} and {batch_size}."
    )
  root = Path(root)
  spec = make_spec(source, encoders, dtype)
  if (root / cached_lib.MANIFEST_FILE).is_file():
    return cached_lib.CachedSource(root, spec)
  chief = process_index == 0
  with _only_writer(root, enabled=chief), _disk_full_explained(root):
    shards = _Shards(root, len(source), shard_size)
    if chief:
      _claim(root, spec, shard_size)
    if process_count > 1:
      barrier()
    _check_claim(root, spec, shard_size)
    own = range(process_index, shards.count, process_count)
    missing = [k for k in own if not shards.is_complete(k)]
    # No batch reaches over the end of a file: so a job that goes on encodes
    # the same batches as one that was never stopped.
    places = [p for k in missing for p in _split(shards.records(k), batch_size)]
    encoded = encoded_batches(
      source,
      places,
      encoders,
      batch_size,
      dtype=dtype,
      num_threads=num_threads,
      prefetch=prefetch,
    )
    with Progress(
      f"cache ({len(source)} records)",
      len(places),
      images_per_step=batch_size,
      enabled=show_progress and chief and bool(places),
    ) as progress:
      _write(shards, encoded, progress)
    barrier()
    if chief:
      _finish(root, spec, shards)
  if process_count > 1:
    barrier()
  return cached_lib.CachedSource(root, spec)


def measure_stats(
  source: views.ViewedSource,
  encoders: Encoders,
  *,
  dtype: str = "float32",
  count: int = 0,
  batch_size: int = 256,
  num_threads: int = 2,
  prefetch: int = 4,
  process_index: int = 0,
  process_count: int = 1,
) -> LatentStats:
  """Statistics of latents that are not stored: as of a cache of `source`.

  Args:
    source: the examples; their view 0 counts.
    encoders: only `images` is called.
    dtype: the latents are rounded to it first, as a cache would.
    count: of the first so many examples; 0 takes all.
    batch_size: examples that are encoded at once, on each host.
    num_threads: threads that prepare batches.
    prefetch: batches prepared ahead.
    process_index: this host's number.
    process_count: number of hosts; each encodes a share.
  """
  count = min(count or source.num_examples, source.num_examples)
  places = _split(range(count), batch_size)
  own = places[process_index::process_count]
  encoded = encoded_batches(
    source,
    # A host without a share learns the latents' shape from another's.
    own or places[:1],
    encoders,
    batch_size,
    dtype=dtype,
    only_images=True,
    num_threads=num_threads,
    prefetch=prefetch,
  )
  moments: LatentMoments | None = None
  for which, batch in encoded:
    moments = moments or LatentMoments(batch["latent"].shape[-1])
    # The stand-in of a bad record does not count twice.
    counts = (batch["index"] == np.array(which)) & bool(own)
    moments.update(batch["latent"], counts)
  return moments.over_hosts().result(encoders.autoencoder, source.description)


def make_spec(
  source: views.ViewedSource, encoders: Encoders, dtype: str
) -> cached_lib.CacheSpec:
  """What a cache of `source` in `dtype` is of."""
  return cached_lib.CacheSpec(
    encoders.autoencoder,
    source.description,
    dtype,
    encoders.tokenizer,
    encoders.text_length,
    encoders.text_encoder,
  )


class _Shards:
  """Which records are in which file, and which files are there."""

  def __init__(self, root: Path, num_records: int, size: int) -> None:
    self.root, self.num_records, self.size = root, num_records, size
    self.count = -(-num_records // size)

  def records(self, shard: int) -> range:
    start = shard * self.size
    return range(start, min(start + self.size, self.num_records))

  def path(self, shard: int) -> Path:
    return self.root / f"{shard:05d}-of-{self.count:05d}.arrayrecord"

  def is_complete(self, shard: int) -> bool:
    """Renamed means complete, unless the machine went down right then."""
    path, wanted = self.path(shard), len(self.records(shard))
    return path.is_file() and record_files.num_records(path) == wanted


def _split(places: range, size: int) -> list[range]:
  return [places[i : i + size] for i in range(0, len(places), size)]


def _write(
  shards: _Shards,
  encoded: Iterator[tuple[range, dict[str, np.ndarray]]],
  progress: Progress,
) -> None:
  """Writes batches that are in the order of the files."""
  writer = None
  for number, (places, batch) in enumerate(encoded, start=1):
    shard = places.start // shards.size
    records = [_record(batch, row) for row in range(len(places))]
    if number == 1:
      _check_room(shards, len(records[0]))
    writer = writer or record_files.RecordWriter(shards.path(shard))
    for record in records:
      writer.write(record)
    if places.stop == shards.records(shard).stop:
      writer.close()
      writer = None
    progress.advance(number)


def _record(batch: dict[str, np.ndarray], row: int) -> bytes:
  element = {name: value[row] for name, value in batch.items()}
  if "text" in element:
    element["text"] = element["text"][element["token_mask"]]
  return record_files.encode(element)


def _check_room(shards: _Shards, record_bytes: int) -> None:
  """Says early that the disk is too small, from the first record's size."""
  missing = (k for k in range(shards.count) if not shards.path(k).is_file())
  need = record_bytes * sum(len(shards.records(k)) for k in missing)
  free = shutil.disk_usage(shards.root).free
  if need > free:
    raise OSError(
      errno.ENOSPC,
      f"the cache needs about {need / 2**20:.0f} MiB more, "
      f"{free / 2**20:.0f} MiB are free",
      str(shards.root),
    )


def _claim(root: Path, spec: cached_lib.CacheSpec, shard_size: int) -> None:
  """Says in the folder what is being written there, if nothing does yet."""
  path = root / UNFINISHED_FILE
  if path.is_file():
    return
  if any(root.glob("*.arrayrecord")):
    raise cached_lib.CacheError(
      f"{root} holds files of a cache, but neither {cached_lib.MANIFEST_FILE} "
      f"nor {UNFINISHED_FILE} says of what: {cached_lib.remedy(root)}"
    )
  files.write_json(path, {"spec": spec.to_json(), "shard_size": shard_size})


def _check_claim(
  root: Path, spec: cached_lib.CacheSpec, shard_size: int
) -> None:
  """Refuses to go on with a cache of something else."""
  path = root / UNFINISHED_FILE
  if not path.is_file():
    raise cached_lib.CacheError(
      f"{path}, which the first host has written, is missing: all hosts must "
      f"see the same folder {root}; choose another cache.root"
    )
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    found_size, found_spec = int(found["shard_size"]), dict(found["spec"])
  except (ValueError, TypeError, KeyError) as error:
    raise cached_lib.CacheError(
      f"{path} is damaged ({error}): {cached_lib.remedy(root)}"
    ) from error
  cached_lib.check_spec(root, spec, found_spec)
  if found_size != shard_size:
    raise cached_lib.CacheError(
      f"the unfinished cache in {root} has {found_size} records a file, wanted "
      f"{shard_size}: set cache.shard_size={found_size}, or "
      + cached_lib.remedy(root)
    )


def _finish(root: Path, spec: cached_lib.CacheSpec, shards: _Shards) -> None:
  """Writes the manifest, now that all files are there."""
  entries = []
  for shard in range(shards.count):
    path, records = shards.path(shard), len(shards.records(shard))
    if not shards.is_complete(shard):
      raise cached_lib.CacheError(
        f"{path} was not written: all hosts must see the same folder {root}"
      )
    size = path.stat().st_size
    entries.append({"file": path.name, "records": records, "bytes": size})
  for leftover in root.glob(f".*{record_files.TEMPORARY}"):
    leftover.unlink(missing_ok=True)
  manifest = {
    "format": cached_lib.FORMAT,
    "spec": spec.to_json(),
    "shard_size": shards.size,
    "shards": entries,
  }
  # In one move: the folder says either what is missing or what it holds.
  files.write_json(root / UNFINISHED_FILE, manifest)
  os.replace(root / UNFINISHED_FILE, root / cached_lib.MANIFEST_FILE)


@contextlib.contextmanager
def _only_writer(root: Path, enabled: bool) -> Iterator[None]:
  root.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(workdir_lib.workdir_lock(root, enabled=enabled))
    except workdir_lib.WorkdirBusyError as error:
      raise cached_lib.CacheError(
        f"the cache in {root} is being written by another job; wait for it, or "
        f"choose another cache.root. ({error})"
      ) from error
    yield


@contextlib.contextmanager
def _disk_full_explained(root: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    if not disk_is_full(error):
      raise
    raise OSError(
      error.errno,
      f"the disk is full ({error.strerror}): make room, or choose another "
      "cache.root; the same command goes on with what is complete",
      str(root),
    ) from error
