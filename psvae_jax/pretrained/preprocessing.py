"""Image statistics of published encoders, and preprocessor_config.json.

Images are never resized here: what is read is how pixels are normalised, and
what is written is what transformers' image processors want to know.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from psvae_jax.pretrained import files
from psvae_jax.pretrained.fields import Fields, show

# Channel means and standard deviations of images in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

BILINEAR, BICUBIC = 2, 3  # PIL's numbers


@dataclasses.dataclass(frozen=True)
class Processor:
  """The image processor that a family of encoders is published with.

  Attributes:
    kind: its class in transformers.
    mean: per-channel mean, of images in [0, 1].
    std: per-channel standard deviation, of images in [0, 1].
    resample: PIL's number of the resizing filter.
    crop: resize the shorter side and cut out the middle, in place of resizing
      both sides.
  """

  kind: str
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  resample: int = BICUBIC
  crop: bool = False


def read(
  path: pathlib.Path, processor: Processor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """(mean, std) of a preprocessor file; the processor's where there is none.

  Raises:
    ValueError: a malformed file, or images that are not rescaled by 1/255.
  """
  if not path.exists():
    return processor.mean, processor.std
  raw = files.read_json(path)
  rescale = 1.0
  if raw.get("do_rescale", True):
    rescale = Fields(raw, path).get("rescale_factor", float, 1 / 255)
  if not math.isclose(rescale, 1 / 255, rel_tol=1e-4):
    raise ValueError(
      f"{path}: only images rescaled by 1/255 are supported, rescale_factor is "
      f"{rescale}"
    )
  if not raw.get("do_normalize", True):
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  mean = raw.get("image_mean", processor.mean)
  std = raw.get("image_std", processor.std)
  return (
    statistics(mean, "image_mean", str(path)),
    statistics(std, "image_std", str(path)),
  )


def form(
  processor: Processor,
  image_size: int,
  mean: Sequence[float],
  std: Sequence[float],
) -> dict[str, Any]:
  """A preprocessor_config.json that transformers reads.

  Raises:
    ValueError: `mean` or `std` are not three finite numbers, or `std` is not
      positive.
  """
  square = {"height": image_size, "width": image_size}
  sizes = {"size": square}
  if processor.crop:
    sizes = {
      "crop_size": square,
      "do_center_crop": True,
      "size": {"shortest_edge": image_size},
    }
  return {
    **sizes,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(statistics(mean, "mean", "save_encoder")),
    "image_processor_type": processor.kind,
    "image_std": list(statistics(std, "std", "save_encoder")),
    "resample": processor.resample,
    "rescale_factor": 1 / 255,
  }


def statistics(values: Any, name: str, where: str) -> tuple[float, ...]:
  """Three finite numbers, positive ones where `name` has "std" in it.

  Raises:
    ValueError: anything else; names `where` and `name`.
  """
  try:
    if len(values) != 3:
      raise ValueError("another number of them")
    out = tuple(_number(value) for value in values)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f"{where}: {name} {show(values)} is not 3 finite numbers"
    ) from error
  if "std" in name and min(out) <= 0:
    raise ValueError(f"{where}: {name} {show(values)} is not positive")
  return out


def _number(value: Any) -> float:
  if isinstance(value, bool) or not math.isfinite(value):  # text: TypeError
    raise ValueError("no finite number")
  return float(value)
