"""A folder of instruction edits as a random-access source.

Hugging Face's `imagefolder` with several images a row: `metadata.jsonl` or
`metadata.csv` has

* `file_name` (or `target_file_name`, `output_file_name`): the edited image;
* `source_file_name` (or `input_file_name`): the image to be edited;
* `instruction` (or `edit_prompt`): what was done.

    {"file_name": "after/1.jpg", "source_file_name": "before/1.jpg",
     "instruction": "make the door red"}

Paths are relative to the metadata's folder; see `folder` for the rest. One
image may be the source of several edits, and two edits may have one result.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from psvae_jax.data import images
from psvae_jax.data.folder import FolderListing, Scan
from psvae_jax.data.folder_metadata import (
  METADATA_FILES,
  SOURCE_COLUMNS,
  edit_form,
)

# Images may be read from the same folder; their faults are not the edits'.
SUFFIX = " (edits)"


class EditFolderSource(FolderListing):
  """Edits of a folder, in `scenes.EditSource`'s names.

  An element is {"source", "target": uint8 (H, W, 3) of one size, any,
  "instruction": str, "index": np.int64, "path": str, the target's}.

  Args:
    root, max_pixels, gone: see `FolderListing`; paths are the targets'.

  Attributes:
    root, faults: see `FolderListing`.

  Raises:
    FileNotFoundError, ValueError: as `FolderListing`, or there is no metadata.
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    *,
    max_pixels: int = images.MAX_PIXELS,
    gone: Iterable[str] = (),
  ):
    super().__init__(root, edit_form(), max_pixels, gone)

  def _note(self, scan: Scan) -> None:
    if not scan.has_metadata:
      raise ValueError(
        f"The folder of edits {self.root!r} has neither "
        + " nor ".join(METADATA_FILES)
        + f"; its rows name 'file_name', {SOURCE_COLUMNS[0]!r} and "
        "'instruction'."
      )

  @property
  def name(self) -> str:
    """What to call the source."""
    return self.root + SUFFIX

  def origin(self, index: int) -> str:
    """Path of the image to be edited; the target's where none is known."""
    return self._others[index] or self.path(index)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads and decodes both images of one edit.

    Raises:
      IndexError: there is no such edit.
      quarantine.CaptionError: its instruction is broken.
      ValueError, OSError: an image is, or they differ in size; the message
        names the file.
    """
    path = self._usable_path(index)
    source_path = self._others[index]
    target, source = self._read_image(path), self._read_image(source_path)
    if source.shape != target.shape:
      sizes = [
        f"{name} is {image.shape[0]} × {image.shape[1]}"
        for name, image in ((source_path, source), (path, target))
      ]
      raise ValueError(
        f"An edit's images must have one size, but {' and '.join(sizes)} "
        "pixels (height × width)."
      )
    return {
      "source": source,
      "target": target,
      "instruction": self._texts[index],
      "index": np.int64(index),
      "path": path,
    }
