"""Generator jobs on other data than scenes: classes, and folders of edits."""

import importlib.util
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import tiny
import tiny_generator_job
from PIL import Image

from psvae_jax import main, stages
from psvae_jax.config import ConfigError
from psvae_jax.config import parser as config_parser
from psvae_jax.data import quarantine
from psvae_jax.data.cached import CachedSource
from psvae_jax.data.sources import SPLITS
from psvae_jax.latent_stats import LatentStats
from psvae_jax.report import pictures
from psvae_jax.tasks.generator import GeneratorTask
from psvae_jax.tasks.latent_data import STATS_FILE, LatentData


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
  """A workdir with an autoencoder and nothing else."""
  folder = tmp_path_factory.mktemp("autoencoder")
  encoder = tiny.save_encoder(folder / "encoder")
  tiny_generator_job.train_autoencoder(encoder, folder / "job")
  return folder / "job"


def config(*stages, **data):
  raw = tiny_generator_job.config(*stages, steps=1)
  raw.data = dict(num_threads=1, augment="center", **data)
  raw.eval.update(probe="none", num_images=6)
  return raw


def summary_of(workdir, stage):
  return json.loads((workdir / "summary.json").read_text())[stage]


def prepare_builder(folder):
  pytest.importorskip("array_record")
  tests = pathlib.Path(__file__).parents[1]
  path = tests / "data" / "tiny_tfds.py"
  spec = importlib.util.spec_from_file_location("tiny_tfds", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  module.prepare(folder)
  return {"source": "tfds", "builder": "tiny_pictures", "root": str(folder)}


def write_images(root):
  """Captioned images, and beside them edits, of which two are broken."""
  rng = np.random.default_rng(0)
  for split in SPLITS:
    images, edits = root / split / "images", root / split / "edits"
    for folder in (images, edits):
      folder.mkdir(parents=True)
    rows = []
    for i in range(10):
      pixels = rng.integers(0, 256, (42, 50, 3), np.uint8)
      Image.fromarray(pixels).save(images / f"{i}.png")
      Image.fromarray(pixels).save(edits / f"before-{i}.png")
      pixels = 255 - pixels[:, : 50 - (i == 3)]  # another size
      Image.fromarray(pixels).save(edits / f"after-{i}.png")
      rows.append((f"{i}.png", f"picture {i}"))
    (edits / "before-7.png").write_bytes(b"")
    lines = [{"file_name": name, "text": text} for name, text in rows]
    write_rows(images, lines)
    lines = [
      {"file_name": f"after-{name}", "source_file_name": f"before-{name}"}
      | {"instruction": f"invert the {text}"}
      for name, text in rows
    ]
    write_rows(edits, lines)


def write_rows(folder, rows):
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metadata.jsonl").write_text(lines)


def folders_of(root):
  names = ("root", "eval_root", "edits", "eval_edits")
  kinds = ("images", "edits")
  folders = [str(root / split / kind) for kind in kinds for split in SPLITS]
  settings = dict(zip(names, folders, strict=True))
  return {"source": "folder", "max_bad_share": 0.2, **settings}


class Pixels:
  """Stands where an autoencoder would: nothing here encodes."""

  output_size = image_size = 40
  latent_fingerprint = "ours"


def latent_data(raw, workdir):
  return LatentData(config_parser.parse(raw), workdir, Pixels(), None, None)


def test_held_out_edits_of_a_folder(tmp_path):
  write_images(tmp_path)
  data = latent_data(config("edit", **folders_of(tmp_path)), tmp_path)
  (first, last) = data.held_out("edit", 10)
  assert first["image"].shape == first["source"].shape == (8, 40, 40, 3)
  # 3 and 7 are broken, and after 9 there are no more.
  wanted = [[1, 1, 1, 0, 1, 1, 1, 0], [1, 1] + [0] * 6]
  np.testing.assert_array_equal([first["mask"], last["mask"]], wanted)
  changed = first["mask"][:, None, None, None] & (
    abs(255 - first["source"].astype(int) - first["image"]) > 1
  )
  assert not changed.any()


def test_statistics_of_other_data_are_refused(tmp_path):
  raw = config("t2i", source="scenes", num_train=24)
  raw.cache.update(enabled=False)
  description = latent_data(raw, tmp_path)._viewed("t2i", False).description
  numbers = np.ones(2, np.float32)
  stats = LatentStats(numbers, numbers, 24, "ours", description)
  stats.save(tmp_path / STATS_FILE)
  assert latent_data(raw, tmp_path).prepare(["t2i"]).count == 24
  for change in ({"num_train": 23}, {"seed": 1}):
    other = raw.copy_and_resolve_references()
    other.data.update(change)
    with pytest.raises(ValueError, match=f"{STATS_FILE} has .* of other"):
      latent_data(other, tmp_path).prepare(["t2i"])
    # A later stage keeps to what `t2i` saw, on whatever data.
    other.stages = ("edit",)
    assert latent_data(other, tmp_path).prepare(["edit"]).count == 24


def test_a_grid_without_a_step_is_an_error():
  raw = config("t2i", source="scenes")
  raw.sample.update(grid="rae", steps=2)
  config_parser.parse(raw)
  raw.sample.steps = 1
  with pytest.raises(ConfigError, match="sample.steps=1 would leave none"):
    config_parser.parse(raw)


def test_held_out_classes(tmp_path):
  raw = config("t2i", **prepare_builder(tmp_path / "data"))
  raw.model.update(condition="class", num_classes=3)
  data = latent_data(raw, tmp_path)
  (batch,) = data.held_out("t2i", 6)
  assert sorted(batch["label"][batch["mask"]]) == [0, 0, 1, 1, 2, 2]
  with_classes = config_parser.parse(raw)
  stages.check_data(Pixels(), with_classes, tmp_path)
  raw.model.num_classes = 2
  with pytest.raises(ConfigError, match="num_classes=2 is too small.*=3"):
    stages.check_data(Pixels(), config_parser.parse(raw), tmp_path)


def test_data_are_checked_before_any_training(tmp_path):
  write_images(tmp_path)
  raw = config("t2i", "edit", **folders_of(tmp_path))
  stages.check_data(Pixels(), config_parser.parse(raw), tmp_path)
  raw.data.eval_edits = str(tmp_path / "validation" / "images")
  with pytest.raises(ValueError, match="no file name under 'source_file_name'"):
    stages.check_data(Pixels(), config_parser.parse(raw), tmp_path)


def test_an_unknown_class_is_the_null_one():
  model = types.SimpleNamespace(num_classes=7)
  task = types.SimpleNamespace(
    text_encoder=None, config=types.SimpleNamespace(model=model)
  )
  batch = {"label": np.array([0, -1, 6], np.int32)}
  found = GeneratorTask._condition(task, {}, batch)
  np.testing.assert_array_equal(found["labels"], [0, 7, 6])


@pytest.mark.slow
def test_a_job_on_classes(autoencoder, tmp_path):
  workdir = tmp_path / "job"
  shutil.copytree(autoencoder, workdir)
  raw = config("t2i", **prepare_builder(tmp_path / "data"))
  raw.model.update(condition="class", num_classes=2)
  del raw.model["text_length"]
  with pytest.raises(ConfigError, match="num_classes=2 is too small.*=3"):
    main.run(raw, workdir)
  assert not (workdir / "cache").exists()
  raw.model.num_classes = 3
  main.run(raw, workdir)
  figures = summary_of(workdir, "t2i")
  assert {"eval/loss", "eval/frechet_distance"} <= set(figures)
  assert np.isfinite(list(figures.values())).all()
  with np.load(workdir / "t2i" / "generated.npz") as arrays:
    assert list(arrays["captions"]) == ["0", "1", "2"]
  cached = CachedSource(workdir / "cache" / "t2i")
  assert {int(cached[i]["label"]) for i in range(len(cached))} == {0, 1, 2}


@pytest.mark.slow
def test_a_job_on_a_folder_of_edits(autoencoder, tmp_path):
  workdir, root = tmp_path / "job", tmp_path / "data"
  shutil.copytree(autoencoder, workdir)
  write_images(root)
  main.run(config("t2i", "edit", **folders_of(root)), workdir)
  figures = summary_of(workdir, "edit")
  assert {"eval/loss", "eval/edit_loss"} <= set(figures)
  assert not {"eval/edit_success", "eval/preservation_psnr"} & set(figures)
  notices = []
  found = pictures.read_pictures(workdir / "edit", notices).edits
  assert not notices and "correct" not in found
  assert list(found["instructions"]) == [
    f"invert the picture {i}" for i in range(10) if i not in (3, 7)
  ]
  cached = CachedSource(workdir / "cache" / "edit")
  assert len(cached) == 10 and "source_latent" in cached[0]
  assert not {int(cached[i]["index"]) for i in range(10)} & {3, 7}
  entries = quarantine.read(workdir / "quarantine.jsonl")
  assert {(entry["split"], entry["path"]) for entry in entries} == {
    (split, f"after-{i}.png") for split in SPLITS for i in (3, 7)
  }
  assert "invert the picture 0" in (workdir / "report.html").read_text()
