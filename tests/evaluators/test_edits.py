"""What counts as an edit done, and what it is compared with."""

import dataclasses
import json
import runpy
from pathlib import Path

import fake_generator
import numpy as np
import pytest
from PIL import Image

from psvae_jax.config import parser as config_parser
from psvae_jax.data import scene_edits
from psvae_jax.data.scene_edits import EDIT_KINDS
from psvae_jax.data.scene_render import render
from psvae_jax.evaluators import edit_score
from psvae_jax.evaluators.edit_score import score_edit
from psvae_jax.evaluators.edits import EditEvaluator
from psvae_jax.report import pictures

_ROOT = Path(__file__).resolve().parents[2]
COUNT = 40
EDITS = [scene_edits.sample_edit("validation", i) for i in range(COUNT)]
NAMES = ("edit_success", "edit_instruction", "edit_kept", "preservation_psnr")


def make_config(data=None, **changes):
  raw = runpy.run_path(str(_ROOT / "configs" / "edit.py"))["get_config"]("")
  raw.eval.update(dict(num_edits=COUNT, batch_size=16) | changes)
  raw.data.update(data or {})
  return config_parser.parse(raw)


def evaluate(model, folder=None, quick=False, **changes):
  evaluator = EditEvaluator(make_config(**changes), 48)
  return evaluator.evaluate(model, folder, quick=quick)


def the_edit(kind, kept):
  """The first edit of a kind, with an object that is not named or without."""
  return next(
    e
    for e in EDITS
    if e.kind == kind
    and any(o in e.source.objects for o in e.target.objects) == kept
  )


def score(scene, edit):
  return score_edit(render(scene), edit, render(edit.target))


def change(scene, which, **changes):
  objects = list(scene.objects)
  objects[which] = dataclasses.replace(objects[which], **changes)
  return dataclasses.replace(scene, objects=tuple(objects))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("edit")


@pytest.fixture(scope="module")
def metrics(folder):
  return evaluate(fake_generator.TrueScenes(), folder)


def test_the_true_target_is_right_and_the_source_is_not(metrics):
  assert {e.kind for e in EDITS} == set(EDIT_KINDS)
  for end in ("", "_ceiling"):
    for name in NAMES[:3]:
      assert metrics[f"eval/{name}{end}"] == 1.0
    assert metrics[f"eval/preservation_psnr{end}"] == 100.0
  for kind in EDIT_KINDS:
    assert metrics[f"eval/edit_success_{kind}"] == 1.0
  assert metrics["eval/edit_success_copy"] == 0.0
  assert metrics["eval/edit_instruction_copy"] == 0.0
  assert metrics["eval/edit_kept_copy"] == 1.0
  assert metrics["eval/preservation_psnr_copy"] == 100.0


def test_another_picture_of_the_target_is_no_edit(metrics):
  """Regeneration says what it should, and keeps neither place nor ground."""
  assert metrics["eval/edit_instruction_regenerate"] == 1.0
  assert metrics["eval/edit_success_regenerate"] < 0.5
  assert metrics["eval/edit_kept_regenerate"] < 0.5
  assert metrics["eval/preservation_psnr_regenerate"] < 25


def test_noise_is_nothing():
  got = evaluate(fake_generator.Noise(), quick=True)
  assert got["eval/edit_success"] == got["eval/edit_kept"] == 0.0
  assert got["eval/preservation_psnr"] < 12
  ends = ("_copy", "_regenerate", "_ceiling")
  assert not [name for name in got if name.endswith(ends)]


def test_batches_change_nothing(metrics):
  got = evaluate(fake_generator.TrueScenes(), batch_size=7)
  assert got == pytest.approx(metrics)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_what_is_not_named_must_stay(kind):
  """The other object moved away, or recoloured, is no success."""
  edit = the_edit(kind, kept=True)
  which = [o in edit.source.objects for o in edit.target.objects].index(True)
  item = edit.target.objects[which]
  x = item.x + (0.15 if item.x < 0.5 else -0.15)
  moved = score(change(edit.target, which, x=x), edit)
  assert moved.kept is False and not moved.success
  recoloured = change(edit.target, which, colour=(item.colour + 3) % 7)
  recoloured = score(recoloured, edit)
  assert recoloured.kept is False and not recoloured.success


@pytest.mark.parametrize("kind", ["recolour", "reshape", "resize"])
def test_what_is_changed_in_place_must_stay_there(kind):
  edit = the_edit(kind, kept=False)
  (item,) = edit.target.objects
  for shift, fine in ((0.0, True), (0.03, True), (0.15, False)):
    x = item.x + (shift if item.x < 0.5 else -shift)
    got = score(change(edit.target, 0, x=x), edit)
    assert got.instruction and got.kept is None
    assert got.placed == got.success == fine


def test_an_added_object_may_stand_anywhere_in_its_relation():
  edit = the_edit("add", kept=True)
  item, anchor = edit.target.objects
  for step in (0.01, 0.02):
    x = item.x + step * np.sign(item.x - anchor.x)
    y = item.y + step * np.sign(item.y - anchor.y)
    assert score(change(edit.target, 0, x=x, y=y), edit).success


def test_every_true_target_can_be_read():
  """The tolerance is far above the reader's own error."""
  for edit in EDITS:
    assert score(edit.target, edit).success, edit.instruction
    copied = score(edit.source, edit)
    assert not copied.instruction and copied.kept is not False


@pytest.mark.parametrize("size", [32, 48, 96])
def test_source_and_target_differ_only_in_the_region(size):
  shares = []
  for edit in EDITS:
    region = edit_score.edited_region(edit, size)
    source, target = render(edit.source, size), render(edit.target, size)
    np.testing.assert_array_equal(source[~region], target[~region])
    assert (source != target).any()
    shares.append(region.mean())
  assert 0.05 < np.mean(shares) < 0.4


def test_preservation_sees_the_outside_alone():
  edit = the_edit("recolour", kept=True)
  target = render(edit.target)
  region = edit_score.edited_region(edit, 48)
  inside, outside = target.copy(), target.copy()
  inside[region] = 255 - inside[region]
  assert score_edit(inside, edit, target).psnr == 100.0
  outside[~region] ^= 8  # every value off by eight levels
  expected = 20 * np.log10(255 / 8)
  assert score_edit(outside, edit, target).psnr == pytest.approx(expected)
  nothing = np.zeros((48, 48), bool)
  assert np.isnan(edit_score.masked_psnr(target, target, nothing))


def test_pictures(folder, metrics):
  with np.load(folder / "edits.npz") as arrays:
    for name, scenes in (
      ("source", [e.source for e in EDITS[:12]]),
      ("target", [e.target for e in EDITS[:12]]),
      ("result", [e.target for e in EDITS[:12]]),
    ):
      assert arrays[name].dtype == np.uint8
      np.testing.assert_array_equal(
        arrays[name], np.stack([render(scene) for scene in scenes])
      )
    assert list(arrays["instructions"]) == [e.instruction for e in EDITS[:12]]
    assert arrays["correct"].dtype == bool and arrays["correct"].all()


def write_folder(root, count):
  """Edits whose target is the source, mirrored; the images are not square."""
  rng = np.random.default_rng(0)
  with (root / "metadata.jsonl").open("w") as file:
    for i in range(count):
      image = rng.integers(0, 256, (50, 60, 3), np.uint8)
      names = [f"{i:02d}-{which}.png" for which in ("before", "after")]
      for name, pixels in zip(names, (image, image[:, ::-1]), strict=True):
        Image.fromarray(pixels).save(root / name)
      row = {"file_name": names[1], "input_file_name": names[0]}
      file.write(json.dumps(row | {"instruction": f"mirror {i}"}) + "\n")


class Mirror:
  """Does the only instruction there is."""

  def edit(self, images, instructions, seeds):
    assert len(images) == len(instructions) == len(seeds)
    return images[:, :, ::-1]


def test_a_folder_of_edits_is_shown_and_not_scored(tmp_path):
  root, file = tmp_path / "edits", tmp_path / "quarantine.jsonl"
  root.mkdir()
  write_folder(root, 14)
  (root / "03-before.png").write_bytes(b"")
  config = make_config(
    dict(
      source="bundled",
      edits="elsewhere",
      eval_edits=str(root),
      augment="crop",
      max_bad_share=0.1,
    )
  )
  evaluator = EditEvaluator(config, 48)
  assert evaluator.evaluate(Mirror(), tmp_path, quarantine=file) == {}
  notices = []
  found = pictures.read_pictures(tmp_path, notices).edits
  assert not notices
  assert list(found["instructions"]) == [
    f"mirror {i}" for i in range(12) if i != 3
  ]
  assert found["source"].shape == (11, 48, 48, 3)
  # Both images have the same crop.
  np.testing.assert_array_equal(found["target"], found["result"])
  assert "correct" not in found
  assert all(mark is None for mark in pictures.marks_of(found))
  assert "03-before.png" in file.read_text()
