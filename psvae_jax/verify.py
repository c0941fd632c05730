"""Prints figures of a network that can be compared with a reference run.

    python -m psvae_jax.verify facebook/dinov2-with-registers-base

What is computed, and of what, is in `psvae_jax/verification/`.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax import cli

USAGE_EXAMPLES = """\
examples:
  python -m psvae_jax.verify facebook/dinov2-with-registers-base
  python -m psvae_jax.verify exported --json > exported.json
  python -m psvae_jax.verify exported --against=exported.json
  python -m psvae_jax.verify encoder/ --reference --tolerance=1e-4
  python -m psvae_jax.verify random:vgg --pictures=pictures

Prints architecture, parameter counts, checksums of parameters, and what the
network makes of a few fixed pictures and texts: mean length of its feature
vectors, their spread, and some of the numbers. --pictures writes those
pictures, for a program of your own. --against compares with what --json
printed, --reference every number with transformers or diffusers, where they
are installed. The exit code is 0 if all agree, 1 if not. float32 is rounded on
accelerators unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
"""

_KINDS = (
  "encoder",
  "text",
  "clip",
  "clip_text",
  "qwen2",
  "autoencoder",
  "lpips",
  "inception",
)
# Of lengths along the last axis; the rest are of single numbers.
_LENGTHS = ("norm", "norm_std")
_AVERAGES = ("mean", "std")
_NUMBERS = ("least", "most", "leading", "spread")
_SHOWN = 6  # leading numbers of an output in the text


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.verify",
    description="Prints figures of a network to compare with a reference run.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "name",
    metavar="NAME",
    help="folder (a model's, a workdir or an export), id of the Hugging Face "
    "hub, random:ID, or embedded",
  )
  parser.add_argument(
    "--kind", choices=_KINDS, help="of network (default: its config.json says)"
  )
  parser.add_argument(
    "--size", type=int, help="side of the pictures (default: the network's)"
  )
  parser.add_argument(
    "--json", action="store_true", help="print one JSON object"
  )
  parser.add_argument(
    "--against", metavar="FILE", help="compare with what --json printed"
  )
  parser.add_argument(
    "--reference",
    action="store_true",
    help="compare with the same network in transformers or diffusers",
  )
  parser.add_argument(
    "--tolerance",
    type=float,
    default=1e-4,
    help="largest difference, as a share of an output's largest number "
    "(default: 1e-4)",
  )
  parser.add_argument(
    "--pictures", metavar="DIR", help="write the pictures there, as PNG"
  )
  return parser.parse_args(argv)


def differences(
  found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float
) -> list[str]:
  """In what two reports disagree.

  Args:
    found: what `summary.report` returned.
    wanted: another one; what it does not have is not compared.
    tolerance: largest difference of two figures, as a share of the largest
      number (or length) of the output.

  Returns:
    A line each; none if they agree.
  """
  lines = []
  for key in ("kind", "parameters"):
    if key in wanted and found[key] != wanted[key]:
      lines.append(f"{key}: {found[key]}, expected {wanted[key]}")
  inputs = wanted.get("inputs", {}).get("sha256")
  if inputs not in (None, found["inputs"]["sha256"]):
    lines.append(
      f"inputs: {found['inputs']['sha256']}, expected {inputs}: other pictures "
      "or texts (--size, or another Pillow or scikit-image?)"
    )
    return lines
  for name, figures in wanted["outputs"].items():
    if name not in found["outputs"]:
      lines.append(f"{name}: missing; there are {', '.join(found['outputs'])}")
      continue
    lines += [
      f"{name}, {line}"
      for line in _differ(found["outputs"][name], figures, tolerance)
    ]
  return lines


def _differ(
  found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float
) -> list[str]:
  """Differences of one output's figures."""
  if found["shape"] != wanted["shape"]:
    return [f"shape: {found['shape']}, expected {wanted['shape']}"]
  scale = max(abs(wanted["least"]), abs(wanted["most"]))
  # Two programs may round one number up and down.
  rounding = 1.0 if found["levels"] else 0.0
  rows = [(name, wanted["norm"], 0.0) for name in _LENGTHS]
  rows += [(name, scale, 0.0) for name in _AVERAGES]
  rows += [(name, scale, rounding) for name in _NUMBERS]
  lines = []
  for name, size, slack in rows:
    ours, theirs = (np.ravel(x[name]) for x in (found, wanted))
    if len(ours) != len(theirs):
      lines.append(f"{name}: {len(ours)} numbers, expected {len(theirs)}")
      continue
    for a, b in zip(ours, theirs, strict=True):
      # Not ">": a NaN agrees with nothing.
      if not abs(a - b) <= tolerance * size + slack:
        lines.append(f"{name}: {a:.6g}, expected {b:.6g}")
        break
  return lines


def read_report(path: Path) -> dict[str, Any]:
  """What --json printed; only what `differences` reads is looked at.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is something else.
  """
  from psvae_jax.pretrained import files

  raw = files.read_json(path)
  try:
    inputs = raw.get("inputs", {})
    good = isinstance(inputs, dict) and bool(raw["outputs"])
    for figures in raw["outputs"].values():
      numbers = [figures[name] for name in (*_LENGTHS, *_AVERAGES)]
      numbers += [figures["least"], figures["most"]]
      numbers += figures["leading"] + figures["spread"]
      good &= isinstance(figures["shape"], list)
      good &= all(type(number) in (int, float) for number in numbers)
  except (KeyError, TypeError, AttributeError):
    good = False
  if not good:
    raise ValueError(
      f"{path} is not what `python -m psvae_jax.verify NAME --json` prints"
    )
  return raw


def format_report(report: Mapping[str, Any]) -> str:
  """The report as text, numbers with six digits."""
  lines = [f"{report['name']}: {report['kind']}, {report['parameters']:,} "]
  lines[0] += f"parameters, fingerprint {report['fingerprint'][:16]}"
  fields = ", ".join(f"{k} {v}" for k, v in report["architecture"].items())
  lines += [fields, "", "module                     parameters  sha256"]
  for name, module in report["modules"].items():
    lines.append(f"{name:24} {module['parameters']:12,}  {module['sha256']}")
  inputs = report["inputs"]
  shape = " × ".join(map(str, inputs.get("shape", [])))
  lines += [
    "",
    f"inputs {inputs['sha256']}: {shape} "
    + ", ".join(repr(name) if not name else name for name in inputs["names"]),
  ]
  for name, figures in report["outputs"].items():
    shape = " × ".join(map(str, figures["shape"]))
    numbers, spread = (
      " ".join(f"{x:.6g}" for x in figures[name][:_SHOWN])
      for name in ("leading", "spread")
    )
    lines += [
      "",
      f"{name}: {shape}",
      f"  length {figures['norm']:.6g} ± {figures['norm_std']:.6g}, mean "
      f"{figures['mean']:.6g}, std {figures['std']:.6g}, from "
      f"{figures['least']:.6g} to {figures['most']:.6g}",
      f"  first numbers {numbers}",
      f"  at equal distances {spread}",
    ]
  lines += ["", f"{report['device']}, {report['precision']} precision"]
  return "\n".join(lines)


def _write_pictures(inputs: Any, folder: Path) -> None:
  from PIL import Image

  if inputs.pictures is None:
    raise ValueError("--pictures: this network is shown none")
  folder.mkdir(parents=True, exist_ok=True)
  for name, picture in zip(inputs.names, inputs.pictures, strict=True):
    stem = Path(name).stem.replace(" ", "-")
    Image.fromarray(picture).save(folder / f"{stem}.png")


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if a figure differs."""
  arguments = parse_arguments(argv)
  if not 0 < arguments.tolerance < math.inf:
    cli.fail(f"--tolerance={arguments.tolerance} must be positive, e.g. 1e-4")
  if arguments.size is not None and not 16 <= arguments.size <= 4096:
    cli.fail(f"--size={arguments.size} must be in [16, 4096]")
  # After the arguments' checks: these imports take seconds.
  from psvae_jax.checkpoint import CheckpointError
  from psvae_jax.verification import subjects, summary

  found = []
  try:
    wanted = arguments.against and read_report(Path(arguments.against))
    subject = subjects.load(arguments.name, arguments.kind, arguments.size)
    outputs = subject.run()
    report = summary.report(subject, outputs)
    if arguments.pictures:
      _write_pictures(subject.inputs, Path(arguments.pictures).expanduser())
    print(
      json.dumps(report, indent=2) if arguments.json else format_report(report)
    )
    if wanted:
      lines = differences(report, wanted, arguments.tolerance)
      found += [f"{arguments.against}: {line}" for line in lines]
      if not lines and not arguments.json:
        _say_agreement(report, wanted, arguments)
    if arguments.reference:
      from psvae_jax.verification import reference

      others = reference.run(subject)
      distances = reference.distances(outputs, others)
      for name, value in distances.items():
        line = f"{name}: differs by {value:.2g} from the reference"
        if not arguments.json:
          print(f"\n{line}, as a share of its largest number")
        if not value <= arguments.tolerance:
          found.append(line)
  except (ValueError, OSError, CheckpointError) as error:
    cli.fail(cli.one_line(error))
  if found:
    cli.fail(
      f"{len(found)} figures differ by more than {arguments.tolerance:g}. "
      + "; ".join(found[:8])
      + (" …" if found[8:] else "")
    )


def _say_agreement(
  report: Mapping[str, Any],
  wanted: Mapping[str, Any],
  arguments: argparse.Namespace,
) -> None:
  """One line; says too where the parameters are others all the same."""
  note = ""
  if wanted.get("modules", report["modules"]) != report["modules"]:
    note = "; checksums differ: the parameters are not the same to the bit"
  print(
    f"\nagrees with {arguments.against} within {arguments.tolerance:g}{note}"
  )


if __name__ == "__main__":
  cli.guard(main, interrupted="nothing was compared")
