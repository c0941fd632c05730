"""Metrics, summary and progress: what survives a kill, what a reader sees."""

import io
import json
import math
import os

import numpy as np
import pytest
from small_disk import filled, mounted

from psvae_jax import writers
from psvae_jax.progress import Progress, format_seconds


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(folder, steps, **kwargs):
  with writers.MetricWriter(folder, **kwargs) as writer:
    for step in steps:
      writer.write(step, {"train/loss": 1.0 / (step + 1)})


def events(folder):
  """(step, name) of every scalar and the steps of session starts."""
  from tensorboardX.proto import event_pb2

  scalars, starts = [], []
  for path in sorted((folder / "tensorboard").iterdir()):
    raw, position = path.read_bytes(), 0
    while position < len(raw):
      # A record: length (8), its checksum (4), data, the data's checksum (4).
      size = int.from_bytes(raw[position : position + 8], "little")
      data = raw[position + 12 : position + 12 + size]
      event = event_pb2.Event.FromString(data)
      # Without it TensorBoard takes the file for one of another format.
      assert position or event.file_version == "brain.Event:2"
      scalars += [(event.step, value.tag) for value in event.summary.value]
      if event.HasField("session_log"):
        starts.append(event.step)
      position += size + 16
  return scalars, starts


def test_a_line_holds_the_step_first_and_then_the_metrics(tmp_path):
  with writers.MetricWriter(tmp_path / "svae") as writer:
    writer.write(np.int32(3), {"train/loss": np.float32(0.5), "a": 2})
    # Flushed at once: readable while the writer is open.
    text = (tmp_path / "svae" / "metrics.jsonl").read_text()
  assert text == '{"step": 3, "train/loss": 0.5, "a": 2.0}\n'


def test_resume_cuts_back_to_the_restored_step(tmp_path):
  write_steps(tmp_path, range(1, 8))
  write_steps(tmp_path, [5, 6], start_step=4)
  records = lines(tmp_path / "metrics.jsonl")
  assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
  assert records[3]["train/loss"] == 0.2


def test_nothing_restored_starts_the_history_anew(tmp_path):
  write_steps(tmp_path, [0, 1, 2])
  write_steps(tmp_path, [0, 1])
  records = lines(tmp_path / "metrics.jsonl")
  assert [record["step"] for record in records] == [0, 1]


def test_a_torn_last_line_is_dropped(tmp_path):
  write_steps(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 3, "train/lo')
  assert [r["step"] for r in writers.read_metrics(path)] == [1, 2]
  write_steps(tmp_path, [3], start_step=5)
  assert [record["step"] for record in lines(path)] == [1, 2, 3]


def test_a_failing_cut_leaves_the_file_as_it_was(tmp_path, monkeypatch):
  write_steps(tmp_path, range(5))
  path = tmp_path / "metrics.jsonl"
  before = path.read_bytes()

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    writers.cut_back(path, 2)
  assert path.read_bytes() == before
  assert not list(tmp_path.glob(".*.tmp"))


def test_non_finite_values_are_valid_json_and_read_back(tmp_path):
  values = {"a": math.nan, "b": math.inf, "c": -math.inf}
  with writers.MetricWriter(tmp_path) as writer:
    writer.write(1, values)
  path = tmp_path / "metrics.jsonl"

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  record = json.loads(path.read_text(), parse_constant=refuse)
  assert record == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
  (read,) = writers.read_metrics(path)
  assert math.isnan(read["a"])
  assert (read["b"], read["c"]) == (math.inf, -math.inf)


def test_a_writer_that_is_not_enabled_touches_nothing(tmp_path):
  write_steps(tmp_path / "svae", [1], enabled=False)
  assert not list(tmp_path.iterdir())


def test_wrong_use_is_named(tmp_path):
  writer = writers.MetricWriter(tmp_path)
  with pytest.raises(ValueError, match='called "step"'):
    writer.write(1, {"step": 2.0})
  writer.close()
  writer.close()
  with pytest.raises(ValueError, match="closed"):
    writer.write(1, {"a": 2.0})


def test_tensorboard_has_the_scalars_and_hides_restarted_steps(tmp_path):
  write_steps(tmp_path, [1, 2, 3])
  assert events(tmp_path) == ([(s, "train/loss") for s in (1, 2, 3)], [])
  write_steps(tmp_path, [3, 4], start_step=2)
  scalars, starts = events(tmp_path)
  assert scalars == [(s, "train/loss") for s in (1, 2, 3, 3, 4)]
  assert starts == [3]  # steps >= 3 of the first file are hidden


def test_summary_merges_at_every_depth(tmp_path):
  workdir = tmp_path / "new"
  assert writers.read_summary(workdir) == {}
  writers.update_summary(
    workdir, {"svae": {"eval/psnr": 16.0}, "wall_seconds": {"svae": 2.0}}
  )
  merged = writers.update_summary(
    workdir,
    {
      "svae": {"eval/psnr": np.float32(17), "eval/ssim": math.nan},
      "wall_seconds": {"psvae": 3},
      "device": "cpu",
    },
  )
  read = writers.read_summary(workdir)
  assert list(read) == ["svae", "wall_seconds", "device"]
  assert math.isnan(read["svae"].pop("eval/ssim"))
  assert read["svae"] == {"eval/psnr": 17.0}
  assert read["wall_seconds"] == {"svae": 2.0, "psvae": 3}
  assert merged["device"] == "cpu"
  assert [path.name for path in workdir.iterdir()] == ["summary.json"]


def test_a_failing_merge_leaves_the_summary_as_it_was(tmp_path):
  writers.update_summary(tmp_path, {"svae": {"eval/psnr": 16.0}})
  with pytest.raises(TypeError, match="object"):
    writers.update_summary(tmp_path, {"svae": {"eval/ssim": object()}})
  assert writers.read_summary(tmp_path) == {"svae": {"eval/psnr": 16.0}}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_summary_is_an_error_and_is_kept(tmp_path, text):
  path = tmp_path / "summary.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="summary.json"):
    writers.update_summary(tmp_path, {"a": 1})
  assert path.read_text() == text


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
  """Whole lines: none is torn, and none is appended to half of another."""
  with mounted(tmp_path / "disk", "1m") as disk:
    with writers.MetricWriter(disk / "svae") as writer:
      for step in range(1, 5):
        writer.write(step, {f"a/{i}": step + i / 3 for i in range(40)})
      with filled(disk, spare=1000):
        # As many as fill what is left of the last page, and many more.
        for step in range(5, 45):
          writer.write(step, {f"a/{i}": step + i / 3 for i in range(40)})
      for step in range(45, 50):
        writer.write(step, {f"a/{i}": step + i / 3 for i in range(40)})
    (line,) = capsys.readouterr().out.splitlines()
    assert "No space left on device" in line
    assert "svae" in line
    records = lines(disk / "svae" / "metrics.jsonl")  # every line is whole
    steps = [record["step"] for record in records]
    assert steps[:4] == [1, 2, 3, 4]
    assert steps[-5:] == [45, 46, 47, 48, 49]
    assert len(steps) < 25  # the disk was full
    scalars, _ = events(disk / "svae")
    seen = {step for step, _ in scalars}
    assert {1, 2, 3, 4, 45, 46, 47, 48, 49} <= seen
    assert len(seen) < 25


def test_a_full_disk_from_the_start_costs_lines_only(tmp_path, capsys):
  with mounted(tmp_path / "disk", "1m") as disk:
    with writers.MetricWriter(disk / "svae") as writer:
      with filled(disk):
        writer.write(1, {"a": 1.0})
        writer.write(2, {"a": 1.0})
      writer.write(3, {"a": 1.0})
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert [r["step"] for r in lines(disk / "svae" / "metrics.jsonl")] == [3]
    assert events(disk / "svae") == ([(3, "a")], [])


def test_a_full_disk_leaves_whole_files_as_they_were(tmp_path):
  with mounted(tmp_path / "disk", "1m") as disk:
    writers.update_summary(disk, {"svae": {"eval/psnr": 16.0}})
    page = disk / "report.html"
    writers.write_text_atomic(page, "old")
    with filled(disk):
      with pytest.raises(OSError, match="No space left"):
        writers.update_summary(disk, {"svae": {"eval/ssim": 1.0}})
      with pytest.raises(OSError, match="No space left"):
        writers.write_text_atomic(page, "new")
    assert writers.read_summary(disk) == {"svae": {"eval/psnr": 16.0}}
    assert page.read_text() == "old"
    assert not list(disk.glob(".*.tmp"))


def test_a_full_disk_leaves_arrays_as_they_were(tmp_path, capsys):
  noise = np.random.default_rng(0).standard_normal((100, 100))
  with mounted(tmp_path / "disk", "1m") as disk:
    path = disk / "samples" / "reconstructions.npz"
    writers.write_arrays_atomic(path, {"a": noise[:10]})
    with filled(disk, spare=20_000):
      with writers.skipped_when_full(str(path)):
        writers.write_arrays_atomic(path, {"a": noise})
        raise AssertionError("the disk was not full")
    (line,) = capsys.readouterr().out.splitlines()
    assert "reconstructions.npz" in line
    assert "No space left on device" in line
    np.testing.assert_array_equal(np.load(path)["a"], noise[:10])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    writers.write_arrays_atomic(path, {"a": noise})
    np.testing.assert_array_equal(np.load(path)["a"], noise)
  with pytest.raises(PermissionError), writers.skipped_when_full("x"):
    raise PermissionError(1, "not permitted")


class Clock:
  """A clock that stands still until told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_plain_lines_come_no_faster_than_asked_and_end_with_the_last():
  clock, stream = Clock(), io.StringIO()
  progress = Progress(
    "svae", 400, 64, 110, every_seconds=10, stream=stream, clock=clock
  )
  with progress:
    clock.now += 60  # compilation
    for step in range(111, 161):
      clock.now += 0.5
      progress.advance(step)
      progress.show({"train/loss": 0.4117})
      progress.show({"eval/psnr": 20.0})
  assert stream.getvalue().splitlines() == [
    "svae 111/400",
    "svae 131/400  2 it/s  128 images/s  loss 0.4117  eta 2m14s",
    "svae 151/400  2 it/s  128 images/s  loss 0.4117  eta 2m04s",
    "svae 160/400  2 it/s  128 images/s  loss 0.4117  eta 2m00s",
  ]


def test_a_pause_does_not_change_the_rate():
  clock = Clock()
  progress = Progress("svae", 100, 8, stream=io.StringIO(), clock=clock)
  for step in range(1, 11):
    clock.now += 0.25
    progress.advance(step)
  with progress.paused("evaluating"):
    clock.now += 500
    with progress.paused():
      clock.now += 500
    assert progress.steps_per_second == 4.0
  clock.now += 0.25
  progress.advance(11)
  assert progress.steps_per_second == pytest.approx(4.0)
  assert progress.images_per_second == pytest.approx(32.0)
  assert progress.eta_seconds == pytest.approx(89 / 4)


def test_the_rate_is_that_of_the_last_minute_and_unknown_at_first():
  clock = Clock()
  progress = Progress("svae", 9999, stream=io.StringIO(), clock=clock)
  progress.advance(1)
  assert math.isnan(progress.steps_per_second)
  for step in range(2, 200):
    clock.now += 1.0 if step < 100 else 2.0
    progress.advance(step)
  assert progress.steps_per_second == pytest.approx(0.5)
  assert math.isnan(progress.images_per_second)  # batch size not given


def test_a_terminal_gets_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  with Progress("svae", 4, 8, stream=stream) as progress:
    for step in range(1, 5):
      progress.advance(step)
      progress.show({"train/loss": 0.25})
    with progress.paused("evaluating"):
      pass
  text = stream.getvalue()
  assert "svae" in text
  assert "4/4" in text
  assert "loss 0.25" in text
  assert "\x1b[" in text


def test_progress_that_is_not_enabled_is_silent():
  stream = io.StringIO()
  with Progress("svae", 2, stream=stream, enabled=False) as progress:
    progress.advance(1)
    progress.advance(2)
  assert stream.getvalue() == ""


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.44, "0.4s"),
    (9.97, "10s"),
    (59.6, "1m00s"),
    (90, "1m30s"),
    (7499, "2h04m"),
    (277_200, "3d05h"),
    (math.nan, "?"),
  ],
)
def test_durations_are_short(seconds, text):
  assert format_seconds(seconds) == text
