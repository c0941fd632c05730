"""From a raw config to its typed view, strictly.

An unknown field, a wrong type or an impossible combination is a `ConfigError`
that names the field, and the nearest valid name where there is one.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from psvae_jax.config import (
  STAGES,
  AutoencoderModel,
  Config,
  ConfigError,
  nearest,
  one_of,
)

_CHOICES = {
  "eval.probe": ("scenes", "none"),
  "compute.dtype": ("float32", "bfloat16", "float64"),
  "model.final_norm": ("affine", "affine_free"),
  "model.pixel_decoder.kind": ("conv", "vit"),
  "discriminator.kind": ("patch", "dino"),
  "discriminator.norm": ("group", "batch"),
  "*.optim.name": ("adamw", "muon"),
  "*.optim.schedule": ("cosine", "linear", "constant"),
  "*.discriminator_optim.name": ("adamw", "muon"),
  "*.discriminator_optim.schedule": ("cosine", "linear", "constant"),
  "*.loss.kl_reduction": ("mean", "sum"),
}


def _coerce(value: Any, kind: Any, path: str) -> Any:
  """Checks `value` against the annotation `kind`; widens int to float."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, path)
  origin = typing.get_origin(kind)
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise ConfigError(f"config.{path} must be a tuple, got {value!r}")
    item = typing.get_args(kind)[0]
    return tuple(_coerce(v, item, f"{path}[{i}]") for i, v in enumerate(value))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind is Any or isinstance(kind, types.UnionType):
    return value
  # bool is a subclass of int: `steps=True` is a mistake, not a number.
  wrong_bool = isinstance(value, bool) and kind is not bool
  if not isinstance(value, kind) or wrong_bool:
    raise ConfigError(
      f"config.{path} must be {kind.__name__}, got {value!r} "
      f"({type(value).__name__})"
    )
  return value


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  """Builds dataclass `cls` from a mapping, strictly."""
  hints = typing.get_type_hints(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  if not isinstance(values, Mapping):
    raise ConfigError(f"config.{path} must be a section, got {values!r}")
  for name in values:
    if name not in names:
      raise ConfigError(
        f"unknown config field config.{path}.{name}: {nearest(name, names)}"
      )
  built = {
    name: _coerce(values[name], hints[name], f"{path}.{name}")
    for name in names
    if name in values
  }
  return cls(**built)


def _check_choices(config: Config) -> None:
  for key, valid in _CHOICES.items():
    head, _, tail = key.partition(".")
    roots = config.sections if head == "*" else {head: getattr(config, head)}
    for name, value in roots.items():
      for part in tail.split("."):
        value = getattr(value, part, None)
        if value is None:
          break
      if value is not None:
        one_of(f"{name}.{tail}", value, valid)


def _check_positive(config: Config) -> None:
  counts = {
    "checkpoint.every_steps": config.checkpoint.every_steps,
    "checkpoint.keep": config.checkpoint.keep,
    "eval.batch_size": config.eval.batch_size,
    "eval.num_images": config.eval.num_images,
    "eval.num_samples": config.eval.num_samples,
    "eval.num_probe_train": config.eval.num_probe_train,
    "eval.num_probe_test": config.eval.num_probe_test,
    "data.prefetch": config.data.prefetch,
    "compute.unroll": config.compute.unroll,
    "discriminator.channels": config.discriminator.channels,
    "discriminator.num_layers": config.discriminator.num_layers,
    "guard.max_skipped": config.guard.max_skipped,
  }
  for stage, section in config.sections.items():
    counts |= {
      f"{stage}.train.steps": section.train.steps,
      f"{stage}.train.batch_size": section.train.batch_size,
      f"{stage}.train.accumulate": section.train.accumulate,
      f"{stage}.train.log_every": section.train.log_every,
    }
  for name, value in counts.items():
    if value < 1:
      raise ConfigError(f"config.{name} must be at least 1, got {value}")
  for stage, section in config.sections.items():
    if not 0 <= section.train.ema < 1:
      raise ConfigError(
        f"config.{stage}.train.ema must be in [0, 1), got {section.train.ema}"
      )


def _check_sections(config: Config) -> None:
  for stage, section in config.sections.items():
    if section.optim.learning_rate <= 0:
      raise ConfigError(
        f"config.{stage}.optim.learning_rate must be positive, got "
        f"{section.optim.learning_rate}"
      )
  model = config.model
  if isinstance(model, AutoencoderModel):
    counts = {
      "channels": model.channels,
      "semantic_encoder.depth": model.semantic_encoder.depth,
      "semantic_decoder.depth": model.semantic_decoder.depth,
      "pixel_decoder.depth": model.pixel_decoder.depth,
      "pixel_decoder.channels": model.pixel_decoder.channels,
    }
    for name, value in counts.items():
      if value < 1:
        raise ConfigError(f"config.model.{name} must be at least 1: {value}")


def batch_sizes(config: Config) -> dict[str, int]:
  """Config field → global batch size, of everything that runs on the mesh."""
  sizes = {
    f"{stage}.train.batch_size": section.train.batch_size
    for stage, section in config.sections.items()
  }
  return sizes | {"eval.batch_size": config.eval.batch_size}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
  """The raw config with every field that it leaves out at its default.

  Config files return this, so that each field can be overridden by a flag.
  Nothing is checked: `parse` does that, after the flags.
  """
  raw = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  kinds = {name: STAGES[name][1] for name in raw if name in STAGES}
  stages = [stage for stage in raw.get("stages", ()) if stage in STAGES]
  if stages:
    kinds["model"] = STAGES[stages[0]][0]
    kinds |= {stage: STAGES[stage][1] for stage in stages}
  for name, hint in typing.get_type_hints(Config).items():
    if dataclasses.is_dataclass(hint):
      kinds[name] = hint
  filled = {
    name: _fill(kind, raw.get(name, {})) for name, kind in kinds.items()
  }
  return {"seed": 0, **raw, **filled}


def _fill(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
  hints = typing.get_type_hints(kind)
  filled = dict(values)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(hints[field.name]):
      given = values.get(field.name, {})
      filled[field.name] = _fill(hints[field.name], given)
    elif field.name not in values:
      filled[field.name] = field.default
  return filled


def parse(config: Mapping[str, Any]) -> Config:
  """Turns a raw config into the typed view, or raises `ConfigError`.

  Args:
    config: an `ml_collections.ConfigDict` or a nested mapping.

  Returns:
    The validated config.

  Raises:
    ConfigError: unknown field, wrong type, or a value out of its range.
  """
  raw = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  stages = tuple(raw.pop("stages", ()))
  if not stages:
    raise ConfigError("config.stages is empty: name at least one stage")
  for stage in stages:
    if stage not in STAGES:
      raise ConfigError(
        f"unknown stage {stage!r} in config.stages: {nearest(stage, STAGES)}"
      )
  if len(set(stages)) != len(stages):
    raise ConfigError(f"config.stages names a stage twice: {stages}")
  models = {STAGES[stage][0] for stage in stages}
  if len(models) > 1:
    raise ConfigError(f"config.stages={stages} cannot share one model section")
  model = _build(models.pop(), raw.pop("model", {}), "model")
  sections = {
    stage: _build(STAGES[stage][1], raw.pop(stage, {}), stage)
    for stage in stages
  }
  # A section of a stage that is not run this time is legal, but still checked.
  for stage in [name for name in raw if name in STAGES]:
    _build(STAGES[stage][1], raw.pop(stage), stage)
  shared = {
    f.name: f
    for f in dataclasses.fields(Config)
    if f.name not in ("stages", "sections", "model")
  }
  for name in raw:
    if name not in shared:
      raise ConfigError(
        f"unknown config field config.{name}: "
        f"{nearest(name, [*shared, *STAGES, 'model', 'stages'])}"
      )
  hints = typing.get_type_hints(Config)
  built = {name: _coerce(raw[name], hints[name], name) for name in raw}
  parsed = Config(stages=stages, sections=sections, model=model, **built)
  _check_choices(parsed)
  _check_positive(parsed)
  _check_sections(parsed)
  return parsed
