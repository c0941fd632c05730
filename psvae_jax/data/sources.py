"""Names in a config → sources: which data, and which part of it."""

import hashlib
import os

import numpy as np

from psvae_jax.config import DataConfig
from psvae_jax.data import (
  bundled,
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
  if split not in SPLITS:
    raise ValueError(
      f"Unknown split {split!r}; there are " + ", ".join(SPLITS) + "."
    )
  limit = config.num_train if split == "train" else config.num_eval
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


def _folder_source(
  config: DataConfig,
  split: str,
  limit: int,
  quarantine_file: str | os.PathLike[str] | None,
) -> folder.FolderSource:
  """One split of a folder: the whole of it, or its side of the hold-out."""
  own_root = config.eval_root if split == "validation" else ""
  root = own_root or config.root
  # A file that an earlier run found broken and that was then removed must not
  # move all that follow it. Of either split: the hold-out depends on both.
  known = [] if quarantine_file is None else quarantine.read(quarantine_file)
  source = folder.FolderSource(
    root,
    captions=config.captions,
    gone=[entry["path"] for entry in known if entry["source"] == root],
  )
  keys = np.array([_hash(source.path(i)) for i in range(len(source))])
  keep = np.ones(len(source), bool)
  if not config.eval_root:
    # An example's side depends on its own path only, so that it stays where
    # it is when files are added. The smallest key is always held out, so that
    # a small folder has validation too (there, a new file may take its place).
    held_out = (keys < HOLDOUT) | (keys == keys.min())
    keep = held_out if split == "validation" else ~held_out
    if not keep.any():
      raise ValueError(
        f"{source!r} is too small to be split into train and validation; "
        "set data.eval_root to a second folder."
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
