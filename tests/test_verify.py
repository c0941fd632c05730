"""Figures of a network: right, repeatable, and compared by the command."""

import copy
import functools
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
from psvae_jax import verify
from psvae_jax.pretrained import files
from psvae_jax.tasks.generator import EMBEDDED_TEXT_ENCODER
from psvae_jax.verification import inputs, reference, subjects, summary


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
  subject = subjects.load(folder)
  return summary.report(subject, subject.run())


def test_figures_of_an_encoder(folder, report):
  encoder = psvae_jax.load_encoder(folder)
  pictures = inputs.make_inputs(32).pictures
  features = np.asarray(encoder(pictures), np.float64)
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
  first, second = (inputs.make_inputs(48) for _ in range(2))
  assert first.describe() == second.describe()
  assert first.names[0] == "scene 0" and "astronaut.png" in first.names
  assert first.pictures.shape == (6, 48, 48, 3)
  assert len({picture.tobytes() for picture in first.pictures}) == 6
  assert first.describe() != inputs.make_inputs(32).describe()


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
  np.testing.assert_array_equal(picture, inputs.make_inputs(32).pictures[1])
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
  made = vae.reconstruct(inputs.make_inputs(48).pictures)
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
  figures = [summary.summarize(x) for x in (ours, other)]
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
  found = reference.distances({"y": ours}, {"y": other})
  assert 0 < found["y"] < 1e-4
  found = reference.distances({"y": ours}, {"y": ours[:, 1:]})
  assert found["y"] == float("inf")


def save_qwen2(folder):
  transformers = vision_reference.import_transformers()
  config = transformers.Qwen2Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
  )
  model = transformers.Qwen2ForCausalLM(config)
  vision_reference.randomise(model).save_pretrained(folder)
  return folder


def save_clip_text(folder, kind):
  clip = pytest.importorskip("clip_reference")
  transformers = clip.transformers
  config = transformers.CLIPTextConfig(**clip.text_config())
  model = clip.randomise(getattr(transformers, kind)(config))
  model.save_pretrained(folder)
  clip.tokenizer().save_pretrained(folder)
  return folder


@pytest.fixture(name="saved", scope="module")
def _saved(folder, tmp_path_factory):
  """Name → folder; made when it is asked for."""

  @functools.cache
  def save(which):
    if which == "encoder":
      return folder
    if which == "text":
      return EMBEDDED_TEXT_ENCODER
    new = tmp_path_factory.mktemp(which)
    return save_qwen2(new) if which == "Qwen2" else save_clip_text(new, which)

  return save


@pytest.mark.parametrize(
  "which, kind, count",
  [
    ("encoder", "encoder", 1),
    ("text", "text", 3),
    ("CLIPTextModel", "clip_text", 4),
    ("CLIPTextModelWithProjection", "clip_text", 4),
    ("Qwen2", "qwen2", 1),
  ],
)
def test_reference(saved, which, kind, count, capsys):
  vision_reference.import_transformers()
  text = run(capsys, saved(which), "--reference")
  assert f": {kind}, " in text
  found = re.findall(r"differs by (\S+) from the reference", text)
  assert len(found) == count
  assert all(float(value) < 1e-5 for value in found)


def test_a_pipeline_s_autoencoder_and_nothing_else(
  tmp_path, monkeypatch, capsys
):
  """Of gigabytes, the reference wants what the loader wanted."""
  huggingface_hub = pytest.importorskip("huggingface_hub")
  diffusers = pytest.importorskip("tiny_diffusers")
  diffusers.kl("sd").save_pretrained(tmp_path / "vae")
  (tmp_path / "model_index.json").write_text("{}")
  asked = []

  def download(name, allow_patterns):
    asked.extend(allow_patterns)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  text = run(capsys, "somebody/pipeline", "--reference", "--tolerance=1e-4")
  assert "latents: differs by" in text
  assert "reconstructions: differs by" in text
  assert "vae/diffusion_pytorch_model.safetensors" in asked
  # Not all that ends so: other networks of the pipeline, half precision.
  assert not any(re.search(r"(^|/)\*", pattern) for pattern in asked)
  with pytest.raises(ValueError, match="AutoencoderKL alone; embedded is none"):
    reference.run(subjects.load("embedded"))


def test_tokens_are_fixed(saved, capsys):
  first, second = (inputs.make_tokens(500) for _ in range(2))
  assert first.describe() == second.describe()
  assert first.tokens.shape == (2, 32) and 0 <= first.tokens.min()
  assert first.tokens.max() < 500 and len(np.unique(first.tokens)) == 64
  assert first.describe() != inputs.make_tokens(501).describe()
  report = json.loads(run(capsys, saved("Qwen2"), "--json"))
  assert report["inputs"]["shape"] == [2, 32]
  assert report["outputs"]["features"]["shape"] == [2, 32, 24]
  assert set(report["modules"]) == {"embed", "blocks", "final_norm"}
  fails("--pictures: .* shown none", saved("Qwen2"), "--pictures=pictures")


def test_features_of_tokens_see_what_came_before_alone(saved):
  subject = subjects.load(saved("Qwen2"))
  before = subject.run()["features"]
  tokens = subject.inputs.tokens
  tokens[:, 20] = (tokens[:, 20] + 1) % 37
  after = subject.run()["features"]
  np.testing.assert_array_equal(before[:, :20], after[:, :20])
  assert (np.abs(after - before).max(axis=2)[:, 20:] > 1e-4).all()


def test_reference_that_differs(folder, monkeypatch):
  vision_reference.import_transformers()
  load = subjects.load

  def tampered(*arguments):
    subject = load(*arguments)
    norm = subject.params["norm"]
    subject.params["norm"] = jax.tree.map(lambda x: np.float32(1.01) * x, norm)
    return subject

  monkeypatch.setattr(subjects, "load", tampered)
  fails("figures differ", folder, "--reference")


@pytest.mark.parametrize(
  "config, kind",
  [
    ({"model_type": "dinov2"}, "encoder"),
    ({"model_type": "t5"}, "text"),
    ({"model_type": "clip"}, "clip"),
    ({"model_type": "clip_text_model"}, "clip_text"),
    ({"model_type": "qwen2"}, "qwen2"),
    ({"model_type": "lpips"}, "lpips"),
    ({"model_type": "fid_inception"}, "inception"),
    ({"_class_name": "AutoencoderKL"}, "autoencoder"),
    ({"stages": ["svae"]}, "autoencoder"),
    ({"format": "psvae_jax"}, "autoencoder"),
  ],
)
def test_kinds_are_found(tmp_path, config, kind):
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert subjects.find_kind(str(tmp_path)) == kind


def test_kinds_of_names():
  names = {
    "embedded": "autoencoder",
    "random:vgg": "lpips",
    "random:inception": "inception",
    "random:facebook/dinov2-base": "encoder",
    "random:openai/clip-vit-base-patch32": "clip",
    "random:Qwen/Qwen2.5-0.5B": "qwen2",
    "random:stabilityai/sd-vae-ft-ema": "autoencoder",
  }
  assert {name: subjects.find_kind(name) for name in names} == names
  assert tuple(subjects.KINDS) == verify._KINDS


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
  (empty / "config.json").write_text('{"model_type": "vit"}')
  for name in (empty, "facebook/dino-vits8", "random:facebook/dino-vits8"):
    fails("DINO, .* which verify does not cover", name)
  name = "random:openai/clip-vit-base-patch32"
  fails("has no tokenizer; give a folder", name, "--kind=clip_text")
  fails("must be positive", folder, "--tolerance=0")
  fails("must be in", folder, "--size=2")
  fails("knows no other program for 'lpips'", "random:alex", "--reference")
