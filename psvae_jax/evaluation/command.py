"""What `python -m psvae_jax.evaluate` does once its flags are checked."""

import argparse
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import psvae_jax
from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.evaluation import (
  generation,
  image_sets,
  models,
  networks,
  output,
  reconstruction,
  references,
)
from psvae_jax.evaluation.figures import Evaluation
from psvae_jax.evaluation.image_sets import ImageSet
from psvae_jax.evaluation.networks import Networks
from psvae_jax.evaluation.references import Reference, Settings
from psvae_jax.evaluators.reference_npz import (
  POOL,
  ReferenceFile,
  write_reference,
)

STATE_FOLDER = "state"
QUARANTINE_FILE = "quarantine.jsonl"


def run(arguments: argparse.Namespace, out: Path) -> None:
  """Measures, prints, and writes to `out`.

  Args:
    arguments: what `evaluate.parse_arguments` gives, checked.
    out: the folder.

  Raises:
    ValueError, OSError, CheckpointError, quarantine.DataError: what a user can
      do something about.
  """
  if jax.process_count() > 1:
    raise ValueError(
      "evaluate runs in one process, on all devices that it sees; start it on "
      "one host"
    )
  mesh = sharding.make_mesh(MeshConfig())
  settings = Settings(
    folder=out / STATE_FOLDER,
    batch_size=arguments.batch_size,
    save_every=arguments.save_every,
    rounding=arguments.rounding,
    kid_subsets=arguments.kid_subsets,
    kid_subset_size=arguments.kid_subset_size,
    seed=arguments.seed,
    neighbours=arguments.neighbours,
    label_sampling=arguments.label_sampling,
  )
  if arguments.models:
    found = _reconstruction(arguments, settings, mesh, out)
  elif arguments.generated:
    found = _generation(arguments, settings, mesh, out)
  else:
    _write_reference(arguments, settings, mesh, out)
    return
  found.protocol |= {
    "batch_size": settings.batch_size,
    "device": _device(),
    "versions": _versions(),
  }
  _note_bad(found, out)
  paths = output.write(found, out)
  output.show(found)
  print(f"written → {', '.join(map(str, paths))}", flush=True)


def _reconstruction(
  arguments: argparse.Namespace, settings: Settings, mesh: Mesh, out: Path
) -> Evaluation:
  # Data and networks first: what is missing is found before models load.
  _open(arguments, arguments.data, out, arguments.size or 1, arguments.num)
  given = _networks(arguments)
  loaded = [models.load(name, arguments.precision) for name in arguments.models]
  size = models.common_size(loaded, arguments.size)
  images = _open(arguments, arguments.data, out, size, arguments.num)
  reference = None
  if arguments.reference and given.features:
    reference = _reference(arguments, given, settings, mesh, size, (), out)
  return reconstruction.evaluate(
    loaded, images, given, settings, mesh, reference
  )


def _generation(
  arguments: argparse.Namespace, settings: Settings, mesh: Mesh, out: Path
) -> Evaluation:
  sets = [_open(arguments, s, out, arguments.size) for s in arguments.generated]
  sizes = {images.size for images in sets}
  if len(sizes) > 1:
    each = ", ".join(f"{images.name} {images.size}" for images in sets)
    raise ValueError(
      f"the sets have images of different sizes ({each}), whose figures do not "
      "compare; give --size=N to bring all of them to one"
    )
  prompts = {}
  if arguments.prompts:
    prompts = {
      images.name: generation.read_prompts(arguments.prompts, images)
      for images in sets
    }
  given = _networks(arguments)
  reference = None
  if arguments.reference and given.features:
    rows = (POOL,) if given.inception else ()
    reference = _reference(
      arguments, given, settings, mesh, sets[0].size, rows, out
    )
  return generation.evaluate(sets, given, settings, mesh, reference, prompts)


def _write_reference(
  arguments: argparse.Namespace, settings: Settings, mesh: Mesh, out: Path
) -> None:
  """Statistics of --data as an .npz."""
  path = Path(arguments.write_reference).expanduser()
  if path.suffix != ".npz":
    raise ValueError(f"--write_reference={path}: the file's name ends in .npz")
  images = _open(arguments, arguments.data, out, arguments.size, arguments.num)
  given = _networks(arguments)
  found = references.of_images(images, given, settings, mesh)
  protocol = {
    **found.protocol,
    "networks": given.identity(),
    "unreadable_images": found.bad,
    "versions": _versions(),
  }
  shape = None
  if arguments.with_images:
    shape = (found.count, images.size, images.size, 3)
  write_reference(
    path,
    {kind: moments[:2] for kind, moments in found.moments.items()},
    count=found.count,
    protocol=protocol,
    images=_good_images(images, settings) if shape else (),
    image_shape=shape,
  )
  print(f"statistics of {found.count} images → {path}", flush=True)


def _good_images(images: ImageSet, settings: Settings) -> Any:
  """Batches of the images that can be read."""
  for batch in images.batches(settings.batch_size):
    yield np.asarray(batch["image"])[batch["mask"]]


def _reference(
  arguments: argparse.Namespace,
  given: Networks,
  settings: Settings,
  mesh: Mesh,
  size: int,
  rows: tuple[str, ...],
  out: Path,
) -> Reference:
  """What --reference names: statistics, images, or a file of both.

  As ADM's evaluator does, distances between distributions are taken to a
  file's statistics, which may be of more images than it holds, and what needs
  single images to those.
  """
  name = arguments.reference
  stored = None
  if name.endswith(".npz"):
    file = ReferenceFile(Path(name).expanduser())
    if file.statistics:
      stored = references.of_file(file, given, size)
    lacking = [
      k for k in given.moments if not stored or k not in stored.moments
    ]
    if not file.num_images or not (lacking or rows):
      return stored
  images = _open(arguments, name, out, size, arguments.num_reference)
  made = references.of_images(
    images,
    given,
    settings,
    mesh,
    rows=rows,
  )
  if stored is None:
    return made
  return Reference(
    {**made.moments, **stored.moments},
    made.rows,
    {
      **stored.protocol,
      "statistics_of_the_file": sorted(stored.moments),
      "images_of_the_file": made.protocol,
    },
    made.count,
    made.bad,
    stored.notes,
  )


def _open(
  arguments: argparse.Namespace,
  name: str,
  out: Path,
  size: int | None,
  count: int = 0,
) -> ImageSet:
  return image_sets.open_set(
    name,
    size=size,
    count=count,
    data_dir=arguments.data_dir,
    max_bad_share=arguments.max_bad_share,
    quarantine_file=out / QUARANTINE_FILE,
  )


def _networks(arguments: argparse.Namespace) -> Networks:
  return networks.load(
    inception=arguments.inception,
    inception_resize=arguments.inception_resize,
    lpips=arguments.lpips,
    dinov2=arguments.dinov2,
    clip=arguments.clip,
  )


def _note_bad(found: Evaluation, out: Path) -> None:
  """Says where unreadable images are named, if there are any."""
  counts = [
    found.protocol.get("unreadable_images", 0),
    found.protocol.get("unreadable_reference_images", 0),
    *(row.get("unreadable_images", 0) for row in found.of_row.values()),
  ]
  if sum(counts):
    found.note(
      "unreadable images were left out; they are named in "
      f"{out / QUARANTINE_FILE}"
    )


def _device() -> str:
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == "cpu":
    kind = f"{platform.machine()} CPU"
  return f"{len(devices)} × {kind}"


def _versions() -> dict[str, str]:
  found = {name: metadata.version(name) for name in ("jax", "flax", "numpy")}
  return {"psvae_jax": psvae_jax.__version__, **found}
