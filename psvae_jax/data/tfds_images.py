"""A prepared TensorFlow Datasets builder, read without TensorFlow.

Any builder with an `image` feature, ImageNet for one, that was prepared in the
array_record format, which alone has random access. Images are decoded by
`images.decode_image`, like those of a folder.
"""

import difflib
import errno
import os
import pathlib
from typing import Any

import numpy as np

from psvae_jax.data import class_labels, images, quarantine

IMAGE = "image"
TEXT_FEATURES = ("caption", "text")
LABEL_FEATURE = "label"

# What the machine lacks, as the system words it: the readers give no number.
_SHORTAGES = {
  os.strerror(code): code for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
}


class TfdsSource:
  """Images and captions of one split of a builder.

  An element is {"image": uint8 (H, W, 3) of any size, "caption": str ("" if
  there is none), "index": np.int64, "path": str, "builder/split/index"}, and
  of a builder with classes "label": np.int64 (−1 where it is not known). The
  class is the feature that `captions` names, if that is one, else `label`.

  Attributes:
    name: name of the builder.
    num_classes: labels lie in [0, num_classes); 0 without classes.
    faults: always empty; see `guarded.FallibleSource`.
  """

  def __init__(
    self,
    builder: str,
    split: str,
    *,
    data_dir: str = "",
    captions: str = "auto",
    limit: int = 0,
    max_pixels: int = images.MAX_PIXELS,
  ):
    """Opens the data set; no record is read.

    Args:
      builder: its name, as `tfds.builder` takes it: "imagenet2012",
        "cifar10:3.0.2", "oxford_flowers102".
      split: one of its splits, or a part as TensorFlow Datasets writes it:
        "train[:95%]".
      data_dir: where it was prepared; "" is ~/tensorflow_datasets.
      captions: "auto" (a text feature `caption` or `text`; else the name of
        class `label`, with spaces for underscores; else none), "none", or the
        name of a text or class feature.
      limit: take so many records, evenly spaced; 0 takes all.
      max_pixels: larger images are refused when they are read.

    Raises:
      ValueError: unknown builder, split or caption feature, no image feature,
        data that were not prepared for random access, or no TensorFlow
        Datasets installed.
      FileNotFoundError: the builder was not prepared in `data_dir`.
    """
    self.name = builder
    self.faults: dict[int, quarantine.Fault] = {}
    self._arguments = {
      "builder": builder,
      "split": split,
      "data_dir": data_dir,
      "captions": captions,
      "limit": limit,
      "max_pixels": max_pixels,
    }
    self._split, self._max_pixels = split, max_pixels
    tfds = _import_tfds()
    found = _open_builder(tfds, builder, data_dir)
    self._folder = pathlib.Path(found.data_path)
    self._records = _open_split(tfds, found, builder, split)
    features = found.info.features
    self._caption = _caption_feature(tfds, features, captions)
    self._label = _label_feature(tfds, features, self._caption)
    self._features = _select_features(
      tfds, features, self._caption, self._label
    )
    self.num_classes = 0
    if self._label is not None:
      self.num_classes = self._features[self._label].num_classes
    self._decoders = {IMAGE: tfds.decode.SkipDecoding()}
    total = len(self._records)
    self._length = min(limit or total, total)
    if not total:
      raise ValueError(f"Split {split!r} of {builder!r} has no records.")

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads and decodes one record.

    Raises:
      IndexError: there is no such record.
      quarantine.CaptionError: its caption cannot be used.
      ValueError: its image cannot; the message names the record.
      OSError, MemoryError: the machine lacks files or memory.
    """
    path = self.path(index)
    try:
      record = self._records[self._record(index)]
      values = self._features.deserialize_example_np(
        record, decoders=self._decoders
      )
    # The readers raise their own types and plain RuntimeErrors for a file
    # that is missing, cut off or damaged.
    except (MemoryError, OSError):
      raise
    except Exception as error:
      for words, code in _SHORTAGES.items():
        if words in str(error):
          raise OSError(code, words, path) from error
      raise ValueError(
        f"{path}: cannot read the record ({error or type(error).__name__})."
      ) from error
    data = values[IMAGE]
    if not isinstance(data, bytes):
      raise ValueError(f"{path}: the record holds no image.")
    image = images.decode_image(data, name=path, max_pixels=self._max_pixels)
    element = {
      "image": image,
      "caption": self._read_caption(values, path),
      "index": np.int64(index),
      "path": path,
    }
    if self._label is not None:
      element["label"] = self._read_label(values, path)
    return element

  def __repr__(self) -> str:
    return f"TfdsSource({self.name!r}, {self._split!r}, length={self._length})"

  def __getstate__(self) -> dict[str, Any]:
    return self._arguments

  def __setstate__(self, arguments: dict[str, Any]) -> None:
    self.__init__(**arguments)  # open files do not travel

  def path(self, index: int) -> str:
    """What to call one record; its number is the one in the whole split."""
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} is outside [0, {self._length})")
    return f"{self.name}/{self._split}/{self._record(index)}"

  def is_available(self) -> bool:
    """Whether the data set's folder is there."""
    return self._folder.is_dir()

  def _record(self, index: int) -> int:
    return index * len(self._records) // self._length

  def _read_caption(self, values: dict[str, Any], path: str) -> str:
    if self._caption is None:
      return ""
    value, feature = values[self._caption], self._features[self._caption]
    if hasattr(feature, "int2str"):
      return _class_name(value, feature, f"{path}: {self._caption!r}")
    try:
      return value.decode() if isinstance(value, bytes) else str(value or "")
    except UnicodeDecodeError as error:
      raise quarantine.CaptionError(
        f"{path}: {self._caption!r} is not valid UTF-8 ({error})."
      ) from error

  def _read_label(self, values: dict[str, Any], path: str) -> np.int64:
    name = self._label
    place = f"{path}: {name!r}"
    return np.int64(_class_number(values[name], self._features[name], place))


def _class_number(value: Any, feature: Any, place: str) -> int:
  """A record's class; `class_labels.UNKNOWN` as test splits have it."""
  if value is None or not (
    0 <= value < feature.num_classes or value == class_labels.UNKNOWN
  ):
    raise quarantine.CaptionError(
      f"{place} is {value}; there are {feature.num_classes} classes."
    )
  return int(value)


def _class_name(value: Any, feature: Any, place: str) -> str:
  number = _class_number(value, feature, place)
  if number == class_labels.UNKNOWN:
    return ""
  return feature.int2str(number).replace("_", " ")


def _import_tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ValueError(
      "data.source='tfds' needs TensorFlow Datasets (without TensorFlow): "
      f"pip install tensorflow-datasets array_record ({error})."
    ) from error
  return tfds


def _how_to_prepare(name: str, data_dir: str) -> str:
  place = data_dir or "~/tensorflow_datasets"
  return (
    "Prepare it once (for this, some builders need TensorFlow): "
    f"tfds build {name} --data_dir={place} --file_format=array_record"
  )


def _open_builder(tfds: Any, name: str, data_dir: str) -> Any:
  """The builder, which has been prepared."""
  try:
    found = tfds.builder(name, data_dir=data_dir or None)
  except Exception as error:
    if isinstance(error, tfds.core.DatasetNotFoundError):
      raise ValueError(_unknown_builder(tfds, name, data_dir)) from error
    cause = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"TensorFlow Datasets cannot open data.builder={name!r}: {cause[0]}"
    ) from error
  if not found.info.splits:
    folder = pathlib.Path(found.data_path)
    raise FileNotFoundError(
      f"Data set {name!r} is not prepared in {str(folder)!r}"
      f"{_other_versions(folder)}. {_how_to_prepare(name, data_dir)}"
    )
  return found


def _other_versions(folder: pathlib.Path) -> str:
  try:
    found = sorted(path.name for path in folder.parent.iterdir())
  except OSError:
    return ""
  found = [version for version in found if version[:1].isdigit()]
  if not found:
    return ""
  return ", only in " + ", ".join(found) + " (give one as NAME:VERSION)"


def _unknown_builder(tfds: Any, name: str, data_dir: str) -> str:
  known = set(tfds.list_builders(with_community_datasets=False))
  root = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser()
  if root.is_dir():
    known |= {path.name for path in root.iterdir() if path.is_dir()}
  # "name/config:version"
  short = name.partition("/")[0].partition(":")[0]
  near = difflib.get_close_matches(short, known - {short}, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return (
    f"Unknown data.builder {name!r}: {hint}TensorFlow Datasets knows no such "
    f"builder or version, and {os.fspath(root)!r} (data.root) holds none."
  )


def _open_split(tfds: Any, found: Any, name: str, split: str) -> Any:
  """The split's records as bytes, with random access."""
  splits = list(found.info.splits)
  method = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    return found.as_data_source(
      split, deserialize_method=method, file_format="array_record"
    )
  except NotImplementedError as error:
    form = getattr(found.info.file_format, "value", "another")
    raise ValueError(
      f"Data set {name!r} in {str(found.data_path)!r} is in the {form} format, "
      "which has no random access. "
      + _how_to_prepare(name, "ANOTHER_FOLDER")
      + ", or convert it: python -m tensorflow_datasets.scripts."
      "convert_format --help"
    ) from error
  except ValueError as error:
    near = difflib.get_close_matches(split, splits, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
      f"Cannot take split {split!r} of {name!r}: {hint}it has "
      + ", ".join(splits)
      + f" ({str(error).splitlines()[0]})."
    ) from error


def _caption_feature(tfds: Any, features: Any, captions: str) -> str | None:
  """Name of the feature that captions are made of."""

  def is_usable(name: str) -> bool:
    kinds = (tfds.features.Text, tfds.features.ClassLabel)
    return name in features and isinstance(features[name], kinds)

  if not isinstance(features, tfds.features.FeaturesDict):
    return None
  if captions == "none":
    return None
  if captions == "auto":
    names = (*TEXT_FEATURES, LABEL_FEATURE)
    return next((name for name in names if is_usable(name)), None)
  if is_usable(captions):
    return captions
  usable = [name for name in sorted(features) if is_usable(name)]
  raise ValueError(
    f"captions={captions!r} is no text or class feature; there are "
    + (", ".join(usable) or "none")
    + "."
  )


def _label_feature(tfds: Any, features: Any, caption: str | None) -> str | None:
  """Name of the feature that is an example's class."""
  if not isinstance(features, tfds.features.FeaturesDict):
    return None
  for name in (caption, LABEL_FEATURE):
    feature = features[name] if name in features else None
    if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes:
      return name
  return None


def _select_features(tfds: Any, features: Any, *others: str | None) -> Any:
  """Only the features that are used: the others are not even parsed."""
  is_dict = isinstance(features, tfds.features.FeaturesDict)
  image = features[IMAGE] if is_dict and IMAGE in features else None
  if not isinstance(image, tfds.features.Image):
    names = ", ".join(sorted(features)) if is_dict else repr(features)
    raise ValueError(
      f"The data set has no feature 'image' that is a picture; it has {names}."
    )
  if np.dtype(image.np_dtype).kind == "f":
    raise ValueError(
      "The data set's images are floats, packed into PNG files; pictures of 8 "
      "or 16 bits are needed."
    )
  names = (IMAGE, *(name for name in others if name is not None))
  return tfds.features.FeaturesDict({name: features[name] for name in names})
