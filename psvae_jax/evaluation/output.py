"""An evaluation as people see it: on the terminal, as Markdown, as JSON."""

import sys
from pathlib import Path
from typing import Any

from psvae_jax import cost_table, writers
from psvae_jax.evaluation.figures import FIGURES, Evaluation, cell, head, lines

JSON_FILE, MARKDOWN_FILE = "evaluation.json", "evaluation.md"

_FIRST = {"reconstruction": "model", "generation": "images"}
_TITLE = {
  "reconstruction": "Reconstruction: a data set's own images, decoded again",
  "generation": "Generation: made images against a reference set",
}


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
  """Writes `evaluation.json` and `evaluation.md`; returns them."""
  paths = [folder / JSON_FILE, folder / MARKDOWN_FILE]
  writers.write_json_atomic(paths[0], as_json(evaluation))
  writers.write_text_atomic(paths[1], as_markdown(evaluation))
  return paths


def as_json(evaluation: Evaluation) -> dict[str, Any]:
  """Everything, JSON values; figures under their names, unrounded."""
  return {
    "kind": evaluation.kind,
    "figures": evaluation.rows,
    "protocol": evaluation.protocol,
    "protocol_of_figure": evaluation.of,
    "protocol_of_row": evaluation.of_row,
    "left_out": evaluation.left_out,
    "notes": evaluation.notes,
  }


def as_markdown(evaluation: Evaluation) -> str:
  """Table and protocol, a file of their own."""
  parts = [f"# {_TITLE[evaluation.kind]}", "", _table(evaluation), ""]
  for title, bullets in _sections(evaluation):
    parts += [f"## {title}", "", *(f"* {line}" for line in bullets), ""]
  return "\n".join(parts)


def show(evaluation: Evaluation) -> None:
  """Prints table and protocol, on a terminal with its colours and width."""
  if not sys.stdout.isatty():
    print(as_markdown(evaluation), flush=True)
    return
  import rich.console
  import rich.markup
  import rich.table

  console = rich.console.Console()
  table = rich.table.Table(title=_TITLE[evaluation.kind])
  table.add_column(_FIRST[evaluation.kind], style="bold", overflow="fold")
  for key in evaluation.columns:
    table.add_column(head(key), justify="right")
  for name, row in evaluation.rows.items():
    cells = [cell(key, row) for key in evaluation.columns]
    table.add_row(rich.markup.escape(name), *cells)
  console.print(table)
  for title, bullets in _sections(evaluation):
    console.print(f"[bold]{title}[/bold]")
    for line in bullets:
      console.print(f"  {rich.markup.escape(line)}", highlight=False)


def _table(evaluation: Evaluation) -> str:
  columns = evaluation.columns
  rows = [
    [name.replace("|", "\\|"), *(cell(key, row) for key in columns)]
    for name, row in evaluation.rows.items()
  ]
  return cost_table.markdown(
    [_FIRST[evaluation.kind], *map(head, columns)], rows
  )


def _sections(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
  """Titles and their lines; what is empty is left out."""
  figures = [
    f"{FIGURES[key].title}: {'; '.join(lines(details))}"
    for key, details in evaluation.of.items()
  ]
  rows = [
    f"{name}: {'; '.join(lines(details))}"
    for name, details in evaluation.of_row.items()
  ]
  missing = [
    f"{FIGURES[key].title}: {why}" for key, why in evaluation.left_out.items()
  ]
  sections = [
    ("Protocol", lines(evaluation.protocol)),
    ("Of each row", rows),
    ("Of each figure", figures),
    ("Left out", missing),
    ("Notes", evaluation.notes),
  ]
  return [(title, bullets) for title, bullets in sections if bullets]
