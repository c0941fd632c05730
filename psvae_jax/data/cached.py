"""Latents and text that `psvae_jax.cache` has written, by index.

A cache is a folder of ArrayRecord files and `manifest.json`, which is written
last: a folder without it is not finished. The manifest says what the cache is
of (`CacheSpec`), and a cache of anything else than what is wanted is refused.
The files' sizes and numbers of records are compared with it, and every record
that is read with its hash.
"""

import dataclasses
import json
import operator
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax.data import record_files

MANIFEST_FILE = "manifest.json"
FORMAT = 1


class CacheError(ValueError):
  """A cache cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
  """What a cache is of. Two caches with equal specs hold the same.

  Attributes:
    autoencoder: its `latent_fingerprint`.
    data: `views.ViewedSource.description`: source, size, augmentation, seed.
    dtype: "float32", "bfloat16" or "float16", of latents and text features.
    tokenizer: its fingerprint; "" if no text is stored.
    text_length: tokens a text is padded to; 0 if no text is stored.
    text_encoder: its fingerprint; "" if no text features are stored.
  """

  autoencoder: str
  data: Mapping[str, Any]
  dtype: str
  tokenizer: str = ""
  text_length: int = 0
  text_encoder: str = ""

  def to_json(self) -> dict[str, Any]:
    """JSON values; equal for equal specs."""
    return json.loads(json.dumps(dataclasses.asdict(self)))

  def differences(self, found: Mapping[str, Any]) -> str:
    """Says where `found`, another one's `to_json`, differs; "" if nowhere."""
    wanted, found = _flatten(self.to_json()), _flatten(found)
    return "; ".join(
      f"{name} is {found.get(name)!r}, wanted {wanted.get(name)!r}"
      for name in sorted(wanted.keys() | found.keys())
      if found.get(name) != wanted.get(name)
    )


class CachedSource:
  """Random access to the records of a finished cache.

  Elements: "latent" (h, w, C) of the cache's dtype, un-normalised; "index"
  int64, the example's; for edits "source_latent"; if text was stored "tokens"
  int32 (L,) and "token_mask" bool (L,); if its features were, "text" (L, D) of
  the cache's dtype, 0 where the mask is False; and numbers that the examples
  had, such as "label".

  Threads may share one; it can be pickled.

  Args:
    root: the cache's folder.
    spec: what it must be of; None takes whatever it is.

  Attributes:
    root: see above.
    spec: what it is of, as JSON values.
    num_examples: examples; the first so many records are their view 0.
    views: versions of every example.

  Raises:
    CacheError: no finished cache, one of something else, or files that are
      missing or not as they were written.
  """

  def __init__(self, root: str | Path, spec: CacheSpec | None = None) -> None:
    self.root = Path(root)
    manifest = _read_manifest(self.root)
    if spec is not None:
      check_spec(self.root, spec, manifest["spec"])
    self.spec = manifest["spec"]
    self.num_examples = self.spec["data"]["num_examples"]
    self.views = self.spec["data"]["views"]
    self._shard_size = manifest["shard_size"]
    self._shards = manifest["shards"]
    self._length = sum(shard["records"] for shard in self._shards)
    for shard in self._shards:
      self._check_size(shard)
    self._readers: list[Any] = [None] * len(self._shards)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    """One record.

    Raises:
      IndexError: there is none.
      CacheError: the file is damaged, or has gone; it is named.
    """
    index = operator.index(index)
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} of {self!r}")
    shard, row = divmod(index, self._shard_size)
    reader = self._readers[shard] or self._open(shard)
    try:
      return _padded(record_files.decode(reader.read([row])[0]))
    except (RuntimeError, ValueError, KeyError) as error:
      raise self._damaged(shard, f"record {row}: {error}") from error

  def read_batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """The elements of n records, stacked; errors as for one."""
    # One by one: ArrayRecord's reading of several at once costs more.
    elements = [self[index] for index in indices]
    return {
      name: np.stack([element[name] for element in elements])
      for name in elements[0]
    }

  def __repr__(self) -> str:
    # Without the folder: a moved cache is the same source.
    return f"CachedSource({json.dumps(self.spec, sort_keys=True)})"

  def __getstate__(self) -> dict[str, Any]:
    state = dict(self.__dict__)
    del state["_lock"], state["_readers"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._readers = [None] * len(self._shards)
    self._lock = threading.Lock()

  def _open(self, shard: int) -> Any:
    with self._lock:
      if self._readers[shard] is None:
        try:
          reader = record_files.open_reader(
            self.root / self._shards[shard]["file"]
          )
        except RuntimeError as error:
          raise self._damaged(shard, str(error)) from error
        found, wanted = reader.num_records(), self._shards[shard]["records"]
        if found != wanted:
          raise self._damaged(shard, f"{found} records, {wanted} were written")
        self._readers[shard] = reader
      return self._readers[shard]

  def _check_size(self, shard: Mapping[str, Any]) -> None:
    path = self.root / shard["file"]
    if not path.is_file():
      raise CacheError(f"{path} is missing: {remedy(self.root)}")
    found = path.stat().st_size
    if found != shard["bytes"]:
      raise CacheError(
        f"{path} has {found} bytes, {shard['bytes']} were written: "
        + remedy(self.root)
      )

  def _damaged(self, shard: int, why: str) -> CacheError:
    path = self.root / self._shards[shard]["file"]
    return CacheError(f"{path} is damaged ({why}): {remedy(self.root)}")


def check_spec(root: Path, spec: CacheSpec, found: Mapping[str, Any]) -> None:
  """Raises a CacheError that names all in which `found` is not `spec`."""
  differences = spec.differences(found)
  if differences:
    raise CacheError(
      f"the cache in {root} is of something else ({differences}): "
      + remedy(root)
    )


def remedy(root: Path) -> str:
  """What to do about a cache that is of no use."""
  return (
    f"delete {root}, which the same command then writes anew, or choose "
    "another cache.root"
  )


def _padded(element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Text features of the real tokens → of all, 0 where there is padding."""
  if "text" in element:
    mask, real = element["token_mask"], element["text"]
    text = np.zeros((len(mask), real.shape[-1]), real.dtype)
    text[mask] = real
    element["text"] = text
  return element


def _read_manifest(root: Path) -> dict[str, Any]:
  path = root / MANIFEST_FILE
  if not path.is_file():
    raise CacheError(
      f"{root} holds no finished cache: {MANIFEST_FILE} is missing. Start the "
      "command that writes it again; it goes on where it stopped"
    )
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    version = manifest["format"]
    numbers = [manifest["shard_size"]]
    numbers += [manifest["spec"]["data"][n] for n in ("num_examples", "views")]
    for shard in manifest["shards"]:
      numbers += [shard["records"], shard["bytes"], len(shard["file"])]
    if not all(isinstance(n, int) and n > 0 for n in numbers):
      raise ValueError("entries are missing")
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise CacheError(f"{path} is damaged ({error}): {remedy(root)}") from error
  if version != FORMAT:
    raise CacheError(
      f"{path} has format {version}, this version reads {FORMAT}: "
      + remedy(root)
    )
  return manifest


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
