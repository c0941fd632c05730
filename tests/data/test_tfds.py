"""A small builder, written here, read as ImageNet would be."""

import errno
import importlib.util
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_cache

from psvae_jax.config import ConfigError, DataConfig
from psvae_jax.data import pipeline, quarantine, sources, tfds_images, views

pytest.importorskip("array_record")
_PATH = pathlib.Path(__file__).with_name("tiny_tfds.py")
_SPEC = importlib.util.spec_from_file_location("tiny_tfds", _PATH)
tiny_tfds = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_tfds)
NAME = "tiny_pictures"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The data set as its builder writes it; not to be changed."""
  root = tmp_path_factory.mktemp("tfds")
  tiny_tfds.prepare(root)
  return root


@pytest.fixture
def copy(prepared, tmp_path):
  """A copy that may be damaged; (data_dir, folder of the files)."""
  shutil.copytree(prepared, tmp_path / "data")
  return tmp_path / "data", tmp_path / "data" / NAME / "1.0.0"


def source_of(root, split="train", **options):
  return tfds_images.TfdsSource(NAME, split, data_dir=str(root), **options)


def number_of(root, split="train", **options) -> list[int]:
  """Record's place in the source → number that the builder gave it."""
  source = source_of(root, split, captions="file_name", **options)
  return [int(source[i]["caption"].split("_")[1]) for i in range(len(source))]


def test_every_record_with_its_picture_and_class(prepared):
  for split, size in tiny_tfds.SIZES.items():
    source = source_of(prepared, split)
    numbers = number_of(prepared, split)
    assert len(source) == size and sorted(numbers) == list(range(size))
    for index, number in enumerate(numbers):
      element = source[index]
      assert set(element) == {"image", "caption", "label", "index", "path"}
      np.testing.assert_array_equal(
        element["image"], tiny_tfds.picture(split, number)
      )
      name = tiny_tfds.NAMES[number % 3].replace("_", " ")
      assert element["caption"] == name
      assert element["label"] == number % 3
      assert isinstance(element["label"], np.int64)
      assert element["index"] == index
      assert isinstance(element["index"], np.int64)
      assert element["path"] == f"{NAME}/{split}/{index}"
  for index in (-1, size):
    with pytest.raises(IndexError):
      source[index]


def test_parts_of_splits_and_limits(prepared):
  assert len(source_of(prepared, "train[:25%]")) == 10
  assert len(source_of(prepared, "train+validation")) == 46
  some = source_of(prepared, limit=7)
  places = [0, 5, 11, 17, 22, 28, 34]
  assert len(some) == 7 and len(source_of(prepared, limit=99)) == 40
  assert [some.path(i) for i in range(7)] == [
    f"{NAME}/train/{place}" for place in places
  ]
  whole = source_of(prepared)
  for index, place in enumerate(places):
    element = some[index]
    assert element["index"] == index
    np.testing.assert_array_equal(element["image"], whole[place]["image"])


def test_copy_and_name(prepared):
  source = source_of(prepared, limit=7)
  copied = pickle.loads(pickle.dumps(source))
  assert repr(copied) == repr(source)
  assert repr(source) == "TfdsSource('tiny_pictures', 'train', length=7)"
  np.testing.assert_array_equal(copied[3]["image"], source[3]["image"])
  assert len(pickle.dumps(source)) < 1000


def test_through_the_config_and_the_pipeline(prepared, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  config = DataConfig(
    source="tfds",
    builder=NAME,
    root=str(prepared),
    augment="center",
    num_eval=4,
  )
  source = sources.make_source(config, "train", 4, file)
  iterator = pipeline.train_iterator(
    source,
    image_size=4,
    batch_size=8,
    seed=0,
    augment="center",
    num_threads=3,
  )
  batches = [next(iterator) for _ in range(5)]
  seen = np.concatenate([batch["index"] for batch in batches])
  assert sorted(seen) == list(range(40))
  labels = np.concatenate([batch["label"] for batch in batches])
  assert labels.dtype == np.int64 and source.num_classes == 3
  for index, label in zip(seen, labels, strict=True):
    assert source[int(index)]["label"] == label
  validation = sources.make_source(config, "validation", 4, file)
  assert len(validation) == 4
  batches = list(pipeline.eval_batches(validation, image_size=4, batch_size=3))
  assert [b["mask"].sum() for b in batches] == [3, 1]
  assert not file.exists()


_WITHOUT_TENSORFLOW = """
import importlib.machinery
import sys

class TensorFlow:  # can be found, so that who could use it would
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == "tensorflow":
      return importlib.machinery.ModuleSpec(name, self)

  def create_module(self, spec):
    raise SystemExit("TensorFlow was imported")

  def exec_module(self, module):
    raise SystemExit("TensorFlow was imported")

sys.meta_path.insert(0, TensorFlow())
from psvae_jax.config import DataConfig
from psvae_jax.data import pipeline, sources
assert "tensorflow_datasets" not in sys.modules  # only where it is asked for
config = DataConfig(source="tfds", builder="tiny_pictures", root=sys.argv[1])
source = sources.make_source(config, "train", 4)
batches = pipeline.train_iterator(
  source, image_size=4, batch_size=8, seed=0, augment="crop"
)
assert next(batches)["image"].shape == (8, 4, 4, 3)
assert source[3]["caption"] in ("tabby cat", "dog", "great white shark")
assert "tensorflow" not in sys.modules
"""


def test_without_tensorflow(prepared):
  subprocess.run(
    [sys.executable, "-c", _WITHOUT_TENSORFLOW, str(prepared)], check=True
  )


# Captions and classes.


def test_captions_by_name(prepared):
  source = source_of(prepared, captions="none")
  assert source[0]["caption"] == ""
  source = source_of(prepared, captions="label")
  assert source[0]["caption"] in ("tabby cat", "dog", "great white shark")
  with pytest.raises(ValueError, match="'text' is no .* there are .*label"):
    source_of(prepared, captions="text")
  with pytest.raises(ValueError, match="'unused' is no text or class"):
    source_of(prepared, captions="unused")


def test_text_goes_before_classes_and_broken_text_is_a_bad_record(tmp_path):
  text = tiny_tfds.tfds.features.Text()

  def caption(number):
    return b"\xff\xfe" if number == 5 else f"cliché {number}"

  tiny_tfds.prepare(tmp_path, extra={"caption": (text, caption)})
  source = source_of(tmp_path)
  numbers = number_of(tmp_path)
  bad = numbers.index(5)
  good = bad - 1
  assert source[good]["caption"] == f"cliché {numbers[good]}"
  with pytest.raises(quarantine.CaptionError, match=f"train/{bad}.*UTF-8"):
    source[bad]


def test_builder_without_captions(tmp_path):
  tiny_tfds.prepare(tmp_path, drop=("label",))
  source = source_of(tmp_path)
  assert source[0]["caption"] == ""
  assert "label" not in source[0] and source.num_classes == 0


def test_the_class_that_captions_name_counts(tmp_path):
  coarse = tiny_tfds.tfds.features.ClassLabel(names=("pet", "fish"))

  def make(number):
    return -1 if number == 7 else int(number % 3 == 2)

  tiny_tfds.prepare(tmp_path, extra={"coarse": (coarse, make)})
  assert source_of(tmp_path).num_classes == 3
  source = source_of(tmp_path, captions="coarse")
  assert source.num_classes == 2
  for index, number in enumerate(number_of(tmp_path)):
    element = source[index]
    assert element["label"] == make(number)
    assert element["caption"] == ("pet", "fish", "")[make(number)]


def test_class_numbers_outside_the_classes(prepared):
  feature = tiny_tfds.tfds.features.ClassLabel(names=tiny_tfds.NAMES)
  name = tfds_images._class_name
  assert name(2, feature, "p") == "great white shark"
  assert name(-1, feature, "p") == ""  # a test split without classes
  for value in (3, -2, None):
    with pytest.raises(quarantine.CaptionError, match="there are 3 classes"):
      name(value, feature, "place")


def test_classes_of_the_generator(prepared, tmp_path):
  config = DataConfig(source="tfds", builder=NAME, root=str(prepared))
  source = sources.make_source(config, "train", 4)
  for enough in (3, 4):
    sources.check_classes(source, enough)
  with pytest.raises(ConfigError, match=r"=2 is too small.* 3 classes.*=3$"):
    sources.check_classes(source, 2)
  tiny_tfds.prepare(tmp_path, drop=("label",))
  config = DataConfig(source="tfds", builder=NAME, root=str(tmp_path))
  with pytest.raises(ConfigError, match="needs classes, which .* has not"):
    sources.check_classes(sources.make_source(config, "train", 4), 3)


def test_classes_through_views_and_the_cache(prepared, tmp_path):
  config = DataConfig(source="tfds", builder=NAME, root=str(prepared))
  source = sources.make_source(config, "train", 4)
  viewed = views.ViewedSource(
    source,
    image_size=tiny_cache.SIZE,
    augment="crop",
    views=2,
    num_examples=9,
  )
  encoders = tiny_cache.encoders(
    text=None, tokenizer="", text_length=0, text_encoder=""
  )
  cached = tiny_cache.write(tmp_path / "cache", viewed, encoders)
  batch = next(
    pipeline.train_iterator(cached, batch_size=18, seed=0, num_threads=0)
  )
  assert set(batch) == {"latent", "index", "label"}
  wanted = [source[int(index)]["label"] for index in batch["index"]]
  np.testing.assert_array_equal(batch["label"], wanted)
  assert len(set(wanted)) == 3


# Faults.


def test_damaged_images_are_bad_records(tmp_path):
  whole = tiny_tfds.encode(tiny_tfds.picture("train", 0))
  damage = {4: b"", 9: whole[:50], 13: b"<html>"}
  tiny_tfds.prepare(tmp_path, damage=damage)
  bad = {}
  source = source_of(tmp_path)
  for index in range(40):
    try:
      source[index]
    except ValueError as error:
      assert f"{NAME}/train/{index}: " in str(error)
      bad[index] = str(error)
  assert len(bad) == 3
  file = tmp_path / "quarantine.jsonl"
  config = DataConfig(
    source="tfds", builder=NAME, root=str(tmp_path), max_bad_share=0.1
  )
  guarded = sources.make_source(config, "train", 4, file)
  for index in range(40):
    element = guarded[index]
    assert (element["index"] == index) == (index not in bad)
  assert {entry["index"] for entry in quarantine.read(file)} == set(bad)
  assert {entry["source"] for entry in quarantine.read(file)} == {NAME}


def shards(folder) -> list[pathlib.Path]:
  return sorted(folder.glob(f"{NAME}-train.array_record-*"))


def flip(path) -> None:
  data = bytearray(path.read_bytes())
  for place in range(200, 4000, 50):
    data[place] ^= 255
  path.write_bytes(data)


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(path.read_bytes()[:1000]),
    lambda path: path.write_bytes(b""),
    lambda path: path.unlink(),
    flip,
  ],
)
def test_damaged_shard_costs_its_own_records_only(copy, tmp_path, damage):
  root, folder = copy
  file = tmp_path / "quarantine.jsonl"
  damage(shards(folder)[1])
  config = DataConfig(
    source="tfds", builder=NAME, root=str(root), max_bad_share=0.5
  )
  source = sources.make_source(config, "train", 4, file)
  used = [int(source[i]["index"]) for i in range(40)]
  bad = [i for i in range(40) if used[i] != i]
  assert 3 <= len(bad) <= 15 and bad == list(range(bad[0], bad[0] + len(bad)))
  assert {entry["index"] for entry in quarantine.read(file)} == set(bad)
  with pytest.raises(quarantine.DataError, match="allows 0"):
    tight = DataConfig(
      source="tfds", builder=NAME, root=str(root), max_bad_share=0
    )
    sources.make_source(tight, "train", 4)[bad[0]]


def test_too_many_open_files_are_no_fault_of_the_record(prepared, tmp_path):
  """The reader says so in a plain RuntimeError."""
  resource = pytest.importorskip("resource")
  file = tmp_path / "quarantine.jsonl"
  config = DataConfig(source="tfds", builder=NAME, root=str(prepared))
  source = sources.make_source(config, "train", 4, file)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  with open(tmp_path / "highest", "w") as highest:
    resource.setrlimit(
      resource.RLIMIT_NOFILE, (highest.fileno() + 1, limits[1])
    )
    taken = []
    try:
      with pytest.raises(OSError, match="Too many open files"):
        while True:
          taken.append(open(os.devnull))
      with pytest.raises(OSError, match=f"Too many.*{NAME}/train/0") as raised:
        source[0]
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, limits)
      for each in taken:
        each.close()
  assert raised.value.errno == errno.EMFILE
  assert len(source.quarantine) == 0 and not file.exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "x")])
def test_shortages_are_no_fault_of_the_record(prepared, monkeypatch, error):
  source = source_of(prepared)

  class Records:
    def __len__(self):
      return 40

    def __getitem__(self, index):
      raise error

  monkeypatch.setattr(source, "_records", Records())
  with pytest.raises(type(error)):
    source[0]


def test_vanished_data_set_ends_quickly(copy):
  root, _ = copy
  config = DataConfig(source="tfds", builder=NAME, root=str(root))
  source = sources.make_source(config, "train", 4)
  shutil.rmtree(root)
  with pytest.raises(quarantine.DataError, match="disk or its mount is gone"):
    source[0]


@pytest.mark.parametrize(
  "name, split, error, message",
  [
    ("tiny_picture", "train", ValueError, "did you mean 'tiny_pictures'"),
    ("imagenet2021", "train", ValueError, "did you mean 'imagenet2012'"),
    ("tiny_pictures:9.9.9", "train", ValueError, "builder or version"),
    ("tiny pictures", "train", ValueError, "cannot open data.builder"),
    ("tiny_pictures", "tran", ValueError, "did you mean 'train'.*validation"),
    ("tiny_pictures", "train[:", ValueError, "it has train, validation"),
    ("tiny_pictures", "train[:0]", ValueError, "no records|it has train"),
    (
      "imagenet2012",
      "train",
      FileNotFoundError,
      "not prepared in .*tfds build imagenet2012 .*file_format=array_record",
    ),
  ],
)
def test_mistakes_name_what_was_meant(prepared, name, split, error, message):
  with pytest.raises(error, match=message) as raised:
    tfds_images.TfdsSource(name, split, data_dir=str(prepared))
  assert len(str(raised.value)) < 600  # not the list of all builders


def test_other_version_is_named(prepared, tmp_path):
  old = tmp_path / "imagenet2012" / "5.0.0"
  old.mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match=r"only in 5\.0\.0 \(give one"):
    tfds_images.TfdsSource("imagenet2012", "train", data_dir=str(tmp_path))


def test_format_without_random_access(copy):
  root, folder = copy
  info = json.loads((folder / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match="tfrecord format.*array_record"):
    source_of(root)


def test_no_image_or_no_picture(tmp_path):
  features = tiny_tfds.tfds.features
  with pytest.raises(
    ValueError, match="no feature 'image'.* it has file_name, label, unused"
  ):
    tiny_tfds.prepare(tmp_path / "a", drop=("image",))
    source_of(tmp_path / "a")
  depth = features.Image(shape=(None, None, 1), dtype=np.float32)
  with pytest.raises(ValueError, match="images are floats"):
    tfds_images._select_features(
      tiny_tfds.tfds, features.FeaturesDict({"image": depth}), None
    )


def test_not_installed(prepared, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
    source_of(prepared)
