"""Lets a process that computes on a CPU keep the memory that XLA frees.

XLA allocates its temporaries anew for every step. glibc takes blocks of that
size from the system and gives them back each time, and touching them again
costs a page fault for every 4 KiB: a third of a small model's step. Kept in
the process, they cost nothing, and no number changes.
"""

import ctypes
import glob
import os

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1

_ACCELERATORS = (
  "/dev/nvidia[0-9]*",
  "/dev/accel*",
  "/dev/vfio/[0-9]*",
  "/dev/kfd",
)


def has_accelerator() -> bool:
  """Whether JAX may find something else than a CPU here."""
  if os.environ.get("JAX_PLATFORMS", "").strip().lower() == "cpu":
    return False
  return any(glob.glob(pattern) for pattern in _ACCELERATORS)


def keep_freed_memory() -> bool:
  """Tells glibc to keep what is freed; call it before JAX starts threads.

  Returns:
    Whether it was told: not where an accelerator computes, whose host better
    gives memory back, and not under another C library.
  """
  if has_accelerator():
    return False
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return False
  # One arena: the others are made of small heaps that cannot hold such blocks.
  return all(
    [
      mallopt(_M_ARENA_MAX, 1),
      mallopt(_M_MMAP_MAX, 0),
      mallopt(_M_TRIM_THRESHOLD, _NEVER),
    ]
  )
