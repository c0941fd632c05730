"""Which values a config may have, and which go together.

`CHECKS` is the table: one small function a rule, each of the whole config, so
that a rule may look at any two fields. None of them opens a file or a device;
what depends on the encoder's files is checked where the model is built. Every
message names the field, its value, and a value that would work.
"""

import dataclasses
import fnmatch
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from psvae_jax.config import (
  AutoencoderModel,
  AutoencoderStage,
  Config,
  ConfigError,
  EncoderModel,
  TextEncoderModel,
  VisionModel,
  nearest,
)
from psvae_jax.config.divisors import (
  check_heads,
  nearest_multiple,
)
from psvae_jax.config.generator_checks import (
  GENERATOR_CHECKS,
  check_edit_shards,
)

# Field → its valid values; of a tuple, of each item.
_CHOICES = {
  "data.source": ("scenes", "bundled", "folder", "tfds"),
  "data.augment": ("none", "center", "crop", "crop_flip"),
  "eval.probe": ("scenes", "none"),
  "compute.dtype": ("float32", "bfloat16", "float64"),
  "compute.convolution": ("native", "matmul"),
  "compute.products": ("native", "mixed"),
  "model.final_norm": ("affine", "affine_free"),
  "model.pixel_decoder.kind": ("conv", "vit"),
  "discriminator.kind": ("patch", "dino"),
  "discriminator.norm": ("group", "batch", "instance"),
  "discriminator.augment": ("color", "translation", "cutout"),
  "perceptual.network": ("vgg", "alex"),
  "perceptual.dtype": ("float32", "bfloat16"),
  "model.condition": ("text", "class"),
  "cache.dtype": ("float32", "bfloat16", "float16"),
  "sample.solver": ("euler", "heun", "midpoint", "ancestral"),
  "sample.grid": ("uniform", "diffusers", "rae"),
  "*.optim.name": ("adamw", "muon"),
  "*.optim.schedule": ("cosine", "linear", "constant"),
  "*.discriminator_optim.name": ("adamw", "muon"),
  "*.discriminator_optim.schedule": ("cosine", "linear", "constant"),
  "*.loss.kl_reduction": ("mean", "sum"),
}

# Field → the interval it lies in; of a tuple, each item does. The first
# pattern that fits counts.
_RANGES = {
  "seed": "[0, 2147483648)",
  "data.seed": "[0, 2147483648)",
  "data.num_*": "[0, inf)",
  "data.prefetch": "[1, inf)",
  "data.max_bad_share": "[0, 1)",
  "data.min_scale": "(0, 1]",
  "checkpoint.*": "[1, inf)",
  "eval.every_steps": "[0, inf)",
  "eval.num_generated": "[2, inf)",
  "eval.num_reference": "[2, inf)",
  "eval.*": "[1, inf)",
  "compute.unroll": "[1, inf)",
  "discriminator.*": "[1, inf)",
  "guard.max_skipped": "[1, inf)",
  "cache.num_*": "[0, inf)",
  "cache.*": "[1, inf)",
  "sample.steps": "[1, inf)",
  "sample.shift": "(0, inf)",
  "sample.guidance_*": "[0, 1]",
  "sample.*": "[0, inf)",
  "*.loss.time_mean": "(-inf, inf)",
  "*.loss.time_std": "(0, inf)",
  "*.loss.*_dropout": "[0, 1)",
  "*.loss.edit_share": "(0, 1]",
  "*.train.ema": "[0, 1)",
  "*.train.*": "[1, inf)",
  "*optim.learning_rate": "(0, inf)",
  "*optim.adam_learning_rate": "(0, inf)",
  "*optim.b[12]": "[0, 1)",
  "*optim.eps": "(0, inf)",
  "*optim.end_factor": "[0, 1]",
  "*optim.*": "[0, inf)",
  "*.loss.foils": "[1, inf)",
  "*.loss.*": "[0, inf)",
  "model.semantic_*.mlp_hidden": "[0, inf)",
  "model.pixel_decoder.mlp_ratio": "(0, inf)",
  "model.pixel_decoder.num_res_blocks": "[0, 64]",
  "model.pixel_decoder.overlap": "[0, inf)",
  "model.pixel_decoder.refine_channels": "[0, inf)",
  "model.dit.mlp_ratio": "(0, inf)",
  "model.dit.head_depth": "[0, inf)",
  "model.num_classes": "[0, inf)",
  "model.vision.mlp_ratio": "(0, inf)",
  "model.vision.num_registers": "[0, inf)",
  "model.*": "[1, inf)",
}

_SSIM_WINDOW = 11  # evaluators.image_metrics.ssim
_LEAST_SCENE = 16  # data.scene_render.render
_NORM_IMAGES = 8  # models.discriminator.DinoDiscriminator
_GRADIENT_FACTOR = 4  # losses.multiscale_gradient_loss with its three scales
_LEAST_LPIPS = {"vgg": 16, "alex": 31}  # their poolings leave one position


def leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(dotted path, value, default) of every field below a section."""
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    name = f"{path}.{field.name}" if path else field.name
    if dataclasses.is_dataclass(value):
      yield from leaves(value, name)
    else:
      yield name, value, field.default


def check_field(path: str, value: Any, default: Any) -> None:
  """Checks one field by itself against its choices or its interval.

  Raises:
    ConfigError: the value is none of them, or outside.
  """
  items = value if isinstance(value, tuple) else (value,)
  for item in items:
    if isinstance(item, str):
      valid = _lookup(_CHOICES, path)
      if valid is not None and item not in valid:
        raise ConfigError(
          f"config.{path}={value!r} is unknown; {nearest(item, valid)}"
        )
    elif not isinstance(item, bool):
      interval = _lookup(_RANGES, path)
      if interval is not None:
        _check_interval(path, value, item, interval, default)


def _lookup(table: dict[str, Any], path: str) -> Any:
  for pattern, entry in table.items():
    if fnmatch.fnmatchcase(path, pattern):
      return entry
  return None


def _check_interval(
  path: str, value: Any, item: float, interval: str, default: Any
) -> None:
  low, high = (float(bound) for bound in interval[1:-1].split(","))
  above = low < item or (interval[0] == "[" and low == item)
  below = item < high or (interval[-1] == "]" and item == high)
  if above and below:
    return
  if math.isinf(high) and interval[0] == "[":
    wanted = f"at least {low:g}"
  else:
    wanted = "positive" if math.isinf(high) else f"in {interval}"
    wanted += f", e.g. {default!r}"
  raise ConfigError(f"config.{path}={value!r} must be {wanted}")


def _check_folders(config: Config) -> None:
  data = config.data
  if data.source == "folder" and not data.root:
    raise ConfigError(
      "config.data.source='folder' needs a folder: pass "
      "--config.data.root=FOLDER"
    )
  if data.source not in ("folder", "tfds") and data.root:
    raise ConfigError(
      f"config.data.root={data.root!r} is for config.data.source='folder' and "
      f"'tfds', not {data.source!r}"
    )
  if data.source != "folder" and data.eval_root:
    raise ConfigError(
      f"config.data.eval_root={data.eval_root!r} is for "
      f"config.data.source='folder', not {data.source!r}"
    )
  roots = {os.path.realpath(data.root), os.path.realpath(data.eval_root)}
  if data.eval_root and len(roots) == 1:
    raise ConfigError(
      f"config.data.eval_root={data.eval_root!r} is the training folder: "
      "images trained on say nothing. Leave it out to hold out 5 % of "
      "config.data.root"
    )


def _check_builder(config: Config) -> None:
  data = config.data
  if (data.source == "tfds") != bool(data.builder):
    raise ConfigError(
      f"config.data.source={data.source!r} with "
      f"config.data.builder={data.builder!r}: a builder goes with 'tfds', e.g. "
      "--config.data.source=tfds --config.data.builder=imagenet2012"
    )
  if data.source == "tfds" and data.split == data.eval_split:
    raise ConfigError(
      f"config.data.eval_split={data.eval_split!r} is also data.split: images "
      "trained on say nothing; the default is 'validation'"
    )


def _check_mesh(config: Config) -> None:
  sizes = dataclasses.asdict(config.mesh)
  wrong = [k for k, v in sizes.items() if v < 1 and v != -1]
  if wrong or list(sizes.values()).count(-1) > 1:
    raise ConfigError(
      f"config.mesh={sizes}: sizes are positive, and at most one is -1, e.g. "
      "data=-1, fsdp=1, tensor=1"
    )


def _check_accumulation(config: Config) -> None:
  for stage, section in config.sections.items():
    batch, parts = section.train.batch_size, section.train.accumulate
    if batch % parts:
      raise ConfigError(
        f"config.{stage}.train.batch_size={batch} does not divide into "
        f"config.{stage}.train.accumulate={parts} micro-batches; batch_size "
        f"{nearest_multiple(batch, parts)} would"
      )


def _check_pixel_decoder(config: Config) -> None:
  if not isinstance(config.model, AutoencoderModel):
    return
  decoder = config.model.pixel_decoder
  path = "model.pixel_decoder"
  if decoder.kind == "conv":
    if not decoder.channel_mult:
      raise ConfigError(
        f"config.{path}.channel_mult=() is empty; e.g. "
        f"{type(decoder)().channel_mult}"
      )
    factor = 2 ** (len(decoder.channel_mult) - 1) * decoder.output_patch
    size = config.model.output_size
    if size % factor:
      raise ConfigError(
        f"config.{path}.channel_mult={decoder.channel_mult} with output_patch="
        f"{decoder.output_patch} upsamples {factor}×, which does not divide "
        f"config.model.output_size={size}; {nearest_multiple(size, factor)} "
        "would be a multiple"
      )
    return
  check_heads(path, decoder.width, decoder.num_heads)
  if decoder.width % 4:
    raise ConfigError(
      f"config.{path}.width={decoder.width} must be a multiple of 4 (sin-cos "
      f"positions), e.g. {nearest_multiple(decoder.width, 4)}"
    )
  if decoder.width * decoder.mlp_ratio < 1:
    raise ConfigError(
      f"config.{path}.mlp_ratio={decoder.mlp_ratio} leaves no hidden unit; "
      "e.g. 4.0"
    )


def _check_image_sizes(config: Config) -> None:
  if not isinstance(config.model, AutoencoderModel):
    return
  size = config.model.output_size
  scenes = config.data.source == "scenes" or config.eval.probe == "scenes"
  least = _LEAST_SCENE if scenes else _SSIM_WINDOW
  if size < least:
    raise ConfigError(
      f"config.model.output_size={size} is too small for "
      f"{'scenes' if scenes else 'SSIM'}; {least} is the least"
    )
  for stage, section in config.sections.items():
    if section.loss.perceptual and size % _GRADIENT_FACTOR:
      raise ConfigError(
        f"config.{stage}.loss.perceptual={section.loss.perceptual} needs "
        f"config.model.output_size, now {size}, to be a multiple of "
        f"{_GRADIENT_FACTOR}, e.g. {nearest_multiple(size, 4)}; or set it to 0"
      )
    least = _LEAST_LPIPS[config.perceptual.network]
    if section.loss.lpips and size < least:
      raise ConfigError(
        f"config.{stage}.loss.lpips={section.loss.lpips} needs images of at "
        f"least {least} pixels for config.perceptual.network="
        f"{config.perceptual.network!r}, config.model.output_size is {size}; "
        "or set it to 0"
      )


def _check_adversary(config: Config) -> None:
  for stage, section in config.sections.items():
    if not isinstance(section, AutoencoderStage) or not section.loss.gan:
      continue
    loss, steps = section.loss, section.train.steps
    name = f"config.{stage}.loss.gan={loss.gan}"
    begins = loss.gan_start + loss.gan_warmup
    if begins >= steps:
      raise ConfigError(
        f"{name} never acts: gan_start={loss.gan_start} + gan_warmup="
        f"{loss.gan_warmup} is not below config.{stage}.train.steps={steps}; "
        f"set gan_start={max(0, steps * 2 // 3 - loss.gan_warmup)}"
        f"{' and gan_warmup=0' if loss.gan_warmup >= steps else ''}, or gan=0"
      )
    if not loss.pixel:
      raise ConfigError(
        f"{name} is a part of the pixel loss, whose weight config.{stage}.loss."
        "pixel is 0; set pixel=1.0 or gan=0"
      )
    if config.discriminator.norm == "batch" and section.train.accumulate > 1:
      raise ConfigError(
        "config.discriminator.norm='batch' would normalise over micro-batches "
        f"with config.{stage}.train.accumulate={section.train.accumulate}; set "
        "norm='group' or accumulate=1"
      )
    _check_groups(config, stage, section.train.batch_size)
    _check_discriminator(config)


def _check_groups(config: Config, stage: str, batch: int) -> None:
  """A DINO discriminator's batch norm is over equal groups of eight images."""
  if (config.discriminator.kind, config.discriminator.norm) != (
    "dino",
    "batch",
  ):
    return
  if batch % math.ceil(batch / _NORM_IMAGES):
    raise ConfigError(
      f"config.{stage}.train.batch_size={batch} does not divide into equal "
      f"groups of at most {_NORM_IMAGES} images, over which discriminator.norm="
      f"'batch' takes its statistics; {nearest_multiple(batch, _NORM_IMAGES)} "
      "would"
    )


def _check_discriminator(config: Config) -> None:
  adversary = config.discriminator
  if adversary.kind == "dino":
    if not adversary.weights:
      raise ConfigError(
        "config.discriminator.kind='dino' needs config.discriminator.weights, "
        "e.g. facebook/dino-vits8; or set kind='patch'"
      )
    return
  size = config.model.output_size
  # LDM's PatchGAN: each layer halves, then two convolutions take one pixel
  # each. One logit could not be told from a whole-image discriminator's.
  most = (size // 4).bit_length() - 1
  if adversary.num_layers > most:
    raise ConfigError(
      f"config.discriminator.num_layers={adversary.num_layers} leaves no patch "
      f"of config.model.output_size={size}; "
      + (f"{most} is the most" if most > 0 else "8 pixels are the least")
    )


def _check_encoders(config: Config) -> None:
  """The jobs that train the miniature's own."""
  if not isinstance(config.model, EncoderModel | TextEncoderModel):
    return
  text = config.model.text
  check_heads("model.text", text.width, text.num_heads)
  if config.data.source != "scenes":
    raise ConfigError(
      f"config.data.source must be 'scenes' for {config.stages[0]!r}, not "
      f"{config.data.source!r}: its foils need the scenes' grammar"
    )
  for stage, section in config.sections.items():
    if section.train.accumulate > 1:
      raise ConfigError(
        f"config.{stage}.train.accumulate={section.train.accumulate} must be "
        "1: the loss compares all pairs of a batch, and micro-batches have "
        "fewer"
      )
  if isinstance(config.model, EncoderModel):
    _check_vision(config.model.vision)


def _check_vision(vision: VisionModel) -> None:
  check_heads("model.vision", vision.width, vision.num_heads)
  if vision.width * vision.mlp_ratio < 1:
    raise ConfigError(
      f"config.model.vision.mlp_ratio={vision.mlp_ratio} leaves no hidden "
      "unit; e.g. 4.0"
    )
  if vision.image_size % vision.patch_size:
    near = nearest_multiple(vision.image_size, vision.patch_size)
    raise ConfigError(
      f"config.model.vision.image_size={vision.image_size} is not a multiple "
      f"of config.model.vision.patch_size={vision.patch_size}; {near} would be"
    )
  if vision.image_size < _LEAST_SCENE:
    raise ConfigError(
      f"config.model.vision.image_size={vision.image_size} is too small for "
      f"scenes; {_LEAST_SCENE} is the least"
    )


CHECKS: tuple[Callable[[Config], None], ...] = (
  _check_folders,
  _check_builder,
  _check_mesh,
  _check_accumulation,
  _check_pixel_decoder,
  _check_image_sizes,
  _check_adversary,
  _check_encoders,
  *GENERATOR_CHECKS,
)


def check(config: Config) -> None:
  """Checks the combinations of a config whose fields are valid.

  Raises:
    ConfigError: two fields do not go together.
  """
  for one in CHECKS:
    one(config)


def check_shards(config: Config, shards: int) -> None:
  """Checks that every batch divides over the devices.

  Args:
    config: the job.
    shards: parts that the mesh's data and fsdp axes cut a batch into.

  Raises:
    ConfigError: one does not; the message names the nearest batch that does.
  """
  batches = {
    f"{stage}.train": (section.train.batch_size, section.train.accumulate)
    for stage, section in config.sections.items()
  } | {"eval": (config.eval.batch_size, 1)}
  if "edit" in config.sections:
    check_edit_shards(config.sections["edit"], shards)
  for path, (batch, parts) in batches.items():
    if batch % (shards * parts):
      split = f" in {parts} micro-batches" if parts > 1 else ""
      raise ConfigError(
        f"config.{path}.batch_size={batch} does not divide{split} over the "
        f"{shards} shards of mesh axes data × fsdp; "
        f"{nearest_multiple(batch, shards * parts)} would"
      )


def check_devices(config: Config, devices: int) -> None:
  """Checks that the mesh fits the number of devices.

  Raises:
    ConfigError: it does not; the message names one that does.
  """
  mesh = config.mesh
  sizes = dataclasses.asdict(mesh)
  known = math.prod(size for size in sizes.values() if size != -1)
  fits = devices % known == 0 if -1 in sizes.values() else devices == known
  if not fits:
    fsdp = math.gcd(max(mesh.fsdp, 1), devices)
    tensor = math.gcd(max(mesh.tensor, 1), devices // fsdp)
    raise ConfigError(
      f"config.mesh={sizes} does not fit this job's number of devices, "
      f"{devices}; data=-1, fsdp={fsdp}, tensor={tensor} would"
    )
