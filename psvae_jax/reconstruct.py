"""Shows what a trained autoencoder makes of your images.

    python -m psvae_jax.reconstruct cat.jpg photos/ --workdir=runs/psvae

Writes one PNG an image: the original, each stage's reconstruction, and what the
last one got wrong.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from psvae_jax import cli
from psvae_jax.evaluators.comparison import ERROR_GAIN, error_picture, psnr

USAGE_EXAMPLES = """\
examples:
  python -m psvae_jax.reconstruct cat.jpg dog.png --workdir=runs/psvae
  python -m psvae_jax.reconstruct photos/ --workdir=runs/psvae --out=compare
  python -m psvae_jax.reconstruct cat.jpg --workdir=runs/psvae --stage=svae

Images are resized and centre-cropped to the square that the autoencoder makes.
The exit code is 1 if an image could not be read; the others are done.
"""

_GAP = 4  # pixels between panels
_LEAST_PANEL = 192  # smaller ones are drawn with larger pixels
_LABEL = 14  # height of the line of text above the panels


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.reconstruct",
    description="Reconstructs images and writes them beside the originals: "
    "original | each stage | error × 4.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "images",
    nargs="+",
    metavar="IMAGE",
    help="image files, and folders of them (searched at every depth)",
  )
  parser.add_argument(
    "--workdir", required=True, help="--workdir of the training job"
  )
  parser.add_argument(
    "--out", help="folder for the PNGs (default: WORKDIR/reconstructions)"
  )
  parser.add_argument(
    "--stage",
    help="show this stage only (default: all that have a checkpoint)",
  )
  return parser.parse_args(argv)


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
  """Files as they are given; of folders, every image file, sorted."""
  from psvae_jax.data.images import EXTENSIONS

  found = []
  for path in map(Path, paths):
    if not path.is_dir():
      found.append(path)
      continue
    inside = (p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    found += sorted(p for p in inside if p.is_file())
  return list(dict.fromkeys(found))


def name_outputs(inputs: Sequence[Path], folder: Path) -> list[Path]:
  """A file in `folder` for each input: all different, and none an input."""
  taken = {os.path.realpath(path) for path in inputs}
  outputs = []
  for path in inputs:
    number = 1
    while True:
      suffix = "" if number == 1 else f"-{number}"
      output = folder / f"{path.stem}-reconstruction{suffix}.png"
      if os.path.realpath(output) not in taken:
        break
      number += 1
    taken.add(os.path.realpath(output))
    outputs.append(output)
  return outputs


def draw_panels(panels: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
  """Labelled uint8 (S, S, 3) images side by side, on white.

  Images below 192 pixels are enlarged by a whole factor, pixel by pixel.
  """
  size = panels[0][1].shape[0]
  factor = max(1, _LEAST_PANEL // size)
  side = factor * size
  width = len(panels) * side + (len(panels) - 1) * _GAP
  canvas = Image.new("RGB", (width, side + _LABEL), "white")
  draw = ImageDraw.Draw(canvas)
  for i, (label, panel) in enumerate(panels):
    left = i * (side + _GAP)
    large = panel.repeat(factor, axis=0).repeat(factor, axis=1)
    canvas.paste(Image.fromarray(large), (left, _LABEL))
    draw.text((left, 1), label, fill="black")
  return canvas


def _read(
  paths: Sequence[Path], outputs: Sequence[Path], size: int, count: int
) -> Iterator[list[tuple[Path, Path, Any]]]:
  """(input, output, image or error) of at most `count` images at a time."""
  from psvae_jax.data import images, transforms

  crop = transforms.center_crop(size)
  part = []
  for path, output in zip(paths, outputs, strict=True):
    try:
      result = crop({"image": images.decode_image(path)}, None)["image"]
    except (OSError, ValueError, MemoryError) as error:
      result = error
    part.append((path, output, result))
    if len(part) == count:
      yield part
      part = []
  if part:
    yield part


def reconstruct(
  paths: Sequence[Path], models: Sequence[Any], folder: Path
) -> int:
  """Writes one PNG a readable image and prints one line each.

  Args:
    paths: image files.
    models: a `PSVAE` for each stage, of one product size.
    folder: where the PNGs go; created if need be.

  Returns:
    How many images could not be read.
  """
  folder.mkdir(parents=True, exist_ok=True)
  outputs = name_outputs(paths, folder)
  failed = 0
  size, count = models[0].output_size, models[0].batch_size
  for part in _read(paths, outputs, size, count):
    good = [entry for entry in part if isinstance(entry[2], np.ndarray)]
    for path, _, error in part:
      if isinstance(error, Exception):
        failed += 1
        message = cli.one_line(error)
        named = message if str(path) in message else f"{path}: {message}"
        print(f"error: {named}", file=sys.stderr, flush=True)
    if not good:
      continue
    originals = np.stack([image for _, _, image in good])
    made = {model.stage: model.reconstruct(originals) for model in models}
    figures = {k: psnr(v, originals) for k, v in made.items()}
    for i, (path, output, original) in enumerate(good):
      panels = [("original", original)]
      panels += [(f"{k} {figures[k][i]:.2f} dB", made[k][i]) for k in made]
      error = error_picture(original, panels[-1][1])
      panels.append((f"error x {ERROR_GAIN}", error))
      draw_panels(panels).save(output)
      values = "  ".join(f"{k} {v[i]:.2f} dB" for k, v in figures.items())
      print(f"{path} → {output}  {values}", flush=True)
  return failed


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if anything could not be done."""
  arguments = parse_arguments(argv)
  workdir = Path(arguments.workdir).expanduser()
  paths = find_images(arguments.images)
  if not paths:
    cli.fail(f"no image files in {', '.join(arguments.images)}")
  # After the checks: these imports take seconds.
  from psvae_jax.checkpoint import CheckpointError
  from psvae_jax.psvae import PSVAE, stages_with_checkpoints

  try:
    stages = [arguments.stage]
    if arguments.stage is None:
      stages = stages_with_checkpoints(workdir) or [None]
    models = [PSVAE.from_pretrained(workdir, stage=name) for name in stages]
    folder = Path(arguments.out or workdir / "reconstructions").expanduser()
    failed = reconstruct(paths, models, folder)
  except (ValueError, OSError, CheckpointError) as error:
    cli.fail(cli.one_line(error))
  if failed:
    cli.fail(f"{failed} of {len(paths)} images could not be read, see above")


if __name__ == "__main__":
  cli.guard(main, interrupted="images already written are complete")
