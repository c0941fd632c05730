"""Figures of autoencoders and of made images, with how they were made.

    python -m psvae_jax.evaluate --models=embedded --data=scenes --size=48
    python -m psvae_jax.evaluate --generated=samples --reference=photos \\
      --inception=weights/inception

Prints one table and its protocol, and writes both to --out as Markdown and
JSON. Interrupted, the same command goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from psvae_jax import cli, memory

USAGE_EXAMPLES = """\
examples, reconstruction of a data set:
  python -m psvae_jax.evaluate --models embedded --data=scenes --num=500
  python -m psvae_jax.evaluate --models runs/psvae stabilityai/sd-vae-ft-ema \\
    --data=photos/validation --size=256 --inception=weights/inception \\
    --lpips=weights/vgg16
  python -m psvae_jax.evaluate --models runs/psvae@svae runs/psvae@psvae \\
    --data=tfds:imagenet2012:validation --data_dir=TFDS --rounding=truncate \\
    --inception=weights/inception --dinov2=facebook/dinov2-large

examples, made images against a reference:
  python -m psvae_jax.evaluate --generated samples.npz \\
    --reference=VIRTUAL_imagenet256_labeled.npz --inception=weights/inception
  python -m psvae_jax.evaluate --generated runs/a/samples runs/b/samples \\
    --reference=photos/validation --inception=weights/inception
  python -m psvae_jax.evaluate --generated samples --prompts=prompts.txt \\
    --clip=openai/clip-vit-base-patch32

example, statistics of a reference set, to be given to --reference:
  python -m psvae_jax.evaluate --data=photos/train --size=256 \\
    --inception=weights/inception --write_reference=photos256.npz

A data set is a folder of images, an .npz with arr_0 (uint8, N × H × W × 3),
"scenes" (the embedded one), or tfds:BUILDER:SPLIT. Figures whose network was
not given are left out, and the output says so: `python -m psvae_jax.convert`
makes the folders of --inception and --lpips. The same command goes on where it
was interrupted, from the last save in OUT/state; what is finished there is not
computed again when another model is added to the table.
"""

_LEAST_SIZE, _MOST_SIZE = 11, 4096


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.evaluate",
    description="Measures autoencoders on a data set, or made images against "
    "a reference set, and says how.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  what = parser.add_argument_group("what is measured")
  what.add_argument(
    "--models",
    nargs="+",
    metavar="MODEL",
    default=[],
    help='autoencoders: a workdir (WORKDIR@STAGE), an export, "embedded", a '
    'folder or Hugging Face id of another, or "random:ID" of a published one',
  )
  what.add_argument(
    "--data", default="", metavar="SET", help="images to reconstruct"
  )
  what.add_argument(
    "--generated",
    nargs="+",
    metavar="SET",
    default=[],
    help="made images: folders or .npz files",
  )
  what.add_argument(
    "--reference",
    default="",
    metavar="SET|FILE.npz",
    help="what distances are taken to: images, or an .npz with ADM's "
    "statistics (default, of reconstructions: the images themselves)",
  )
  what.add_argument(
    "--prompts",
    default="",
    metavar="FILE",
    help='prompts of the made images, one a line; "captions" takes those of '
    "the folder's metadata.jsonl",
  )
  what.add_argument(
    "--write_reference",
    default="",
    metavar="FILE.npz",
    help="write the statistics of --data as a reference, and nothing else",
  )
  what.add_argument(
    "--with_images",
    action="store_true",
    help="put the images into --write_reference too, for KID, precision and "
    "recall",
  )
  _add_networks(parser)
  _add_images(parser)
  _add_computing(parser)
  return parser.parse_args(argv)


def _add_networks(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("networks of figures")
  group.add_argument(
    "--inception",
    default="",
    metavar="FOLDER",
    help="for FID, sFID, IS, KID, precision and recall; "
    '"random:inception" is for dry runs',
  )
  group.add_argument(
    "--inception_resize",
    default="tf1",
    choices=("tf1", "torch"),
    help="how images come to 299 × 299: as ADM and torch-fidelity (tf1, the "
    "default), or as pytorch-fid (torch); figures differ",
  )
  group.add_argument(
    "--lpips",
    default="",
    metavar="FOLDER",
    help='for LPIPS; "random:vgg" is for dry runs',
  )
  group.add_argument(
    "--dinov2",
    default="",
    metavar="ID|FOLDER",
    help="for FD-DINOv2, which is defined with facebook/dinov2-large",
  )
  group.add_argument(
    "--clip",
    default="",
    metavar="ID|FOLDER",
    help="for the CLIP score, e.g. openai/clip-vit-base-patch32",
  )


def _add_images(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("images")
  group.add_argument(
    "--size",
    type=int,
    metavar="PIXELS",
    help="resize and centre-crop to this side (default: the models' own; made "
    "images as they are)",
  )
  group.add_argument(
    "--num",
    type=int,
    default=0,
    metavar="N",
    help="of --data, take N, evenly spaced (default: all)",
  )
  group.add_argument(
    "--num_reference",
    type=int,
    default=0,
    metavar="N",
    help="the same of --reference",
  )
  group.add_argument(
    "--data_dir", default="", help="of TensorFlow Datasets, for tfds:…"
  )
  group.add_argument(
    "--max_bad_share",
    type=float,
    default=0.01,
    metavar="SHARE",
    help="share of images that may be unreadable; they are left out, counted "
    "and named in OUT/quarantine.jsonl (default: 0.01)",
  )
  group.add_argument(
    "--label_sampling",
    default="",
    metavar="TEXT",
    help="how labels of made images were drawn, for the protocol (default: "
    "counted, where labels are known)",
  )


def _add_computing(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("computing")
  group.add_argument(
    "--rounding",
    default="round",
    choices=("round", "truncate"),
    help="of reconstructions to 8 bits; truncate compares with RAE's figures",
  )
  group.add_argument(
    "--precision",
    choices=("float32", "bfloat16"),
    help="of imported models (default: float32); ours compute as they were "
    "trained, figures always in float32",
  )
  group.add_argument("--kid_subsets", type=int, default=100, metavar="N")
  group.add_argument("--kid_subset_size", type=int, default=1000, metavar="N")
  group.add_argument(
    "--seed", type=int, default=0, help="of KID's subsets (default: 0)"
  )
  group.add_argument(
    "--neighbours",
    type=int,
    default=3,
    metavar="K",
    help="of precision and recall (default: 3)",
  )
  group.add_argument(
    "--batch_size", type=int, default=32, help="images at once (default: 32)"
  )
  group.add_argument(
    "--save_every",
    type=int,
    default=20,
    metavar="N",
    help="batches between two saves (default: 20)",
  )
  group.add_argument(
    "--out",
    default="evaluation",
    metavar="FOLDER",
    help="for tables, protocol and what is needed to go on (default: "
    "evaluation)",
  )


def check(arguments: argparse.Namespace) -> None:
  """Raises ValueError where flags do not fit together."""
  if arguments.write_reference and not (
    arguments.models or arguments.generated
  ):
    _check_reference(arguments)
    return
  if bool(arguments.models) == bool(arguments.generated):
    raise ValueError(
      "give either --models and --data (reconstruction) or --generated "
      "(made images); --help has examples"
    )
  if arguments.write_reference:
    raise ValueError("--write_reference is for --data alone, without models")
  if arguments.models and not arguments.data:
    raise ValueError("--models needs --data: the images to reconstruct")
  if arguments.generated and arguments.data:
    raise ValueError(
      "made images are compared with --reference; --data is for --models"
    )
  _check_idle(arguments)
  if arguments.prompts and not arguments.clip:
    raise ValueError("--prompts needs --clip, the network of the CLIP score")
  for flag in ("models", "generated"):
    given = getattr(arguments, flag)
    if twice := {name for name in given if given.count(name) > 1}:
      raise ValueError(f"--{flag} has {', '.join(sorted(twice))} twice")
  if arguments.generated and not (
    arguments.inception or arguments.dinov2 or arguments.clip
  ):
    raise ValueError(
      "made images need a network to be measured with: --inception, --dinov2 "
      "or --clip"
    )


def _check_idle(arguments: argparse.Namespace) -> None:
  """Refuses flags that would change nothing."""
  if arguments.with_images:
    raise ValueError("--with_images is for --write_reference")
  if arguments.models and (arguments.prompts or arguments.clip):
    raise ValueError("--clip and --prompts are for --generated")
  has_features = arguments.inception or arguments.dinov2
  if arguments.reference and not has_features:
    raise ValueError("--reference needs --inception or --dinov2")
  if arguments.num_reference and not arguments.reference:
    raise ValueError("--num_reference needs --reference")
  if arguments.generated:
    idle = {
      "num": arguments.num,
      "lpips": arguments.lpips,
      "precision": arguments.precision,
      "rounding": arguments.rounding != "round",
    }
    for flag, given in idle.items():
      if given:
        raise ValueError(f"--{flag} is for --models, not for --generated")


def _check_reference(arguments: argparse.Namespace) -> None:
  if not arguments.data:
    raise ValueError("--write_reference needs --data: the images it is of")
  if not (arguments.inception or arguments.dinov2):
    raise ValueError("--write_reference needs --inception or --dinov2")


def check_numbers(arguments: argparse.Namespace) -> None:
  """Raises ValueError where a number is out of its range."""
  least = {
    "batch_size": 1,
    "save_every": 1,
    "num": 0,
    "num_reference": 0,
    "kid_subsets": 1,
    "kid_subset_size": 2,
    "neighbours": 1,
    "seed": 0,
  }
  for name, bound in least.items():
    if getattr(arguments, name) < bound:
      raise ValueError(
        f"--{name}={getattr(arguments, name)}: at least {bound} is needed"
      )
  size = arguments.size
  if size is not None and not _LEAST_SIZE <= size <= _MOST_SIZE:
    raise ValueError(
      f"--size={size}: from {_LEAST_SIZE} to {_MOST_SIZE} pixels"
    )
  if not 0 <= arguments.max_bad_share < 1:
    raise ValueError(
      f"--max_bad_share={arguments.max_bad_share:g}: from 0 to below 1"
    )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if anything could not be done."""
  arguments = parse_arguments(argv)
  try:
    check(arguments)
    check_numbers(arguments)
  except ValueError as error:
    cli.fail(cli.one_line(error))
  memory.keep_freed_memory()
  # After the checks: these imports take seconds.
  from psvae_jax import workdir
  from psvae_jax.checkpoint import CheckpointError
  from psvae_jax.data import quarantine
  from psvae_jax.evaluation import command, image_sets

  out = Path(arguments.out).expanduser()
  try:
    with workdir.workdir_lock(out):
      command.run(arguments, out)
  except quarantine.DataError as error:
    cli.fail(cli.one_line(ValueError(image_sets.explain_quarantine(error))))
  except workdir.WorkdirError as error:
    cli.fail(cli.one_line(error).replace("--workdir", "--out"))
  except (ValueError, OSError, MemoryError, CheckpointError) as error:
    cli.fail(cli.one_line(error))


if __name__ == "__main__":
  cli.guard(main, interrupted="the same command goes on from the last save")
