"""Examples in views: fixed, distinct, and edits' two images alike."""

import numpy as np
import pytest
import tiny_cache

from psvae_jax.data import transforms, views


def viewed(**options):
  source = options.pop("source", tiny_cache.Examples(5, 13))
  return views.ViewedSource(source, **{"image_size": 6, **options})


def test_view_0_is_the_plain_image():
  source = tiny_cache.Examples(5, 13)
  plain = transforms.center_crop(6)
  found = viewed(augment="crop_flip", views=3)
  for i in range(5):
    element, expected = found[i], plain(source[i], None)
    np.testing.assert_array_equal(element["image"], expected["image"])
    assert element["caption"] == expected["caption"] and element["index"] == i


def test_views_are_fixed_and_differ():
  source = tiny_cache.Examples(5, 40)
  options = {"source": source, "augment": "crop", "views": 3, "seed": 2}
  found, again = viewed(**options), viewed(**options)
  assert len(found) == 15
  images = [found[i]["image"] for i in range(15)]
  for i in reversed(range(15)):  # in whatever order
    np.testing.assert_array_equal(images[i], again[i]["image"])
    assert found[i]["index"] == i % 5
  assert len({image.tobytes() for image in images}) == 15
  other = viewed(**{**options, "seed": 3})
  assert all((images[i] != other[i]["image"]).any() for i in range(5, 15))


def test_examples_have_crops_of_their_own():
  class Same(tiny_cache.Examples):
    def __getitem__(self, index):
      return super().__getitem__(0)

  found = viewed(source=Same(6, 100), augment="crop", views=2)
  assert len({found[i]["image"].tobytes() for i in range(6, 12)}) == 6


def test_more_views_begin_with_fewer():
  few, many = (viewed(augment="crop", views=n) for n in (2, 4))
  for i in range(10):
    np.testing.assert_array_equal(few[i]["image"], many[i]["image"])


def test_first_examples_only():
  found = viewed(augment="crop", views=2, num_examples=3)
  assert len(found) == 6
  assert [found[i]["index"] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_both_images_of_an_edit_get_the_same_crop():
  class Unchanged(tiny_cache.Edits):
    def __getitem__(self, index):
      element = super().__getitem__(index)
      return {**element, "target": element["source"]}

  source = views.EditExamples(Unchanged(4, 13))
  found = viewed(source=source, augment="crop_flip", views=4)
  for index in range(16):
    element = found[index]
    assert element["image"].shape == (6, 6, 3)
    np.testing.assert_array_equal(element["image"], element["source"])


def test_pairing_leaves_single_images_alone():
  crop = transforms.random_crop(6)
  element = tiny_cache.Examples(5, 13)[2]
  single = views.paired(crop)(element, np.random.default_rng(1))
  expected = crop(element, np.random.default_rng(1))
  np.testing.assert_array_equal(single["image"], expected["image"])


def test_edit_images_of_two_sizes():
  class Odd(tiny_cache.Edits):
    def __getitem__(self, index):
      element = super().__getitem__(index)
      return {**element, "target": element["target"][:-1]}

  with pytest.raises(ValueError, match=r"Example 1: .*\(13, 13, 3\), its targ"):
    viewed(source=views.EditExamples(Odd(3, 13)), augment="center")[1]


def test_edits_take_the_names_of_other_examples():
  edit, edits = tiny_cache.Edits(3)[1], views.EditExamples(tiny_cache.Edits(3))
  found = edits[1]
  assert set(found) == {"image", "source", "caption", "index"}
  assert found["caption"] == edit["instruction"] and found["index"] == 1
  np.testing.assert_array_equal(found["image"], edit["target"])
  np.testing.assert_array_equal(found["source"], edit["source"])
  assert len(edits) == 3 and repr(edits) == "EditExamples(Examples(3))"


def test_description_says_what_decides_the_images():
  assert viewed(augment="none").description == {
    "source": "Examples(5)",
    "num_examples": 5,
    "image_size": 6,
    "views": 1,
  }
  # With one view nothing is random: seed and scale do not matter.
  one = [
    viewed(augment="crop", seed=s, min_scale=m) for s, m in ((0, 1), (1, 0.5))
  ]
  assert one[0].description == one[1].description
  two = [viewed(augment="crop", seed=s, views=2) for s in (0, 1)]
  assert two[0].description != two[1].description


@pytest.mark.parametrize(
  "options, message",
  [
    ({"views": 0}, "at least 1, not 0"),
    ({"views": 2}, 'augment="none" would be equal'),
    ({"views": 2, "augment": "center"}, 'augment="center" would be equal'),
    ({"num_examples": 6}, r"take 6 examples of Examples\(5\), which has 5"),
    ({"source": tiny_cache.Examples(0)}, "take any examples"),
    ({"augment": "cut"}, "'cut'; there are none"),
  ],
)
def test_bad_settings(options, message):
  with pytest.raises(ValueError, match=message):
    viewed(**options)


@pytest.mark.parametrize("index", [-1, 5])
def test_no_such_element(index):
  with pytest.raises(IndexError, match=f"index {index} is outside"):
    viewed()[index]


def test_wrong_size_without_augmentation():
  with pytest.raises(ValueError, match="13 × 13 pixels"):
    viewed()[0]
