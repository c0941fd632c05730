"""Figures of a network: right, repeatable, and compared by the command."""

import copy
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
import vision_reference
from PIL import Image

import psvae_jax
from psvae_jax import verification, verification_reference, verify
from psvae_jax.pretrained import files
from psvae_jax.tasks.generator import EMBEDDED_TEXT_ENCODER


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def run(capsys, *arguments):
  """What the command prints."""
  verify.main([str(argument) for argument in arguments])
  return capsys.readouterr().out


def fails(match, *arguments):
  with pytest.raises(SystemExit, match=match) as error:
    verify.main([str(argument) for argument in arguments])
  assert "\n" not in str(error.value)


@pytest.fixture(name="report", scope="module")
def _report(folder):
  subject = verification.load(folder)
  return verification.report(subject, subject.run())


def test_figures_of_an_encoder(folder, report):
  encoder = psvae_jax.load_encoder(folder)
  inputs = verification.make_inputs(32)
  features = np.asarray(encoder(inputs.pictures), np.float64)
  found = report["outputs"]["features"]
  assert found["shape"] == list(features.shape) == [6, 4, 4, 16]
  lengths = np.linalg.norm(features, axis=-1)
  assert found["norm"] == pytest.approx(lengths.mean(), rel=1e-6)
  assert found["norm_std"] == pytest.approx(lengths.std(), rel=1e-6)
  assert found["std"] == pytest.approx(features.std(), rel=1e-6)
  flat = features.ravel()
  np.testing.assert_allclose(found["leading"], flat[:8], rtol=1e-6)
  step = flat.size // 8
  np.testing.assert_allclose(found["spread"], flat[::step], rtol=1e-6)
  assert report["fingerprint"] == encoder.fingerprint
  assert report["architecture"]["width"] == 16
  block = report["modules"]["blocks"]
  assert (
    block["sha256"] == files.fingerprint_params(encoder.params["blocks"])[:16]
  )
  assert report["parameters"] == sum(
    module["parameters"] for module in report["modules"].values()
  )


def test_pictures_are_fixed():
  first, second = (verification.make_inputs(48) for _ in range(2))
  assert first.describe() == second.describe()
  assert first.names[0] == "scene 0" and "astronaut.png" in first.names
  assert first.pictures.shape == (6, 48, 48, 3)
  assert len({picture.tobytes() for picture in first.pictures}) == 6
  assert first.describe() != verification.make_inputs(32).describe()


def test_json_and_against(folder, report, tmp_path, capsys):
  file = tmp_path / "figures.json"
  file.write_text(run(capsys, folder, "--json"))
  assert json.loads(file.read_text()) == json.loads(json.dumps(report))
  assert "agrees with" in run(capsys, folder, f"--against={file}")
  # A rounded copy agrees, and is said to be one; another model does not.
  rounded = tmp_path / "rounded"
  shutil.copytree(folder, rounded)
  tensors = files.read_safetensors(rounded)
  key = "encoder.layer.0.mlp.fc1.weight"
  tensors[key] = tensors[key] * np.float32(1 + 1e-6)
  files.write_safetensors(rounded / "model.safetensors", tensors)
  text = run(capsys, rounded, f"--against={file}", "--tolerance=1e-3")
  assert "agrees" in text and "checksums differ" in text
  tensors[key] = tensors[key] * np.float32(1.5)
  files.write_safetensors(rounded / "model.safetensors", tensors)
  fails(
    "figures differ by more than.*features, norm: ",
    rounded,
    f"--against={file}",
  )
  fails("other pictures", folder, f"--against={file}", "--size=64")


def test_text_and_pictures(folder, report, tmp_path, capsys):
  text = run(capsys, folder, f"--pictures={tmp_path / 'pictures'}")
  found = report["outputs"]["features"]
  assert f"length {found['norm']:.6g}" in text
  assert f"first numbers {found['leading'][0]:.6g} " in text
  assert report["modules"]["blocks"]["sha256"] in text
  picture = np.asarray(Image.open(tmp_path / "pictures" / "scene-1.png"))
  np.testing.assert_array_equal(
    picture, verification.make_inputs(32).pictures[1]
  )
  assert len(list((tmp_path / "pictures").iterdir())) == 6


@pytest.mark.parametrize(
  "path, value, message",
  [
    (("parameters",), 3, "parameters: .*expected 3"),
    (("kind",), "lpips", "kind: encoder, expected lpips"),
    (("outputs", "features", "shape"), [1], "features, shape"),
    (("outputs", "features", "norm"), 0.1, "features, norm: .*expected 0.1"),
    (("outputs", "features", "std"), float("nan"), "features, std"),
    (("outputs", "features", "leading"), [0.0] * 8, "features, leading: "),
    (("outputs", "features", "spread"), [0.0] * 8, "features, spread: "),
    (("outputs", "features", "leading"), [0.0], "8 numbers, expected 1"),
    (("outputs", "other"), None, "other: missing; there are features"),
  ],
)
def test_every_figure_counts(report, path, value, message):
  wanted = copy.deepcopy(report)
  assert verify.differences(report, wanted, 1e-9) == []
  target = wanted
  for name in path[:-1]:
    target = target[name]
  target[path[-1]] = value or report["outputs"]["features"]
  lines = verify.differences(report, wanted, 1e-4)
  assert len(lines) >= 1
  with pytest.raises(AssertionError, match=message):
    raise AssertionError("; ".join(lines))


def test_other_kinds(capsys):
  report = json.loads(run(capsys, EMBEDDED_TEXT_ENCODER, "--json"))
  assert report["kind"] == "text" and len(report["outputs"]) == 3
  assert report["outputs"]["features of 'a red circle'"]["norm"] > 0
  report = json.loads(run(capsys, "random:alex", "--json"))
  assert report["kind"] == "lpips"
  assert report["parameters"] == 2_469_696 + 1152
  for figures in report["outputs"].values():
    assert figures["shape"] == [6] and figures["least"] > 0


def test_an_autoencoder(capsys):
  report = json.loads(run(capsys, "embedded", "--json"))
  assert report["kind"] == "autoencoder"
  assert set(report["modules"]) == {
    "encoder",
    "semantic_encoder",
    "semantic_decoder",
    "pixel_decoder",
  }
  vae = psvae_jax.PSVAE.from_pretrained("embedded")
  assert report["fingerprint"] == vae.fingerprint
  made = vae.reconstruct(verification.make_inputs(48).pictures)
  found = report["outputs"]["reconstructions"]
  assert found["mean"] == pytest.approx(made.mean(), abs=0.01)


@pytest.mark.slow
def test_inception(capsys):
  report = json.loads(run(capsys, "random:inception", "--json"))
  assert report["kind"] == "inception"
  assert report["outputs"]["2048, tf1"]["shape"] == [6, 2048]


def test_levels_may_be_rounded_up_and_down():
  ours = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
  other = ours.copy()
  other[0, 0, 0, 0] ^= 1
  figures = [verification.summarize(x) for x in (ours, other)]
  reports = [
    {
      "kind": "x",
      "parameters": 1,
      "inputs": {"sha256": ""},
      "outputs": {"y": y},
    }
    for y in figures
  ]
  assert verify.differences(*reports, tolerance=1e-3) == []
  found = verification_reference.distances({"y": ours}, {"y": other})
  assert 0 < found["y"] < 1e-4
  found = verification_reference.distances({"y": ours}, {"y": ours[:, 1:]})
  assert found["y"] == float("inf")


@pytest.mark.parametrize("which", ["encoder", "text"])
def test_reference(folder, which, capsys):
  vision_reference.import_transformers()
  name = {"encoder": folder, "text": EMBEDDED_TEXT_ENCODER}[which]
  text = run(capsys, name, "--reference")
  found = re.findall(r"differs by (\S+) from the reference", text)
  assert len(found) == (1 if which == "encoder" else 3)
  assert all(float(value) < 1e-5 for value in found)


def test_reference_that_differs(folder, monkeypatch):
  vision_reference.import_transformers()
  load = verification.load

  def tampered(*arguments):
    subject = load(*arguments)
    norm = subject.params["norm"]
    subject.params["norm"] = jax.tree.map(lambda x: np.float32(1.01) * x, norm)
    return subject

  monkeypatch.setattr(verification, "load", tampered)
  fails("figures differ", folder, "--reference")


@pytest.mark.parametrize(
  "config, kind",
  [
    ({"model_type": "dinov2"}, "encoder"),
    ({"model_type": "t5"}, "text"),
    ({"model_type": "clip"}, "clip"),
    ({"model_type": "lpips"}, "lpips"),
    ({"model_type": "fid_inception"}, "inception"),
    ({"_class_name": "AutoencoderKL"}, "autoencoder"),
    ({"stages": ["svae"]}, "autoencoder"),
    ({"format": "psvae_jax"}, "autoencoder"),
  ],
)
def test_kinds_are_found(tmp_path, config, kind):
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert verification.find_kind(str(tmp_path)) == kind


def test_kinds_of_names():
  names = {
    "embedded": "autoencoder",
    "random:vgg": "lpips",
    "random:inception": "inception",
    "random:facebook/dinov2-base": "encoder",
    "random:openai/clip-vit-base-patch32": "clip",
    "random:stabilityai/sd-vae-ft-ema": "autoencoder",
  }
  assert {name: verification.find_kind(name) for name in names} == names
  assert tuple(verification.KINDS) == verify._KINDS


def test_mistakes_are_one_line(folder, tmp_path, capsys):
  bad = tmp_path / "bad.json"
  empty = tmp_path / "empty"
  empty.mkdir()
  for content in ("{}", '{"outputs": {"x": 3}}', "[]", "{", '{"outputs": {}}'):
    bad.write_text(content)
    fails("bad.json", folder, f"--against={bad}")
  fails("no.json is missing", folder, f"--against={tmp_path / 'no.json'}")
  fails("nowhere does not exist", tmp_path / "nowhere")
  fails("config.json is missing", empty)
  (empty / "config.json").write_text("{}")
  fails("has no model_type.*--kind", empty)
  fails("must be positive", folder, "--tolerance=0")
  fails("must be in", folder, "--size=2")
  fails("knows no other program for 'lpips'", "random:alex", "--reference")
