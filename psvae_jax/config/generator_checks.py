"""What of a generator's config goes together; see `checks`."""

import os
from collections.abc import Callable

from psvae_jax.config import (
  Config,
  ConfigError,
  GeneratorModel,
  GeneratorStage,
)
from psvae_jax.config.divisors import (
  check_heads,
  nearest_divisor,
  nearest_multiple,
)


def _check_generator(config: Config) -> None:
  if not isinstance(config.model, GeneratorModel):
    return
  model, dit = config.model, config.model.dit
  check_heads("model.dit", dit.width, dit.num_heads)
  if dit.head_depth and dit.head_width % dit.head_num_heads:
    raise ConfigError(
      f"config.model.dit.head_num_heads={dit.head_num_heads} does not divide "
      f"config.model.dit.head_width={dit.head_width}; "
      f"{nearest_divisor(dit.head_width, dit.head_num_heads)} would"
    )
  for name, width, heads in (
    ("", dit.width, dit.num_heads),
    ("head_", dit.head_width, dit.head_num_heads if dit.head_depth else 0),
  ):
    if heads and width // heads % 4:
      fitting = [n for n in range(1, width + 1) if width % (4 * n) == 0]
      near = min(fitting, key=lambda n: abs(n - heads), default=0)
      raise ConfigError(
        f"config.model.dit.{name}num_heads={heads} gives heads of "
        f"{width // heads} channels, which 2-D rotary positions need to be a "
        "multiple of 4"
        + (f"; {near} would" if near else f": change dit.{name}width={width}")
      )
  if (model.condition == "class") != bool(model.num_classes):
    raise ConfigError(
      f"config.model.condition={model.condition!r} with config.model."
      f"num_classes={model.num_classes}: classes go with 'class', e.g. "
      "--config.model.condition=class --config.model.num_classes=1000"
    )
  if model.condition == "class" and model.text_encoder:
    raise ConfigError(
      f"config.model.text_encoder={model.text_encoder!r} is for config.model."
      "condition='text', not 'class'"
    )
  if model.condition == "class" and config.data.source not in (
    "tfds",
    "folder",
  ):
    raise ConfigError(
      "config.model.condition='class' needs a data set with classes, config."
      f"data.source='tfds' or 'folder', not {config.data.source!r}"
    )


def _check_products(config: Config) -> None:
  if config.compute.products == "mixed" and config.compute.dtype != "float32":
    raise ConfigError(
      f"config.compute.products='mixed' with config.compute.dtype="
      f"{config.compute.dtype!r}: mixed products leave float32; set dtype="
      "'float32', or products='native'"
    )


def _check_views(config: Config) -> None:
  plain = config.data.augment in ("none", "center")
  if config.cache.enabled and config.cache.views > 1 and plain:
    raise ConfigError(
      f"config.cache.views={config.cache.views} would be equal with config."
      f"data.augment={config.data.augment!r}; set views=1, or augment='crop' "
      "or 'crop_flip'"
    )


def _check_guidance(config: Config) -> None:
  sample = config.sample
  if sample.guidance_low > sample.guidance_high:
    raise ConfigError(
      f"config.sample.guidance_low={sample.guidance_low} is above "
      f"guidance_high={sample.guidance_high}: guidance would never act; e.g. "
      "guidance_low=0.0"
    )


def _check_grid(config: Config) -> None:
  sample = config.sample
  if sample.grid == "rae" and sample.steps < 2:
    raise ConfigError(
      f"config.sample.grid='rae' counts its points as steps: config.sample."
      f"steps={sample.steps} would leave none to take; 2 is the least"
    )


def edit_rows(section: GeneratorStage) -> int:
  """Edits in a global batch of an edit stage; the rest is text-to-image."""
  return round(section.loss.edit_share * section.train.batch_size)


def _check_edit_folders(config: Config) -> None:
  data = config.data
  if data.edits and data.source == "scenes":
    raise ConfigError(
      f"config.data.edits={data.edits!r} is not for config.data.source="
      "'scenes', which have edits of their own; e.g. 'folder'"
    )
  if data.eval_edits and not data.edits:
    raise ConfigError(
      f"config.data.eval_edits={data.eval_edits!r} needs edits to train on: "
      "pass --config.data.edits=FOLDER"
    )
  same = os.path.realpath(data.edits) == os.path.realpath(data.eval_edits)
  if data.eval_edits and same:
    raise ConfigError(
      f"config.data.eval_edits={data.eval_edits!r} is the training folder: "
      "edits trained on say nothing. Leave it out to hold out 5 % of "
      "config.data.edits"
    )


def _check_edits(config: Config) -> None:
  section = config.sections.get("edit")
  if section is None:
    return
  if config.data.source != "scenes" and not config.data.edits:
    raise ConfigError(
      "config.stages has 'edit', and config.data.source="
      f"{config.data.source!r} has no edits: pass --config.data.edits=FOLDER"
    )
  batch, share = section.train.batch_size, section.loss.edit_share
  if config.model.condition != "text":
    raise ConfigError(
      "config.stages has 'edit', whose instructions are text: set config.model."
      "condition='text'"
    )
  if not edit_rows(section):
    raise ConfigError(
      f"config.edit.loss.edit_share={share} leaves no edit in config.edit."
      f"train.batch_size={batch}; {1 / batch:.2g} would leave one"
    )


GENERATOR_CHECKS: tuple[Callable[[Config], None], ...] = (
  _check_generator,
  _check_edit_folders,
  _check_edits,
  _check_products,
  _check_views,
  _check_guidance,
  _check_grid,
)


def check_edit_shards(section: GeneratorStage, shards: int) -> None:
  """Each part of an edit stage's batch is divided by itself."""
  batch, parts = section.train.batch_size, section.train.accumulate
  edits, unit = edit_rows(section), shards * parts
  if batch % unit == 0 and edits % unit:
    near = min(nearest_multiple(edits, unit), batch)
    raise ConfigError(
      f"config.edit.loss.edit_share={section.loss.edit_share} makes {edits} "
      f"of {batch} examples edits, which do not divide over {unit} (shards of "
      f"mesh axes data × fsdp, times micro-batches); {near / batch:g} would"
    )
