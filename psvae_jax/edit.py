"""Edits an image with a trained generator.

    python -m psvae_jax.edit --image=in.png --instruction="make it green"
    python -m psvae_jax.edit --image=in.png --prompt="a green circle" \
      --strength=0.6

Writes the result as PNG, and the source beside it in a second one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psvae_jax import cli, contact_sheet
from psvae_jax.sample import (
  add_generator_arguments,
  check,
  load,
  out_folder,
  plain_messages,
  settings_of,
)

USAGE_EXAMPLES = """\
examples:
  python -m psvae_jax.edit --image=in.png --instruction="make the circle green"
  python -m psvae_jax.edit --image=in.png --prompt="a green circle"
  python -m psvae_jax.edit --image=in.png --prompt="a star" --strength=0.8
  python -m psvae_jax.edit --workdir=runs/psvae --image=in.png \\
      --instruction="remove the star" --guidance=5 --image_guidance=1.5

--instruction says what to change: the generator sees the image beside the one
it makes (stage "edit" learns that). --prompt describes the result: the image is
noised up to time --strength (0 keeps it, 1 forgets it) and denoised. An image
of another size is resized and centre-cropped. Nothing is overwritten.
"""

_STRENGTH = 0.6


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.edit",
    description="Edits an image by an instruction, or by noise and a prompt.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--image", required=True, help="the image file")
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--instruction", help="what to change")
  what.add_argument("--prompt", help="what the result shows")
  parser.add_argument(
    "--strength",
    type=float,
    help=f"with --prompt: noise, in [0, 1] (default: {_STRENGTH})",
  )
  parser.add_argument(
    "--image_guidance",
    type=float,
    help="with --instruction: scale of the image's guidance; 1 is none",
  )
  parser.add_argument(
    "--num", type=int, default=1, help="results, of seeds one after another"
  )
  add_generator_arguments(parser)
  return parser.parse_args(argv)


def read_image(path: Path, size: int) -> tuple[np.ndarray, str]:
  """An image file as uint8 (size, size, 3), and what was done to it.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no image, or in a mode without an 8-bit range.
  """
  from psvae_jax.data import images, transforms

  if path.is_dir():
    raise ValueError(f"{str(path)!r} is a folder; --image takes one image file")
  image = images.decode_image(path)
  height, width = image.shape[:2]
  if (height, width) == (size, size):
    return image, ""
  note = f"{path} has {width} × {height} pixels; "
  if height == width:
    note += f"it is resized to {size} × {size}"
  else:
    note += f"its centre is cropped and resized to {size} × {size}"
  return transforms.center_crop(size)({"image": image}, None)["image"], note


def edit(
  pipe: Any,
  source: np.ndarray,
  text: str,
  folder: Path,
  *,
  name: str = "image",
  num: int = 1,
  seed: int = 0,
  **settings: Any,
) -> list[Path]:
  """Makes `num` edits of one image and writes them, and a comparison.

  Args:
    pipe: a `TextToImage`.
    source: uint8 (S, S, 3) at its size.
    text: instruction, or prompt if `settings` has a strength.
    folder: created if need be.
    name: what the files' names begin with.
    num: results, of seeds `seed`, `seed` + 1, …
    seed: of the first.
    **settings: as `TextToImage.edit` takes them.

  Returns:
    The results' files, the comparison last.
  """
  images = np.stack([source] * num)
  made = pipe.edit(images, text, seed=seed, **settings)
  folder.mkdir(parents=True, exist_ok=True)
  names = [f"{name} {text[:30]} seed {seed + n}" for n in range(num)]
  names.append(f"{name} {text[:30]} compared")
  paths = contact_sheet.file_names(names, folder)
  for path, image in zip(paths[:-1], made, strict=True):
    Image.fromarray(image).save(path)
  captions = ["source", *(f"{text} · seed {seed + n}" for n in range(num))]
  columns = min(num + 1, 6)
  sheet = contact_sheet.draw([source, *made], captions, columns)
  sheet.save(paths[-1])
  return paths


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if anything could not be done."""
  arguments = parse_arguments(argv)
  settings = settings_of(arguments)
  if arguments.num < 1:
    cli.fail(f"--num={arguments.num}: at least one result")
  if arguments.instruction is None:
    text, strength = arguments.prompt, arguments.strength
    settings["strength"] = _STRENGTH if strength is None else strength
    if arguments.image_guidance is not None:
      cli.fail("--image_guidance goes with --instruction, not with --prompt")
  else:
    text = arguments.instruction
    settings["image_guidance"] = arguments.image_guidance
    if arguments.strength is not None:
      cli.fail(
        "--strength goes with --prompt, which describes the result; an "
        "--instruction starts from pure noise beside the image"
      )
  path = Path(arguments.image).expanduser()
  with plain_messages():
    # Before anything is loaded.
    if not text.strip():
      raise ValueError("the instruction or prompt is empty; say what is wanted")
    read_image(path, 1)
    check(arguments, **settings)
  pipe = load(arguments)
  with plain_messages():
    source, note = read_image(path, pipe.output_size)
    if note:
      print(f"note: {note}")
    *results, comparison = edit(
      pipe,
      source,
      text,
      out_folder(arguments, "edits"),
      name=path.stem,
      num=arguments.num,
      seed=arguments.seed,
      **settings,
    )
  for result in results:
    print(f"{path} → {result}")
  print(f"side by side → {comparison}")


if __name__ == "__main__":
  cli.guard(main, interrupted="images already written are complete")
