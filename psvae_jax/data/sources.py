"""Names in a config → sources: which data, and which part of it."""

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from psvae_jax.config import ConfigError, DataConfig
from psvae_jax.data import (
  bundled,
  edit_folder,
  folder,
  guarded,
  pipeline,
  quarantine,
  scenes,
  tfds_images,
)

SPLITS = ("train", "validation")

# Share of a folder that is held out when it has no validation folder.
HOLDOUT = 0.05

# Lengths for sources that are generated and so have none of their own.
_GENERATED = {"train": 1_000_000, "validation": 2_000}
_BUNDLED_TRAIN = 10_000

_Listing = TypeVar("_Listing", bound=folder.FolderListing)


def make_source(
  config: DataConfig,
  split: str,
  image_size: int,
  quarantine_file: str | os.PathLike[str] | None = None,
) -> pipeline.Source:
  """The source of one split.

  Args:
    config: which data.
    split: "train" or "validation"; they share no image.
    image_size: height and width at which scenes are drawn, pixels. Other
      sources keep the size of their files.
    quarantine_file: `quarantine.jsonl` of the run, where records of folders
      and data sets that cannot be used are named. An earlier run's may be
      there. None counts and logs them only.

  Returns:
    A random-access source of {"image", "caption", "index", …}. Folders and
    data sets are a `guarded.GuardedSource`.

  Raises:
    ValueError: unknown split, a split without images, or more metadata rows
      that cannot be used than `config.max_bad_share` allows.
    FileNotFoundError: a folder or a file that is missing.
  """
  limit = _limit(config, split)
  if config.source == "scenes":
    return scenes.SceneSource(
      split,
      limit or _GENERATED[split],
      image_size,
      config.seed,
      config.caption_variants,
    )
  if config.source == "bundled":
    default = _BUNDLED_TRAIN if split == "train" else None
    return bundled.BundledSource(split, length=limit or default)
  if config.source == "tfds":
    source = tfds_images.TfdsSource(
      config.builder,
      config.split if split == "train" else config.eval_split,
      data_dir=config.root,
      captions=config.captions,
      limit=limit,
    )
  else:
    source = _folder_source(config, split, limit, quarantine_file)
  return guarded.GuardedSource(
    source,
    split=split,
    max_bad_share=config.max_bad_share,
    file=quarantine_file,
  )


def make_edit_source(
  config: DataConfig,
  split: str,
  image_size: int,
  quarantine_file: str | os.PathLike[str] | None = None,
) -> scenes.EditSource | guarded.GuardedSource:
  """Instruction edits of one split: scenes', or those of `config.edits`.

  Args:
    config, split, image_size, quarantine_file: as `make_source`.

  Returns:
    A random-access source of {"source", "target", "instruction", "index", …}.

  Raises:
    ValueError, FileNotFoundError: as `make_source`.
  """
  limit = _limit(config, split)
  if not config.edits:
    length = limit or _GENERATED[split]
    return scenes.EditSource(split, length, image_size, config.seed)
  source = _one_side(
    config.edits,
    config.eval_edits,
    split,
    limit,
    lambda root: edit_folder.EditFolderSource(
      root, gone=_known(quarantine_file, f"{root}{edit_folder.SUFFIX}")
    ),
  )
  return guarded.GuardedSource(
    source,
    split=split,
    max_bad_share=config.max_bad_share,
    file=quarantine_file,
  )


def check_classes(source: pipeline.Source, num_classes: int) -> None:
  """Checks that a class-conditional generator can learn from a source.

  Args:
    source: what `make_source` returns.
    num_classes: `config.model.num_classes`.

  Raises:
    ConfigError: it has no classes, or more than the generator.
  """
  found = getattr(source, "num_classes", 0)
  if not found:
    raise ConfigError(
      f"config.model.condition='class' needs classes, which {source!r} has "
      "not: take a builder with a class feature 'label', or a folder with one "
      "sub-folder a class or a metadata column 'label'"
    )
  if found > num_classes:
    raise ConfigError(
      f"config.model.num_classes={num_classes} is too small: {source!r} has "
      f"{found} classes; set --config.model.num_classes={found}"
    )


def _limit(config: DataConfig, split: str) -> int:
  if split not in SPLITS:
    raise ValueError(
      f"Unknown split {split!r}; there are " + ", ".join(SPLITS) + "."
    )
  return config.num_train if split == "train" else config.num_eval


def _folder_source(
  config: DataConfig,
  split: str,
  limit: int,
  quarantine_file: str | os.PathLike[str] | None,
) -> folder.FolderSource:
  """One split of a folder, with the classes of its training split."""

  def open_folder(root: str) -> folder.FolderSource:
    gone = _known(quarantine_file, root)
    return folder.FolderSource(root, captions=config.captions, gone=gone)

  source = _one_side(config.root, config.eval_root, split, limit, open_folder)
  if source.root != config.root and source.may_have_classes:
    # Of other folders beside it, a class would have another number.
    source = source.with_classes_of(open_folder(config.root))
  return source


def _known(
  quarantine_file: str | os.PathLike[str] | None, source: str
) -> Iterable[str]:
  """Paths that an earlier run found broken in a source.

  A file that was then removed must not move all that follow it. Of either
  split: the hold-out depends on both.
  """
  known = [] if quarantine_file is None else quarantine.read(quarantine_file)
  return [entry["path"] for entry in known if entry["source"] == source]


def _one_side(
  root: str,
  eval_root: str,
  split: str,
  limit: int,
  open_folder: Callable[[str], _Listing],
) -> _Listing:
  """One split of a folder: the whole of it, or its side of the hold-out."""
  own_root = eval_root if split == "validation" else ""
  source = open_folder(own_root or root)
  keys = np.array([_hash(source.origin(i)) for i in range(len(source))])
  keep = np.ones(len(source), bool)
  if not eval_root:
    # An example's side depends on its own file only, so that it stays where
    # it is when files are added. The smallest key is always held out, so that
    # a small folder has validation too (there, a new file may take its place).
    held_out = (keys < HOLDOUT) | (keys == keys.min())
    keep = held_out if split == "validation" else ~held_out
    if not keep.any():
      raise ValueError(
        f"{source!r} is too small to be split into train and validation; "
        "give validation a folder of its own: data.eval_root for images, "
        "data.eval_edits for edits."
      )
  indices = np.flatnonzero(keep)
  if limit:
    # The smallest keys: a sample of all sub-folders, not the first few.
    by_key = np.argsort(keys[indices], kind="stable")
    indices = np.sort(indices[by_key[:limit]])
  return source if len(indices) == len(source) else source.select(indices)


def _hash(path: str) -> float:
  """A number in [0, 1) that is fixed by `path` on every machine."""
  data = path.encode("utf-8", "surrogatepass")
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, "little") / 2**64
