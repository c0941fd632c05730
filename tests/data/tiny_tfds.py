"""A small TensorFlow Datasets builder that prepares itself, TensorFlow apart.

    python tests/data/tiny_tfds.py FOLDER

writes `tiny_pictures` into FOLDER, in the array_record format.
"""

import io
import pathlib
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NAMES = ("tabby_cat", "dog", "great_white_shark")
SIZES = {"train": 40, "validation": 6}
SHARDS = 3


def picture(split: str, number: int) -> np.ndarray:
  """uint8 (5, 7, 3), different in every record."""
  seed = [len(split), number]
  return np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)


def encode(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


# Unknown to TensorFlow Datasets, like the code of a data set that someone else
# prepared: it must be read from its files alone.
with tfds.core.registered.skip_registration():

  class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Noise with a class and a name, in two splits.

    `damage` maps a record's number to the image bytes it gets in their place.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, extra=None, damage=None, drop=(), **options):
      self._extra, self._damage = extra or {}, damage or {}
      self._drop = drop
      super().__init__(**options)

    @classmethod
    def _get_pkg_dir_path(cls):
      return tfds.core.Path(pathlib.Path(__file__).parent)

    def _info(self):
      features = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=NAMES),
        "file_name": tfds.features.Text(),
        "unused": tfds.features.Tensor(shape=(2,), dtype=np.float32),
      }
      features |= {name: feature for name, (feature, _) in self._extra.items()}
      for name in self._drop:
        del features[name]
      return tfds.core.DatasetInfo(
        builder=self,
        description="noise",
        homepage="https://example.org",
        features=tfds.features.FeaturesDict(features),
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
      for number in range(SIZES[split]):
        data = self._damage.get(number, encode(picture(split, number)))
        example = {
          "image": io.BytesIO(data),
          "label": number % len(NAMES),
          "file_name": f"{split}_{number}",
          "unused": np.zeros(2, np.float32),
        }
        example |= {
          name: make(number) for name, (_, make) in self._extra.items()
        }
        yield number, {k: v for k, v in example.items() if k not in self._drop}


def prepare(folder, **options) -> pathlib.Path:
  """Writes the data set below `folder`; returns the folder of its files."""
  builder = TinyPictures(data_dir=folder, file_format="array_record", **options)
  config = tfds.download.DownloadConfig(num_shards=SHARDS)
  builder.download_and_prepare(download_config=config)
  return pathlib.Path(builder.data_path)


if __name__ == "__main__":
  print(prepare(sys.argv[1]))
