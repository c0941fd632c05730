"""A folder of images as a random-access source.

Three layouts, those of Hugging Face's `imagefolder`:

* a `metadata.jsonl` or `metadata.csv` with a `file_name` column, and a caption
  in `text` or `caption`. It lists the examples of its folder and of all
  folders below that have no metadata of their own; other images there are left
  out, and a file named twice (with two captions) is two examples. A column
  `label` holds classes, as numbers or by name;
* one sub-folder a class, without metadata: `root/tabby_cat/1.jpg`. The caption
  is the folder's name with spaces for underscores, and the class its place
  among the folders' sorted names;
* images anywhere below the root, without captions.

Examples are sorted by the bytes of their relative path, so that a data set
has the same order on every machine. Names starting with a dot are ignored.
Paths, captions and classes are kept as packed bytes, not as Python objects: 8
bytes an example beside the text itself, for each that there is.

A metadata row that cannot be used is an example too, whose reading fails: its
place in the order does not depend on what is wrong with it. A row that cannot
even be read goes by the name of its file and line.
"""

import array
import bisect
import copy
import heapq
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np

from psvae_jax.data import images, quarantine
from psvae_jax.data.class_labels import ClassLabels
from psvae_jax.data.folder_metadata import (
  METADATA_FILES,
  Form,
  Metadata,
  Texts,
  caption_form,
)

# An example: its path, and what is known of it.
Example = tuple[str, Texts]


class FolderListing:
  """The examples of a folder in order, without their images.

  Attributes:
    root: the folder.
    faults: index → fault of the examples that metadata cannot describe.
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    form: Form,
    max_pixels: int,
    gone: Iterable[str],
  ):
    """Lists the folder; no image is opened.

    Args:
      root: the folder.
      form: what metadata rows are to say.
      max_pixels: larger images are refused when they are read.
      gone: paths that were images of this folder once. Where they are missing
        now, they keep their places as examples that cannot be read.

    Raises:
      FileNotFoundError: `root` is missing.
      ValueError: no images, a broken metadata file, or no row of it that can
        be used (the message says file:line).
    """
    self.root = os.fspath(root)
    self._max_pixels = max_pixels
    if not os.path.isdir(self.root):
      raise FileNotFoundError(
        f"Image folder {self.root!r} does not exist or is not a folder."
      )
    scan = Scan(self.root, form)
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
    self._note(scan)

  def _note(self, scan: "Scan") -> None:
    """Keeps what else the walk has found."""

  def __len__(self) -> int:
    return len(self._paths)

  def __repr__(self) -> str:
    return f"{type(self).__name__}(root={self.root!r}, length={len(self)})"

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

  def origin(self, index: int) -> str:
    """Path of the file that an example was made from.

    Examples of one origin must not be both trained on and held out.
    """
    return self.path(index)

  def select(self, indices: Iterable[int]) -> Self:
    """A source of only these examples, in this order, indexed from 0."""
    selected = copy.copy(self)
    selected._pack(self._example(int(i)) for i in indices)
    return selected

  def _usable_path(self, index: int) -> str:
    """Path of one example; raises the error of one that is known to be bad."""
    path = self.path(index)
    fault = self.faults.get(index)
    if fault is not None:
      is_caption = fault.kind == "caption"
      raise (quarantine.CaptionError if is_caption else ValueError)(fault.cause)
    return path

  def _read_image(self, path: str) -> np.ndarray:
    return images.decode_image(
      os.path.join(self.root, path), max_pixels=self._max_pixels
    )

  def _example(self, index: int) -> Example:
    texts = self.faults.get(index) or (self._texts[index], self._others[index])
    return self._paths[index], texts

  def _pack(self, examples: Iterable[Example]) -> None:
    """Takes over the examples, which may come from a generator."""
    faults: dict[int, quarantine.Fault] = {}

    def rows() -> Iterator[tuple[str, str, str]]:
      for index, (path, texts) in enumerate(examples):
        if isinstance(texts, quarantine.Fault):
          faults[index], texts = texts, ("", "")
        yield path, *texts

    packed = _PackedStrings.pack(rows(), columns=3)
    self._paths, self._texts, self._others = packed
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


class FolderSource(FolderListing):
  """Images and captions of a folder; see the module's docstring.

  An element is {"image": uint8 (H, W, 3) of any size, "caption": str ("" if
  there is none), "index": np.int64, "path": str relative to the root}, and in
  a folder with classes "label": np.int64 (−1 where it is not known).

  Args:
    root, max_pixels, gone: see `FolderListing`.
    captions: "auto" (metadata if there is any, else class folders, else
      none), "none", "folder" (the name of each image's own folder), or the
      name of a metadata column, which every row must then have.

  Attributes:
    root, faults: see `FolderListing`.
    captions: as given.

  Raises:
    FileNotFoundError, ValueError: as `FolderListing`, or there is no metadata
      that could have such a column.
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    *,
    captions: str = "auto",
    max_pixels: int = images.MAX_PIXELS,
    gone: Iterable[str] = (),
  ):
    self.captions = captions
    super().__init__(root, caption_form(captions), max_pixels, gone)

  def _note(self, scan: "Scan") -> None:
    if scan.unlisted:
      logging.warning(
        "%s: left out %d images that no metadata row lists.",
        self.root,
        scan.unlisted,
      )
    captions = self.captions
    if captions not in ("auto", "none", "folder") and not scan.has_metadata:
      raise ValueError(
        f"captions={captions!r} is a metadata column, but {self.root!r} has "
        "neither " + " nor ".join(METADATA_FILES) + "."
      )
    self._folder_captions = captions == "folder" or (
      captions == "auto" and scan.is_class_layout
    )
    self._class_folders = scan.class_folders
    self._labels = ClassLabels(
      # One folder alone is no class, unless elsewhere there are others.
      scan.class_folders if scan.is_class_layout else self._others.distinct(),
      may_be_numbers=scan.has_metadata,
    )

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads and decodes one image.

    Raises:
      IndexError: there is no such example.
      quarantine.CaptionError: its caption is broken.
      ValueError, OSError: its image is; the message names the file.
    """
    path = self._usable_path(index)
    element = {
      "image": self._read_image(path),
      "caption": self.caption(index),
      "index": np.int64(index),
      "path": path,
    }
    if self.num_classes:
      element["label"] = np.int64(self.label(index))
    return element

  def __repr__(self) -> str:
    return (
      f"FolderSource(root={self.root!r}, captions={self.captions!r}, "
      f"length={len(self)})"
    )

  @property
  def num_classes(self) -> int:
    """Labels lie in [0, num_classes); 0 without classes."""
    return self._labels.count

  @property
  def may_have_classes(self) -> bool:
    """Whether it has, or would beside a folder that has."""
    return bool(self._class_folders or self.num_classes)

  def caption(self, index: int) -> str:
    """Caption of one example, without opening its image."""
    if self._folder_captions:
      return self._folder_of(index).replace("_", " ")
    return self._texts[index]

  def label(self, index: int) -> int:
    """Class of one example; −1 where it has none that is known."""
    own = self._folder_of(index) if self._class_folders else self._others[index]
    return self._labels.label(own)

  def with_classes_of(self, other: "FolderSource") -> "FolderSource":
    """The same images, with classes numbered as in another folder."""
    same = copy.copy(self)
    same._labels = other._labels
    return same

  def _folder_of(self, index: int) -> str:
    return posixpath.basename(posixpath.dirname(self.path(index)))


class _PackedStrings:
  """An immutable list of strings, held as two arrays: text and end offsets."""

  def __init__(self, text: np.ndarray, ends: np.ndarray):
    self._length = len(ends)
    # Without text all ends are 0.
    self._text, self._ends = text, ends if len(text) else ends[:0].copy()

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
    return self._length

  def __getitem__(self, index: int) -> str:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is outside [0, {len(self)})")
    if not len(self._text):
      return ""
    start = self._ends[index - 1] if index else 0
    data = self._text[start : self._ends[index]].tobytes()
    return data.decode("utf-8", "surrogatepass")

  def distinct(self) -> set[str]:
    """The different ones."""
    if not len(self._text):
      return {""}
    return {self[index] for index in range(len(self))}


class Scan:
  """One walk over a folder.

  Attributes:
    has_metadata: whether a metadata file was found.
    unlisted: images left out because metadata does not list them.
    missing: (path, fault) of metadata rows without a usable file.
    class_folders: no metadata, and all images lie in these folders directly
      below the root; () if it is not so.
    is_class_layout: there are two or more of them.

  All are final only when `examples` is used up.
  """

  def __init__(self, root: str, form: Form):
    self.has_metadata = False
    self.unlisted = 0
    self.missing: list[tuple[str, quarantine.Fault]] = []
    self._root, self._form = root, form
    self._folders: set[str] = set()
    self._is_flat_or_deep = False

  @property
  def class_folders(self) -> tuple[str, ...]:
    is_other = self.has_metadata or self._is_flat_or_deep
    return () if is_other else tuple(sorted(self._folders))

  @property
  def is_class_layout(self) -> bool:
    return len(self.class_folders) > 1

  def examples(self) -> Iterator[Example]:
    """Yields (relative path, what is known of it), sorted by path."""
    yield from self._walk("", None, ())

  def _walk(
    self,
    folder: str,
    rows: "Metadata | None",
    ancestors: tuple[tuple[int, int], ...],
  ) -> Iterator[Example]:
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

    own_rows = Metadata.find(self._root, folder, files, self._form)
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
        yield path, ("", "")
      else:
        found = rows.take(path)
        self.unlisted += not found
        for texts in found:
          yield path, texts
    if own_rows is not None:
      self.missing += own_rows.take_rest(images.EXTENSIONS)

  def _note_layout(self, folder: str) -> None:
    if not folder or "/" in folder:
      self._is_flat_or_deep = True
    else:
      self._folders.add(folder)


def _is_image(name: str) -> bool:
  return name.lower().endswith(images.EXTENSIONS)


def _is_dir(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself; reading it will say so
    return False


def _order(example: Example) -> bytes:
  return _path_order(example[0])


def _path_order(path: str) -> bytes:
  """The bytes of a path, by which examples are sorted."""
  try:
    return os.fsencode(path)
  except UnicodeEncodeError:  # from a metadata row; no file has this name
    return path.encode("utf-8", "surrogatepass")
