"""Reference statistics and images as .npz, the way ADM publishes them.

    mu, sigma        mean (D,), covariance (D, D) of Inception's pool features
    mu_s, sigma_s    the same of its spatial features, for sFID
    arr_0            uint8 (N, H, W, 3) images; arr_1 (N,) their labels
    mu_NAME, sigma_NAME, count, protocol    ours beside them

Published files hold any of these. Files of samples hold arr_0 and arr_1 only.

Statistics are read when they are asked for. Images are never read as a whole:
those of a stored archive are memory-mapped, those of a compressed one are
decompressed a part at a time. See `npz_files` for what is not believed.
"""

import collections
import contextlib
import json
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from psvae_jax.evaluators.npz_files import (
  Header,
  NpzError,
  explained,
  open_archive,
  read_array,
  write_npz,
)

POOL, SPATIAL = "pool", "spatial"
_KEYS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
IMAGES, LABELS = "arr_0", "arr_1"

Moments = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)

_MAX_WIDTH = 1 << 13  # features; a covariance of them takes half a GiB
_MAX_BYTES = _MAX_WIDTH**2 * 8  # of any array that is read as a whole
_MAX_TEXT = 1 << 20
_CHUNK_BYTES = 16 << 20  # of images decompressed together
_KEPT_CHUNKS = 4


class ReferenceFile:
  """What one .npz holds.

  Attributes:
    path: the file.
    statistics: kind of features → (mean, covariance), float64; read, and
      checked to be numbers, each time they are taken out.
    count: images that the statistics are of; None where the file does not say.
    protocol: how they were made; {} where the file does not say.
  """

  def __init__(self, path: str | os.PathLike) -> None:
    """Reads headers; statistics and images stay in the file.

    Raises:
      FileNotFoundError: no such file.
      NpzError: it is no .npz, or one of its arrays cannot be used.
    """
    self.path = Path(path)
    if not self.path.is_file():
      raise FileNotFoundError(f"the reference {self.path} does not exist")
    with open_archive(self.path) as archive:
      names = {
        Path(name).stem for name in archive.namelist() if name.endswith(".npy")
      }
      kinds = {k: v for k, v in _kinds(names).items() if names & set(v)}
      for keys in kinds.values():
        _check_moments(self.path, archive, *keys)
      self.statistics: Mapping[str, Moments] = _Statistics(self.path, kinds)
      self.count = _read_count(self.path, archive, names)
      self.protocol = _read_protocol(self.path, archive, names)
      self._image_header = None
      if IMAGES in names:
        self._image_header = Header.read(self.path, archive, IMAGES)
        self._image_header.check_images()
      self._labels = LABELS in names
    if not self.statistics and self._image_header is None:
      raise NpzError(
        f"{self.path} holds neither statistics (mu and sigma, or mu_s and "
        f"sigma_s) nor images ({IMAGES}); it has "
        + (", ".join(sorted(names)[:20]) or "no arrays")
      )

  @property
  def num_images(self) -> int:
    """Images that are in the file, 0 without."""
    return self._image_header.shape[0] if self._image_header else 0

  def images(self) -> "NpzImages":
    """The images as a random-access source.

    Raises:
      NpzError: there are none.
    """
    if self._image_header is None:
      raise NpzError(f"{self.path} holds statistics only, no images ({IMAGES})")
    return NpzImages(self.path)

  def labels(self) -> np.ndarray | None:
    """int64 (N,) classes of the images; None where there are none.

    Raises:
      NpzError: they are no whole numbers, or not one an image.
    """
    if not self._labels or self._image_header is None:
      return None
    with open_archive(self.path) as archive:
      most = min(self.num_images * 8, _MAX_BYTES)
      labels = read_array(self.path, archive, LABELS, most)
    if labels.shape != (self.num_images,) or labels.dtype.kind not in "iu":
      raise NpzError(
        f"{self.path}: {LABELS} must be one whole number for each of the "
        f"{self.num_images} images, got {labels.dtype} {labels.shape}"
      )
    return labels.astype(np.int64)


class _Statistics(Mapping[str, Moments]):
  """The statistics of an .npz, read anew each time: they may be large."""

  def __init__(self, path: Path, kinds: Mapping[str, tuple[str, str]]) -> None:
    self._path, self._kinds = path, kinds

  def __len__(self) -> int:
    return len(self._kinds)

  def __iter__(self) -> Iterator[str]:
    return iter(self._kinds)

  def __contains__(self, kind: object) -> bool:
    return kind in self._kinds  # Mapping's own would read

  def __getitem__(self, kind: str) -> Moments:
    """Reads one.

    Raises:
      KeyError: there is none.
      NpzError: the file is damaged, or they cannot be used.
    """
    keys = self._kinds[kind]
    with open_archive(self._path) as archive:
      return _read_moments(self._path, archive, *keys)


class NpzImages:
  """The images of an .npz, one by one: {"image", "index", "path"}.

  Args:
    path: an .npz with `arr_0`, uint8 (N, H, W, 3).

  Raises:
    NpzError: it has no such array.
  """

  def __init__(self, path: str | os.PathLike) -> None:
    self.name = os.fspath(path)
    self._path = Path(path)
    with open_archive(self._path) as archive:
      self._header = Header.read(self._path, archive, IMAGES)
    self._header.check_images()
    self._mapped = self._header.memory_map()
    size = math.prod(self._header.shape[1:])
    self._chunk = max(1, _CHUNK_BYTES // size)
    # Of the largest images a chunk is one, and one chunk is kept.
    self._kept = max(1, _KEPT_CHUNKS * _CHUNK_BYTES // (self._chunk * size))
    self._reset()

  def __len__(self) -> int:
    return self._header.shape[0]

  def __repr__(self) -> str:
    return f"NpzImages({self.name!r}, shape={self._header.shape})"

  # Threads and processes that read batches get a copy of their own.
  def __getstate__(self) -> dict[str, Any]:
    kept = ("name", "_path", "_header", "_chunk", "_kept")
    return {name: self.__dict__[name] for name in kept}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._mapped = self._header.memory_map()
    self._reset()

  @property
  def image_shape(self) -> tuple[int, int]:
    """(H, W), pixels."""
    return self._header.shape[1:3]

  def path(self, index: int) -> str:
    """What to call one image."""
    return f"{self.name}/{IMAGES}[{index}]"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one image.

    Raises:
      IndexError: there is no such image.
      NpzError: the file is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is outside [0, {len(self)})")
    if self._mapped is not None:
      image = np.array(self._mapped[index])
    else:
      chunk, row = divmod(int(index), self._chunk)
      with self._lock:
        image = self._read_chunk(chunk)[row].copy()
    return {
      "image": image,
      "index": np.int64(index),
      "path": self.path(index),
    }

  def _reset(self) -> None:
    self._lock = threading.Lock()
    self._chunks: collections.OrderedDict[int, np.ndarray] = (
      collections.OrderedDict()
    )
    self._stream: tuple[contextlib.ExitStack, IO[bytes]] | None = None
    self._next = 0

  def _read_chunk(self, chunk: int) -> np.ndarray:
    """One part of the images; those read last are kept."""
    if chunk in self._chunks:
      return self._chunks[chunk]
    if self._stream is None or chunk < self._next:
      self._open()
    while self._next <= chunk:
      while len(self._chunks) >= self._kept:
        self._chunks.popitem(last=False)
      rows = self._read_rows(self._next)
      self._chunks[self._next] = rows
      self._next += 1
    return self._chunks[chunk]

  def _open(self) -> None:
    if self._stream is not None:
      self._stream[0].close()
    stack = contextlib.ExitStack()
    archive = stack.enter_context(open_archive(self._path))
    file = stack.enter_context(archive.open(self._header.member))
    file.read(self._header.length)
    self._stream, self._next = (stack, file), 0

  def _read_rows(self, chunk: int) -> np.ndarray:
    count = min(self._chunk, len(self) - chunk * self._chunk)
    shape = (count, *self._header.shape[1:])
    with explained(self._path, IMAGES):
      data = self._stream[1].read(math.prod(shape))
      return np.frombuffer(data, np.uint8).reshape(shape)


def write_reference(
  path: str | os.PathLike,
  statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  count: int | None = None,
  protocol: Mapping[str, Any] | None = None,
  images: Iterable[np.ndarray] = (),
  image_shape: tuple[int, int, int, int] | None = None,
) -> None:
  """Writes an .npz that ADM's evaluator and `ReferenceFile` read.

  Args:
    path: the file, replaced in one step.
    statistics: kind of features → (mean, covariance); "pool" and "spatial"
      under ADM's names.
    count: images that they are of.
    protocol: how they were made, JSON values.
    images: batches uint8 (n, H, W, 3), written as they come.
    image_shape: (N, H, W, 3) of all images together; None without images.

  Raises:
    ValueError: the images are not of that shape.
  """
  arrays: dict[str, Any] = {}
  for kind, (mean, covariance) in statistics.items():
    keys = _KEYS.get(kind, (f"mu_{kind}", f"sigma_{kind}"))
    arrays[keys[0]] = np.asarray(mean, np.float64)
    arrays[keys[1]] = np.asarray(covariance, np.float64)
  if count is not None:
    arrays["count"] = np.int64(count)
  if protocol is not None:
    arrays["protocol"] = np.array(json.dumps(protocol, ensure_ascii=False))
  streams = {}
  if image_shape is not None:
    streams[IMAGES] = (image_shape, images)
  write_npz(path, arrays, streams)


def _kinds(names: set[str]) -> dict[str, tuple[str, str]]:
  """Kind of features → its two arrays, of those that a file may have."""
  kinds = dict(_KEYS)
  known = {name for pair in _KEYS.values() for name in pair}
  for name in sorted(names - known):
    kind = name.removeprefix("mu_")
    if kind != name and f"sigma_{kind}" in names:
      kinds[kind] = (name, f"sigma_{kind}")
  return kinds


def _check_moments(
  path: Path, archive: zipfile.ZipFile, mean_key: str, covariance_key: str
) -> None:
  """Raises NpzError unless both headers are of usable statistics."""
  mean = Header.read(path, archive, mean_key)
  covariance = Header.read(path, archive, covariance_key)
  for header in (mean, covariance):
    if header.dtype.kind != "f":
      raise NpzError(
        f"{path}: {header.name} must hold floating point numbers, got {header}"
      )
  square = len(mean.shape) == 1 and covariance.shape == mean.shape * 2
  if not square or not 1 <= mean.shape[0] <= _MAX_WIDTH:
    raise NpzError(
      f"{path}: {mean_key} must be (D,) and {covariance_key} (D, D), D at most "
      f"{_MAX_WIDTH}, got {mean.shape} and {covariance.shape}"
    )
  mean.check_size(_MAX_WIDTH * 8)
  covariance.check_size(_MAX_BYTES)


def _read_moments(
  path: Path, archive: zipfile.ZipFile, mean_key: str, covariance_key: str
) -> Moments:
  # The file may be another one by now.
  _check_moments(path, archive, mean_key, covariance_key)
  found = []
  for key, most in ((mean_key, _MAX_WIDTH * 8), (covariance_key, _MAX_BYTES)):
    array = read_array(path, archive, key, most)
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
      raise NpzError(f"{path}: {key} holds NaN or infinity")
    found.append(array)
  mean, covariance = found
  scale = np.abs(covariance).max()
  if np.abs(covariance - covariance.T).max() > 1e-4 * scale:
    raise NpzError(f"{path}: {covariance_key} is not symmetric")
  return mean, covariance


def _read_count(
  path: Path, archive: zipfile.ZipFile, names: set[str]
) -> int | None:
  if "count" not in names:
    return None
  count = read_array(path, archive, "count", 8)
  if count.shape != () or count.dtype.kind not in "iu" or count < 1:
    raise NpzError(f"{path}: count must be one whole number")
  return int(count)


def _read_protocol(
  path: Path, archive: zipfile.ZipFile, names: set[str]
) -> dict[str, Any]:
  if "protocol" not in names:
    return {}
  text = read_array(path, archive, "protocol", _MAX_TEXT)
  try:
    value = json.loads(str(text))
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, dict):
    raise NpzError(f"{path}: protocol does not hold a JSON object")
  return value
