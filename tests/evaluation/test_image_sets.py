"""Sets of images by name: order, sizes, choice, fingerprints, faults."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from psvae_jax.data import quarantine
from psvae_jax.evaluation import image_sets
from psvae_jax.evaluation.image_sets import open_set


def _save(folder, count=10, size=(12, 12), seed=0):
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, *size, 3), np.uint8)
  for i, image in enumerate(images):
    Image.fromarray(image).save(folder / f"{i:02d}.png")
  return images


def _read(images, batch_size=4, first=0):
  batches = list(images.batches(batch_size, first))
  mask = np.concatenate([b["mask"] for b in batches])
  rows = np.concatenate([b["image"] for b in batches])[mask]
  return rows, np.concatenate([b["index"] for b in batches])


def test_a_folder_as_it_is_and_from_the_middle(tmp_path):
  pixels = _save(tmp_path / "a")
  images = open_set(str(tmp_path / "a"))
  assert (len(images), images.size, images.available) == (10, 12, 10)
  rows, index = _read(images)
  np.testing.assert_array_equal(rows, pixels)
  assert list(index) == [*range(10), -1, -1]
  rows, index = _read(images, first=2)
  np.testing.assert_array_equal(rows, pixels[8:])
  assert list(index) == [8, 9, -1, -1]
  assert list(images.batches(4, 3)) == []
  assert images.describe()["images"] == "all 10"
  assert images.describe()["preparation"] == "taken as they are, 12 × 12"


def test_other_sizes_are_cropped_only_if_asked(tmp_path):
  _save(tmp_path / "a", size=(12, 18))
  with pytest.raises(ValueError, match="12 × 18, not square; give --size=N"):
    open_set(str(tmp_path / "a"))
  images = open_set(str(tmp_path / "a"), size=6)
  assert _read(images)[0].shape == (10, 6, 6, 3)
  assert "centre crop" in images.preparation
  _save(tmp_path / "b")
  _save(tmp_path / "b" / "z", count=1, size=(14, 14))
  with pytest.raises(ValueError, match=r"z/00.png is 14 × 14 .* give --size="):
    _read(open_set(str(tmp_path / "b")))


def test_a_choice_is_evenly_spaced(tmp_path):
  pixels = _save(tmp_path / "a")
  images = open_set(str(tmp_path / "a"), count=4)
  np.testing.assert_array_equal(_read(images)[0], pixels[[0, 2, 5, 7]])
  assert images.path(3) == "07.png"
  assert images.describe()["images"] == "4 of 10, evenly spaced"
  with pytest.raises(ValueError, match="has 10 images, 11 were asked for"):
    open_set(str(tmp_path / "a"), count=11)


def test_npz_with_labels(tmp_path):
  pixels = _save(tmp_path / "a")
  path = tmp_path / "a.npz"
  np.savez(path, arr_0=pixels, arr_1=np.arange(10) % 2)
  images = open_set(str(path), count=5)
  np.testing.assert_array_equal(_read(images)[0], pixels[::2])
  assert image_sets.describe_labels(images.labels) == "1 classes, 5 each"
  assert images.path(1).endswith("a.npz/arr_0[2]")


def test_scenes_and_tfds_names():
  images = open_set("scenes", count=3)
  assert images.size == 48 and _read(images)[0].shape == (3, 48, 48, 3)
  assert (
    open_set("scenes:heldout").fingerprint != open_set("scenes").fingerprint
  )
  with pytest.raises(ValueError, match="tfds:BUILDER:SPLIT"):
    open_set("tfds:imagenet2012")


def test_fingerprints_change_with_files_and_choice(tmp_path):
  _save(tmp_path / "a")
  name = str(tmp_path / "a")
  found = [
    open_set(name).fingerprint,
    open_set(name, size=12).fingerprint,
    open_set(name, count=5).fingerprint,
  ]
  assert open_set(name).fingerprint == found[0]
  _save(tmp_path / "a", count=1, size=(12, 13), seed=1)
  found.append(open_set(name, size=12).fingerprint)
  assert len(set(found)) == 4


def test_files_alike_but_for_their_content_are_told_apart(tmp_path):
  """Archives unpack with one time, and as many images are one size."""
  found = set()
  for level in (1, 2):
    path = tmp_path / "made.npz"
    np.savez(path, np.full((4, 12, 12, 3), level, np.uint8))
    os.utime(path, (1e9, 1e9))
    found.add(open_set(str(path)).fingerprint)
  other = tmp_path / "other.npz"
  shutil.copy2(path, other)
  found.add(open_set(str(other)).fingerprint)
  assert len(found) == 3
  folders = [tmp_path / "a", tmp_path / "b"]
  for folder in folders:
    _save(folder)
    for file in folder.iterdir():
      os.utime(file, (1e9, 1e9))
  assert len({open_set(str(folder)).fingerprint for folder in folders}) == 2


def test_broken_files_are_left_out_and_listed(tmp_path):
  pixels = _save(tmp_path / "a")
  (tmp_path / "a" / "03.png").write_bytes(b"no image")
  listed = tmp_path / "out" / "quarantine.jsonl"
  options = dict(max_bad_share=0.1, quarantine_file=listed)
  images = open_set(str(tmp_path / "a"), **options)
  rows, index = _read(images)
  np.testing.assert_array_equal(rows, np.delete(pixels, 3, axis=0))
  assert index[3] == -1
  (entry,) = quarantine.read(listed)
  assert entry["path"] == "03.png"
  (tmp_path / "a" / "07.png").write_bytes(b"")
  with pytest.raises(quarantine.DataError) as error:
    _read(open_set(str(tmp_path / "a"), **options))
  said = image_sets.explain_quarantine(error.value)
  assert "--max_bad_share=0.1 allows 1" in said and "config" not in said


def test_what_is_no_set_of_images(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    open_set(str(tmp_path / "none"))
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="No images in"):
    open_set(str(tmp_path / "empty"))
  (tmp_path / "a.png").write_bytes(b"")
  with pytest.raises(ValueError, match="is a file; give a folder"):
    open_set(str(tmp_path / "a.png"))


def test_captions_and_labels_of_a_folder(tmp_path):
  for name in ("dog", "cat"):
    _save(tmp_path / "a" / name, count=2)
  images = open_set(str(tmp_path / "a"))
  assert list(images.labels) == [0, 0, 1, 1]
  assert image_sets.describe_labels(images.labels) == "2 classes, 2 each"
  assert image_sets.describe_labels(np.array([1, 0, 1])) == (
    "2 classes, 1 to 2 each"
  )
  assert image_sets.describe_labels(None) == ""
  assert images.caption(3) == "dog"


@pytest.mark.parametrize(
  "paths, found",
  [
    (["10.png", "2.png"], ("10.png", "2.png")),
    (["a-1.png", "a-10.png", "a-2.png"], ("a-10.png", "a-2.png")),
    (["01.png", "02.png", "10.png"], None),
    (["a2.png", "b1.png"], None),
    (["2.png", "x.png"], None),
  ],
)
def test_numbers_that_sort_otherwise(paths, found):
  assert image_sets.numbered_out_of_order(paths) == found
