"""scikit-image's photographs, and the choice of a source by name."""

import pickle

import numpy as np
import pytest

from psvae_jax.data import bundled, folder, scenes, sources


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pictures_are_colour_photographs(split):
  source = bundled.BundledSource(split)
  assert len(source) >= 3
  for index, element in enumerate(source):
    image = element["image"]
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert min(image.shape[:2]) >= 256  # fills the product's 256 × 256
    assert image.std() > 10 and (image[..., 0] != image[..., 2]).any()
    assert element["index"] == index
    assert isinstance(element["index"], np.int64)
    assert isinstance(element["caption"], str) and element["caption"]


def test_splits_share_no_picture():
  splits = [
    {element["path"] for element in bundled.BundledSource(split)}
    for split in ("train", "validation")
  ]
  assert not splits[0] & splits[1]


def test_known_picture():
  source = bundled.BundledSource("validation")
  (coffee,) = [e for e in source if e["path"] == "coffee.png"]
  assert coffee["image"].shape == (400, 600, 3)
  np.testing.assert_array_equal(coffee["image"][0, 0], [21, 13, 8])


def test_length_repeats_the_pictures():
  count = len(bundled.BundledSource("train"))
  source = bundled.BundledSource("train", length=2 * count + 1)
  assert len(source) == 2 * count + 1
  assert source[0]["path"] == source[2 * count]["path"]
  assert source[2 * count]["index"] == 2 * count
  with pytest.raises(IndexError):
    source[2 * count + 1]


def test_repr_and_copy():
  source = bundled.BundledSource("train", length=7)
  assert repr(source) == "BundledSource(split='train', length=7)"
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])
  assert len(pickle.dumps(source)) < 2000  # names, not pixels


def test_bad_settings():
  with pytest.raises(ValueError, match="'test'; there are train, validation"):
    bundled.BundledSource("test")
  with pytest.raises(ValueError, match="at least 1"):
    bundled.BundledSource("train", length=0)


def test_missing_scikit_image(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
    bundled.BundledSource("train")


def test_make_source_scenes():
  config = sources.DataConfig(num_train=9, num_eval=4, seed=5)
  train = sources.make_source(config, "train", 32)
  assert isinstance(train, scenes.SceneSource) and len(train) == 9
  assert train[0]["image"].shape == (32, 32, 3)
  validation = sources.make_source(config, "validation", 32)
  assert len(validation) == 4
  assert (train[0]["image"] != validation[0]["image"]).any()
  other_seed = sources.make_source(
    sources.DataConfig(num_train=9, seed=6), "train", 32
  )
  assert (train[0]["image"] != other_seed[0]["image"]).any()
  default = sources.make_source(sources.DataConfig(), "train", 32)
  assert len(default) >= 100_000


def test_make_source_bundled_and_folder(tmp_path):
  config = sources.DataConfig(source="bundled", num_train=50)
  assert len(sources.make_source(config, "train", 32)) == 50
  assert len(sources.make_source(config, "validation", 32)) == 3
  (tmp_path / "a.png").write_bytes(b"")
  (tmp_path / "b.png").write_bytes(b"")
  config = sources.DataConfig(source="folder", root=str(tmp_path))
  source = sources.make_source(config, "train", 32)
  assert isinstance(source.source, folder.FolderSource)


def test_unknown_split():
  with pytest.raises(ValueError, match="'test'; there are train, validation"):
    sources.make_source(sources.DataConfig(), "test", 32)
