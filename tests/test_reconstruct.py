"""The reconstruct command: what it writes, prints and returns."""

import io
import json
import os
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import psvae_jax
from psvae_jax import cli, reconstruct
from psvae_jax.config import parser as config_parser
from psvae_jax.evaluators.comparison import error_picture
from psvae_jax.psvae import PSVAE
from psvae_jax.tasks import make_task


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Both stages of an autoencoder with random parameters."""
  encoder = tiny.save_encoder(tmp_path_factory.mktemp("encoder"))
  task = make_task("svae", config_parser.parse(tiny.config(encoder)), encoder)
  params = jax.jit(task.model.init)(jax.random.key(0), task.frozen["teacher"])
  params["encoder"] = task.frozen["teacher"]
  return [
    PSVAE(
      task.model,
      tiny.randomise(params, seed=seed),
      stage=stage,
      fingerprint="",
      batch_size=2,
    )
    for seed, stage in enumerate(("svae", "psvae"))
  ]


def save_image(path, height=50, width=60, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(image).save(path)
  return path


def test_panels_are_the_original_each_stage_and_the_error(
  models, tmp_path, capsys
):
  path = save_image(tmp_path / "in.png", 40, 40)
  original = np.asarray(Image.open(path))
  assert reconstruct.reconstruct([path], models, tmp_path / "out") == 0
  written = np.asarray(Image.open(tmp_path / "out" / "in-reconstruction.png"))
  side, gap, top = 160, 4, 14  # 40 pixels, each drawn 4 × 4
  assert written.shape == (top + side, 4 * side + 3 * gap, 3)
  panels = [
    written[top::4, i * (side + gap) : i * (side + gap) + side : 4]
    for i in range(4)
  ]
  made = [model.reconstruct(original[None])[0] for model in models]
  expected = [original, *made, error_picture(original, made[1])]
  for panel, wanted in zip(panels, expected, strict=True):
    np.testing.assert_array_equal(panel, wanted)
  line = capsys.readouterr().out.strip()
  mse = np.mean((original.astype(float) - made[1]) ** 2)
  assert line.startswith(f"{path} → ")
  assert line.endswith(f"psvae {10 * np.log10(255**2 / mse):.2f} dB")
  assert "svae " in line


def test_other_sizes_are_centre_cropped(models, tmp_path):
  path = save_image(tmp_path / "wide.png", 40, 80)
  assert reconstruct.reconstruct([path], models[:1], tmp_path) == 0
  written = np.asarray(Image.open(tmp_path / "wide-reconstruction.png"))
  middle = np.asarray(Image.open(path))[:, 20:60]
  np.testing.assert_array_equal(written[14::4, :160:4], middle)


def test_unreadable_files_are_named_and_the_rest_is_done(
  models, tmp_path, capsys
):
  good = [save_image(tmp_path / f"{i}.png") for i in range(3)]
  bad = tmp_path / "bad.png"
  bad.write_bytes(good[0].read_bytes()[:100])
  missing = tmp_path / "missing.png"
  paths = [good[0], bad, good[1], missing, good[2]]
  assert reconstruct.reconstruct(paths, models, tmp_path / "out") == 2
  captured = capsys.readouterr()
  assert len(captured.out.splitlines()) == 3
  assert len(captured.err.splitlines()) == 2
  assert str(bad) in captured.err
  assert str(missing) in captured.err
  assert len(list((tmp_path / "out").iterdir())) == 3


def test_find_images(tmp_path):
  nested = save_image(tmp_path / "photos" / "deep" / "b.JPG")
  first = save_image(tmp_path / "photos" / "a.png")
  (tmp_path / "photos" / "notes.txt").write_text("x")
  odd = tmp_path / "no_suffix"
  found = reconstruct.find_images([odd, tmp_path / "photos", first])
  assert found == [odd, first, nested]


def test_no_output_is_an_input_or_another_output(tmp_path):
  taken = save_image(tmp_path / "a-reconstruction.png")
  inputs = [tmp_path / "a.png", tmp_path / "x" / "a.jpg", taken]
  outputs = reconstruct.name_outputs(inputs, tmp_path)
  assert [path.name for path in outputs] == [
    "a-reconstruction-2.png",
    "a-reconstruction-3.png",
    "a-reconstruction-reconstruction.png",
  ]
  link = tmp_path / "b-reconstruction.png"
  link.symlink_to(taken)
  (output,) = reconstruct.name_outputs([taken, tmp_path / "b.png"], tmp_path)[
    1:
  ]
  assert os.path.realpath(output) != str(taken)


def test_names_that_are_not_utf_8_stop_nothing(models, tmp_path, monkeypatch):
  names = [b"caf\xe9.png", b"gone\xe9.png", b"z.png"]
  paths = [tmp_path / os.fsdecode(name) for name in names]
  save_image(paths[0])
  save_image(paths[2])
  streams = {name: io.BytesIO() for name in ("stdout", "stderr")}
  for name, stream in streams.items():
    strict = io.TextIOWrapper(stream, "utf-8", errors="strict")
    monkeypatch.setattr(sys, name, strict)

  def command():
    return reconstruct.reconstruct(paths, models, tmp_path / "out")

  assert cli.guard(command, interrupted="") == 1
  sys.stdout.flush()
  first, second = streams["stdout"].getvalue().decode().splitlines()
  assert r"caf\udce9.png → " in first and r"caf\udce9-reconstruction" in first
  assert "z.png" in second
  assert r"gone\udce9.png" in streams["stderr"].getvalue().decode()
  written = {os.fsencode(path.name) for path in (tmp_path / "out").iterdir()}
  assert written == {b"caf\xe9-reconstruction.png", b"z-reconstruction.png"}


def test_help_shows_examples(capsys):
  with pytest.raises(SystemExit) as stopped:
    reconstruct.main(["--help"])
  assert stopped.value.code == 0
  text = capsys.readouterr().out
  examples = text.split("examples:")[1].split("\n\n")[0].strip().splitlines()
  assert len(examples) == 3
  for line in examples:
    reconstruct.parse_arguments(line.split()[3:])


@pytest.mark.parametrize(
  "setup, message",
  [
    ("nothing", "is not a folder"),
    ("empty", "has no config.json"),
    ("untrained", "no checkpoint yet"),
  ],
)
def test_a_wrong_workdir_is_one_line(setup, message, tmp_path):
  image, workdir = save_image(tmp_path / "a.png"), tmp_path / "run"
  if setup != "nothing":
    workdir.mkdir()
  if setup == "untrained":
    raw = config_parser.with_defaults(tiny.config(tmp_path / "encoder"))
    (workdir / "config.json").write_text(json.dumps(raw))
  with pytest.raises(SystemExit) as stopped:
    reconstruct.main([str(image), f"--workdir={workdir}"])
  assert message in stopped.value.code
  assert "\n" not in stopped.value.code


def test_a_folder_without_images_is_an_error(tmp_path):
  with pytest.raises(SystemExit, match="no image files in"):
    reconstruct.main([str(tmp_path), "--workdir=anything"])


@pytest.mark.parametrize("bad, code", [(False, None), (True, "1 of 2 images")])
def test_exit_code(models, tmp_path, monkeypatch, bad, code):
  paths = [save_image(tmp_path / "a.png"), tmp_path / "b.png"]
  if not bad:
    save_image(paths[1])
  monkeypatch.setattr(psvae_jax.psvae, "stages_with_checkpoints", lambda _: [])
  monkeypatch.setattr(PSVAE, "from_pretrained", lambda *_, **__: models[0])
  arguments = [*map(str, paths), f"--workdir={tmp_path}"]
  if code is None:
    reconstruct.main(arguments)
  else:
    with pytest.raises(SystemExit, match=code):
      reconstruct.main(arguments)
  assert (tmp_path / "reconstructions" / "a-reconstruction.png").is_file()
