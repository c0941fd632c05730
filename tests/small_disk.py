"""A file system that fills up: a tmpfs, where mounting one is permitted."""

import contextlib
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def mounted(folder, size="24m"):
  """Mounts a tmpfs of `size` at the empty `folder` within the block."""
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"mounting a tmpfs is not permitted: {error}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk, spare=0):
  """Leaves `spare` bytes free within the block."""
  ballast = disk / "ballast"
  ballast.write_bytes(bytes(max(shutil.disk_usage(disk).free - spare, 0)))
  yield
  ballast.unlink()
