"""The evaluate command: flags, both tables, restarts, errors in one line."""

import json

import numpy as np
import pytest
import tiny_metrics
from PIL import Image

from psvae_jax import evaluate
from psvae_jax.evaluation import models, networks
from psvae_jax.evaluators.reference_npz import ReferenceFile

SIDE = 24


def save_images(folder, count=12, size=(SIDE, SIDE), seed=0):
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  for i in range(count):
    coarse = rng.integers(0, 256, (3, 3, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(folder / f"{i:02d}.png")
  return str(folder)


def _load_model(name, dtype=None):
  """Autoencoders of one number: the name says how dark."""
  if not name.startswith("dark"):
    raise ValueError(f"{name} is no model")
  _, shift, size = name.split(",")

  def reconstruct(params, images):
    return images.astype(np.float32) / 127.5 - 1.0 - params["shift"]

  return models.Model(
    name,
    name,
    {"shift": np.float32(shift)},
    reconstruct,
    int(size),
    0,
    dtype or "float32",
    f"darker by {shift}",
  )


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
  def load(*, inception="", dinov2="", lpips="", clip="", **options):
    del lpips, clip, options
    return networks.Networks(
      inception=tiny_metrics.inception() if inception else None,
      dinov2=tiny_metrics.dinov2() if dinov2 else None,
    )

  monkeypatch.setattr(networks, "load", load)
  monkeypatch.setattr(models, "load", _load_model)


def run(tmp_path, *arguments):
  evaluate.main([*arguments, f"--out={tmp_path / 'out'}", "--batch_size=8"])
  return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def fails(tmp_path, *arguments):
  with pytest.raises(SystemExit) as stopped:
    evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
  message = stopped.value.code
  assert message.startswith("error: ") and "\n" not in message
  return message


def test_help_shows_examples_that_parse(capsys):
  with pytest.raises(SystemExit) as stopped:
    evaluate.main(["--help"])
  assert stopped.value.code == 0
  shown = capsys.readouterr().out.replace("\\\n", " ")
  lines = shown.splitlines()
  examples = [
    line.split()[3:]
    for line in lines
    if line.startswith("  python -m psvae_jax.evaluate")
  ]
  assert len(examples) == 7
  for example in examples:
    arguments = evaluate.parse_arguments(example)
    evaluate.check(arguments)
    evaluate.check_numbers(arguments)


def test_reconstruction_of_several_models(tmp_path, capsys):
  data = save_images(tmp_path / "data")
  arguments = ["--models", "dark,0.1,24", "dark,0.3,24", f"--data={data}"]
  found = run(tmp_path, *arguments, "--inception=x", "--dinov2=y")
  rows = found["figures"]
  assert rows["dark,0.1,24"]["psnr"] > rows["dark,0.3,24"]["psnr"]
  assert rows["dark,0.1,24"]["rfid"] < rows["dark,0.3,24"]["rfid"]
  assert found["kind"] == "reconstruction"
  assert found["protocol"]["set"]["images"] == "all 12"
  assert found["protocol"]["rounding"] == "round to 8 bits"
  assert found["left_out"] == {"lpips": "--lpips was not given"}
  shown = capsys.readouterr().out
  assert "rFID ↓" in shown and "gFID" not in shown
  assert "evaluation.json" in shown
  # A third model: what was done before is not done again.
  found = run(tmp_path, *arguments, "--inception=x", "--dinov2=y")
  assert found["figures"] == rows
  assert "images)" not in capsys.readouterr().out
  arguments[2:3] = ["dark,0.3,24", "dark,0.2,24"]
  found = run(tmp_path, *arguments, "--inception=x", "--dinov2=y")
  assert {k: found["figures"][k] for k in rows} == rows
  shown = capsys.readouterr().out
  assert "dark,0.2,24 (12 images)" in shown
  assert "dark,0.1,24 (12 images)" not in shown


def test_interrupted_it_goes_on_to_the_same_figures(tmp_path, monkeypatch):
  from psvae_jax.evaluation import passes

  data = save_images(tmp_path / "data", count=40)
  arguments = [
    *("--models", "dark,0.1,24", f"--data={data}"),
    *("--inception=x", "--dinov2=y", "--save_every=1"),
  ]
  whole = run(tmp_path / "whole", *arguments)
  real, stops = passes._State.save, iter([2, 1, 1, 3, 1, 1, 99])

  class Killed(BaseException):
    pass

  times = 0
  for stop in stops:
    left = [stop]

    def save(self, left=left):
      if not left[0]:
        raise Killed
      left[0] -= 1
      real(self)

    monkeypatch.setattr(passes._State, "save", save)
    try:
      found = run(tmp_path / "cut", *arguments)
    except Killed:
      times += 1
  assert times >= 4
  assert found["figures"] == whole["figures"]


def test_generation_against_folder_and_file(tmp_path):
  made = [save_images(tmp_path / n, seed=i) for i, n in enumerate("ab")]
  real = save_images(tmp_path / "real", count=20, size=(30, 26), seed=9)
  found = run(
    tmp_path,
    *("--generated", *made, f"--reference={real}", "--inception=x"),
    "--label_sampling=by hand",
  )
  assert set(found["figures"]) == set(made)
  row = found["figures"][made[0]]
  assert {"gfid", "gsfid", "kid", "precision", "inception_score"} <= set(row)
  assert found["protocol"]["reference"]["count"] == 20
  assert "centre crop" in found["protocol"]["reference"]["preparation"]
  assert found["protocol_of_row"][made[0]]["label_sampling"] == "by hand"
  # The same statistics from a file, with its images and without.
  path = tmp_path / "reference.npz"
  base = ["--generated", made[0], f"--reference={path}", "--inception=x"]
  for flags in ([], ["--with_images"]):
    evaluate.main(
      [
        *(f"--data={real}", f"--size={SIDE}", "--inception=x", *flags),
        *(f"--write_reference={path}", f"--out={tmp_path / 'out'}"),
        "--batch_size=8",
      ]
    )
    file = ReferenceFile(path)
    assert file.count == 20 and file.num_images == (20 if flags else 0)
    assert file.protocol["networks"]["inception"]["inception"] == "tiny"
    again = run(tmp_path, *base)["figures"][made[0]]
    for key, value in again.items():
      assert value == pytest.approx(row[key], rel=1e-9), key
    assert ("precision" in again) == bool(flags)


def test_unreadable_images_are_counted_and_listed(tmp_path):
  data = save_images(tmp_path / "data", count=20)
  (tmp_path / "data" / "05.png").write_bytes(b"x")
  flags = ["--models", "dark,0.1,24", f"--data={data}", "--inception=x"]
  message = fails(tmp_path, *flags)
  assert "allow more with --max_bad_share=SHARE" in message
  found = run(tmp_path, *flags, "--max_bad_share=0.05")
  assert found["protocol"]["count"] == 19
  assert found["protocol"]["unreadable_images"] == 1
  listed = tmp_path / "out" / "quarantine.jsonl"
  assert str(listed) in found["notes"][0] and "05.png" in listed.read_text()


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "give either --models and --data"),
    (["--models", "a", "--generated", "b"], "give either --models and --data"),
    (["--models", "a"], "--models needs --data"),
    (["--generated", "a"], "need a network to be measured with"),
    (["--generated", "a", "--data=b", "--clip=c"], "--data is for --models"),
    (["--models", "a", "--data=b", "--clip=c"], "are for --generated"),
    (
      ["--generated", "a", "--prompts=b", "--dinov2=d"],
      "--prompts needs --clip",
    ),
    (["--models", "a", "a", "--data=b"], "--models has a twice"),
    (["--models", "a", "--data=b", "--reference=c"], "needs --inception or"),
    (["--models", "a", "--data=b", "--with_images"], "for --write_reference"),
    (["--models", "a", "--data=b", "--num_reference=3"], "needs --reference"),
    (["--generated", "a", "--dinov2=d", "--num=9"], "--num is for --models"),
    (["--generated", "a", "--dinov2=d", "--lpips=e"], "--lpips is for"),
    (["--write_reference=a.npz"], "--write_reference needs --data"),
    (["--write_reference=a.npz", "--data=b"], "needs --inception or --dinov2"),
    (["--models", "a", "--data=b", "--size=5"], "--size=5: from 11 to"),
    (["--models", "a", "--data=b", "--batch_size=0"], "at least 1 is needed"),
    (["--models", "a", "--data=b", "--max_bad_share=1"], "to below 1"),
    (["--models", "a", "--data=missing"], "does not exist"),
  ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message):
  assert message in fails(tmp_path, *flags)


def test_sizes_that_do_not_fit_are_one_line(tmp_path):
  data = save_images(tmp_path / "data")
  other = save_images(tmp_path / "other", size=(30, 30))
  both = ["--models", "dark,0.1,24", "dark,0.1,32", f"--data={data}"]
  assert "different sizes (dark,0.1,24 24" in fails(tmp_path, *both)
  assert "--size=N" in fails(
    tmp_path, "--generated", data, other, "--inception=x"
  )
  path = tmp_path / "reference.npz"
  np.savez(path, mu=np.zeros(9), sigma=np.eye(9))
  assert "statistics of 9 pool features" in fails(
    tmp_path, "--generated", data, f"--reference={path}", "--inception=x"
  )
  save_images(tmp_path / "data" / "z", count=1, size=(30, 30))
  assert "several sizes" in fails(
    tmp_path, "--generated", data, "--inception=x"
  )


def test_a_folder_in_use_is_one_line(tmp_path):
  from psvae_jax import workdir

  with workdir.workdir_lock(tmp_path / "out"):
    message = fails(tmp_path, "--models", "dark,0,24", "--data=scenes")
  assert "in use by another run" in message and "--out" in message
