"""Makes images of prompts with a trained generator.

    python -m psvae_jax.sample --prompts="a red circle"
    python -m psvae_jax.sample --workdir=runs/psvae --prompts=prompts.txt

Writes one PNG an image and a contact sheet of all of them.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from psvae_jax import cli, contact_sheet

USAGE_EXAMPLES = """\
examples:
  python -m psvae_jax.sample --prompts="a red circle"
  python -m psvae_jax.sample --prompts "a red circle" "a blue star" --num=3
  python -m psvae_jax.sample --workdir=runs/psvae --prompts=prompts.txt
  python -m psvae_jax.sample --prompts="a red circle" --steps=20 --guidance=3

A prompt file has one prompt a line. Of every prompt, image n is made from
seed + n: the same prompt and seed give the same image again, whatever else is
made with it. Nothing is overwritten.
"""

_ALONE = 4  # images of a single prompt
_CHUNK = 256  # images in memory


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.sample",
    description="Makes images of prompts, and a contact sheet of them.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--prompts",
    nargs="+",
    required=True,
    metavar="PROMPT|FILE",
    help="prompts, and files with one a line; numbers, of a class-conditional "
    "generator",
  )
  parser.add_argument(
    "--num",
    type=int,
    help=f"images a prompt (default: {_ALONE} of a single prompt, else 1)",
  )
  add_generator_arguments(parser)
  return parser.parse_args(argv)


def add_generator_arguments(parser: argparse.ArgumentParser) -> None:
  """What every command has that runs a generator."""
  parser.add_argument(
    "--workdir",
    default="embedded",
    help="--workdir of the training job, or an exported folder (default: the "
    "miniature that comes with the package)",
  )
  parser.add_argument(
    "--stage", help="t2i or edit (default: the last that has a checkpoint)"
  )
  parser.add_argument("--seed", type=int, default=0, help="of the first image")
  parser.add_argument("--steps", type=int, help="of the sampler")
  parser.add_argument(
    "--guidance", type=float, help="scale of the prompt's guidance; 1 is none"
  )
  parser.add_argument("--shift", type=float, help="time shift of the sampler")
  parser.add_argument(
    "--solver",
    choices=("euler", "heun", "midpoint", "ancestral"),
    help="of the sampler",
  )
  parser.add_argument("--out", help="folder for the PNGs")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
  """What `TextToImage` takes by name."""
  return {
    name: getattr(arguments, name)
    for name in ("steps", "guidance", "shift", "solver")
  }


def out_folder(arguments: argparse.Namespace, name: str) -> Path:
  """--out, or a folder `name` in the workdir, else in the current folder."""
  if arguments.out:
    return Path(arguments.out).expanduser()
  if arguments.workdir == "embedded":
    return Path(name)
  return Path(arguments.workdir).expanduser() / name


def check(arguments: argparse.Namespace, **settings: Any) -> None:
  """What can be wrong before a generator is loaded, which may take minutes.

  Raises:
    ValueError: a seed or a setting out of range, or --out is no folder.
  """
  from psvae_jax import text_to_image

  out = Path(arguments.out or ".").expanduser()
  there = next(p for p in (out, *out.parents) if p.exists())
  if not there.is_dir():
    raise ValueError(f"--out={out}: {there} is a file; give a folder")
  text_to_image.check_settings(seed=arguments.seed, **settings)


def load(arguments: argparse.Namespace) -> Any:
  """The `TextToImage` of --workdir; ends the command if there is none."""
  # After the arguments' checks: these imports take seconds.
  from psvae_jax.checkpoint import CheckpointError
  from psvae_jax.text_to_image import TextToImage

  try:
    return TextToImage.from_pretrained(arguments.workdir, stage=arguments.stage)
  except (ValueError, OSError, CheckpointError) as error:
    cli.fail(cli.one_line(error))


@contextlib.contextmanager
def plain_messages() -> Iterator[None]:
  """Warnings as one line each; errors that a user can cause end the command."""

  def show(message, *_, **__):
    print(f"warning: {message}", file=sys.stderr, flush=True)

  with warnings.catch_warnings():
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show
    try:
      yield
    except (ValueError, OSError) as error:
      cli.fail(cli.one_line(error))


def read_prompts(given: Sequence[str]) -> list[str]:
  """Prompts as they are; of files, every line that is not empty.

  Raises:
    FileNotFoundError: what looks like a file's name is none.
    ValueError: an empty prompt, a folder, a file that is no text or has none.
  """
  prompts = []
  for text in given:
    if not text.strip():
      raise ValueError('a prompt is empty; give one: --prompts="a red circle"')
    path = Path(text)
    if path.suffix in (".txt", ".csv", ".jsonl") and not path.is_file():
      raise FileNotFoundError(f"the prompt file {text!r} does not exist")
    if len(text) > 255 or not path.exists():
      prompts.append(text)
      continue
    if path.is_dir():
      raise ValueError(f"the prompt {text!r} is a folder; give text, or a file")
    try:
      lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
      raise ValueError(f"the prompt file {text!r} is not UTF-8 text") from error
    prompts += [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise ValueError(
      f"there are no prompts in {', '.join(map(repr, given))}; give at least "
      'one: --prompts="a red circle"'
    )
  return prompts


def sample(
  pipe: Any,
  prompts: Sequence[str],
  folder: Path,
  *,
  num: int | None = None,
  seed: int = 0,
  **settings: Any,
) -> list[Path]:
  """Makes `num` images of every prompt and writes them, and their sheet.

  Args:
    pipe: a `TextToImage`.
    prompts: texts, or numbers as text for a class-conditional generator.
    folder: created if need be.
    num: images a prompt.
    seed: of every prompt's first image.
    **settings: as `TextToImage` takes them.

  Returns:
    The files, the contact sheet last.
  """
  num = num or (_ALONE if len(prompts) == 1 else 1)
  jobs = [(p, seed + n) for p in prompts for n in range(num)]
  conditions = prompts
  if pipe.saved.text_encoder is None:
    conditions = [_label(prompt) for prompt in prompts]
  conditions = [c for c in conditions for _ in range(num)]
  digits = len(str(len(prompts) - 1)) if len(prompts) > 1 else 0
  names = []
  for i, (prompt, number) in enumerate(jobs):
    prefix = f"{i // num:0{digits}d} " if digits else ""
    names.append(f"{prefix}{prompt[:40]} seed {number}")
  paths, images = contact_sheet.file_names(names, folder), []
  for start in range(0, len(jobs), _CHUNK):
    part = slice(start, start + _CHUNK)
    seeds = [number for _, number in jobs[part]]
    made = pipe(conditions[part], seed=seeds, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths[part], made, strict=True):
      Image.fromarray(image).save(path)
    images += list(made)
  captions = [
    f"{prompt or '(no prompt)'} · seed {number}" for prompt, number in jobs
  ]
  columns = min(num, 8) if num > 1 and len(prompts) > 1 else None
  (sheet,) = contact_sheet.file_names(["contact sheet"], folder)
  contact_sheet.draw(images, captions, columns).save(sheet)
  return [*paths, sheet]


def _label(text: str) -> int:
  try:
    return int(text)
  except ValueError:
    raise ValueError(
      f"this generator is class-conditional: prompts are numbers, not {text!r}"
    ) from None


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if anything could not be done."""
  arguments = parse_arguments(argv)
  if arguments.num is not None and arguments.num < 1:
    cli.fail(f"--num={arguments.num}: at least one image a prompt")
  with plain_messages():
    prompts = read_prompts(arguments.prompts)
    check(arguments, **settings_of(arguments))
  pipe = load(arguments)
  with plain_messages():
    *paths, sheet = sample(
      pipe,
      prompts,
      out_folder(arguments, "samples"),
      num=arguments.num,
      seed=arguments.seed,
      **settings_of(arguments),
    )
  if len(paths) == 1:
    print(f"image → {paths[0]}")
  else:
    print(f"{len(paths)} images → {paths[0]} … {paths[-1].name}")
  print(f"contact sheet → {sheet}")


if __name__ == "__main__":
  cli.guard(main, interrupted="images already written are complete")
