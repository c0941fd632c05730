"""Folders of instruction edits: what is read, held out, and skipped."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from psvae_jax.config import DataConfig
from psvae_jax.data import edit_folder, pipeline, quarantine, sources, views

COUNT = 12


def write_image(path, value=0, size=(5, 4)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", size, value).save(path)


def row(i, target="file_name", source="source_file_name", text="instruction"):
  return {target: f"after/{i:02d}.png", source: f"before/{i:02d}.png"} | {
    text: f"make it {i}"
  }


def write(root, rows=None, **names):
  """`COUNT` edits: source i has the value i, its target 100 + i."""
  for i in range(COUNT):
    write_image(root / "before" / f"{i:02d}.png", i)
    write_image(root / "after" / f"{i:02d}.png", 100 + i)
  rows = [row(i, **names) for i in range(COUNT)] if rows is None else rows
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (root / "metadata.jsonl").write_text(lines)
  return root


def make(root, split="train", file=None, **options):
  options = {"max_bad_share": 0.2, **options}
  config = DataConfig(source="folder", root="x", edits=str(root), **options)
  return sources.make_edit_source(config, split, 4, file)


@pytest.mark.parametrize("target", ["file_name", "output_file_name"])
@pytest.mark.parametrize("source", ["source_file_name", "input_file_name"])
@pytest.mark.parametrize("text", ["instruction", "edit_prompt"])
def test_a_row_is_an_edit(tmp_path, target, source, text, caplog):
  write(tmp_path, target=target, source=source, text=text)
  edits = edit_folder.EditFolderSource(tmp_path)
  assert len(edits) == COUNT
  for i in range(COUNT):
    element = edits[i]
    assert set(element) == {"source", "target", "instruction", "index", "path"}
    assert (element["source"] == i).all()
    assert (element["target"] == 100 + i).all()
    assert element["target"].shape == (4, 5, 3)
    assert element["instruction"] == f"make it {i}"
    assert element["index"] == i and isinstance(element["index"], np.int64)
  assert not caplog.records  # images to be edited are not left out
  copied = pickle.loads(pickle.dumps(edits))
  assert copied[3]["instruction"] == "make it 3"
  with pytest.raises(IndexError):
    edits[COUNT]


def test_csv_with_edits_of_one_image(tmp_path):
  write(tmp_path, rows=[])
  (tmp_path / "metadata.jsonl").unlink()
  lines = ["input_file_name,output_file_name,instruction"]
  lines += ["before/01.png,after/01.png,up", "before/01.png,after/02.png,down"]
  (tmp_path / "metadata.csv").write_text("\n".join(lines))
  edits = edit_folder.EditFolderSource(tmp_path)
  assert [edits[i]["instruction"] for i in range(2)] == ["up", "down"]
  assert (edits[0]["source"] == edits[1]["source"]).all()
  assert (edits[0]["target"] != edits[1]["target"]).all()


def test_all_edits_of_an_image_are_on_one_side(tmp_path):
  rows = [
    row(i) | {"source_file_name": f"before/{i % 3:02d}.png"}
    for i in range(COUNT)
  ]
  write(tmp_path, rows)
  values = {}
  for split in sources.SPLITS:
    edits = make(tmp_path, split)
    images = [edits[i]["source"] for i in range(len(edits))]
    values[split] = {int(image[0, 0, 0]) for image in images}
  assert values["train"] and values["validation"]
  assert not values["train"] & values["validation"]


def test_a_folder_for_validation(tmp_path):
  write(tmp_path / "a")
  write(tmp_path / "b")
  settings = {"eval_edits": str(tmp_path / "b"), "num_train": 7}
  assert len(make(tmp_path / "a", **settings)) == 7
  validation = make(tmp_path / "a", "validation", **settings)
  assert len(validation) == COUNT
  assert validation.source.root == str(tmp_path / "b")


def break_source(root):
  (root / "before" / "05.png").write_bytes(b"<html>")


def break_target(root):
  (root / "after" / "05.png").write_bytes(b"")


def remove_source(root):
  (root / "before" / "05.png").unlink()


def resize_source(root):
  write_image(root / "before" / "05.png", 5, (4, 5))


@pytest.mark.parametrize(
  "damage, cause",
  [
    (break_source, "before/05.png"),
    (break_target, "after/05.png"),
    (remove_source, "before/05.png"),
    (resize_source, "before/05.png is 5 × 4 and after/05.png is 4 × 5"),
  ],
)
def test_one_bad_image_skips_the_edit(tmp_path, damage, cause):
  root, file = write(tmp_path / "edits"), tmp_path / "quarantine.jsonl"
  damage(root)
  edits = edit_folder.EditFolderSource(root)
  with pytest.raises((ValueError, OSError), match=cause):
    edits[5]
  for split in sources.SPLITS:
    guarded = make(root, split, file, eval_edits=str(root), num_eval=0)
    examples = views.EditExamples(guarded)
    found = [int(examples[i]["index"]) for i in range(len(examples))]
    assert [i for i in range(COUNT) if found[i] != i] == [5]
  entries = quarantine.read(file)
  assert [entry["split"] for entry in entries] == list(sources.SPLITS)
  for entry in entries:
    assert entry["path"] == "after/05.png" and cause in entry["cause"]
    assert entry["source"] == f"{root} (edits)" and entry["kind"] == "image"


def test_a_removed_target_keeps_its_place(tmp_path):
  root, file = write(tmp_path / "edits"), tmp_path / "quarantine.jsonl"
  break_target(root)
  before = make(root, file=file, eval_edits="elsewhere")
  paths = [before.path(i) for i in range(len(before))]
  assert before[5]["index"] != 5
  (root / "after" / "05.png").unlink()
  rows = [row(i) for i in range(COUNT) if i != 5]
  write_rows = "".join(json.dumps(row) + "\n" for row in rows)
  (root / "metadata.jsonl").write_text(write_rows)
  after = make(root, file=file, eval_edits="elsewhere")
  assert [after.path(i) for i in range(len(after))] == paths
  assert after[5]["index"] == before[5]["index"]


@pytest.mark.parametrize(
  "changes, kind, cause",
  [
    ({"source_file_name": None}, "image", "'source_file_name' or 'input_file"),
    ({"source_file_name": "../x.png"}, "image", "outside the image folder"),
    ({"instruction": None}, "caption", "'instruction' must be text, not null"),
    ({"instruction": " "}, "caption", "'instruction' is empty"),
    ({"file_name": "after/no.png"}, "image", "does not exist"),
  ],
)
def test_broken_rows_are_bad_records(tmp_path, changes, kind, cause):
  rows = [row(i) for i in range(COUNT)]
  rows[5] |= changes
  write(tmp_path / "edits", rows)
  file = tmp_path / "quarantine.jsonl"
  edits = make(tmp_path / "edits", file=file, eval_edits="elsewhere")
  assert len(edits) == COUNT
  (entry,) = quarantine.read(file)
  assert entry["kind"] == kind and cause in entry["cause"]
  assert "metadata.jsonl:6" in entry["cause"]


def test_folders_that_hold_no_edits(tmp_path):
  write(tmp_path / "a", [{"file_name": "after/01.png", "text": "a cat"}])
  with pytest.raises(ValueError, match="None of the 1 .*'source_file_name'"):
    edit_folder.EditFolderSource(tmp_path / "a")
  no_text = {"file_name": "after/01.png", "source_file_name": "before/01.png"}
  write(tmp_path / "b", [no_text])
  with pytest.raises(ValueError, match="no instruction under 'instruction' or"):
    edit_folder.EditFolderSource(tmp_path / "b")
  (tmp_path / "b" / "metadata.jsonl").unlink()
  with pytest.raises(ValueError, match="neither metadata.jsonl nor .*rows nam"):
    edit_folder.EditFolderSource(tmp_path / "b")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    edit_folder.EditFolderSource(tmp_path / "c")


def test_batches_crop_both_images_alike(tmp_path):
  write(tmp_path)
  examples = views.EditExamples(make(tmp_path, eval_edits="elsewhere"))
  batch = next(
    pipeline.train_iterator(
      examples,
      image_size=4,
      batch_size=COUNT,
      seed=0,
      augment="crop",
      num_threads=0,
    )
  )
  assert set(batch) == {"image", "source", "index"}
  np.testing.assert_array_equal(batch["image"], batch["source"] + 100)
  assert sorted(batch["index"]) == list(range(COUNT))
