"""What is freed stays in a process that computes on a CPU."""

import subprocess
import sys

import pytest

from psvae_jax import memory

_SCRIPT = """
import resource, sys
from psvae_jax import memory
if sys.argv[1] == "keep":
  assert memory.keep_freed_memory()
import numpy as np
def touch():
  np.ones(8 << 20, np.uint8)  # allocated and freed
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
  touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(memory.has_accelerator(), reason="there is an accelerator")
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_fault_once():
  faults = {}
  for mode in ("keep", "give"):
    out = subprocess.run(
      [sys.executable, "-c", _SCRIPT, mode],
      capture_output=True,
      text=True,
      check=True,
    )
    faults[mode] = int(out.stdout)
  assert faults["keep"] < 100 < faults["give"], faults


def test_leaves_accelerator_hosts_alone(monkeypatch):
  monkeypatch.setattr(memory, "has_accelerator", lambda: True)
  assert not memory.keep_freed_memory()


def test_jax_platforms_decides(monkeypatch):
  monkeypatch.setattr(memory.glob, "glob", lambda pattern: [pattern])
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert memory.has_accelerator()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert not memory.has_accelerator()
