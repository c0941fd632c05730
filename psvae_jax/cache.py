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
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import safetensors.numpy
from array_record.python import array_record_module

from psvae_jax import workdir as workdir_lib
from psvae_jax.data import cached as cached_lib
from psvae_jax.data import views
from psvae_jax.latent_stats import LatentMoments, LatentStats
from psvae_jax.pretrained import files
from psvae_jax.progress import Progress
from psvae_jax.writers import disk_is_full

UNFINISHED_FILE = "unfinished.json"
_TEMPORARY = ".tmp"
# Latents hardly compress; without compression reading is faster.
_WRITER_OPTIONS = "group_size:1,uncompressed"

EncodeImages = Callable[[np.ndarray], Any]
EncodeText = Callable[[Sequence[str]], tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Encoders:
  """What turns examples into records, and what it is called.

  The functions get whole batches of one size, padded with black images and
  empty texts. On several hosts each calls them by itself, not equally often:
  they must not communicate.

  Attributes:
    images: uint8 (B, S, S, 3) → (B, h, w, C), the posterior mean; a JAX array
      may still be under way.
    autoencoder: `latent_fingerprint` of what `images` uses.
    text: B strings → int32 tokens (B, L), bool mask (B, L), and features
      (B, L, D) or None; None stores no text.
    tokenizer: fingerprint of what makes the tokens; "" without `text`.
    text_length: L; 0 without `text`.
    text_encoder: fingerprint of what makes the features; "" if `text` gives
      none.
  """

  images: EncodeImages
  autoencoder: str
  text: EncodeText | None = None
  tokenizer: str = ""
  text_length: int = 0
  text_encoder: str = ""

  def spec(
    self, source: views.ViewedSource, dtype: str
  ) -> cached_lib.CacheSpec:
    """What a cache of `source` in `dtype` is of."""
    return cached_lib.CacheSpec(
      self.autoencoder,
      source.description,
      dtype,
      self.tokenizer,
      self.text_length,
      self.text_encoder,
    )


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
  spec = encoders.spec(source, dtype)
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
    batches = _Batches(source, shards, missing, batch_size)
    writer = _Writer(shards, encoders, dtype)
    with Progress(
      f"cache ({len(source)} records)",
      len(batches),
      images_per_step=batch_size,
      enabled=show_progress and chief and bool(len(batches)),
    ) as progress:
      encoded = _encode(batches, encoders, num_threads, prefetch)
      for number, batch in enumerate(encoded, start=1):
        writer.add(batch)
        progress.advance(number)
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
  shards = _Shards(Path(), count, batch_size)
  own = list(range(process_index, shards.count, process_count))
  # A host without a share learns the latents' shape from a batch of another's.
  batches = _Batches(source, shards, own or [0], batch_size, only_images=True)
  encoders = dataclasses.replace(encoders, text=None)
  moments: LatentMoments | None = None
  for batch in _encode(batches, encoders, num_threads, prefetch):
    z = _rounded(batch["latent"], dtype, batch["index"], "latents")
    moments = moments or LatentMoments(z.shape[-1])
    places = np.arange(batch["start"], batch["stop"])
    moments.update(z, (batch["index"] == places) & bool(own))
  return moments.over_hosts().result(encoders.autoencoder, source.description)


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

  def temporary(self, shard: int) -> Path:
    path = self.path(shard)
    return path.with_name(f".{path.name}{_TEMPORARY}")

  def is_complete(self, shard: int) -> bool:
    """Renamed means complete, unless the machine went down right then."""
    path = self.path(shard)
    return path.is_file() and _num_records(path) == len(self.records(shard))


class _Batches:
  """Batches of examples, ready to be encoded: a grain source.

  No batch reaches over the end of a file: so a job that goes on encodes the
  same batches as one that was never stopped.
  """

  def __init__(
    self,
    source: views.ViewedSource,
    shards: _Shards,
    missing: Sequence[int],
    batch_size: int,
    only_images: bool = False,
  ) -> None:
    self._source, self._batch_size = source, batch_size
    self._drop = ("caption", "source") if only_images else ()
    self._places = [
      (shard, start, min(start + batch_size, shards.records(shard).stop))
      for shard in missing
      for start in range(
        shards.records(shard).start, shards.records(shard).stop, batch_size
      )
    ]

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard, start, stop = self._places[index]
    elements = [self._source[i] for i in range(start, stop)]
    batch: dict[str, Any] = {"shard": shard, "start": start, "stop": stop}
    spare = self._batch_size - len(elements)
    for name, value in elements[0].items():
      values = [element[name] for element in elements]
      if name == "caption":
        batch[name] = values + [""] * spare
      elif name in views.IMAGES:
        padding = [(0, spare)] + [(0, 0)] * 3
        batch[name] = np.pad(np.stack(values), padding)
      elif not isinstance(value, str):
        batch[name] = np.stack(values)
    for name in self._drop:
      batch.pop(name, None)
    return batch

  def __repr__(self) -> str:
    return f"_Batches({self._source!r})"


def _encode(
  batches: _Batches, encoders: Encoders, num_threads: int, prefetch: int
) -> Iterator[dict[str, Any]]:
  """Batches with "latent" and text in place of images and captions.

  A batch is fetched from the device after the next one has been started.
  """
  if not len(batches):
    return
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=prefetch
  )
  previous = None
  for batch in grain.MapDataset.source(batches).to_iter_dataset(options):
    batch["latent"] = encoders.images(batch.pop("image"))
    if "source" in batch:
      batch["source_latent"] = encoders.images(batch.pop("source"))
    captions = batch.pop("caption", None)
    if encoders.text is not None:
      if captions is None:
        raise ValueError("the examples have no captions to store as text")
      text = encoders.text(captions)
      names = ("tokens", "token_mask", "text")
      batch |= {n: v for n, v in zip(names, text, strict=True) if v is not None}
    if previous is not None:
      yield _fetched(previous)
    previous = batch
  yield _fetched(previous)


def _fetched(batch: dict[str, Any]) -> dict[str, Any]:
  """On the host, without the rows that were padding."""
  count = batch["stop"] - batch["start"]
  return {
    name: np.asarray(jax.device_get(value))[:count] if np.ndim(value) else value
    for name, value in batch.items()
  }


class _Writer:
  """Turns batches into records, and records into files."""

  def __init__(self, shards: _Shards, encoders: Encoders, dtype: str) -> None:
    self._shards, self._encoders, self._dtype = shards, encoders, dtype
    self._file: Any = None
    self._room_checked = False

  def add(self, batch: dict[str, Any]) -> None:
    """Writes one batch; the last of a file completes it."""
    shard, start, stop = (batch.pop(n) for n in ("shard", "start", "stop"))
    records = list(self._records(batch))
    if not self._room_checked:
      self._check_room(len(records[0]))
    temporary = self._shards.temporary(shard)
    if self._file is None:
      self._file = _open_writer(temporary)
    with _os_errors(temporary):
      for record in records:
        self._file.write(record)
    if stop == self._shards.records(shard).stop:
      with _os_errors(temporary):
        self._file.close()
      self._file = None
      _replace(temporary, self._shards.path(shard))

  def _records(self, batch: dict[str, Any]) -> Iterator[bytes]:
    index = batch["index"]
    for name in ("latent", "source_latent"):
      if name in batch:
        batch[name] = _rounded(batch[name], self._dtype, index, "latents")
    if "tokens" in batch:
      self._check_text(batch)
    if "text" in batch:
      mask = batch["token_mask"]
      # Padding is not stored: whatever it holds must not matter.
      text = np.where(mask[..., None], batch["text"], 0)
      batch["text"] = _rounded(text, self._dtype, index, "text features")
    for row in range(len(index)):
      record = {name: value[row] for name, value in batch.items()}
      if "text" in record:
        record["text"] = record["text"][record["token_mask"]]
      yield safetensors.numpy.save(
        {name: np.asarray(v, order="C") for name, v in record.items()}
      )

  def _check_text(self, batch: Mapping[str, Any]) -> None:
    length = self._encoders.text_length
    if batch["tokens"].shape[1:] != (length,):
      raise ValueError(
        f"tokens have the shape {batch['tokens'].shape[1:]} an example, "
        f"text_length is {length}"
      )
    if ("text" in batch) != bool(self._encoders.text_encoder):
      raise ValueError(
        "text features and the name of their encoder come together or not at "
        "all"
      )

  def _check_room(self, record_bytes: int) -> None:
    """Says early that the disk is too small, from the first record's size."""
    self._room_checked = True
    shards = self._shards
    left = sum(
      len(shards.records(k))
      for k in range(shards.count)
      if not shards.path(k).is_file()
    )
    free = shutil.disk_usage(shards.root).free
    if left * record_bytes > free:
      raise OSError(
        errno.ENOSPC,
        f"the cache needs about {left * record_bytes / 2**20:.0f} MiB more, "
        f"{free / 2**20:.0f} MiB are free",
        str(shards.root),
      )


def _rounded(
  values: np.ndarray, dtype: str, index: np.ndarray, what: str
) -> np.ndarray:
  """`values` (B, …) in `dtype`.

  Raises:
    ValueError: not finite, before or after; names the first example.
  """
  values = np.asarray(values, np.float32)
  with np.errstate(over="ignore"):
    rounded = values.astype(jax.numpy.dtype(dtype))
  for array, why in (
    (values, "the encoder gives NaN or infinity for it"),
    (rounded, f'too large for {dtype}; set cache.dtype to "bfloat16"'),
  ):
    axes = tuple(range(1, array.ndim))
    bad = ~np.isfinite(array.astype(np.float32)).all(axis=axes)
    if bad.any():
      raise ValueError(
        f"the {what} of example {int(index[bad.argmax()])} are not finite: "
        + why
      )
  return rounded


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
  for leftover in root.glob(f".*{_TEMPORARY}"):
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


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
  """ArrayRecord's RuntimeErrors as the OSErrors that they stand for."""
  try:
    yield
  except RuntimeError as error:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOENT):
      if os.strerror(number) in str(error):
        reason = os.strerror(number)
        raise OSError(number, reason, str(path)) from error
    raise OSError(errno.EIO, str(error), str(path)) from error


def _open_writer(path: Path) -> Any:
  path.unlink(missing_ok=True)
  path.touch()  # an error here says more than ArrayRecord's
  return array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)


def _replace(temporary: Path, path: Path) -> None:
  """Renames a file whose content is on the disk for certain."""
  with temporary.open("rb") as stream:
    os.fsync(stream.fileno())
  os.replace(temporary, path)


def _num_records(path: Path) -> int:
  try:
    reader = cached_lib.open_records(path)
    count = reader.num_records()
    reader.close()
  except RuntimeError:
    return -1
  return count
