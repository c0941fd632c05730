"""A folder of images as a random-access source.

Three layouts, those of Hugging Face's `imagefolder`:

* a `metadata.jsonl` or `metadata.csv` with a `file_name` column, and a caption
  in `text` or `caption`. It lists the examples of its folder and of all
  folders below that have no metadata of their own; other images there are left
  out, and a file named twice (with two captions) is two examples;
* one sub-folder a class, without metadata: `root/tabby_cat/1.jpg`. The caption
  is the folder's name with spaces for underscores;
* images anywhere below the root, without captions.

Examples are sorted by the bytes of their relative path, so that a data set
has the same order on every machine. Names starting with a dot are ignored.
Paths and captions are kept as packed bytes, not as Python objects: 16 bytes an
example beside the text itself.

A metadata row that cannot be used is an example too, whose reading fails: its
place in the order does not depend on what is wrong with it. A row that cannot
even be read goes by the name of its file and line.
"""

import array
import bisect
import heapq
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from psvae_jax.data import images, quarantine
from psvae_jax.data.folder_metadata import METADATA_FILES, Caption, Metadata


class FolderSource:
  """Images and captions of a folder; see the module's docstring.

  An element is {"image": uint8 (H, W, 3) of any size, "caption": str ("" if
  there is none), "index": np.int64, "path": str relative to the root}.

  Attributes:
    root: the folder.
    captions: as given.
    faults: index → fault of the examples that metadata cannot describe.
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    *,
    captions: str = "auto",
    max_pixels: int = images.MAX_PIXELS,
    gone: Iterable[str] = (),
  ):
    """Lists the folder; no image is opened.

    Args:
      root: the folder.
      captions: "auto" (metadata if there is any, else class folders, else
        none), "none", "folder" (the name of each image's own folder), or the
        name of a metadata column, which every row must then have.
      max_pixels: larger images are refused when they are read.
      gone: paths that were images of this folder once. Where they are missing
        now, they keep their places as examples that cannot be read.

    Raises:
      FileNotFoundError: `root` is missing.
      ValueError: no images, a broken metadata file, or no row of it that can
        be used (the message says file:line).
    """
    self.root = os.fspath(root)
    self.captions = captions
    self._max_pixels = max_pixels
    if not os.path.isdir(self.root):
      raise FileNotFoundError(
        f"Image folder {self.root!r} does not exist or is not a folder."
      )
    scan = _Scan(self.root, captions)
    self._pack(scan.examples())
    self._insert(scan.missing)
    self._insert(list(self._still_gone(gone)))
    if not len(self._paths):
      raise ValueError(
        f"No images in {self.root!r} or below; looked for names ending in "
        + ", ".join(images.EXTENSIONS)
        + "."
      )
    if len(self.faults) == len(self._paths):
      raise ValueError(
        f"None of the {len(self)} examples of {self.root!r} can be used: "
        + self.faults[0].cause
      )
    if scan.unlisted:
      logging.warning(
        "%s: left out %d images that no metadata row lists.",
        self.root,
        scan.unlisted,
      )
    if captions not in ("auto", "none", "folder") and not scan.has_metadata:
      raise ValueError(
        f"captions={captions!r} is a metadata column, but {self.root!r} has "
        "neither " + " nor ".join(METADATA_FILES) + "."
      )
    self._folder_captions = captions == "folder" or (
      captions == "auto" and scan.is_class_layout
    )

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads and decodes one image.

    Raises:
      IndexError: there is no such example.
      quarantine.CaptionError: its caption is broken.
      ValueError, OSError: its image is; the message names the file.
    """
    path = self.path(index)
    fault = self.faults.get(index)
    if fault is not None:
      is_caption = fault.kind == "caption"
      raise (quarantine.CaptionError if is_caption else ValueError)(fault.cause)
    image = images.decode_image(
      os.path.join(self.root, path), max_pixels=self._max_pixels
    )
    return {
      "image": image,
      "caption": self.caption(index),
      "index": np.int64(index),
      "path": path,
    }

  def __repr__(self) -> str:
    return (
      f"FolderSource(root={self.root!r}, captions={self.captions!r}, "
      f"length={len(self)})"
    )

  @property
  def name(self) -> str:
    """What to call the source: its folder."""
    return self.root

  def is_available(self) -> bool:
    """Whether the folder is there."""
    return os.path.isdir(self.root)

  def path(self, index: int) -> str:
    """Path of one example relative to the root, with forward slashes."""
    return self._paths[index]

  def caption(self, index: int) -> str:
    """Caption of one example, without opening its image."""
    if self._folder_captions:
      folder = posixpath.basename(posixpath.dirname(self.path(index)))
      return folder.replace("_", " ")
    return self._texts[index]

  def select(self, indices: Iterable[int]) -> "FolderSource":
    """A source of only these examples, in this order, indexed from 0."""
    selected = object.__new__(FolderSource)
    selected.__dict__.update(self.__dict__)
    selected._pack(self._example(int(i)) for i in indices)
    return selected

  def _example(self, index: int) -> tuple[str, Caption]:
    caption = self.faults.get(index) or self._texts[index]
    return self._paths[index], caption

  def _pack(self, examples: Iterable[tuple[str, Caption]]) -> None:
    """Takes over the examples, which may come from a generator."""
    faults: dict[int, quarantine.Fault] = {}

    def rows() -> Iterator[tuple[str, str]]:
      for index, (path, caption) in enumerate(examples):
        if isinstance(caption, quarantine.Fault):
          faults[index], caption = caption, ""
        yield path, caption

    self._paths, self._texts = _PackedStrings.pack(rows(), columns=2)
    self.faults = faults

  def _insert(self, examples: list[tuple[str, quarantine.Fault]]) -> None:
    """Puts further examples in their places of the order."""
    if examples:
      own = (self._example(i) for i in range(len(self._paths)))
      examples = sorted(examples, key=_order)
      self._pack(heapq.merge(own, examples, key=_order))

  def _still_gone(
    self, paths: Iterable[str]
  ) -> Iterator[tuple[str, quarantine.Fault]]:
    """Those of `paths` that the folder lacks now."""
    for path in sorted(set(paths), key=_path_order):
      place = bisect.bisect_left(
        self._paths, _path_order(path), key=_path_order
      )
      is_there = place < len(self._paths) and self._paths[place] == path
      if _is_image(path) and not is_there:
        cause = f"{os.path.join(self.root, path)!r} does not exist any more."
        yield path, quarantine.Fault("image", cause)


class _PackedStrings:
  """An immutable list of strings, held as two arrays: text and end offsets."""

  def __init__(self, text: np.ndarray, ends: np.ndarray):
    self._text, self._ends = text, ends

  @classmethod
  def pack(
    cls, rows: Iterable[tuple[str, ...]], *, columns: int
  ) -> tuple["_PackedStrings", ...]:
    """Packs every column of `rows`, which may be a generator."""
    texts = [bytearray() for _ in range(columns)]
    ends = [array.array("q") for _ in range(columns)]
    for row in rows:
      for text, end, value in zip(texts, ends, row, strict=True):
        # File names may hold bytes that are not UTF-8: surrogates in Python.
        text += value.encode("utf-8", "surrogatepass")
        end.append(len(text))
    return tuple(
      cls(np.frombuffer(text, np.uint8), np.frombuffer(end, np.int64))
      for text, end in zip(texts, ends, strict=True)
    )

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> str:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is outside [0, {len(self)})")
    start = self._ends[index - 1] if index else 0
    data = self._text[start : self._ends[index]].tobytes()
    return data.decode("utf-8", "surrogatepass")


class _Scan:
  """One walk over a folder.

  Attributes:
    has_metadata: whether a metadata file was found.
    unlisted: images left out because metadata does not list them.
    missing: (path, fault) of metadata rows without a usable file.
    is_class_layout: no metadata, and all images lie in two or more folders
      directly below the root.

  All are final only when `examples` is used up.
  """

  def __init__(self, root: str, captions: str):
    self.has_metadata = False
    self.unlisted = 0
    self.missing: list[tuple[str, quarantine.Fault]] = []
    self._root, self._captions = root, captions
    self._class_folders: set[str] = set()
    self._is_flat_or_deep = False

  @property
  def is_class_layout(self) -> bool:
    return (
      not self.has_metadata
      and not self._is_flat_or_deep
      and len(self._class_folders) > 1
    )

  def examples(self) -> Iterator[tuple[str, Caption]]:
    """Yields (relative path, caption), sorted by path."""
    yield from self._walk("", None, ())

  def _walk(
    self,
    folder: str,
    rows: "Metadata | None",
    ancestors: tuple[tuple[int, int], ...],
  ) -> Iterator[tuple[str, Caption]]:
    """Walks `folder` (relative; "" is the root), which `rows` describes."""
    status = os.stat(os.path.join(self._root, folder))
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a symbolic link to a folder above itself
      return
    files, folders = set(), set()
    with os.scandir(os.path.join(self._root, folder)) as entries:
      for entry in entries:
        if not entry.name.startswith("."):
          (folders if _is_dir(entry) else files).add(entry.name)

    own_rows = Metadata.find(self._root, folder, files, self._captions)
    if own_rows is not None:
      self.has_metadata = True
      rows = own_rows

    # With the slash, siblings sort as their full paths do.
    names = [name for name in files if _is_image(name)]
    names += [name + "/" for name in folders]
    for name in sorted(names, key=os.fsencode):
      path = posixpath.join(folder, name)
      if name.endswith("/"):
        yield from self._walk(path[:-1], rows, (*ancestors, identity))
      elif rows is None:
        self._note_layout(folder)
        yield path, ""
      else:
        captions = rows.take(path)
        self.unlisted += not captions
        for caption in captions:
          yield path, caption
    if own_rows is not None:
      self.missing += own_rows.take_rest(images.EXTENSIONS)

  def _note_layout(self, folder: str) -> None:
    if not folder or "/" in folder:
      self._is_flat_or_deep = True
    else:
      self._class_folders.add(folder)


def _is_image(name: str) -> bool:
  return name.lower().endswith(images.EXTENSIONS)


def _is_dir(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself; reading it will say so
    return False


def _order(example: tuple[str, Caption]) -> bytes:
  return _path_order(example[0])


def _path_order(path: str) -> bytes:
  """The bytes of a path, by which examples are sorted."""
  try:
    return os.fsencode(path)
  except UnicodeEncodeError:  # from a metadata row; no file has this name
    return path.encode("utf-8", "surrogatepass")
