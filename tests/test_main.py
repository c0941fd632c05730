"""The command line: what a user sees, and with which exit code."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
from small_disk import filled, mounted

from psvae_jax import cli, main, report, train, writers
from psvae_jax.checkpoint import CheckpointError
from psvae_jax.config import ConfigError
from psvae_jax.config import parser as config_parser
from psvae_jax.report.data import read_run
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.workdir import workdir_lock

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def command(*flags, module="psvae_jax.main"):
  return subprocess.run(
    [sys.executable, "-m", module, *flags],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


def is_one_line(result, message):
  assert result.returncode == 1
  assert message in result.stderr
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1
  assert not result.stdout
  return True


@pytest.fixture
def job(tmp_path):
  """A tiny job as a JSON file, which takes seconds."""
  encoder = tiny.save_encoder(tmp_path / "encoder")
  raw = config_parser.with_defaults(tiny.config(encoder, steps=2))
  path = tmp_path / "job.json"
  path.write_text(json.dumps(raw))
  return path


@pytest.mark.parametrize("flag", ["--help", "-h", "-help"])
def test_help_shows_examples(flag):
  result = command(flag, "--config=nothing.py")
  assert result.returncode == 0
  assert not result.stderr
  assert "python -m psvae_jax.main --config=configs/psvae.py" in result.stdout
  assert "--print_config" in result.stdout
  assert len(result.stdout.splitlines()) < 40


def test_examples_of_the_help_are_valid():
  """Every example parses; the files and folders it names may be missing."""
  text = main.USAGE.split("Examples:")[1].replace("\\\n", " ")
  examples = [line.split()[3:] for line in text.splitlines() if line.strip()]
  assert len(examples) == 5
  for flags in examples:
    flags = flags[: flags.index(">")] if ">" in flags else flags
    rest, overrides = cli.split_overrides(flags)
    config = next(f for f in rest if f.startswith("--config=")).split("=")[1]
    assert all(f.split("=")[0].lstrip("-") in main.flags.FLAGS for f in rest)
    if config == "job.json":  # written by the example before
      continue
    raw = cli.load_config(str(_ROOT / config))
    config_parser.parse(config_parser.override(raw, overrides))


def test_print_config_is_the_checked_config_and_runs_nothing(tmp_path):
  workdir = tmp_path / "run"
  flags = ("--config=configs/psvae.py", "--config.psvae.train.steps=7")
  result = command(*flags, "--print_config", f"--workdir={workdir}")
  assert result.returncode == 0, result.stderr
  printed = json.loads(result.stdout)
  assert printed["psvae"]["train"]["steps"] == 7
  assert printed["guard"]["max_skipped"] == 10
  assert not workdir.exists()
  again = tmp_path / "job.json"
  again.write_text(result.stdout)
  same = command(f"--config={again}", "--print_config")
  assert json.loads(same.stdout) == printed


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "--config is missing, e.g. --config=configs/psvae.py"),
    (["configs/psvae.py"], "a config is given as --config=FILE"),
    (["--config=configs/nothing.py"], "'configs/nothing.py' does not exist"),
    (["--config=configs"], "'configs' is a folder"),
    (["--config=configs/psvae.py:nothing"], "'nothing'"),
    (
      ["--config=configs/psvae.py", "--config.psvae.train.stepz=3"],
      "config.psvae.train.stepz: did you mean 'steps'?",
    ),
    (
      ["--config=configs/psvae.py", "--config.train.steps=3"],
      "did you mean config.svae.train.steps or config.psvae.train.steps?",
    ),
    (
      ["--config=configs/psvae.py", "--config.model.channels=many"],
      "config.model.channels must be int, got 'many'",
    ),
    (
      ["--config=configs/psvae.py", "--config.svae.loss.kl", "nan"],
      "must be a finite number",
    ),
    (
      ["--config=configs/psvae.py", "--svae.train.steps=3"],
      "did you mean --config.svae.train.steps?",
    ),
    (["--config=configs/psvae.py", "--workdri=x"], "Did you mean: workdir"),
    (["--flagfile=nothing"], "nothing"),
    (
      ["--config=configs/psvae.py", "--workdir=README.md"],
      "--workdir=README.md cannot be created: README.md is a file",
    ),
    (
      ["--config=configs/psvae.py", "--workdir=README.md/deep/run"],
      "README.md is a file",
    ),
    (["--config=configs/psvae.py", "--workdir=gs://bucket/run"], "address"),
  ],
)
def test_a_mistake_is_one_line(flags, message):
  assert is_one_line(command(*flags), message)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("a.py", "import os\ndef get_config(:\n", "a.py:2: "),
    ("b.py", "def get_config():\n  return 1 / 0\n", "b.py:2: ZeroDivision"),
    ("c.py", "x = 1\nimport nothing_there\n", "c.py:2: ModuleNotFoundError"),
    ("d.py", "x = 1\n", "d.py has no function get_config"),
    ("e.py", "def get_config():\n  return 3\n", "must be a mapping, got 3"),
    ("f.py", "def get_config():\n  return {}\n", "config.stages is empty"),
    ("g.json", '{\n "seed": 0,\n}', "g.json:3: "),
    ("h.json", "[1]", "holds no JSON object"),
    ("i.py", "\0", "i.py"),
  ],
)
def test_a_broken_config_file_names_file_and_line(
  tmp_path, name, text, message
):
  path = tmp_path / name
  path.write_text(text)
  assert is_one_line(command(f"--config={path}"), message)


def test_a_size_mistake_is_one_line_and_leaves_no_workdir(job, tmp_path):
  workdir = tmp_path / "run"
  flags = (f"--config={job}", f"--workdir={workdir}")
  result = command(*flags, "--config.model.image_size=36")
  assert is_one_line(result, "image_size=36 is not a multiple of the encoder's")
  assert not workdir.exists()


@pytest.mark.parametrize(
  "flag, text, message",
  [
    ("mesh.fsdp", "3", "data=-1, fsdp=1, tensor=1 would"),
    ("svae.train.batch_size", "12", r"svae\.train\.batch_size=12.*16 would"),
    ("svae.train.accumulate", "2", "2 micro-batches over the 8 .*; 16 would"),
    ("compute.dtype", "float64", "JAX_ENABLE_X64=1, or take 'float32'"),
  ],
)
def test_a_job_must_fit_the_machine(tmp_path, flag, text, message):
  raw = tiny.config(tmp_path / "no_encoder_needed")
  workdir = tmp_path / "run"
  with pytest.raises(ConfigError, match=message):
    main.run(config_parser.override(raw, {flag: text}), workdir)
  assert not workdir.exists()


def test_a_folder_without_permission(tmp_path, monkeypatch):
  """Root may write anywhere, so the operating system's answer is replaced."""
  config = "configs/psvae.py"
  assert main._workdir(str(tmp_path / "a"), config) == tmp_path / "a"
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  with pytest.raises(
    ConfigError, match=f"no permission to write to {tmp_path}"
  ):
    main._workdir(str(tmp_path / "a" / "b"), config)


@pytest.mark.parametrize(
  "config, name",
  [
    ("configs/psvae.py", "psvae"),
    ("configs/psvae.py:gan", "psvae-gan"),
    ("psvae.py:base,encoder=a/b", "psvae-base-encoder=a-b"),
    ("psvae.py:", "psvae"),
    ("/jobs/my job.json", "my-job"),
  ],
)
def test_the_default_workdir_tells_variants_apart(config, name):
  """In the way of launch/local.sh, so that both continue the same job."""
  assert main._workdir(None, config) == pathlib.Path("runs") / name
  script = (_ROOT / "launch" / "local.sh").read_text()
  script = script.replace('\nmain "$@"\n', '\nconfig_name "$@"\n')
  result = subprocess.run(
    ["bash", "-c", script, "local.sh", config], capture_output=True, text=True
  )
  assert result.stdout.strip() == name, result.stderr


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
  """A workdir in which stage 1 has been trained, and the job."""
  folder = tmp_path_factory.mktemp("job")
  raw = tiny.config(tiny.save_encoder(folder / "encoder"), steps=2)
  raw.stages = ("svae",)
  raw.mesh.data = 8
  main.run(raw, folder / "run")
  return folder / "run", raw


@pytest.fixture
def trained(first_stage, tmp_path):
  workdir, raw = first_stage
  shutil.copytree(workdir, tmp_path / "run")
  return tmp_path / "run", raw.copy_and_resolve_references()


def test_a_job_that_is_refused_changes_no_config(trained):
  """Else the sound stage would no longer load."""
  workdir, raw = trained
  before = (workdir / "config.json").read_text()
  raw.stages = ("psvae",)
  raw.model.channels = 6
  with pytest.raises(CheckpointError, match="channels: saved 4, this job 6"):
    main.run(raw, workdir)
  raw.model.channels = 4
  raw.data.update(source="folder", root="nowhere", augment="crop")
  with pytest.raises(FileNotFoundError, match="nowhere"):
    main.run(raw, workdir)
  shutil.rmtree(workdir / "svae" / "checkpoints")
  with pytest.raises(CheckpointError, match="train the earlier stage first"):
    main.run(raw, workdir)
  assert (workdir / "config.json").read_text() == before
  assert not (workdir / "psvae").exists()


def test_a_finished_stage_says_what_would_be_trained_otherwise(trained, capsys):
  """It keeps its own settings, in the report too, and needs no data."""
  workdir, raw = trained
  before = (workdir / "config.json").read_text()
  raw.svae.loss.kl = 0.25
  raw.data.update(source="folder", root="nowhere", augment="crop")
  main.run(raw, workdir)
  assert (
    "svae: finished before with other settings (loss.kl: 0.001, asked for "
    "0.25), skipped; --workdir=OTHER trains anew"
  ) in capsys.readouterr().out
  assert (workdir / "config.json").read_text() == before
  assert (workdir / "svae" / "config.json").read_text() == before
  # As after a later stage that was trained by a job with other settings.
  later = json.loads(before)
  later["svae"]["loss"]["kl"] = 0.25
  (workdir / "config.json").write_text(json.dumps(later))
  (stage,) = read_run(workdir).stages
  assert stage.config["loss"]["kl"] == 1e-3


def test_a_report_that_cannot_be_written_ends_no_job(
  trained, capsys, monkeypatch
):
  workdir, raw = trained
  (workdir / "report.html").unlink()

  def broken(*_):
    raise RuntimeError("no such colour")

  monkeypatch.setattr(report, "write_report", broken)
  assert "eval/psnr" in main.run(raw, workdir)["svae"]
  (line,) = [x for x in capsys.readouterr().out.splitlines() if "warning" in x]
  assert "no such colour" in line
  assert line.endswith(f"python -m psvae_jax.report {workdir}")


def test_a_disk_that_is_full_after_training_loses_nothing(
  trained, tmp_path, capsys, monkeypatch
):
  """Results, report and frozen encoder wait for the next start."""
  finished, raw = trained
  with mounted(tmp_path / "disk") as disk:
    workdir = disk / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").write_text('{"other": {"eval/psnr": 1.0}}\n')
    shutil.rmtree(workdir / "frozen")
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
      evaluate = AutoencoderTask.evaluate

      def filling(*args):
        stack.enter_context(filled(disk))
        return evaluate(*args)

      patch.setattr(AutoencoderTask, "evaluate", filling)
      with pytest.raises(OSError, match="lacks the figures of svae.*command"):
        main.run(raw, workdir)
      # What was there is whole.
      assert writers.read_summary(workdir) == {"other": {"eval/psnr": 1.0}}
    out = capsys.readouterr().out.splitlines()
    assert sum("report could not be written" in line for line in out) == 2
    assert sum("the results of svae could not" in line for line in out) == 1
    summary = main.run(raw, workdir)
    assert summary["other"] == {"eval/psnr": 1.0}
    assert summary["svae"] == writers.read_summary(finished)["svae"]
    assert list((workdir / "frozen").glob("*/config.json"))
    capsys.readouterr()
    monkeypatch.setattr(train, "run_stage", None)
    main.run(raw, workdir)
    assert "svae: finished before, skipped" in capsys.readouterr().out


def test_a_mistake_in_a_later_stage_stops_the_first(job, tmp_path):
  """No step of stage 1 is made when stage 2 cannot start."""
  workdir = tmp_path / "run"
  result = command(
    f"--config={job}",
    f"--workdir={workdir}",
    "--config.discriminator.kind=dino",
    f"--config.discriminator.weights={tmp_path / 'nowhere'}",
    "--config.psvae.loss.gan=0.5",
  )
  assert result.returncode == 1
  assert "nowhere" in result.stderr
  assert "Traceback" not in result.stderr
  assert not (workdir / "svae").exists()


def test_a_workdir_in_use_is_one_line(job, tmp_path):
  workdir = tmp_path / "run"
  with workdir_lock(workdir):
    result = command(f"--config={job}", f"--workdir={workdir}")
  assert is_one_line(result, "is in use by another run")
  assert not (workdir / "config.json").exists()


def test_ctrl_c_says_how_to_go_on(job, tmp_path):
  workdir = tmp_path / "run"
  flags = (f"--config={job}", f"--workdir={workdir}")
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "psvae_jax.main", *flags),
      "--config.svae.train.steps=100000",
    ],
    cwd=_ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  metrics = workdir / "svae" / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130
  assert stderr.strip().endswith("interrupted; the same command resumes")
  assert "Traceback" not in stderr
  assert "Fatal" not in stderr


def test_ctrl_c_is_not_lost_in_a_finalizer():
  code = """
import os, signal, time
from psvae_jax import cli

class Finalized:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)

def command():
  Finalized()
  time.sleep(20)

cli.guard(command, interrupted="go on")
"""
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True
  )
  assert (result.returncode, result.stderr) == (130, "\ninterrupted; go on\n")


def test_split_overrides():
  arguments = (
    *("prog", "--config=a.py", "--config.a.b=1", "-config.a.c", "-2"),
    *("--config.d", "--noconfig.e", "--workdir", "w", "--config.f", "x=y"),
    *("--config.a.b=3", "--", "--config.g=1"),
  )
  rest, overrides = cli.split_overrides(arguments)
  assert rest == [
    *("prog", "--config=a.py", "--workdir", "w", "--", "--config.g=1")
  ]
  assert overrides == {
    "a.c": "-2",
    "d": "true",
    "e": "false",
    "f": "x=y",
    "a.b": "3",
  }
