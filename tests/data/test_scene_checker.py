"""The checker reads what was drawn, bears mild damage, and does not guess."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from psvae_jax.data import captions, scene_checker, scene_types, scenes


def _all_right(split, count, damage, start=0):
  right = 0
  for index in range(start, start + count):
    scene = scenes.sample_scene(split, index)
    image = damage(scenes.render(scene).astype(np.float32))
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    right += scene_checker.check_scene(image, scene)["all"]
  return right / count


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_reads_what_was_drawn(split):
  assert _all_right(split, 400, lambda image: image) >= 0.99


def test_survives_blur_and_noise():
  rng = np.random.default_rng(0)

  def blur(image):
    return ndimage.gaussian_filter(image, (0.6, 0.6, 0.0))

  def noise(image):
    return image + rng.normal(0.0, 8.0, image.shape)

  assert _all_right("validation", 200, blur, 400) >= 0.99
  assert _all_right("validation", 200, noise, 600) >= 0.99


@pytest.mark.parametrize("image_size", [64, 96])
def test_reads_other_sizes(image_size):
  for index in range(25):
    scene = scenes.sample_scene("validation", index)
    image = scenes.render(scene, image_size)
    assert scene_checker.check_scene(image, scene)["all"]


def test_reads_place_and_radius():
  for index in range(60):
    scene = scenes.sample_scene("validation", index)
    found = scene_checker.read_scene(scenes.render(scene))
    for item in scene.objects:
      (read,) = [o for o in found if o.colour == item.colour]
      assert read.radius == pytest.approx(item.radius, rel=0.12)
      # Every shape turns about its centroid, which is what the reader finds.
      assert read.x == pytest.approx(item.x, abs=0.01)
      assert read.y == pytest.approx(item.y, abs=0.01)


def test_foils_and_other_captions_are_refused():
  rng = np.random.default_rng(1)
  for index in range(200):
    scene = scenes.sample_scene("validation", index)
    found = scene_checker.read_scene(scenes.render(scene))
    for _ in range(3):
      foil = captions.parse_spec(scenes.foil_caption(scene, rng))
      assert not scene_checker.compare(found, foil)["all"], foil
    for variant in range(captions.NUM_VARIANTS):
      spec = captions.parse_spec(scenes.caption(scene, variant))
      assert scene_checker.compare(found, spec)["all"]


def _two_objects():
  return next(
    scene
    for scene in (scenes.sample_scene("validation", i) for i in range(99))
    if len(scene.objects) == 2
    and scene.objects[0].size != scene.objects[1].size
    and scene.objects[0].shape != scene.objects[1].shape
  )


@pytest.mark.parametrize(
  ("key", "changes"),
  [
    ("colour", {"colour": None}),
    ("shape", {"shape": None}),
    ("size", {"size": None}),
  ],
)
def test_each_field_is_judged_alone(key, changes):
  scene = _two_objects()
  image = scenes.render(scene)
  truth = captions.spec_of(scene)
  first, second = truth.objects
  value = next(
    v
    for v in range(2, -1, -1)
    if v not in (getattr(first, key), getattr(second, key))
    or (key == "size" and v == 1 - first.size)
  )
  wrong = dataclasses.replace(first, **dict.fromkeys(changes, value))
  spec = dataclasses.replace(truth, objects=(wrong, second))
  result = scene_checker.check_spec(image, spec)
  assert not result[key] and not result["all"]
  for other in {"count", "colour", "shape", "size", "relation"} - {key}:
    assert result[other], other


def test_relation_and_count_are_judged():
  scene = _two_objects()
  image = scenes.render(scene)
  truth = captions.spec_of(scene)
  wrong = dataclasses.replace(truth, relation=(truth.relation + 1) % 4)
  result = scene_checker.check_spec(image, wrong)
  assert not result.pop("relation") and not result.pop("all")
  assert all(result.values())
  # One object too many costs the count only, one too few everything.
  alone = captions.CaptionSpec(truth.objects[:1])
  result = scene_checker.check_spec(image, alone)
  assert not result.pop("count") and not result.pop("all")
  assert all(result.values())
  single = scenes.Scene(scene.objects[:1], None, scene.background)
  result = scene_checker.check_spec(scenes.render(single), truth)
  assert not any(result.values())


def test_check_caption():
  scene = _two_objects()
  image = scenes.render(scene)
  assert scene_checker.check_caption(image, scenes.caption(scene, 4))["all"]
  with pytest.raises(ValueError, match="not a scene caption: 'a dog'"):
    scene_checker.check_caption(image, "a dog")


def test_edits_do_what_they_say():
  for index in range(60):
    triple = scenes.edit_triple("validation", index)
    after = scene_checker.check_caption(triple["target"], triple["caption"])
    assert after["all"], triple["instruction"]
    before = scene_checker.check_caption(triple["source"], triple["caption"])
    assert not before["all"], triple["instruction"]


def _paint(mask):
  red = np.array([220.0, 30.0, 30.0])
  image = 128.0 + mask[..., None] * (red - 128.0)
  return np.rint(image).astype(np.uint8)


def test_other_outlines_have_no_shape():
  axis = np.arange(48) - 23.5
  x, y = axis, axis[:, None]
  distance, angle = np.hypot(x, y), np.arctan2(y, x)
  outlines = {
    "ellipse": 1.0 - np.hypot(x / 13.0, y / 6.0),
    "bar": np.minimum(14.0 - np.abs(x), 4.0 - np.abs(y)),
    "half circle": np.minimum(10.0 - distance, y + 1.0),
    "trefoil": 8.0 * (1.0 + 0.6 * np.cos(3 * angle + 1.2)) - distance,
    "corner": np.minimum(
      10.0 - np.maximum(np.abs(x), np.abs(y)), np.maximum(-x, -y) - 3.0
    ),
  }
  for name, depth in outlines.items():
    mask = np.clip(depth + 0.5, 0.0, 1.0)
    (read,) = scene_checker.read_scene(_paint(mask))
    assert read.shape is None, (name, read)
    assert read.colour == 0


def test_most_random_blobs_have_no_shape():
  rng = np.random.default_rng(2)
  axis = np.arange(48) - 23.5
  window = np.exp(-(np.square(axis) + np.square(axis[:, None])) / 200.0)
  accepted = total = 0
  for _ in range(150):
    field = ndimage.gaussian_filter(rng.normal(size=(48, 48)), 3.5)
    field *= window / field.std()
    mask = np.clip((field - 0.35) * 6.0, 0.0, 1.0)
    found = scene_checker.read_scene(_paint(mask))
    accepted += sum(read.shape is not None for read in found)
    total += len(found)
  assert total > 100
  assert accepted / total < 0.45  # then right by chance 1 time in 13 or rarer


def test_empty_and_noisy_images_hold_nothing():
  background = scene_types.Background("eval", 3)
  empty = scenes.render(scenes.Scene((), None, background))
  assert scene_checker.read_scene(empty) == []
  spec = captions.parse_spec("a red circle")
  assert not any(scene_checker.check_spec(empty, spec).values())
  noise = np.random.default_rng(3).integers(0, 256, (48, 48, 3), np.uint8)
  assert all(o.shape is None for o in scene_checker.read_scene(noise))


def test_bad_images_are_refused():
  with pytest.raises(ValueError, match=r"\(48, 40, 3\)"):
    scene_checker.read_scene(np.zeros((48, 40, 3), np.uint8))
  with pytest.raises(ValueError, match="float32: expected uint8"):
    scene_checker.read_scene(np.zeros((48, 48, 3), np.float32))
