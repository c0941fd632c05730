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
"""

import array
import csv
import json
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from psvae_jax.data import images

CAPTION_COLUMNS = ("text", "caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


class FolderSource:
  """Images and captions of a folder; see the module's docstring.

  An element is {"image": uint8 (H, W, 3) of any size, "caption": str ("" if
  there is none), "index": np.int64, "path": str relative to the root}.

  Attributes:
    root: the folder.
    captions: as given.
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    *,
    captions: str = "auto",
    max_pixels: int = images.MAX_PIXELS,
  ):
    """Lists the folder; no image is opened.

    Args:
      root: the folder.
      captions: "auto" (metadata if there is any, else class folders, else
        none), "none", "folder" (the name of each image's own folder), or the
        name of a metadata column, which every row must then have.
      max_pixels: larger images are refused when they are read.

    Raises:
      FileNotFoundError: `root` is missing, or metadata names a missing file.
      ValueError: no images, or broken metadata (the message says file:line).
    """
    self.root = os.fspath(root)
    self.captions = captions
    self._max_pixels = max_pixels
    if not os.path.isdir(self.root):
      raise FileNotFoundError(
        f"Image folder {self.root!r} does not exist or is not a folder."
      )
    scan = _Scan(self.root, captions)
    self._paths, self._texts = _PackedStrings.pack(scan.examples(), columns=2)
    if not len(self._paths):
      raise ValueError(
        f"No images in {self.root!r} or below; looked for names ending in "
        + ", ".join(images.EXTENSIONS)
        + "."
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
    """Reads and decodes one image; ValueError names a file that is broken."""
    path = self.path(index)
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
    selected._paths, selected._texts = _PackedStrings.pack(
      ((self._paths[i], self._texts[i]) for i in indices), columns=2
    )
    return selected


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
    is_class_layout: no metadata, and all images lie in two or more folders
      directly below the root.

  All are final only when `examples` is used up.
  """

  def __init__(self, root: str, captions: str):
    self.has_metadata = False
    self.unlisted = 0
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

  def examples(self) -> Iterator[tuple[str, str]]:
    """Yields (relative path, caption), sorted by path."""
    yield from self._walk("", None, ())

  def _walk(
    self,
    folder: str,
    rows: "_Metadata | None",
    ancestors: tuple[tuple[int, int], ...],
  ) -> Iterator[tuple[str, str]]:
    """Walks `folder` (relative; "" is the root), which `rows` describes."""
    status = os.stat(os.path.join(self._root, folder))
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a symbolic link to a folder above itself
      return
    files, folders = set(), set()
    with os.scandir(os.path.join(self._root, folder)) as entries:
      for entry in entries:
        if not entry.name.startswith("."):
          (folders if entry.is_dir() else files).add(entry.name)

    own_rows = _Metadata.find(self._root, folder, files, self._captions)
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
      own_rows.check_all_taken()

  def _note_layout(self, folder: str) -> None:
    if not folder or "/" in folder:
      self._is_flat_or_deep = True
    else:
      self._class_folders.add(folder)


class _Metadata:
  """Rows of one metadata file, taken one path at a time during the walk."""

  def __init__(self, root: str, folder: str, name: str, captions: str):
    self._root = root
    self._file = os.path.join(root, folder, name)
    # path relative to the root → [line, caption, caption, …]
    self._rows: dict[str, list[Any]] = {}
    read = _read_csv if name.endswith(".csv") else _read_jsonl
    for line, row in read(self._file):
      place = f"{self._file}:{line}"
      name = row.get("file_name")
      if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: no file name under 'file_name'.")
      path = posixpath.normpath(posixpath.join(folder, name))
      if path.startswith(("/", "../")):
        raise ValueError(
          f"{place}: {name!r} lies outside the image folder {root!r}."
        )
      self._rows.setdefault(path, [line]).append(
        _row_caption(row, captions, place)
      )

  @classmethod
  def find(
    cls, root: str, folder: str, files: set[str], captions: str
  ) -> "_Metadata | None":
    """The metadata among `files` of `folder`; None if there is none."""
    found = [name for name in METADATA_FILES if name in files]
    if len(found) > 1:
      raise ValueError(
        f"{os.path.join(root, folder)!r} has both {found[0]} and {found[1]}; "
        "remove one."
      )
    return cls(root, folder, found[0], captions) if found else None

  def take(self, path: str) -> list[str]:
    """Captions of all rows that name `path`; empty if none does."""
    return self._rows.pop(path, [0])[1:]

  def check_all_taken(self) -> None:
    """Raises for a row whose file the walk did not meet."""
    for path, (line, *_) in self._rows.items():
      place = f"{self._file}:{line}"
      full_path = os.path.join(self._root, path)
      missing = f"({len(self._rows)} such rows in all)"
      if not os.path.exists(full_path):
        raise FileNotFoundError(
          f"{place}: {full_path!r} does not exist {missing}."
        )
      raise ValueError(
        f"{place}: {full_path!r} cannot be used {missing}: its name starts "
        "with a dot, its folder has metadata of its own, or it does not end "
        "in " + ", ".join(images.EXTENSIONS) + "."
      )


def _is_image(name: str) -> bool:
  return name.lower().endswith(images.EXTENSIONS)


def _row_caption(row: dict[str, Any], captions: str, place: str) -> str:
  """Caption of one metadata row; `place` is file:line for errors."""
  if captions in ("none", "folder"):
    return ""
  if captions == "auto":
    column = next((name for name in CAPTION_COLUMNS if name in row), None)
    if column is None:
      return ""
  else:
    column = captions
    if column not in row:
      raise ValueError(
        f"{place}: no column {column!r}, which captions={captions!r} asks "
        "for; there are " + ", ".join(sorted(row)) + "."
      )
  caption = row[column]
  if caption is None:
    return ""
  if not isinstance(caption, str):
    raise ValueError(
      f"{place}: {column!r} must be text, not {type(caption).__name__}."
    )
  return caption


def _read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number, row) of a JSON-lines file."""
  with open(path, "rb") as file:
    for line, data in enumerate(file, start=1):
      if not data.strip():
        continue
      try:
        row = json.loads(data.decode("utf-8-sig"))
      except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}:{line}: not valid JSON ({error}).") from error
      if not isinstance(row, dict):
        raise ValueError(
          f"{path}:{line}: a JSON object is needed, such as "
          '{"file_name": "1.jpg", "text": "a cat"}.'
        )
      yield line, row


def _read_csv(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number, row) of a comma-separated file with a header."""
  with open(path, encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file)
    try:
      if "file_name" not in (reader.fieldnames or ()):
        raise ValueError("its first line has no column 'file_name'")
      for row in reader:
        if None in row:
          raise ValueError("more values than the first line has columns")
        yield reader.line_num, row
    except (csv.Error, ValueError) as error:
      raise ValueError(f"{path}:{reader.line_num}: {error}.") from error
