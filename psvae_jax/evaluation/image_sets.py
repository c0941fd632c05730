"""Where an evaluation's images come from, and in which shape.

A set is named by the user: a folder of images, an .npz with `arr_0`, "scenes"
(the embedded data set's validation split, or "scenes:heldout"), or
"tfds:BUILDER:SPLIT". Its images have one size and a fixed order, and its
fingerprint changes when its files do.
"""

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax.data import (
  folder,
  guarded,
  pipeline,
  quarantine,
  scenes,
  tfds_images,
)
from psvae_jax.evaluators.reference_npz import NpzImages, ReferenceFile

_SCENES = 2000  # of the embedded data set, which has no end
_TRIES = 20  # images that may be broken before the first sound one

CROPPED = (
  "shorter side to {size} (box halving, then Pillow bicubic, as ADM), centre "
  "crop"
)
AS_THEY_ARE = "taken as they are, {size} × {size}"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """Images of one size, in a fixed order.

  Attributes:
    name: what the user called it.
    source: the images, perhaps of other sizes.
    size: side of the images that `batches` gives, pixels.
    preparation: how they come to it, for the protocol.
    fingerprint: of the files' names, sizes and times, and of the choice.
    available: how many images there are to choose from.
    labels: classes of the images, if they are known.
  """

  name: str
  source: "_View"
  size: int
  preparation: str
  fingerprint: str
  available: int
  labels: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.source)

  def path(self, index: int) -> str:
    """What to call one image."""
    return self.source.path(index)

  def caption(self, index: int) -> str:
    """The caption that the data set has for one image; "" without."""
    return self.source.caption(index)

  def batches(
    self, batch_size: int, first: int = 0
  ) -> Iterator[pipeline.Batch]:
    """Batches from number `first` on, as `pipeline.eval_batches` gives them.

    "index" counts in the set, whatever `first` is.
    """
    start = first * batch_size
    if start >= len(self):
      return
    for batch in pipeline.eval_batches(
      self.source.after(start), image_size=self.size, batch_size=batch_size
    ):
      yield {
        **batch,
        "index": np.where(batch["mask"], batch["index"] + start, -1),
      }

  def describe(self) -> dict[str, Any]:
    """For a protocol: JSON values."""
    chosen = f"all {len(self)}"
    if len(self) < self.available:
      chosen = f"{len(self)} of {self.available}, evenly spaced"
    return {
      "data": self.name,
      "images": chosen,
      "size": self.size,
      "preparation": self.preparation,
      "fingerprint": self.fingerprint,
    }


def open_set(
  name: str,
  *,
  size: int | None = None,
  count: int = 0,
  data_dir: str = "",
  max_bad_share: float = 0.01,
  quarantine_file: Path | None = None,
) -> ImageSet:
  """Opens what the user named; no image but the first is read.

  Args:
    name: see the module's docstring.
    size: the images' side; larger and smaller ones are resized and cropped.
      None takes them as they are: all must be of one size.
    count: take so many, evenly spaced; 0 takes all.
    data_dir: of TensorFlow Datasets.
    max_bad_share: share of them that may be unreadable; they are left out and
      named in the quarantine.
    quarantine_file: where.

  Raises:
    FileNotFoundError: there is no such folder or file.
    ValueError: no images; too many broken ones; no square ones, and no size.
  """
  source, fingerprint, labels = _open(
    name, size, data_dir, max_bad_share, quarantine_file
  )
  available = len(source)
  if not 0 <= count <= available:
    raise ValueError(
      f"{name} has {available} images, {count} were asked for; give a --num "
      "from 1 to that, or none for all"
    )
  number = count or available
  indices = np.arange(number) * available // number
  preparation = CROPPED
  native = size is None
  if native:
    size, preparation = _first_size(source, name), AS_THEY_ARE
  if labels is not None:
    labels = labels[indices]
  digest = hashlib.sha256(
    f"{fingerprint}\n{available}\n{number}\n{size}\n{native}".encode()
  )
  return ImageSet(
    name=name,
    source=_View(source, indices, size if native else None),
    size=size,
    preparation=preparation.format(size=size),
    fingerprint=digest.hexdigest()[:16],
    available=available,
    labels=labels,
  )


class _View:
  """Chosen elements of a source, in order.

  Args:
    source: of a data set.
    indices: which.
    size: their size must be that; None takes any.
  """

  def __init__(self, source: Any, indices: np.ndarray, size: int | None):
    self._source, self._indices, self._size = source, indices, size
    self._read = getattr(source, "read", source.__getitem__)

  def __len__(self) -> int:
    return len(self._indices)

  def __repr__(self) -> str:
    return f"_View({self._source!r}, {len(self)})"

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._checked(self._source[int(self._indices[index])], index)

  def read(self, index: int) -> dict[str, Any] | None:
    """The element; None if it is bad and the source says so."""
    element = self._read(int(self._indices[index]))
    return None if element is None else self._checked(element, index)

  def after(self, start: int) -> "_View":
    """The elements from `start` on."""
    return _View(self._source, self._indices[start:], self._size)

  def path(self, index: int) -> str:
    place = int(self._indices[index])
    name = getattr(self._source, "path", None)
    return f"number {place}" if name is None else name(place)

  def caption(self, index: int) -> str:
    source = getattr(self._source, "source", self._source)
    caption = getattr(source, "caption", None)
    return "" if caption is None else caption(int(self._indices[index]))

  def _checked(self, element: dict[str, Any], index: int) -> dict[str, Any]:
    height, width = element["image"].shape[:2]
    if self._size is not None and (height, width) != (self._size, self._size):
      raise ValueError(
        f"{self.path(index)} is {height} × {width} pixels, the first image "
        f"{self._size} × {self._size}: images of several sizes do not compare; "
        "give --size=N to bring all of them to one, or take other files out"
      )
    return element


def _open(
  name: str,
  size: int | None,
  data_dir: str,
  max_bad_share: float,
  quarantine_file: Path | None,
) -> tuple[Any, str, np.ndarray | None]:
  """Source, fingerprint of all that is in it, and labels."""
  kind, _, rest = name.partition(":")
  if kind == "scenes":
    split = rest or "validation"
    source = scenes.SceneSource(split, _SCENES, size or scenes.IMAGE_SIZE)
    return source, repr(source), None
  if kind == "tfds":
    builder, _, split = rest.rpartition(":")
    if not builder:
      raise ValueError(
        f"{name!r}: a TensorFlow data set is tfds:BUILDER:SPLIT, e.g. "
        "tfds:imagenet2012:validation"
      )
    source = tfds_images.TfdsSource(builder, split, data_dir=data_dir)
    text = f"{source!r}"
  elif name.endswith(".npz"):
    file = ReferenceFile(Path(name).expanduser())
    text = _npz_fingerprint(file.path)
    # Not guarded: of an array no image is broken by itself.
    return file.images(), text, file.labels()
  else:
    root = Path(name).expanduser()
    if root.is_file():
      raise ValueError(
        f"{name} is a file; give a folder of images, or an .npz with arr_0"
      )
    source = folder.FolderSource(root)
    text = _files_fingerprint(source)
  labels = None
  if isinstance(source, folder.FolderSource) and source.num_classes:
    labels = np.array([source.label(i) for i in range(len(source))])
  source = guarded.GuardedSource(
    source,
    split="evaluation",
    max_bad_share=max_bad_share,
    file=quarantine_file,
  )
  return source, text, labels


def _npz_fingerprint(path: Path) -> str:
  """Of its place, time, and the checksums that the file has of its arrays.

  Sets of as many images are files of one size, and archives unpack with one
  time: only the checksums tell them apart.
  """
  with zipfile.ZipFile(path) as archive:
    sums = sorted((i.filename, i.CRC) for i in archive.infolist())
  status = path.stat()
  return f"npz {path.resolve()} {status.st_size} {status.st_mtime_ns} {sums}"


def _files_fingerprint(source: folder.FolderSource) -> str:
  """Of place, names, sizes and times of all files: one look at each."""
  place = os.path.realpath(source.root)
  digest = hashlib.sha256(place.encode("utf-8", "surrogateescape"))
  for index in range(len(source)):
    path = source.path(index)
    try:
      status = os.stat(os.path.join(source.root, path))
      stamp = f"{status.st_size} {status.st_mtime_ns}"
    except (OSError, ValueError):
      stamp = "missing"
    line = f"{path}\0{source.caption(index)}\0{stamp}\n"
    digest.update(line.encode("utf-8", "surrogatepass"))
  return digest.hexdigest()


def _first_size(source: Any, name: str) -> int:
  """Side of the first image that can be read."""
  if isinstance(source, NpzImages):
    height, width = source.image_shape
  else:
    read = getattr(source, "read", source.__getitem__)
    tried = range(min(_TRIES, len(source)))
    element = next(filter(None, map(read, tried)), None)
    if element is None:
      raise ValueError(f"none of the first {len(tried)} images of {name} reads")
    height, width = element["image"].shape[:2]
  if height != width:
    raise ValueError(
      f"the images of {name} are {height} × {width}, not square; give --size=N "
      "to resize and centre-crop them"
    )
  return height


def describe_labels(labels: np.ndarray | None) -> str:
  """How many images each class has; "" where no classes are known."""
  known = np.array([]) if labels is None else labels[labels >= 0]
  if not len(known):
    return ""
  counts = np.unique(known, return_counts=True)[1]
  least, most = counts.min(), counts.max()
  each = f"{least} each" if least == most else f"{least} to {most} each"
  return f"{len(counts)} classes, {each}"


def explain_quarantine(error: quarantine.DataError) -> str:
  """The message of too many broken images, with this command's flag."""
  message = str(error).replace("--config.data.max_bad_share", "--max_bad_share")
  return message.replace("data.max_bad_share", "--max_bad_share")


def numbered_out_of_order(paths: Sequence[str]) -> tuple[str, str] | None:
  """Two files whose numbers say another order than their names sort in.

  "10.png" sorts before "2.png", and the second line of a prompts file is then
  not the second image's.
  """
  stems = [os.path.splitext(path)[0] for path in paths]
  heads = {stem.rstrip("0123456789") for stem in stems}
  if len(heads) != 1:
    return None
  (head,) = heads
  tails = [stem[len(head) :] for stem in stems]
  if not all(tails):
    return None
  numbers = [int(tail) for tail in tails]
  for i in range(1, len(numbers)):
    if numbers[i] < numbers[i - 1]:
      return paths[i - 1], paths[i]
  return None
