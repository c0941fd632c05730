"""Counting shapes, and tables of the counts: what the cost tables share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Kind of array that stays in memory → its row's title.
_MEMORY = {
  "parameters": "trained parameters",
  "gradients": "their gradients",
  "optimizer": "optimizer state",
  "ema": "moving averages",
  "other_state": "other state",
  "frozen": "frozen networks",
  "total": "sum",
}


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  """An array of float32 that is nowhere."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(tree: Any) -> int:
  """Numbers in all arrays (or shapes) of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Bytes of all arrays (or shapes) of a tree."""
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def stage_tables(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Two Markdown tables: what a training step of each stage takes, and holds.

  Args:
    stages: name → `batch_size`; `flops` and `saved_bytes`, each without
      ("plain") and with rematerialisation ("remat"); `bytes` by kind.
  """
  columns = [
    "training step, an image",
    "batch",
    "GFLOP",
    "GFLOP, remat",
    "kept for backward, MiB",
    "kept, remat, MiB",
  ]
  rows = [_step_row(name, stage) for name, stage in stages.items()]
  memory = markdown(["memory, MiB", *stages], _memory_rows(stages))
  return [markdown(columns, rows), memory]


def _step_row(name: str, stage: Mapping[str, Any]) -> list[str]:
  flops, saved = stage["flops"], stage["saved_bytes"]
  return [
    name,
    str(stage["batch_size"]),
    number(flops["plain"], 1e9),
    number(flops["remat"], 1e9),
    number(saved["plain"], 2**20),
    number(saved["remat"], 2**20),
  ]


def _memory_rows(stages: Mapping[str, Any]) -> list[list[str]]:
  """A row for each kind of array that any of the stages holds."""
  return [
    [title, *(number(stage["bytes"][key], 2**20) for stage in stages.values())]
    for key, title in _MEMORY.items()
    if any(stage["bytes"][key] for stage in stages.values())
  ]


def number(value: float, unit: float) -> str:
  """Three digits or more, without an exponent: 0.0123, 86.6, 1,049."""
  value = value / unit
  if value >= 100 or not value:
    return f"{value:,.0f}"
  return f"{value:.{max(2 - math.floor(math.log10(value)), 0)}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table whose columns line up as plain text too."""
  lines = [head, *rows]
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

  def format_line(line):
    first, *rest = line
    cells = [first.ljust(widths[0])]
    cells += [
      cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)
    ]
    return f"| {' | '.join(cells)} |"

  return "\n".join(map(format_line, [head, rule, *rows]))
