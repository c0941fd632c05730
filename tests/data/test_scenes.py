"""The embedded dataset: pure by index, well-formed, honestly split."""

import collections
import dataclasses
import pickle
import zlib

import grain
import numpy as np
import pytest

from psvae_jax.data import captions, scene_edits, scene_types, scenes, textures

_COUNT = 600


@pytest.fixture(scope="module")
def sampled():
  return {
    split: [scenes.sample_scene(split, i) for i in range(_COUNT)]
    for split in scenes.SPLITS
  }


def test_same_index_same_scene_and_pixels():
  first, again = (scenes.sample_scene("train", 11) for _ in range(2))
  assert first == again
  np.testing.assert_array_equal(scenes.render(first), scenes.render(again))
  assert first != scenes.sample_scene("train", 12)
  assert first != scenes.sample_scene("validation", 11)
  assert first != scenes.sample_scene("train", 11, seed=1)


def test_dataset_is_the_published_one():
  # Shipped weights were trained on these scenes: a change of any draw is a
  # change of the dataset and has to be meant.
  numbers = [
    value
    for i in range(50)
    for item in scenes.sample_scene("train", i).objects
    for value in dataclasses.astuple(item)
  ]
  text = ",".join(f"{value:.9f}" for value in numbers)
  assert zlib.crc32(text.encode()) == 645866117
  image = scenes.render(scenes.sample_scene("train", 0))
  np.testing.assert_allclose(
    image.mean((0, 1)), (152.085, 152.076, 152.437), atol=0.02
  )


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_objects_are_inside_apart_and_as_named(sampled, split):
  for scene in sampled[split]:
    assert scene_types.is_well_formed(scene), scene
    colours = [item.colour for item in scene.objects]
    assert len(set(colours)) == len(colours)


def test_drawn_objects_keep_clear_of_edges_and_of_each_other(sampled):
  for scene in sampled["train"][:300]:
    masks = scenes.object_masks(scene)
    assert not masks[:, [0, -1]].any() or masks[:, [0, -1]].max() < 0.5
    assert masks[:, :, [0, -1]].max() < 0.5
    assert (masks > 0).sum(axis=0).max() == 1
    # Soft edges sum to the shape's area only if nothing was cut off.
    wide = scenes.object_masks(scene, 192)
    areas = masks.sum((1, 2)) / 48**2, wide.sum((1, 2)) / 192**2
    np.testing.assert_allclose(*areas, rtol=0.03)


@pytest.mark.parametrize("shape", range(len(scenes.SHAPES)))
def test_reach_bounds_the_shape_tightly(shape):
  background = scene_types.Background("train", 0)
  widest = 0.0
  for angle in np.linspace(-1, 1, 13) * scene_types.MAX_ANGLE:
    item = scenes.SceneObject(shape, 0, 0, 0.5, 0.5, 0.2, float(angle))
    mask = scenes.object_masks(scenes.Scene((item,), None, background), 400)[0]
    rows, columns = np.nonzero(mask > 0.5)
    pixels = np.concatenate([rows, columns]) + 0.5
    widest = max(widest, np.abs(pixels / 400 - 0.5).max())
  assert 0.97 * item.reach < widest + 0.5 / 400 <= item.reach + 0.5 / 400


def test_held_out_combinations_are_only_in_heldout(sampled):
  assert not any(map(scenes.is_held_out, sampled["train"]))
  assert not any(map(scenes.is_held_out, sampled["validation"]))
  assert all(map(scenes.is_held_out, sampled["heldout"]))

  def combinations(split):
    found = set()
    for scene in sampled[split]:
      for spec in (captions.spec_of(scene),):
        kinds = [(o.colour, o.shape) for o in spec.objects]
        if len(kinds) == 1:
          found.add((spec.objects[0].size, *kinds))
        else:  # both wordings of the same fact
          found.add((*kinds, spec.relation))
          turned = scene_types.INVERSE_RELATION[spec.relation]
          found.add((*kinds[::-1], turned))
    return found

  held = combinations("heldout")
  assert not held & (combinations("train") | combinations("validation"))
  # The parts themselves are all known from training.
  for split in scenes.SPLITS:
    items = [item for scene in sampled[split] for item in scene.objects]
    assert {item.colour for item in items} == set(range(7))
    assert {item.shape for item in items} == set(range(6))
    assert {item.size for item in items} == {0, 1}


def test_share_of_two_object_scenes_and_relations(sampled):
  relations = collections.Counter(s.relation for s in sampled["train"])
  assert relations[None] / _COUNT == pytest.approx(0.4, abs=0.07)
  for relation in range(4):
    assert relations[relation] / _COUNT == pytest.approx(0.15, abs=0.05)


def test_textures_of_training_and_validation_are_disjoint(sampled):
  banks = {
    split: {scene.background.bank for scene in sampled[split]}
    for split in scenes.SPLITS
  }
  assert banks == {
    "train": {"train"},
    "validation": {"eval"},
    "heldout": {"eval"},
  }
  assert not set(textures.PHOTOS["train"]) & set(textures.PHOTOS["eval"])
  tiles = {
    (bank, i): textures.texture_tile(bank, i, 32).astype(np.float32).ravel()
    for bank in textures.BANKS
    for i in range(textures.BANK_SIZES[bank])
  }
  stacked = np.stack([tile / np.linalg.norm(tile) for tile in tiles.values()])
  alike = stacked @ stacked.T
  np.fill_diagonal(alike, 0.0)
  assert alike.max() < 0.9  # no tile twice, in one bank or across


def test_textures_are_normalised_and_checked():
  tile = textures.texture_tile("train", 2, 48)
  assert tile.shape == (96, 96) and tile.dtype == np.int8
  assert tile.std() == pytest.approx(textures.STEPS_PER_STD, rel=0.05)
  assert not tile.flags.writeable
  with pytest.raises(ValueError, match="bank"):
    textures.texture_tile("test", 0, 48)
  with pytest.raises(ValueError, match="there are 64"):
    textures.texture_tile("eval", 64, 48)


def test_backgrounds_are_muted(sampled):
  spreads = []
  for scene in sampled["validation"][:100]:
    bare = dataclasses.replace(scene, objects=())
    image = scenes.render(bare).astype(int)
    assert (image.max(axis=2) - image.min(axis=2)).max() < 32
    spreads.append(image.mean(axis=2).std())
  assert 9.0 < np.mean(spreads) < 18.0 and max(spreads) < 30.0


def test_image_size_changes_only_the_resolution():
  for index in (2, 3, 5):
    scene = scenes.sample_scene("train", index)
    small = scenes.render(scene, 48).astype(float)
    large = scenes.render(scene, 240).astype(float)
    assert small.shape == (48, 48, 3) and large.shape == (240, 240, 3)
    reduced = large.reshape(48, 5, 48, 5, 3).mean(axis=(1, 3))
    assert np.abs(reduced - small).mean() < 1.0
  with pytest.raises(ValueError, match="image_size 8"):
    scenes.render(scene, 8)


def test_every_wording_parses_back(sampled):
  for split in scenes.SPLITS:
    for scene in sampled[split][:200]:
      truth = captions.spec_of(scene)
      assert captions.parse_spec(scenes.caption(scene)) == truth
      for variant in range(captions.NUM_VARIANTS):
        text = scenes.caption(scene, variant)
        spec = captions.parse_spec(text)
        assert spec is not None, text
        assert captions.describes(spec, scene), text
        sizes = [item.size for item in spec.objects]
        assert (variant == 4) == (sizes == [None] * len(sizes))


def test_canonical_wording():
  background = scene_types.Background("train", 0)
  star = scenes.SceneObject(3, 5, 1, 0.25, 0.5, 0.2)
  ring = scenes.SceneObject(5, 1, 0, 0.75, 0.5, 0.12)
  one = scenes.Scene((ring,), None, background)
  two = scenes.Scene((star, ring), 0, background)
  assert scenes.caption(one) == "a small orange ring"
  assert scenes.caption(one, 2) == "an orange ring, small"
  assert scenes.caption(two) == "a large blue star left of a small orange ring"
  assert scenes.caption(two, 3) == (
    "a picture of a large blue star to the left of a small orange ring"
  )
  assert (
    scenes.caption(two, 5) == "a small orange ring right of a large blue star"
  )
  assert scenes.parse_caption("The blue star is above a red ring.") == {
    "objects": (
      {"size": None, "colour": 5, "shape": 3},
      {"size": None, "colour": 0, "shape": 5},
    ),
    "relation": 2,
  }
  with pytest.raises(ValueError, match="variant 6"):
    scenes.caption(one, 6)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "a dog",
    "a red",
    "a small red circle, large",
    "a red circle near a blue star",
    "a red circle left of",
    "a red circle and a blue star and a green ring",
  ],
)
def test_other_text_is_no_caption(text):
  assert scenes.parse_caption(text) is None


def test_foils_are_near_and_wrong(sampled):
  rng = np.random.default_rng(0)
  changed = collections.Counter()
  for scene in sampled["train"] + sampled["heldout"]:
    foil = captions.parse_spec(scenes.foil_caption(scene, rng))
    truth = captions.spec_of(scene)
    assert not captions.describes(foil, scene)
    assert len(foil.objects) == len(truth.objects)
    differences = tuple(
      f"{name}{i}"
      for i, (a, b) in enumerate(zip(foil.objects, truth.objects, strict=True))
      for name in ("size", "colour", "shape")
      if getattr(a, name) != getattr(b, name)
    ) + (("relation",) if foil.relation != truth.relation else ())
    changed[differences] += 1
  assert {("colour0",), ("shape0",), ("size0",), ("relation",)} <= set(changed)
  assert ("colour0", "colour1") in changed


def test_attributes():
  background = scene_types.Background("train", 0)
  star = scenes.SceneObject(3, 5, 1, 0.25, 0.5, 0.2)
  ring = scenes.SceneObject(5, 1, 0, 0.75, 0.5, 0.12)
  found = scenes.attributes(scenes.Scene((star, ring), 0, background))
  ones = {name: np.flatnonzero(v).tolist() for name, v in found.items()}
  assert ones == {
    "colour": [1, 5],
    "shape": [3, 5],
    "size": [0, 1],
    "object": [1 * 6 + 5, 5 * 6 + 3],
    "count": [1],
  }
  lengths = {name: v.shape for name, v in found.items()}
  assert lengths == {
    "colour": (7,),
    "shape": (6,),
    "size": (2,),
    "object": (42,),
    "count": (2,),
  }
  assert all(set(np.unique(v)) <= {0.0, 1.0} for v in found.values())


def test_renewed_nuisances_keep_what_captions_name():
  for index in range(30):
    scene = scenes.sample_scene("train", index)
    other = scenes.renew_nuisances(scene, "train", key=index)
    assert scenes.caption(scene) == scenes.caption(other)
    assert scene_types.is_well_formed(other)
    assert other.background != scene.background
    assert other.objects[0].angle != scene.objects[0].angle


def test_source_contract():
  source = scenes.SceneSource("validation", 20, image_size=32, seed=3)
  assert len(source) == 20
  item = source[7]
  assert sorted(item) == ["caption", "image", "index"]
  assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.uint8
  assert item["index"] == 7 and item["index"].dtype == np.int64
  expected = scenes.render(scenes.sample_scene("validation", 7, seed=3), 32)
  np.testing.assert_array_equal(item["image"], expected)
  for index in (-1, 20):
    with pytest.raises(IndexError, match=str(index)):
      source[index]
  with pytest.raises(ValueError, match="unknown split 'test'"):
    scenes.SceneSource("test", 20)
  with pytest.raises(ValueError, match="negative"):
    scenes.SceneSource("train", -1)


def test_source_is_picklable_and_names_itself():
  source = scenes.SceneSource("train", 5, caption_variants=False)
  copy = pickle.loads(pickle.dumps(source))
  assert (
    repr(copy)
    == repr(source)
    == (
      "SceneSource(split='train', length=5, image_size=48, seed=0, "
      "caption_variants=False)"
    )
  )
  np.testing.assert_array_equal(copy[4]["image"], source[4]["image"])


def test_source_feeds_grain():
  source = scenes.SceneSource("train", 12)
  dataset = grain.MapDataset.source(source).shuffle(seed=1).batch(4)
  batch = dataset[0]
  assert batch["image"].shape == (4, 48, 48, 3)
  assert batch["index"].shape == (4,)


def test_caption_variants_are_half_canonical():
  varied = scenes.SceneSource("train", 300, image_size=16)
  plain = scenes.SceneSource(
    "train", 300, image_size=16, caption_variants=False
  )
  canonical = [scenes.caption(varied.scene(i)) for i in range(300)]
  assert [plain[i]["caption"] for i in range(300)] == canonical
  equal = [varied[i]["caption"] == canonical[i] for i in range(300)]
  assert 0.4 < np.mean(equal) < 0.6


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_edits_share_all_that_is_not_named(split):
  kinds = collections.Counter()
  for index in range(80):
    edit = scenes.sample_edit(split, index)
    kinds[edit.kind] += 1
    source, target = edit.source, edit.target
    assert scene_types.is_well_formed(source)
    assert scene_types.is_well_formed(target)
    assert source.background == target.background
    gone = [item for item in source.objects if item not in target.objects]
    new = [item for item in target.objects if item not in source.objects]
    assert (len(gone), len(new)) == {"add": (0, 1), "remove": (1, 0)}.get(
      edit.kind, (1, 1)
    )
    if split != "heldout":
      assert not scenes.is_held_out(target)
    if gone:
      name = scenes.COLOURS[gone[0].colour], scenes.SHAPES[gone[0].shape]
      assert " the {} {}".format(*name) in edit.instruction
    # Outside the touched objects not one pixel differs.
    touched = sum(
      scenes.object_masks(dataclasses.replace(source, objects=(item,)))[0]
      for item in gone + new
    )
    before, after = scenes.render(source), scenes.render(target)
    np.testing.assert_array_equal(before[touched == 0], after[touched == 0])
    assert (before != after).any()
  assert set(kinds) == set(scene_edits.EDIT_KINDS)


def test_edit_instructions_name_the_change():
  for index in range(150):
    edit = scenes.sample_edit("train", index)
    truth = [captions.spec_of(s).objects for s in (edit.source, edit.target)]
    if edit.kind in ("recolour", "reshape", "resize"):
      which = [a != b for a, b in zip(*truth, strict=True)].index(True)
      new = truth[1][which]
      word = {
        "recolour": scenes.COLOURS[new.colour],
        "reshape": scenes.SHAPES[new.shape],
        "resize": scenes.SIZES[new.size],
      }[edit.kind]
      assert edit.instruction.endswith(" " + word)
    elif edit.kind in ("add", "move"):
      relation = scenes.RELATIONS[edit.target.relation]
      assert f" {relation} the " in edit.instruction
      assert set(truth[0]) <= set(truth[1])
    else:
      assert set(truth[1]) < set(truth[0])


def test_edit_source_yields_triples():
  source = scenes.EditSource("train", 6, image_size=32)
  item = source[5]
  triple = scenes.edit_triple("train", 5, image_size=32)
  assert item.pop("index") == 5
  assert item.keys() == triple.keys()
  for name, value in triple.items():
    np.testing.assert_array_equal(item[name], value)
  assert item["source"].shape == item["target"].shape == (32, 32, 3)
  edit = scenes.sample_edit("train", 5)
  assert item["caption"] == scenes.caption(edit.target)
  with pytest.raises(IndexError):
    source[6]
  with pytest.raises(ValueError, match="negative"):
    scenes.edit_triple("train", -1)
