"""The command `python -m psvae_jax.report WORKDIR`."""

import argparse
import sys
from pathlib import Path

from psvae_jax import cli
from psvae_jax.report import write_report

_EXAMPLES = """\
examples:
  python -m psvae_jax.report runs/psvae     # then open runs/psvae/report.html
"""


def main(argv: list[str] | None = None) -> None:
  """Writes the report of a workdir and prints its path."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.report",
    description="Writes WORKDIR/report.html from what a job has left so far. "
    "It may run beside the job.",
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdir", type=Path, help="--workdir of the job")
  args = parser.parse_args(argv)
  cli.print_any_name()
  try:
    print(write_report(args.workdir))
  except OSError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
