"""`metadata.jsonl` and `metadata.csv` of an image folder.

A row that cannot be used (no file name, a caption that is no text, …) is a
record with a `Fault`, not an error: one bad row must not stop a training. A
file without a single usable row among its first is an error.
"""

import csv
import dataclasses
import functools
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from typing import Any

from psvae_jax.data.quarantine import Fault

CAPTION_COLUMNS = ("text", "caption")
LABEL_COLUMN = "label"
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# Hugging Face reads `file_name` as the column "image" and `NAME_file_name` as
# another image column, NAME.
SOURCE_COLUMNS = ("source_file_name", "input_file_name")
TARGET_COLUMNS = ("file_name", "target_file_name", "output_file_name")
INSTRUCTION_COLUMNS = ("instruction", "edit_prompt")

# After so many unusable rows and no usable one the file itself is wrong.
_HOPELESS = 1000

Row = dict[str, Any] | Fault
# What a row says of its file.
Texts = tuple[str, str] | Fault


@dataclasses.dataclass(frozen=True)
class Form:
  """What is wanted of a metadata row.

  Attributes:
    file_columns: columns that name the example's own file; the first that a
      row has counts.
    read: (row, root, folder, "file:line") → its two texts, or what is wrong.
  """

  file_columns: tuple[str, ...]
  read: Callable[[dict[str, Any], str, str, str], Texts]


def caption_form(captions: str) -> Form:
  """Caption and class of an image.

  Args:
    captions: see `folder.FolderSource`.
  """
  return Form(
    ("file_name",), functools.partial(_read_caption, captions=captions)
  )


def edit_form() -> Form:
  """Instruction, and path of the image to be edited, of an edited image."""
  return Form(TARGET_COLUMNS, _read_edit)


class Metadata:
  """Rows of one metadata file, taken one path at a time during a walk."""

  def __init__(self, root: str, folder: str, name: str, form: Form):
    """Reads the file.

    Args:
      root: the image folder.
      folder: the metadata's folder, relative to `root`.
      name: "metadata.jsonl" or "metadata.csv".
      form: what its rows are to say.

    Raises:
      ValueError: the file as a whole is broken; the message says file:line.
    """
    self._root = root
    self._file = os.path.join(root, folder, name)
    self._form = form
    # path relative to the root → [line, texts, texts, …]
    self._rows: dict[str, list[Any]] = {}
    # Rows that name no path: (place, fault). The place stands for the path.
    self._nameless: list[tuple[str, Fault]] = []
    place = posixpath.join(folder, name)
    is_good = False
    if name.endswith(".csv"):
      rows = _read_csv(self._file, form.file_columns)
    else:
      rows = _read_jsonl(self._file)
    for count, (line, row) in enumerate(rows, start=1):
      fault = self._add(folder, f"{place}:{line}", line, row)
      is_good |= fault is None
      if count == _HOPELESS and not is_good:
        raise ValueError(
          f"{fault.cause} The {count} rows before it cannot be used either."
        )

  @classmethod
  def find(
    cls, root: str, folder: str, files: set[str], form: Form
  ) -> "Metadata | None":
    """The metadata among `files` of `folder`; None if there is none."""
    found = [name for name in METADATA_FILES if name in files]
    if len(found) > 1:
      raise ValueError(
        f"{os.path.join(root, folder)!r} has both {found[0]} and {found[1]}; "
        "remove one."
      )
    return cls(root, folder, found[0], form) if found else None

  def take(self, path: str) -> list[Texts]:
    """What all rows say that name `path`; empty if none does."""
    return self._rows.pop(path, [0])[1:]

  def take_rest(self, extensions: tuple[str, ...]) -> list[tuple[str, Fault]]:
    """(path, fault) of the rows whose file the walk did not meet."""
    rest, self._nameless = self._nameless, []
    for path, (line, *texts) in self._rows.items():
      full_path = os.path.join(self._root, path)
      cause = f"{self._file}:{line}: {full_path!r} "
      if os.path.exists(full_path):
        cause += (
          "cannot be used: its name starts with a dot, its folder has metadata "
          "of its own, or it does not end in " + ", ".join(extensions) + "."
        )
      else:
        cause += "does not exist."
      rest += [(path, Fault("image", cause))] * len(texts)
    self._rows = {}
    return rest

  def _add(self, folder: str, place: str, line: int, row: Row) -> Fault | None:
    """Notes one row; returns what is wrong with it."""
    full_place = f"{self._file}:{line}"
    if isinstance(row, Fault):
      self._nameless.append((place, row))
      return row
    columns = self._form.file_columns
    path = _row_path(row, columns, self._root, folder, full_place)
    if isinstance(path, Fault):
      self._nameless.append((place, path))
      return path
    texts = self._form.read(row, self._root, folder, full_place)
    self._rows.setdefault(path, [line]).append(texts)
    return texts if isinstance(texts, Fault) else None


def _row_path(
  row: dict[str, Any],
  columns: tuple[str, ...],
  root: str,
  folder: str,
  place: str,
) -> str | Fault:
  """The file that a row names, relative to `root`; `place` is file:line."""
  column = next((name for name in columns if name in row), None)
  name = row.get(column)
  if not isinstance(name, str) or not name:
    named = " or ".join(map(repr, columns))
    return Fault("image", f"{place}: no file name under {named}.")
  path = posixpath.normpath(posixpath.join(folder, name))
  if path.startswith(("/", "../")) or path == "..":
    return Fault(
      "image", f"{place}: {name!r} lies outside the image folder {root!r}."
    )
  return path


def _read_caption(
  row: dict[str, Any], root: str, folder: str, place: str, captions: str
) -> Texts:
  del root, folder
  caption = _row_caption(row, captions, place)
  return caption if isinstance(caption, Fault) else (caption, _row_label(row))


def _read_edit(
  row: dict[str, Any], root: str, folder: str, place: str
) -> Texts:
  source = _row_path(row, SOURCE_COLUMNS, root, folder, place)
  if isinstance(source, Fault):
    return source
  column = next((name for name in INSTRUCTION_COLUMNS if name in row), None)
  if column is None:
    named = " or ".join(map(repr, INSTRUCTION_COLUMNS))
    return Fault("caption", f"{place}: no instruction under {named}.")
  instruction = _row_caption(row, column, place)
  if isinstance(instruction, Fault):
    return instruction
  if not instruction.strip():
    return Fault("caption", f"{place}: {column!r} is empty.")
  return instruction, source


def _row_label(row: dict[str, Any]) -> str:
  """The class of one row as text; "" if it has none."""
  value = row.get(LABEL_COLUMN)
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # how tables write numbers beside missing ones
  if isinstance(value, bool) or not isinstance(value, int | str):
    return ""
  return str(value)


def _row_caption(row: dict[str, Any], captions: str, place: str) -> str | Fault:
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


def _read_csv(
  path: str, file_columns: tuple[str, ...]
) -> Iterator[tuple[int, Row]]:
  """Yields (line number, row) of a comma-separated file with a header."""
  with open(
    path, encoding="utf-8-sig", errors="surrogateescape", newline=""
  ) as file:
    reader = csv.DictReader(file)
    try:
      if not set(file_columns).intersection(reader.fieldnames or ()):
        named = " or ".join(map(repr, file_columns))
        raise ValueError(f"its first line has no column {named}")
      for row in reader:
        yield reader.line_num, row
    except (csv.Error, ValueError) as error:
      # Quoting that is broken here makes nonsense of all that follows.
      raise ValueError(f"{path}:{reader.line_num}: {error}.") from error
