"""The fixed photographs of every report."""

import numpy as np
import pytest

from psvae_jax.data import bundled, transforms
from psvae_jax.evaluators import photographs


def test_whole_pictures_come_first_then_closer_ones():
  images, captions = photographs.load(48, 12)
  assert images.shape == (12, 48, 48, 3) and images.dtype == np.uint8
  assert len(captions) == 12
  crop = transforms.center_crop(48)
  for index, element in enumerate(bundled.BundledSource("validation")):
    expected = crop({"image": element["image"]}, None)["image"]
    np.testing.assert_array_equal(images[index], expected)
    assert captions[index] == element["caption"]
  assert captions[3] == f"{captions[0]}, closer"
  assert len({image.tobytes() for image in images}) == 12


def test_they_are_the_same_every_time_and_as_many_as_wanted():
  first = photographs.load(32, 7).images
  np.testing.assert_array_equal(photographs.load(32, 12).images[:7], first)
  assert len(photographs.load(32, 100).images) == 12


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_closer_squares_lie_inside_the_picture(place):
  rows, columns = np.mgrid[:20, :30]
  image = np.stack([rows, columns, rows], -1).astype(np.uint8)
  square = photographs._closer(image, *place)
  assert square.shape == (10, 10, 3)
  centre = square[:, :, :2].mean((0, 1))
  wanted = np.clip(np.array(place) * (20, 30), 5, (15, 25))
  np.testing.assert_allclose(centre, wanted, atol=1)


def test_missing_pictures_are_an_error(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
    photographs.load(48, 3)
