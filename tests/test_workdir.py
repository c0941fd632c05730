"""Two runs on one workdir: only the first one runs."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from small_disk import filled, mounted

from psvae_jax.workdir import WorkdirBusyError, WorkdirError, workdir_lock

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_HOLD = (
  "import sys, time; from psvae_jax.workdir import workdir_lock\n"
  "with workdir_lock(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
)


def hold(workdir):
  """Starts a process that holds `workdir`; returns when it does."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(workdir)],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "locked\n"
  return process


def test_a_second_run_is_refused_at_once_and_told_about_the_first(tmp_path):
  workdir = tmp_path / "runs" / "job"
  first = hold(workdir)
  try:
    started = time.monotonic()
    with pytest.raises(WorkdirBusyError) as error:
      with workdir_lock(workdir):
        raise AssertionError("two runs at once")
    assert time.monotonic() - started < 1
    message = str(error.value)
    for part in (
      str(workdir),
      f"process {first.pid} on {os.uname().nodename}",
      f"started {time.strftime('%Y-')}",
      "psvae_jax.workdir",
      "another --workdir",
    ):
      assert part in message
    # A killed run leaves no lock behind.
    first.send_signal(signal.SIGKILL)
    first.wait()
    with workdir_lock(workdir):
      pass
  finally:
    first.kill()
    first.wait()
    first.stdout.close()


def test_one_after_the_other_and_in_one_process(tmp_path):
  for _ in range(2):
    with workdir_lock(tmp_path):
      with pytest.raises(WorkdirBusyError, match=f"process {os.getpid()}"):
        with workdir_lock(tmp_path):
          pass
  with pytest.raises(ZeroDivisionError):
    with workdir_lock(tmp_path):
      raise ZeroDivisionError
  with workdir_lock(tmp_path):
    pass


def test_other_processes_of_the_same_job_touch_nothing(tmp_path):
  with workdir_lock(tmp_path / "job", enabled=False):
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_workdir_that_is_a_file_is_named(tmp_path, name):
  (tmp_path / "file").write_text("x")
  with pytest.raises(WorkdirError, match="is a file.*another --workdir"):
    with workdir_lock(tmp_path / name):
      pass
  assert (tmp_path / "file").read_text() == "x"


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
  """A read-only file system: the administrator may write anywhere else."""
  mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(tmp_path)]
  if os.geteuid() != 0:
    tmp_path.chmod(0o500)
  elif subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a read-only tmpfs is not permitted")
  try:
    for workdir in (tmp_path, tmp_path / "new"):
      with pytest.raises(WorkdirError, match="Read-only|Permission") as error:
        with workdir_lock(workdir):
          pass
      assert str(workdir) in str(error.value)
  finally:
    if os.geteuid() == 0:
      subprocess.run(["umount", str(tmp_path)], check=True)
    else:
      tmp_path.chmod(0o700)


def test_a_full_disk_is_locked_all_the_same(tmp_path):
  with mounted(tmp_path / "disk", "1m") as disk, filled(disk):
    with workdir_lock(disk):
      with pytest.raises(WorkdirBusyError, match="not written its name"):
        with workdir_lock(disk):
          pass


def test_a_file_system_without_locks_is_a_warning(
  tmp_path, monkeypatch, capsys
):
  def no_locks(*_):
    raise OSError(errno.ENOTSUP, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", no_locks)
  with workdir_lock(tmp_path):
    (line,) = capsys.readouterr().out.splitlines()
  for part in (str(tmp_path), "has no locks", "start only one"):
    assert part in line
