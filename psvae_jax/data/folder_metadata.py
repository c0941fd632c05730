"""`metadata.jsonl` and `metadata.csv` of an image folder.

A row that cannot be used (no file name, a caption that is no text, …) is a
record with a `Fault`, not an error: one bad row must not stop a training. A
file without a single usable row among its first is an error.
"""

import csv
import json
import os
import posixpath
from collections.abc import Iterator
from typing import Any

from psvae_jax.data.quarantine import Fault

CAPTION_COLUMNS = ("text", "caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")

# After so many unusable rows and no usable one the file itself is wrong.
_HOPELESS = 1000

Row = dict[str, Any] | Fault
Caption = str | Fault


class Metadata:
  """Rows of one metadata file, taken one path at a time during a walk."""

  def __init__(self, root: str, folder: str, name: str, captions: str):
    """Reads the file.

    Args:
      root: the image folder.
      folder: the metadata's folder, relative to `root`.
      name: "metadata.jsonl" or "metadata.csv".
      captions: see `folder.FolderSource`.

    Raises:
      ValueError: the file as a whole is broken; the message says file:line.
    """
    self._root = root
    self._file = os.path.join(root, folder, name)
    self._captions = captions
    # path relative to the root → [line, caption, caption, …]
    self._rows: dict[str, list[Any]] = {}
    # Rows that name no path: (place, fault). The place stands for the path.
    self._nameless: list[tuple[str, Fault]] = []
    place = posixpath.join(folder, name)
    is_good = False
    read = _read_csv if name.endswith(".csv") else _read_jsonl
    for count, (line, row) in enumerate(read(self._file), start=1):
      fault = self._add(folder, f"{place}:{line}", line, row)
      is_good |= fault is None
      if count == _HOPELESS and not is_good:
        raise ValueError(
          f"{fault.cause} The {count} rows before it cannot be used either."
        )

  @classmethod
  def find(
    cls, root: str, folder: str, files: set[str], captions: str
  ) -> "Metadata | None":
    """The metadata among `files` of `folder`; None if there is none."""
    found = [name for name in METADATA_FILES if name in files]
    if len(found) > 1:
      raise ValueError(
        f"{os.path.join(root, folder)!r} has both {found[0]} and {found[1]}; "
        "remove one."
      )
    return cls(root, folder, found[0], captions) if found else None

  def take(self, path: str) -> list[Caption]:
    """Captions of all rows that name `path`; empty if none does."""
    return self._rows.pop(path, [0])[1:]

  def take_rest(self, extensions: tuple[str, ...]) -> list[tuple[str, Fault]]:
    """(path, fault) of the rows whose file the walk did not meet."""
    rest, self._nameless = self._nameless, []
    for path, (line, *captions) in self._rows.items():
      full_path = os.path.join(self._root, path)
      cause = f"{self._file}:{line}: {full_path!r} "
      if os.path.exists(full_path):
        cause += (
          "cannot be used: its name starts with a dot, its folder has metadata "
          "of its own, or it does not end in " + ", ".join(extensions) + "."
        )
      else:
        cause += "does not exist."
      rest += [(path, Fault("image", cause))] * len(captions)
    self._rows = {}
    return rest

  def _add(self, folder: str, place: str, line: int, row: Row) -> Fault | None:
    """Notes one row; returns what is wrong with it."""
    full_place = f"{self._file}:{line}"
    if isinstance(row, Fault):
      self._nameless.append((place, row))
      return row
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
      fault = Fault("image", f"{full_place}: no file name under 'file_name'.")
      self._nameless.append((place, fault))
      return fault
    path = posixpath.normpath(posixpath.join(folder, name))
    if path.startswith(("/", "../")) or path == "..":
      fault = Fault(
        "image",
        f"{full_place}: {name!r} lies outside the image folder {self._root!r}.",
      )
      self._nameless.append((place, fault))
      return fault
    caption = _row_caption(row, self._captions, full_place)
    self._rows.setdefault(path, [line]).append(caption)
    return caption if isinstance(caption, Fault) else None


def _row_caption(row: dict[str, Any], captions: str, place: str) -> Caption:
  """Caption of one metadata row; `place` is file:line for errors."""
  if captions in ("none", "folder"):
    return ""
  if None in row:  # csv.DictReader's key for surplus values
    return Fault(
      "caption", f"{place}: more values than the first line has columns."
    )
  is_required = captions != "auto"
  column = captions
  if not is_required:
    column = next((name for name in CAPTION_COLUMNS if name in row), None)
    if column is None:
      return ""
  elif column not in row:
    return Fault(
      "caption",
      f"{place}: no column {column!r}, which captions={captions!r} asks "
      "for; there are " + ", ".join(sorted(row)) + ".",
    )
  caption = row[column]
  if caption is None and not is_required:
    return ""
  if not isinstance(caption, str):
    kind = "null" if caption is None else type(caption).__name__
    return Fault("caption", f"{place}: {column!r} must be text, not {kind}.")
  try:
    caption.encode()
  except UnicodeEncodeError:
    return Fault("caption", f"{place}: {column!r} is not valid UTF-8.")
  return caption


def _read_jsonl(path: str) -> Iterator[tuple[int, Row]]:
  """Yields (line number, row) of a JSON-lines file."""
  with open(path, "rb") as file:
    for line, data in enumerate(file, start=1):
      if data.strip():
        yield line, _json_row(data, f"{path}:{line}")


def _json_row(data: bytes, place: str) -> Row:
  data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
  try:
    # Bytes that are not UTF-8 are kept: in a file name they may be right, in
    # a caption `_row_caption` finds them.
    row = json.loads(data.decode("utf-8", "surrogateescape"))
  except (ValueError, RecursionError) as error:
    return Fault("caption", f"{place}: not valid JSON ({error}).")
  if not isinstance(row, dict):
    return Fault(
      "caption",
      f"{place}: a JSON object is needed, such as "
      '{"file_name": "1.jpg", "text": "a cat"}.',
    )
  return row


def _read_csv(path: str) -> Iterator[tuple[int, Row]]:
  """Yields (line number, row) of a comma-separated file with a header."""
  with open(
    path, encoding="utf-8-sig", errors="surrogateescape", newline=""
  ) as file:
    reader = csv.DictReader(file)
    try:
      if "file_name" not in (reader.fieldnames or ()):
        raise ValueError("its first line has no column 'file_name'")
      for row in reader:
        yield reader.line_num, row
    except (csv.Error, ValueError) as error:
      # Quoting that is broken here makes nonsense of all that follows.
      raise ValueError(f"{path}:{reader.line_num}: {error}.") from error
