"""The sample, edit and export commands, and the contact sheet."""

import shlex
import shutil

import numpy as np
import pytest
import tiny
import tiny_generator
from PIL import Image

from psvae_jax import contact_sheet, edit, export, exported, sample, samplers
from psvae_jax.text_to_image import TextToImage


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def pipe(encoder):
  return TextToImage(tiny_generator.saved(encoder), batch_size=4)


@pytest.fixture
def loaded(pipe, monkeypatch):
  """Commands get this generator, whatever their --workdir."""
  monkeypatch.setattr(TextToImage, "from_pretrained", lambda *_, **__: pipe)


def read(path):
  return np.asarray(Image.open(path))


def save_image(path, width=40, height=40, mode="RGB"):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(path)
  return path


# --- the contact sheet ---


def test_sheet_holds_every_picture_and_caption():
  images = [np.full((48, 48, 3), 40 * i, np.uint8) for i in range(5)]
  sheet = np.asarray(contact_sheet.draw(images, ["a", "b", "c " * 90, "d", ""]))
  side, gap = 192, 12
  assert sheet.shape[1] == 3 * (side + gap) + gap
  for i, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
    left = gap + column * (side + gap)
    top = gap + row * (side + 4 + 3 * 18 + gap)
    assert set(sheet[top : top + side, left : left + side].ravel()) == {40 * i}
  under = sheet[gap + side + 4 :][: 3 * 18, 2 * (side + gap) + gap :]
  assert (under[:, :side] < 128).any() and (under[:, side:] == 255).all()


def test_large_pictures_are_not_enlarged():
  assert contact_sheet.enlarge(np.zeros((256, 256, 3), np.uint8)).size == (
    256,
    256,
  )
  assert contact_sheet.enlarge(np.zeros((100, 100, 3), np.uint8)).width == 200


def test_a_long_word_is_cut_at_once():
  # Letter by letter, from its end, this would take hours.
  (line,) = contact_sheet._wrap("a" * 200_000, 180)
  assert line.endswith("…") and 10 < len(line) < 180


def test_file_names_are_sensible_and_new(tmp_path):
  (tmp_path / "a-red-circle.png").touch()
  texts = [
    "A red  circle!",
    "a red circle",
    "../../etc",
    "…",
    "été 1/2",
    "x" * 99,
  ]
  names = [path.name for path in contact_sheet.file_names(texts, tmp_path)]
  assert names == [
    "a-red-circle-2.png",
    "a-red-circle-3.png",
    "etc.png",
    "image.png",
    "été-1-2.png",
    "x" * 60 + ".png",
  ]


# --- sample ---


def test_sample_writes_images_and_a_sheet(pipe, loaded, tmp_path, capsys):
  out = tmp_path / "out"
  sample.main(["--prompts=a red circle", f"--out={out}", "--seed=3"])
  expected = pipe(["a red circle"] * 4, seed=3)
  for i in range(4):
    found = read(out / f"a-red-circle-seed-{3 + i}.png")
    assert np.abs(found.astype(int) - expected[i]).max() <= 1
  sheet = Image.open(out / "contact-sheet.png")
  assert sheet.width == 2 * (200 + 12) + 12
  text = capsys.readouterr().out
  assert "4 images" in text and str(out / "contact-sheet.png") in text
  sample.main(["--prompts=a red circle", f"--out={out}", "--num=1"])
  assert (out / "contact-sheet-2.png").is_file()  # nothing is overwritten


def test_sample_reads_prompt_files(pipe, loaded, tmp_path, capsys):
  file = tmp_path / "prompts.txt"
  file.write_text("a red circle\n\n  two stars  \n")
  out = tmp_path / "out"
  arguments = [f"--out={out}", "--num=2", "--steps=2", "--guidance=1"]
  sample.main(["--prompts", str(file), "a cross", *arguments])
  names = sorted(path.name for path in out.iterdir())
  assert names[:4] == [
    "0-a-red-circle-seed-0.png",
    "0-a-red-circle-seed-1.png",
    "1-two-stars-seed-0.png",
    "1-two-stars-seed-1.png",
  ]
  assert len(names) == 7
  one = pipe(["two stars"], seed=1, steps=2, guidance=1)[0]
  found = read(out / "1-two-stars-seed-1.png")
  assert np.abs(found.astype(int) - one).max() <= 1


def test_a_long_prompt_is_a_warning_of_one_line(loaded, tmp_path, capsys):
  long = "a red circle " * 9
  sample.main([f"--prompts={long}", f"--out={tmp_path}", "--num=2"])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("warning: the prompt") and "is cut to" in line


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--prompts=missing.txt"], "the prompt file 'missing.txt' does not exist"),
    (["--prompts=a", "--num=0"], "at least one image"),
    (["--prompts=a", "--steps=0"], "steps must be at least 1, got 0"),
    (["--prompts=a", "--seed=-1"], "got -1"),
    (["--prompts=a", "--shift=0"], "shift must lie in"),
    (["--prompts=a", "--guidance=1e300"], "guidance must lie in"),
    (["--prompts= "], "a prompt is empty"),
    (["--prompts=/"], "the prompt '/' is a folder"),
  ],
)
def test_sample_mistakes_are_one_line(loaded, tmp_path, arguments, message):
  with pytest.raises(SystemExit, match=message) as stopped:
    sample.main([*arguments, f"--out={tmp_path / 'out'}"])
  assert "\n" not in stopped.value.code
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [sample, edit])
def test_mistakes_come_before_a_generator_is_loaded(
  command, tmp_path, monkeypatch
):
  monkeypatch.setattr(TextToImage, "from_pretrained", None)
  image = save_image(tmp_path / "in.png")
  start = ["--prompts=a"]
  if command is edit:
    start = [f"--image={image}", "--prompt=a"]
  for wrong, message in (
    (f"--out={image}", "is a file; give a folder"),
    (f"--out={image}/a", "is a file; give a folder"),
    ("--steps=-1", "at least 1"),
    ("--seed=-1", "got -1"),
  ):
    with pytest.raises(SystemExit, match=message):
      command.main([*start, wrong])


def test_an_empty_prompt_file_is_an_error(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("\n \n")
  with pytest.raises(SystemExit, match="there are no prompts in"):
    sample.main([f"--prompts={file}"])
  file.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(SystemExit, match="not UTF-8"):
    sample.main([f"--prompts={file}"])


def test_a_wrong_workdir_is_one_line(tmp_path):
  image = save_image(tmp_path / "in.png")
  for command, arguments in (
    (sample, ["--prompts=a"]),
    (edit, [f"--image={image}", "--prompt=a"]),
    (export, [f"--out={tmp_path / 'out'}"]),
  ):
    with pytest.raises(SystemExit, match="is not a folder") as stopped:
      command.main([*arguments, f"--workdir={tmp_path / 'nowhere'}"])
    assert "\n" not in stopped.value.code


# --- edit ---


def test_edit_by_instruction(pipe, loaded, tmp_path, capsys):
  image, out = save_image(tmp_path / "in.png"), tmp_path / "out"
  instruction = "make the circle green"
  edit.main(
    [f"--image={image}", f"--instruction={instruction}", f"--out={out}"]
  )
  (result,) = out.glob("*seed-0.png")
  expected = pipe.edit(read(image), instruction)
  assert np.abs(read(result).astype(int) - expected).max() <= 1
  (comparison,) = out.glob("*compared.png")
  sheet = np.asarray(Image.open(comparison))
  source = np.asarray(contact_sheet.enlarge(read(image)))
  np.testing.assert_array_equal(sheet[12:212, 12:212], source)
  text = capsys.readouterr().out
  assert str(result) in text and str(comparison) in text and "note" not in text


def test_edit_by_noise_of_another_size_and_mode(pipe, loaded, tmp_path, capsys):
  image = save_image(tmp_path / "in.png", 90, 60, mode="P")
  edit.main(
    [f"--image={image}", "--prompt=a star", "--strength=0.3", "--num=2"]
    + [f"--out={tmp_path}"]
  )
  text = capsys.readouterr().out
  assert "has 90 × 60 pixels; its centre is cropped" in text
  source, _ = edit.read_image(image, 40)
  expected = pipe.edit(source, "a star", strength=0.3, seed=1)
  found = read(tmp_path / "in-a-star-seed-1.png")
  assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "CMYK", "1"])
def test_modes_are_made_rgb(tmp_path, mode):
  suffix = "tif" if mode == "CMYK" else "png"
  image = save_image(tmp_path / f"in.{suffix}", mode=mode)
  array, note = edit.read_image(image, 40)
  assert array.shape == (40, 40, 3) and array.dtype == np.uint8 and not note


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--prompt=a", "--strength=1.5"], r"strength must lie in \[0, 1\]"),
    (["--instruction= "], "the instruction or prompt is empty"),
    (["--prompt=a", "--image_guidance=2"], "goes with --instruction"),
    (["--instruction=a", "--strength=0.5"], "--strength goes with --prompt"),
    (["--instruction=a", "--num=0"], "at least one result"),
  ],
)
def test_edit_mistakes_are_one_line(loaded, tmp_path, arguments, message):
  image = save_image(tmp_path / "in.png")
  with pytest.raises(SystemExit, match=message) as stopped:
    edit.main([f"--image={image}", *arguments, f"--out={tmp_path}"])
  assert "\n" not in stopped.value.code


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "float"])
def test_unreadable_images_are_named(tmp_path, kind):
  image = tmp_path / "in.tif"
  if kind == "folder":
    image.mkdir()
  if kind == "text":
    image.write_text("no image")
  if kind == "float":
    Image.fromarray(np.zeros((9, 9), np.float32)).save(image)
  with pytest.raises(SystemExit, match=r"in\.tif") as stopped:
    edit.main([f"--image={image}", "--prompt=a"])
  assert "\n" not in stopped.value.code


# --- export ---


def test_export_command(pipe, tmp_path, capsys):
  vae = tmp_path / "vae"
  tiny_generator.export_autoencoder(pipe.saved.autoencoder, vae)
  tiny_generator.write_stage(tmp_path / "run", pipe.saved, vae)
  export.main(
    [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    + ["--dtype=bfloat16", f"--encoder={tmp_path / 'tuned'}"]
  )
  text = capsys.readouterr().out
  assert "generator (edit" in text and "MiB, bfloat16" in text
  assert (tmp_path / "tuned" / "preprocessor_config.json").is_file()
  provenance = exported.read_config(tmp_path / "out")["provenance"]
  trained = provenance["stages"]["edit"]
  assert trained["edit"]["train"]["batch_size"] == 64
  shutil.rmtree(vae)  # the export has its own
  assert TextToImage.from_pretrained(tmp_path / "out").stage == "edit"
  with pytest.raises(SystemExit, match="not replaced"):
    export.main([f"--workdir={tmp_path / 'out'}", f"--out={tmp_path / 'run'}"])


@pytest.mark.parametrize("command", [sample, edit, export])
def test_help_shows_examples(command, capsys):
  with pytest.raises(SystemExit) as stopped:
    command.main(["--help"])
  assert stopped.value.code == 0
  text = capsys.readouterr().out
  examples = text.split("examples:")[1].split("\n\n")[0].replace("\\\n", "")
  examples = [line for line in examples.splitlines() if line.strip()]
  assert len(examples) == 4
  for line in examples:
    command.parse_arguments(shlex.split(line)[3:])


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_every_solver_can_be_chosen(solver):
  # The command spells them out, so that --help is there before jax is.
  arguments = sample.parse_arguments(["--prompts", "dot", "--solver", solver])
  assert arguments.solver == solver
