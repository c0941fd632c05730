"""The report of a generator: pictures, figures, settings, broken files."""

import re

import numpy as np
import pytest
from generator_workdirs import (
  NUM_IMAGES,
  add_edits,
  add_generator,
  add_pictures,
)
from workdirs import Page, change_config, make_run, page_of

from psvae_jax import writers
from psvae_jax.data import scenes
from psvae_jax.report import write_report
from psvae_jax.report.metrics import describe, format_value, is_part
from psvae_jax.report.pictures import captions_of, marks_of, read_pictures
from psvae_jax.report.references import reference_of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  workdir = make_run(tmp_path_factory.mktemp("generator") / "run", full=True)
  add_generator(workdir)
  path = write_report(workdir)
  assert path.stat().st_size < 5_000_000
  return path.read_text(encoding="utf-8")


@pytest.fixture
def workdir(tmp_path):
  """A text-to-image stage alone."""
  with writers.MetricWriter(tmp_path / "t2i") as writer:
    writer.write(40, {"eval/joint_accuracy": 0.5})
  add_pictures(tmp_path / "t2i", 40, 16, NUM_IMAGES)
  return tmp_path


def alts_of(page):
  return [value for name, value in page.attributes if name == "alt"]


def row_of(text, label):
  """Cells of the one row whose name begins so."""
  (row,) = re.findall(
    rf'<tr><th scope="row">{re.escape(label)}.*?</tr>', text, re.DOTALL
  )
  return [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", row)]


def column_of(text, label):
  """Titles over the row whose name begins so."""
  before = text.split(f'<th scope="row">{label}')[0]
  head = before.split("<thead>")[-1].split("</thead>")[0]
  return re.findall(r'scope="col">([^<]*)', head)[1:]


def test_a_whole_experiment_has_every_section(text):
  page = Page(text)
  assert page.ids == [
    "results",
    "generated",
    "edits",
    "images",
    "curves",
    "latents",
    "run",
  ]
  assert "S-VAE → PS-VAE → Text to image → Editing" in page.text
  for words in (
    "8 blocks of width 192, 6 heads; velocity head of 2 blocks of width 384",
    "text by the embedded miniature, 16 tokens",
    "of this workdir; cached as float16",
    "latent space 0123456789abcdef",
    "Euler, 50 steps, uniform grid, shift 1",
    "4, source image 1.5, for t from 0 to 0.9",
    "64, 75 % of it edits",
    "condition 10 %, source 20 %",
    "logit-normal (0, 1), shift by latent size",
  ):
    assert words in page.text, words
  assert "Left out" not in page.text


def test_tiles_say_the_best_that_could_be(text):
  tiles = re.findall(
    r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>(?:<small>(.*?)<)?', text
  )
  assert tiles[:4] == [
    (
      "72.0 %",
      "Joint accuracy · Editing",
      "ceiling 96.0 %, Text to image 74.0 %",
    ),
    (
      "88.0 %",
      "Joint accuracy, one object · Editing",
      "ceiling 98.0 %, Text to image 88.0 %",
    ),
    (
      "12.5",
      "Fréchet distance · Editing",
      "at best 7.5, Text to image 12.5",
    ),
    ("66.0 %", "Edit success · Editing", "ceiling 94.0 %"),
  ]
  assert tiles[4][1] == "PSNR · PS-VAE"


def test_figures_stand_beside_what_they_compare_with(text):
  assert column_of(text, "Joint accuracy") == [
    "Text to image",
    "Editing",
    "Ceiling",
    "Real",
  ]
  assert row_of(text, "Joint accuracy\u00a0↑") == [
    "74.0 %",
    "72.0 %",
    "96.0 %",
    "",
  ]
  assert row_of(text, "Fréchet distance\u00a0↓") == [
    "12.5",
    "12.5",
    "7.5",
    "6.25",
  ]
  assert row_of(text, "Caption similarity\u00a0↑")[2:] == ["", "0.920"]
  assert row_of(text, "Distance to real latents")[2:] == ["", "0.625"]
  assert column_of(text, "Edit success") == [
    "Editing",
    "Ceiling",
    "Source as it is",
    "Drawn anew",
  ]
  assert row_of(text, "Edit success\u00a0↑") == [
    "66.0 %",
    "94.0 %",
    "0.0 %",
    "12.5 %",
  ]
  # The autoencoder's figures have no columns of the generator's.
  assert column_of(text, "PSNR\u00a0↑") == ["S-VAE", "PS-VAE"]
  assert row_of(text, "Right, colour\u00a0↑")[2] == "99.5 %"


def test_every_picture_says_whether_it_is_right(text):
  alts = alts_of(Page(text))
  generated = [alt for alt in alts if alt.startswith("generated")]
  assert len(generated) == 2 * NUM_IMAGES
  caption = scenes.SceneSource("validation", 2, 48)[1]["caption"]
  assert f"generated, wrong: {caption}" in generated
  wrong = re.findall(r"<figure.class=.shot.>(.*?)</figure>", text)
  marks = ["✗ wrong" in shot for shot in wrong]
  assert marks == [i % 3 == 1 for i in range(NUM_IMAGES)] * 2
  assert ['class="pixelated bad"' in shot for shot in wrong] == marks
  assert [">✓ <" in shot for shot in wrong] == [not mark for mark in marks]
  assert "4 of 6 (67 %) are right" in text
  # 4 captions at 4 steps, the last being the evaluation's.
  steps = [alt for alt in alts if alt.startswith("step ")]
  assert len(steps) == 2 * 4 * 4
  assert "Right: 0 of 4 at step 10, 3 of 4 at 20, 3 of 4 at 30" in text
  grid = [alt for alt in alts if alt.startswith("guidance ")]
  assert len(grid) == 2 * 2 * 4 * 3
  assert any(alt.startswith("guidance 2.5, 25 steps, right:") for alt in grid)
  strips = [alt for alt in alts if alt.startswith("estimate at t = ")]
  assert len(strips) == 2 * 3 * 6


def test_an_edit_is_source_result_and_target(text):
  section = text.split('<section id="edits">')[1].split("</section>")[0]
  edit = scenes.edit_triple("validation", 0)
  assert [a for a in alts_of(Page(section)) if edit["instruction"] in a] == [
    f"source: {edit['instruction']}",
    f"result, right: {edit['instruction']}",
    f"target: {edit['instruction']}",
  ]
  assert section.count("✗ wrong") == NUM_IMAGES // 2
  assert "3 of 6 (50 %) are right" in section


def test_curves_are_the_generators_own(text):
  curves = text.split('<section id="curves">')[1].split("</section>")[0]
  own, others = curves.split("<summary>Of the autoencoder</summary>")
  assert "train/loss" in own and "train/loss" in others
  assert "eval/loss_t0.1" in own
  # Measured once a stage, these are no curves.
  assert "eval/frechet_distance" not in curves
  assert "_ceiling" not in curves


def test_a_stage_in_progress_shows_its_pictures(workdir):
  (workdir / "t2i" / "generated.npz").unlink()
  (workdir / "t2i" / "generated_50.partial.npz").write_bytes(b"PK")
  page = page_of(workdir)
  assert "Right: 0 of 4 at step 10, 3 of 4 at 20, 3 of 4 at 30." in page.text
  assert "Left out" not in page.text
  assert not any(alt.startswith("generated") for alt in alts_of(page))


@pytest.mark.parametrize(
  ("file", "arrays", "words"),
  [
    ("generated", {"correct": np.ones(2, bool)}, "'correct' has 2 entries"),
    ("generated", {"images": np.zeros((6, 4, 4, 3))}, "does not hold images"),
    ("generated_10", {"captions": np.ones(4)}, "does not hold text"),
    ("guidance_grid", {"steps": np.ones(7)}, "'steps' has 7 entries, not 3"),
    ("denoising", {"times": None}, "array 'times' is missing"),
    ("edits", {"target": None}, "array 'target' is missing"),
  ],
)
def test_pictures_of_another_form_are_left_out_and_named(
  workdir, file, arrays, words
):
  add_edits(workdir / "t2i", 16, NUM_IMAGES)
  before = page_of(workdir)
  path = workdir / "t2i" / f"{file}.npz"
  with np.load(path) as saved:
    changed = {**saved, **arrays}
  np.savez(path, **{k: v for k, v in changed.items() if v is not None})
  page = page_of(workdir)
  assert f"Left out: t2i/{file}.npz: array" in page.text
  assert words in page.text
  assert page.tags.count("img") < before.tags.count("img")


@pytest.mark.parametrize("file", ["generated", "generated_20", "denoising"])
def test_a_broken_file_is_left_out_and_named(workdir, file):
  path = workdir / "t2i" / f"{file}.npz"
  path.write_bytes(path.read_bytes()[:-40])
  page = page_of(workdir)
  assert f"t2i/{file}.npz is not a readable .npz" in page.text
  assert "generated" in page.ids


def test_without_a_checker_nothing_is_marked(workdir):
  """Real captions, or classes: no judge, no marks."""
  for path in (workdir / "t2i").glob("*.npz"):
    with np.load(path) as saved:
      arrays = {k: v for k, v in saved.items() if k != "correct"}
    if "captions" in arrays and path.stem != "denoising":
      arrays["captions"] = np.array(["7"] * len(arrays["captions"]))
    np.savez(path, **arrays)
  writers.write_json_atomic(workdir / "config.json", {"stages": ["t2i"]})
  change_config(workdir, model={"condition": "class", "num_classes": 1000})
  page = page_of(workdir)
  assert "1,000 classes" in page.text
  assert "generated: class 7" in alts_of(page)
  marks = ("✓", "✗", "wrong", "are right", "Right:")
  assert not any(mark in page.text for mark in marks)


def test_many_pictures_unfold_and_are_counted(workdir):
  path = workdir / "t2i" / "generated.npz"
  images = np.zeros((100, 8, 8, 3), np.uint8)
  np.savez(path, images=images, correct=np.arange(100) < 25)
  page = page_of(workdir)
  assert sum(a.startswith("generated") for a in alts_of(page)) == 64
  assert "25 of 100 (25 %) are right" in page.text
  assert "The first 64 of 100 are shown." in page.text
  assert "40 more" in page.text


def test_settings_of_any_kind_do_no_harm(workdir):
  config = {
    "stages": ["t2i"],
    "model": {"condition": "class", "num_classes": "x", "dit": {"width": 3}},
    "autoencoder": {"path": 3},
    "cache": [],
    "sample": {"solver": 1, "steps": "x", "guidance": None},
    "t2i": {"loss": {"time_mean": "x", "text_dropout": []}, "train": 1},
  }
  writers.write_json_atomic(workdir / "config.json", config)
  (workdir / "latent_stats.json").write_text('{"count": "x", "fingerprint": 1}')
  assert page_of(workdir).ids[-1] == "run"


def test_readers_of_pictures(workdir):
  notices = []
  found = read_pictures(workdir / "t2i", notices)
  assert found and not notices
  assert list(found.history) == [10, 20, 30]
  assert marks_of(found.guidance_grid).shape == (4, 3, 2)
  assert marks_of(found.denoising).tolist() == [[None] * 6] * 3
  assert captions_of({}, 2) == ["", ""]
  assert not read_pictures(workdir / "none", notices)


def test_endings_name_a_reference():
  for name, expected in {
    "eval/joint_accuracy_heldout_ceiling": (
      "ceiling",
      "eval/joint_accuracy_heldout",
    ),
    "eval/frechet_distance_floor": ("real", "eval/frechet_distance"),
    "eval/caption_similarity_ceiling": ("real", "eval/caption_similarity"),
    "eval/edit_kept_copy": ("copy", "eval/edit_kept"),
    "eval/probe_accuracy_chance": ("chance", "eval/probe_accuracy"),
    "eval/joint_accuracy_heldout": None,
    "train/logits_real": None,
  }.items():
    assert reference_of(name) == expected


def test_parts_of_a_generators_figures_have_names():
  for name, label in {
    "eval/joint_colour_heldout": "Right, colour, held-out",
    "eval/edit_success_recolour": "Edit success, recolour",
    "eval/loss_t0.9": "Loss at t = 0.9",
    "eval/edit_loss_t0.1": "Edit loss at t = 0.1",
  }.items():
    assert is_part(name) and describe(name).label == label
  assert describe("eval/loss").label == "Held-out loss"
  assert describe("train/loss").label == "Loss"
  assert not is_part("train/loss_t2i")
  assert format_value("eval/joint_colour", 0.5) == "50.0 %"
  assert format_value("eval/loss_t0.9", 0.5) == "0.5"
