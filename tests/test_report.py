"""The report: complete, self-contained, safe, and content with less."""

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import PIL.Image
import pytest
from workdirs import add_stage, change_config, make_adversarial_run, make_run

from psvae_jax import writers
from psvae_jax.report import write_report
from psvae_jax.report_data import read_run
from psvae_jax.report_figures import Curve, curve_svg
from psvae_jax.report_images import absolute_error, data_uri, heat, image_psnr
from psvae_jax.report_metrics import describe, format_value

VOID = {"meta", "img", "use", "br"}


class Page(html.parser.HTMLParser):
  """Parses strictly: what is opened is closed, in order."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.tags, self.attributes = [], [], []
    self.words, self.ids = [], []
    self.feed(text)
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag == "section":
      self.ids.append(dict(attrs)["id"])
    if tag not in VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.stack.pop() == tag

  def handle_data(self, data):
    if self.stack and self.stack[-1] != "style":
      self.words.append(data)

  @property
  def text(self):
    return " ".join(self.words)


def page_of(workdir):
  return Page(write_report(workdir).read_text(encoding="utf-8"))


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


def rows_of(text, title):
  """Cells by row name of the table whose first head is `title`."""
  (table,) = re.findall(
    rf"<table>\n<thead><tr><th[^>]*>{title}<.*?</table>", text, re.DOTALL
  )
  rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', table)
  return {
    re.split("<", row)[0]: re.findall(r"<td[^>]*>(.*?)</td>", row)
    for row in rows
  }


def test_probe_floors_stand_below_the_stages(workdir):
  writers.update_summary(
    workdir, {"psvae": {"eval/probe_accuracy_decoded": 0.875}}
  )
  text = write_report(workdir).read_text(encoding="utf-8")
  assert rows_of(text, "Balanced accuracy") == {
    "S-VAE": ["91.2 %", "", ""],
    "PS-VAE": ["91.2 %", "", "87.5 %"],
    "Frozen encoder": ["93.4 %", "", ""],
    "Random encoder": ["22.2 %", "", ""],
    "Chance": ["7.1 %", "7.1 %", "7.1 %"],
  }


def test_the_best_stage_is_bold_and_a_reference_never(workdir):
  writers.update_summary(
    workdir,
    {
      "encoder": {"eval/psnr": 99.0},
      "svae": {"eval/ssim": 0.5},
      "psvae": {"eval/ssim": 0.5},
    },
  )
  text = write_report(workdir).read_text(encoding="utf-8")
  (row,) = re.findall(r"<tr><th[^>]*>PSNR.*?</tr>", text)
  assert re.findall(r"<b>(.*?)</b>", row) == ["27.25 dB"]
  assert "99.00 dB" in row
  (row,) = re.findall(r"<tr><th[^>]*>SSIM.*?</tr>", text)
  assert "<b>" not in row  # both stages read 0.500


def test_an_adversarial_run_has_what_belongs_to_it(tmp_path):
  workdir = make_adversarial_run(tmp_path / "run")
  text = write_report(workdir).read_text(encoding="utf-8")
  page = Page(text)
  assert page.ids == [
    "results",
    "images",
    "features",
    "curves",
    "latents",
    "run",
  ]
  assert [v for k, v in page.attributes if k == "href"] == [
    f"#{name}" for name in page.ids
  ]
  sharpness = rows_of(text, "PS-VAE")["Sharpness"]
  assert sharpness == ["0.625", "0.875"]  # at steps 30 and 60; felt from 45
  for words in (
    "configs/psvae.py",
    "scenes, 48 × 48",
    "0.25 × λ, from step 40 (decoder from 45)",
    "Logits: real, fake (dashed)",
    "0.5 · −1.1",
    "2 unusable records left out of the data",
    "2 non-finite steps of PS-VAE skipped",
    "a/broken.jpg",
    "15s (20 %)",
    "Held-out scenes",
    "Photographs",
    "picture 2",
  ):
    assert words in page.text, words


def test_marks_stand_where_the_adversarial_term_begins():
  curve = Curve(0, np.arange(100.0), np.ones(100))
  plain = curve_svg([curve], bounds=[40, 100])
  marked = curve_svg([curve], bounds=[40, 100], marks=[80, 80, 85])
  places = re.compile(r'<path d="M ([\d.]+) [\d.]+ \nL \1 ')
  lines = {float(x) for x in places.findall(marked)}
  new = sorted(lines - {float(x) for x in places.findall(plain)})
  (bound,) = (float(x) for x in places.findall(plain))
  assert len(new) == 2
  assert (new[0] - bound) / (new[1] - bound) == pytest.approx(40 / 45, abs=1e-3)


def test_features_stand_in_the_order_frozen_tuned_decoded(tmp_path):
  page = page_of(make_adversarial_run(tmp_path / "run"))
  alts = [v for k, v in page.attributes if k == "alt"]
  features = [v for v in alts if v.startswith("features ")]
  assert features[:4] == [
    "features f, frozen: picture 0",
    "features f″, S-VAE: picture 0",
    "features f′, PS-VAE: picture 0",
    "features f″, PS-VAE: picture 0",
  ]
  assert len(features) == 2 * 3 * 4  # sets, images, columns
  channels = [v for v in alts if v.startswith("channel ")]
  assert channels[:2] == [
    "channel 1 of S-VAE: picture 0",
    "channel 4 of S-VAE: picture 0",
  ]
  errors = [v for v in alts if v.startswith("error of ")]
  assert len(errors) == 2 * 3 * 2  # of both stages
  assert all(alts)


def test_pictures_that_could_not_be_made_leave_their_reason(workdir):
  path = workdir / "svae" / "samples" / "photographs.npz"
  np.savez(path, note=np.array("scikit-image is not installed"))
  page = page_of(workdir)
  assert "Photographs" in page.text
  assert "scikit-image is not installed" in page.text


def test_pictures_of_a_wrong_form_are_passed_over(workdir):
  for name in ("features_frozen", "latent", "latent_channel"):
    path = workdir / "svae" / "samples" / "validation.npz"
    with np.load(path) as saved:
      arrays = dict(saved)
    np.savez(path, **arrays, **{name: np.zeros((3, 1))})
    assert page_of(workdir).tags.count("img") == 15


@pytest.mark.parametrize(
  ("loss", "words"),
  [
    ({"gan": 0.5, "gan_start": 55}, "nothing was evaluated after that yet"),
    ({"gan": 0.5, "gan_start": 10}, "was evaluated before that"),
    ({"gan": 0.0, "gan_start": 10}, None),
  ],
)
def test_sharpness_without_a_pair_to_compare(workdir, loss, words):
  with writers.MetricWriter(workdir / "psvae", start_step=60) as writer:
    writer.write(50, {"eval/sharpness": 0.5})
  change_config(workdir, psvae={"loss": loss})
  text = page_of(workdir).text
  if words:
    assert words in text
  else:
    assert "adversarial" not in text


def test_settings_of_any_kind_do_no_harm(workdir):
  strange = {"loss": {"gan": "x"}, "optim": 3, "train": None}
  change_config(workdir, data=[1], model="m", svae=strange, psvae=7)
  (workdir / "quarantine.jsonl").write_bytes(b'\xff\n[1]\n{"path": 3}\n')
  writers.update_summary(workdir, {"timings": {"svae": 3, "psvae": "x"}})
  page = page_of(workdir)
  assert "1 unusable record left out of the data" in page.text
  assert page.ids[-1] == "run"


def test_large_pictures_are_reduced_and_small_ones_exact():
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (48, 48, 3), np.uint8)
  np.testing.assert_array_equal(decoded(data_uri(small)), small)
  large = rng.integers(0, 256, (512, 384, 3), np.uint8)
  assert decoded(data_uri(large)).shape == (256, 192, 3)


def decoded(address):
  data = base64.b64decode(address.split(",")[1])
  return np.asarray(PIL.Image.open(io.BytesIO(data)))


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


def test_long_curves_are_thinned_and_keep_their_range():
  steps = np.arange(1.0, 50_001)
  svg = curve_svg([Curve(0, steps, np.sin(steps / 8000))])
  assert len(svg) < 60_000
  assert "var(--s0)" in svg
  assert not re.search("#[0-9a-f]{6}", svg.replace("#ffffff", ""))


def test_a_few_bad_values_leave_no_hole_in_a_thinned_curve():
  values = np.full(30_000, 0.5)
  values[::40] = math.nan
  values[1::40] = math.inf
  svg = curve_svg([Curve(0, np.arange(30_000.0), values)])
  lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--s0\)', svg)
  assert len(lines) == 2  # as it is, and smoothed
  for line in lines:
    assert line.count("M") == 1  # drawn in one stroke
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", line)]
    assert max(xs) - min(xs) > 200  # of 288 units


def test_the_same_run_gives_the_same_page(workdir):
  first = write_report(workdir).read_bytes()
  assert write_report(workdir).read_bytes() == first


def test_image_figures():
  a = np.full((2, 2, 3), 10, np.uint8)
  b = np.full((2, 2, 3), 30, np.uint8)
  assert image_psnr(a, a) == math.inf
  assert image_psnr(a, b) == pytest.approx(20 * math.log10(255 / 20))
  assert absolute_error(a, b).max() == absolute_error(b, a).min() == 80
  assert absolute_error(a, b, gain=20).min() == 255
  lightness = heat(np.arange(256, dtype=np.uint8)[None])[0].sum(-1, dtype=int)
  assert (np.diff(lightness) >= 0).all() and lightness[0] == 0


@pytest.mark.parametrize(
  ("name", "value", "text"),
  [
    ("eval/psnr", 27.3, "27.30 dB"),
    ("eval/probe_accuracy", 0.9315, "93.2 %"),
    ("eval/checker_shape", 0.5, "50.0 %"),
    ("anything", 3.0, "3"),
    ("anything", -0.123456, "−0.1235"),
    ("anything", math.nan, "NaN"),
    ("anything", -math.inf, "−∞"),
    ("anything", "text", "text"),
  ],
)
def test_values_read_well(name, value, text):
  assert format_value(name, value) == text


def test_unknown_metrics_keep_their_name():
  assert describe("train/never_seen").label == "train/never_seen"
  assert describe("train/grad_norm/pixel_decoder").label == (
    "Gradient norm, pixel decoder"
  )
