"""The trained generator as an object: loading, prompts, edits, errors."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import tiny
import tiny_generator
from tiny_generator import export_autoencoder as write

import psvae_jax
from psvae_jax import exported, saved_generator
from psvae_jax.checkpoint import CheckpointError
from psvae_jax.export import export
from psvae_jax.psvae import PSVAE
from psvae_jax.text_to_image import TextToImage

PROMPTS = ["a red circle", "two green squares", "a blue star"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def saved(encoder):
  return tiny_generator.saved(encoder)


@pytest.fixture(scope="module")
def workdir(saved, encoder, tmp_path_factory):
  """A workdir with both stages, whose autoencoder is elsewhere."""
  folder = tmp_path_factory.mktemp("job")
  vae = write(saved.autoencoder, folder / "vae")
  for stage in ("t2i", "edit"):
    generator = tiny_generator.saved(encoder, stage)
    tiny_generator.write_stage(folder / "run", generator, vae)
  return folder / "run"


@pytest.fixture(scope="module")
def pipe(workdir):
  return psvae_jax.TextToImage.from_pretrained(workdir)


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
  """The same, exported."""
  out = tmp_path_factory.mktemp("exported") / "generator"
  export(workdir, out)
  return out


def images(count):
  return tiny.batch(count)["image"]


def close(found, expected):
  return np.abs(found.astype(int) - expected).max() <= 1


# --- loading ---


def test_a_workdir_is_what_was_trained(pipe, saved):
  assert (pipe.stage, pipe.output_size) == ("edit", 40)
  assert pipe.settings == tiny_generator.SAMPLE
  assert "40×40" in repr(pipe) and saved.fingerprint in repr(pipe)
  made = pipe(PROMPTS, seed=5)
  assert made.shape == (3, 40, 40, 3) and made.dtype == np.uint8
  assert close(made, TextToImage(saved)(PROMPTS, seed=5))


def test_an_export_is_the_same_generator(pipe, folder, saved):
  loaded = TextToImage.from_pretrained(folder)
  assert close(loaded(PROMPTS), pipe(PROMPTS))
  assert loaded.saved.fingerprint == saved.fingerprint
  assert loaded.saved.description == saved.description
  assert loaded.settings == pipe.settings
  vae = PSVAE.from_pretrained(folder)  # it has its autoencoder inside
  assert vae.latent_fingerprint == saved.autoencoder.latent_fingerprint


def test_stages(workdir):
  load = TextToImage.from_pretrained
  assert load(workdir, stage="t2i").stage == "t2i"
  with pytest.raises(ValueError, match="no checkpoint of stage 'x'.*t2i, edit"):
    load(workdir, stage="x")


def test_an_export_refers_to_the_embedded_autoencoder(
  workdir, pipe, tmp_path, monkeypatch
):
  monkeypatch.setattr(exported, "_ASSETS", tmp_path)
  with pytest.raises(FileNotFoundError, match="no embedded generator"):
    TextToImage.from_pretrained("embedded")
  with pytest.raises(ValueError, match="the embedded one is None: leave out"):
    export(workdir, tmp_path / "generator", autoencoder="embedded")
  write(pipe.saved.autoencoder, tmp_path / "autoencoder", "bfloat16")
  export(workdir, tmp_path / "generator", dtype="bfloat16")
  assert not (tmp_path / "generator" / "autoencoder").exists()
  loaded = TextToImage.from_pretrained("embedded")
  difference = loaded(PROMPTS).astype(float) - pipe(PROMPTS)
  assert 0 < np.abs(difference).mean() < 8  # rounded to bfloat16
  export(workdir, tmp_path / "whole", autoencoder="copy")
  assert (tmp_path / "whole" / "autoencoder").is_dir()


def test_a_local_text_encoder_is_exported_too(folder, tmp_path):
  generator = saved_generator.load(folder)
  source = shutil.copytree(
    generator.text_encoder.tokenizer.folder, tmp_path / "text"
  )
  moved = json.loads((folder / "config.json").read_text())
  assert moved["text_encoder"] == "embedded"
  copy = shutil.copytree(folder, tmp_path / "copy")
  moved["text_encoder"] = str(source)
  (copy / "config.json").write_text(json.dumps(moved))
  export(copy, tmp_path / "out")
  shutil.rmtree(source)
  raw = exported.read_config(tmp_path / "out")
  assert raw["text_encoder"] == "text_encoder"
  assert saved_generator.load(tmp_path / "out").text_encoder is not None


def test_another_autoencoder_is_refused(workdir, folder, encoder, tmp_path):
  other = tiny_generator.autoencoder(encoder, seed=1)
  path = write(other, tmp_path / "other")
  for source in (workdir, folder):
    with pytest.raises(ValueError, match="autoencoder") as error:
      TextToImage.from_pretrained(source, autoencoder=path)
    assert other.latent_fingerprint in str(error.value)
  # Statistics that were made to fit do not help.
  copy = shutil.copytree(folder, tmp_path / "copy")
  stats = json.loads((copy / "latent_stats.json").read_text())
  stats["fingerprint"] = other.latent_fingerprint
  (copy / "latent_stats.json").write_text(json.dumps(stats))
  with pytest.raises(ValueError, match="was trained with the autoencoder"):
    TextToImage.from_pretrained(copy, autoencoder=path)
  copy = shutil.copytree(workdir, tmp_path / "run")
  (copy / "latent_stats.json").write_text(json.dumps(stats))
  with pytest.raises(CheckpointError, match="autoencoder: saved"):
    TextToImage.from_pretrained(copy, autoencoder=path)


def test_folders_that_hold_no_generator(workdir, saved, tmp_path):
  load = TextToImage.from_pretrained
  with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
    load(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="no checkpoint of a generator"):
    load(tmp_path)
  vae = write(saved.autoencoder, tmp_path / "vae")
  with pytest.raises(ValueError, match="exported autoencoder, not a generator"):
    load(vae)
  copy = shutil.copytree(workdir, tmp_path / "copy")
  (copy / "latent_stats.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"latent_stats.json is missing"):
    load(copy)
  for path in (copy / "config.json", copy / "edit" / "config.json"):
    path.unlink()
  with pytest.raises(FileNotFoundError, match="but no config.json"):
    load(copy)


# --- use ---


def test_image_i_has_seed_plus_i(pipe):
  made = pipe(PROMPTS, seed=5)
  assert close(made, pipe(PROMPTS, seed=[5, 6, 7]))
  assert close(made[1:2], pipe(PROMPTS[1:2], seed=6))
  assert not close(made, pipe(PROMPTS, seed=6))


def test_settings_act(pipe):
  made = pipe(PROMPTS)
  for changes in (
    {"steps": 2},
    {"guidance": 6.0},
    {"shift": 5.0},
    {"solver": "heun"},
  ):
    assert not close(made, pipe(PROMPTS, **changes))
  same = dict(steps=3, guidance=2.0, shift=2.0, solver="euler")
  assert close(made, pipe(PROMPTS, **same))


def test_edits(pipe):
  source = images(2)
  made = pipe.edit(source, "make it green", seed=3)
  assert made.shape == source.shape and made.dtype == np.uint8
  alone = pipe.edit(jax.numpy.asarray(source[1]), "make it green", seed=4)
  assert alone.shape == (40, 40, 3) and close(alone, made[1])
  each = pipe.edit(source, ["make it green", "remove the star"], seed=3)
  assert close(each[0], made[0]) and not close(each[1], made[1])
  assert not close(
    pipe.edit(source, "make it green", seed=3, image_guidance=4.0), made
  )


def test_strength(pipe):
  source = images(2)
  kept = pipe.edit(source, "a circle", strength=0)
  assert close(kept, pipe.saved.autoencoder.reconstruct(source))
  forgotten = pipe.edit(source, "a circle", strength=1.0, seed=3)
  assert close(forgotten, pipe(["a circle"] * 2, seed=3))
  between = pipe.edit(source, "a circle", strength=0.5, seed=3)
  assert not close(between, kept) and not close(between, forgotten)


def test_a_class_conditional_generator(encoder, tmp_path):
  generator = tiny_generator.saved(encoder, "t2i", num_classes=3)
  write(generator.autoencoder, tmp_path / "autoencoder")
  saved_generator.save(tmp_path, generator, autoencoder="autoencoder")
  pipe = TextToImage.from_pretrained(tmp_path)
  made = pipe([0, 1, 1], seed=[0, 1, 1])
  assert close(made[1], made[2]) and not close(made[0], made[1])
  kept = pipe.edit(images(1)[0], 2, strength=0.0)
  assert kept.shape == (40, 40, 3)
  with pytest.raises(ValueError, match=r"\[0, 3\), got 'a cat'"):
    pipe(["a cat"])


# --- errors ---


@pytest.mark.parametrize(
  "prompts, message",
  [
    ([], r'no prompts; give at least one: \["a red circle"\]'),
    ("a red circle", r"must be a list, e.g. .* got 'a red circle'"),
    (7, "must be a list"),
    (["a", 3], r"prompt 1 must be a string, got 3 \(int\)"),
    (["a", None], "prompt 1 must be a string, got None"),
    (["a\ud800"], "not valid Unicode"),
  ],
)
def test_bad_prompts_are_named(pipe, prompts, message):
  with pytest.raises(ValueError, match=message):
    pipe(prompts)


def test_a_long_prompt_is_cut_and_said(pipe):
  long = "a red circle " * 10
  with pytest.warns(UserWarning, match="tokens, of which .* reads 12") as seen:
    made = pipe(["a red circle", long, long])
  assert len(seen) == 1
  kept = str(seen[0].message).split("cut to ")[1].strip("'")
  assert long.startswith(kept) and "red" in kept
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    pipe(["a red circle"])
    assert close(pipe([long[: len(kept)]], seed=1), made[1:2])


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"steps": 2.5}, "steps must be an integer, got 2.5"),
    ({"guidance": float("nan")}, "guidance must lie in"),
    ({"guidance": -1}, "guidance must lie in .*, got -1"),
    ({"shift": 0}, "shift must lie in .*, got 0"),
    ({"solver": "rk4"}, "solver must be one of euler.*got 'rk4'"),
    ({"seed": 0.5}, "seed must be an integer"),
    ({"seed": [1]}, "1 seeds for 3 images"),
    ({"seed": -1}, "got -1"),
  ],
)
def test_bad_settings_are_named(pipe, changes, message):
  with pytest.raises(ValueError, match=message):
    pipe(PROMPTS, **changes)


@pytest.mark.parametrize(
  "image, message",
  [
    (np.zeros((40, 40, 3)), "uint8 .* got float64"),
    (np.zeros((40, 40), np.uint8), r"RGB.* got \(40, 40\)"),
    (np.zeros((40, 40, 4), np.uint8), "RGB"),
    (np.zeros((32, 32, 3), np.uint8), "32×32; this generator edits 40×40"),
    (np.zeros((1, 40, 48, 3), np.uint8), "40×48"),
    (np.zeros((0, 40, 40, 3), np.uint8), "no images"),
  ],
)
def test_bad_images_are_named(pipe, image, message):
  for options in ({}, {"strength": 0.5}):
    with pytest.raises(ValueError, match=message):
      pipe.edit(image, "make it green", **options)


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "0.5", True])
def test_strength_lies_in_0_1(pipe, strength):
  with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]"):
    pipe.edit(images(1), "a circle", strength=strength)


def test_other_bad_edits(pipe, workdir):
  with pytest.raises(ValueError, match="3 prompts for 2 images"):
    pipe.edit(images(2), PROMPTS)
  with pytest.raises(ValueError, match="image_guidance has no meaning"):
    pipe.edit(images(1), "a circle", strength=0.5, image_guidance=2.0)
  untaught = TextToImage.from_pretrained(workdir, stage="t2i")
  with pytest.raises(ValueError, match="stage 't2i'.* not learned .*strength="):
    untaught.edit(images(1), "make it green")
