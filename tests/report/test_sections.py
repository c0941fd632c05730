"""What stands in the report's sections, and what does not."""

import re

import numpy as np
import pytest
from workdirs import (
  Page,
  change_config,
  make_adversarial_run,
  make_run,
  page_of,
)

from psvae_jax import writers
from psvae_jax.report import write_report


@pytest.fixture
def workdir(tmp_path):
  return make_run(tmp_path / "run")


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
  entry = b'{"split": 1, "source": [], "index": 2, "path": 3, "kind": {}}'
  lines = (b"\xff", b"[1]", b'{"path": 3}', entry)
  (workdir / "quarantine.jsonl").write_bytes(b"\n".join(lines))
  writers.update_summary(workdir, {"timings": {"svae": 3, "psvae": "x"}})
  page = page_of(workdir)
  assert "1 unusable record left out of the data" in page.text
  assert page.ids[-1] == "run"
