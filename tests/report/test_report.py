"""The report: complete, self-contained, safe, and content with less."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from workdirs import (
  Page,
  add_stage,
  make_adversarial_run,
  make_run,
  page_of,
)

from psvae_jax import writers
from psvae_jax.data import quarantine
from psvae_jax.report import write_report
from psvae_jax.report.data import read_run


@pytest.fixture
def workdir(tmp_path):
  return make_run(tmp_path / "run")


def test_a_whole_run_has_every_section(tmp_path):
  page = page_of(make_run(tmp_path / "run", full=True))
  assert page.ids == [
    "results",
    "images",
    "curves",
    "latents",
    "run",
  ]
  for words in (
    "S-VAE → PS-VAE",
    "TPU v5e × 4",
    "2m30s",
    "jax 0.10.2",
    "27.25 dB",
    "PS-VAE 60 of 60 steps",
    "Gradient norm, pixel decoder",
    '"batch_size": 32',
  ):
    assert words in page.text, words
  # 3 images: original, and two stages with an error each.
  assert page.tags.count("img") == 15
  # 5 metrics by step, and a statistic by channel in two stages.
  assert page.tags.count("svg") == 7
  assert "unfinished" not in page.text


@pytest.mark.parametrize("make", [make_run, make_adversarial_run])
def test_it_is_one_file_without_scripts_or_addresses(tmp_path, make):
  path = write_report(make(tmp_path / "run"))
  assert path.stat().st_size < 5_000_000
  text = path.read_text(encoding="utf-8")
  assert not re.findall(r"https?:|//|@import|url\((?!#)", _without_data(text))
  page = Page(text)
  assert not {"script", "link", "iframe", "object"} & set(page.tags)
  for name, value in page.attributes:
    if name == "src":
      assert value.startswith(("data:image/png", "data:image/jpeg"))
    if name in ("href", "xlink:href"):
      assert value.startswith("#")
    assert not name.startswith("on")
  assert "prefers-color-scheme: dark" in text
  assert 'name="viewport"' in text


def _without_data(text):
  return re.sub(r"data:image/\w+;base64,[\w+/=]*", "", text)


def test_text_of_the_run_is_escaped(workdir):
  evil = '<script>alert("&")</script>'
  add_stage(workdir, "a<b>&", 3)
  writers.update_summary(workdir, {"device": evil, evil: {f"eval/{evil}": 1.5}})
  config = {"stages": [evil], "note": "</pre>" + evil}
  writers.write_json_atomic(workdir / "config.json", config)
  with writers.MetricWriter(workdir / "t2i") as writer:
    writer.write(1, {f"train/{evil}$x": 1.0})
  folder = workdir / "t2i" / "samples"
  folder.mkdir()
  np.savez(
    folder / "x.npz",
    sample=np.zeros((1, 2, 2, 3), np.uint8),
    c=np.array([evil]),
  )
  page = page_of(workdir)
  assert "script" not in page.tags
  # Device, column, row, curve and caption; JSON writes its quotes differently.
  assert page.text.count(evil) == 5
  assert "</pre><script>alert" in page.text
  assert "a<b>&" in page.text


def test_names_that_are_not_utf_8_are_written_out(tmp_path, caplog):
  name = os.fsdecode(b"caf\xe9.jpg")
  workdir = tmp_path / os.fsdecode(b"r\xfcn")
  workdir.mkdir()
  stage = workdir / "svae"
  with writers.MetricWriter(stage):
    pass
  (stage / "samples").mkdir()
  images = np.zeros((1, 8, 8, 3), np.uint8)
  np.savez(
    stage / "samples" / "validation.npz",
    original=images,
    reconstruction=images,
    caption=np.array([name]),
  )
  quarantine.Quarantine(
    split="train",
    source=str(workdir),
    num_records=10,
    max_bad_share=0.5,
    file=workdir / "quarantine.jsonl",
  ).add({3: (name, quarantine.Fault("image", f"{name}: damaged"))})
  shown = r"caf\udce9.jpg"
  assert f"Skipping {shown}" in caplog.text
  page = page_of(workdir)
  assert f"{shown}: damaged" in page.text
  assert r"r\udcfcn" in page.text
  alts = [value for key, value in page.attributes if key == "alt"]
  assert f"original: {shown}" in alts
  result = subprocess.run(
    [sys.executable, "-m", "psvae_jax.report", workdir],
    env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    check=True,
    capture_output=True,
    text=True,
  )
  assert result.stdout.endswith("r\\udcfcn/report.html\n")


def test_a_run_in_progress_shows_what_there_is(workdir, tmp_path):
  workdir = tmp_path / "running"
  workdir.mkdir()
  add_stage(workdir, "svae", 20, psnr=15.5, final=False)
  with (workdir / "svae" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 21, "train/loss": 0.1}\n{"step": 22, "train/')
  (workdir / "svae" / "samples" / "validation.partial.npz").write_bytes(b"PK")
  config = {"stages": ["svae", "psvae"], "svae": {"train": {"steps": 40}}}
  writers.write_json_atomic(workdir / "config.json", config)
  page = page_of(workdir)
  assert "S-VAE 21 of 40 steps, unfinished" in page.text
  assert "at step 20" in page.text
  assert "15.50 dB" in page.text
  assert "Left out" not in page.text
  assert "PS-VAE" not in page.text.replace('"psvae"', "")
  assert page.tags.count("img") == 9  # original, S-VAE, error


@pytest.mark.parametrize(
  "missing",
  [
    "config.json",
    "summary.json",
    "svae/metrics.jsonl",
    "svae/samples/validation.npz",
    "psvae/samples/validation.npz",
    "psvae/latents.npz",
  ],
)
def test_a_missing_piece_is_left_out(workdir, missing):
  (workdir / missing).unlink()
  page = page_of(workdir)
  assert "results" in page.ids
  assert "Left out" not in page.text
  assert "S-VAE → PS-VAE" in page.text


@pytest.mark.parametrize(
  "broken",
  [
    "config.json",
    "summary.json",
    "svae/samples/validation.npz",
    "svae/latents.npz",
  ],
)
def test_a_broken_piece_is_left_out_and_named(workdir, broken):
  path = workdir / broken
  path.write_bytes(path.read_bytes()[:-40])
  page = page_of(workdir)
  assert "Left out" in page.text
  assert path.name in page.text
  assert "S-VAE → PS-VAE" in page.text


def test_pickled_arrays_are_refused(workdir):
  path = workdir / "svae" / "samples" / "evil.npz"
  np.savez(path, original=np.array([{}], dtype=object))
  text = page_of(workdir).text
  assert "Left out: svae/samples/evil.npz" in text


def test_an_empty_workdir_is_a_page_and_a_missing_one_an_error(tmp_path):
  assert "Nothing has been recorded yet." in page_of(tmp_path).text
  with pytest.raises(FileNotFoundError, match="nowhere"):
    write_report(tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()


def test_non_finite_metrics_are_drawn_around_and_announced(workdir):
  with writers.MetricWriter(workdir / "psvae", start_step=60) as writer:
    writer.write(61, {"train/loss": math.nan})
    writer.write(62, {"train/loss": math.inf, "train/other": math.nan})
    writer.write(63, {"train/loss": 0.25, "perf/images_per_second": math.nan})
  writers.update_summary(workdir, {"svae": {"eval/ssim": math.nan}})
  page = page_of(workdir)
  assert (
    "Non-finite values in PS-VAE: train/loss (first at step 61),"
    " train/other (first at step 62)." in page.text
  )
  assert "No finite value." in page.text
  assert "NaN" in page.text


def test_another_jobs_metrics_are_shown_generically(tmp_path):
  with writers.MetricWriter(tmp_path / "encoder") as writer:
    for step in range(1, 4):
      writer.write(step, {"train/loss_unheard": 1.0, "odd": step})
  writers.update_summary(tmp_path, {"encoder": {"eval/strange_score": 0.5}})
  page = page_of(tmp_path)
  assert "Encoder 3 steps" in page.text
  for name in ("train/loss_unheard", "odd", "eval/strange_score"):
    assert name in page.text
  assert page.tags.count("svg") == 2


def test_stages_of_other_jobs_keep_their_order(workdir):
  add_stage(workdir, "t2i", 5)
  names = [stage.name for stage in read_run(workdir).stages]
  assert names == ["svae", "psvae", "t2i"]
  config = json.dumps({"stages": ["t2i"]})
  (workdir / "config.json").write_text(config)
  names = [stage.name for stage in read_run(workdir).stages]
  assert names == ["svae", "psvae", "t2i"]


def test_stages_with_other_originals_get_their_own_strips(workdir):
  path = workdir / "psvae" / "samples" / "validation.npz"
  images = np.full((3, 8, 8, 3), 7, np.uint8)
  np.savez(path, original=images, reconstruction=images)
  # 3 × (original, S-VAE, error) and 3 × (original, PS-VAE, error).
  assert page_of(workdir).tags.count("img") == 18


def test_a_step_recorded_twice_counts_once(tmp_path):
  with writers.MetricWriter(tmp_path / "svae") as writer:
    for step, value in ((2, 1.0), (1, 5.0), (2, 3.0)):
      writer.write(step, {"train/loss": value})
  steps, values = read_run(tmp_path).stages[0].series("train/loss")
  assert steps.tolist() == [1, 2]
  assert values.tolist() == [5.0, 3.0]


def test_the_same_run_gives_the_same_page(workdir):
  first = write_report(workdir).read_bytes()
  assert write_report(workdir).read_bytes() == first
