"""From a raw config to its typed view, strictly.

An unknown field, a wrong type or an impossible combination is a `ConfigError`
of one line that names the field, and the nearest valid name or value.
"""

import ast
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from psvae_jax.config import STAGES, Config, ConfigError, nearest
from psvae_jax.config import checks as config_checks

# JAX counts in 32 bits unless told otherwise.
_INT_LIMIT = 2**31

_TRUE = ("true", "t", "1", "yes")
_FALSE = ("false", "f", "0", "no")


# Annotations are looked up once, not for every section of every config.
_hints = functools.cache(typing.get_type_hints)


def _example(kind: Any, value: Any, default: Any) -> str:
  """What to write in place of a value of the wrong type."""
  try:
    meant = kind(value)
    if not isinstance(value, bool) and (kind is str or meant == float(value)):
      return f"did you mean {meant!r}?"
  except (TypeError, ValueError, OverflowError):
    pass
  return "" if default is dataclasses.MISSING else f"e.g. {default!r}"


def _coerce(value: Any, kind: Any, path: str, default: Any) -> Any:
  """Checks `value` against the annotation `kind`; widens int to float."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, path)
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, (list, tuple)):
      raise ConfigError(
        f"config.{path} must be a tuple, got {value!r}; "
        f"{_example(tuple, None, default)}"
      )
    item = typing.get_args(kind)[0]
    return tuple(
      _coerce(v, item, f"{path}[{i}]", dataclasses.MISSING)
      for i, v in enumerate(value)
    )
  if kind is Any or isinstance(kind, types.UnionType):
    return value
  is_int = isinstance(value, int) and not isinstance(value, bool)
  # bool is a subclass of int: `steps=True` is a mistake, not a number.
  wrong_bool = isinstance(value, bool) and kind is not bool
  if (wrong_bool or not isinstance(value, kind)) and not (
    kind is float and is_int
  ):
    example = _example(kind, value, default)
    raise ConfigError(
      f"config.{path} must be {kind.__name__}, got {value!r} "
      f"({type(value).__name__})" + (example and f"; {example}")
    )
  return _plain(value, kind, path, default)


def _plain(value: Any, kind: type, path: str, default: Any) -> Any:
  """Refuses numbers and texts that no field can have."""
  reason = ""
  if isinstance(value, str):
    reason = "" if value.isprintable() else "must be printable text"
  elif isinstance(value, int) and not -_INT_LIMIT <= value < _INT_LIMIT:
    reason = "must fit into 32 bits"
  elif isinstance(value, float) and not math.isfinite(value):
    reason = "must be a finite number"
  if reason:
    shown = repr(value) if isinstance(value, (str, float)) else "a larger one"
    example = _example(kind, None, default) if kind is not str else ""
    raise ConfigError(
      f"config.{path} {reason}, got {shown}" + (example and f"; {example}")
    )
  return float(value) if kind is float else value


def _build(cls: type, values: Any, path: str) -> Any:
  """Builds dataclass `cls` from a mapping, strictly."""
  hints = _hints(cls)
  defaults = {f.name: f.default for f in dataclasses.fields(cls)}
  if not isinstance(values, Mapping):
    raise ConfigError(
      f"config.{path} must be a section, got {values!r}; its fields are "
      + ", ".join(defaults)
    )
  for name in values:
    if name not in defaults:
      raise ConfigError(
        f"unknown config field config.{path}.{name}: "
        f"{nearest(str(name), defaults)}"
      )
  return cls(
    **{
      name: _coerce(values[name], hints[name], f"{path}.{name}", default)
      for name, default in defaults.items()
      if name in values
    }
  )


def _raw(config: Any) -> dict[str, Any]:
  """A shallow copy of a config as a plain dict."""
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  if not isinstance(config, Mapping):
    raise ConfigError(f"the config must be a mapping, got {config!r}")
  return dict(config)


def _stages(raw: Mapping[str, Any]) -> tuple[str, ...]:
  """`config.stages`, checked."""
  stages = raw.get("stages", ())
  if not isinstance(stages, (list, tuple)):
    raise ConfigError(
      f"config.stages must be a tuple of names, got {stages!r}; e.g. "
      "('svae', 'psvae')"
    )
  if not stages:
    raise ConfigError(
      "config.stages is empty: name at least one of " + ", ".join(STAGES)
    )
  for stage in stages:
    if not isinstance(stage, str) or stage not in STAGES:
      raise ConfigError(
        f"unknown stage {stage!r} in config.stages: "
        f"{nearest(str(stage), STAGES)}"
      )
  if len(set(stages)) != len(stages):
    raise ConfigError(
      f"config.stages={stages} names a stage twice; e.g. "
      f"{tuple(dict.fromkeys(stages))}"
    )
  if len({STAGES[stage][0] for stage in stages}) > 1:
    raise ConfigError(
      f"config.stages={stages} cannot share one model section; e.g. "
      f"{tuple(s for s in stages if STAGES[s][0] is STAGES[stages[0]][0])}"
    )
  return tuple(stages)


def _sections(raw: Mapping[str, Any]) -> dict[str, type]:
  """Section name → its type, of every section a config may have."""
  stages = _stages(raw)
  kinds = {"model": STAGES[stages[0]][0]}
  # A section of a stage that is not run this time is legal.
  kinds |= {name: STAGES[name][1] for name in STAGES if name in raw}
  kinds |= {stage: STAGES[stage][1] for stage in stages}
  for name, hint in _hints(Config).items():
    if dataclasses.is_dataclass(hint):
      kinds[name] = hint
  return kinds


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
  """The raw config with every field that it leaves out at its default.

  Config files return this, so that a reader sees every field. Values are not
  checked: `parse` does that, after the flags.

  Raises:
    ConfigError: `stages` is wrong, or a section is not one.
  """
  raw = _raw(config)
  kinds = _sections(raw)
  filled = {
    name: _fill(kind, raw.get(name, {}), name) for name, kind in kinds.items()
  }
  return {"seed": 0, **raw, **filled}


def _fill(kind: type, values: Any, path: str) -> dict[str, Any]:
  hints = _hints(kind)
  if not isinstance(values, Mapping):
    _build(kind, values, path)  # raises
  filled = dict(values)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(hints[field.name]):
      given = values.get(field.name, {})
      filled[field.name] = _fill(
        hints[field.name], given, f"{path}.{field.name}"
      )
    elif field.name not in values:
      filled[field.name] = field.default
  return filled


def override(
  config: Mapping[str, Any], flags: Mapping[str, str]
) -> dict[str, Any]:
  """The config with fields set from the command line, and all defaults.

  Args:
    config: a raw config.
    flags: dotted path below `config` → the text given for it, e.g.
      {"psvae.train.steps": "100", "stages": "svae,psvae"}.

  Raises:
    ConfigError: an unknown field, or a section instead of a field. A text that
      does not read as the field's type is left to `parse`.
  """
  raw = _raw(config)
  if "stages" in flags:  # decides which other fields there are
    raw["stages"] = _read(flags["stages"], tuple[str, ...])
  raw = with_defaults(raw)
  kinds = {**_sections(raw), "seed": int, "stages": tuple[str, ...]}
  for path, text in flags.items():
    target, fields, walked = raw, kinds, "config"
    *parents, name = path.split(".")
    for i, part in enumerate([*parents, name]):
      if part not in fields:
        raise ConfigError(
          f"unknown config field config.{path}: "
          f"{_suggest(path, part, fields, kinds)}"
        )
      walked, kind = f"{walked}.{part}", fields[part]
      fields = _fields(kind)
      if i < len(parents):
        if not fields:
          raise ConfigError(
            f"unknown config field config.{path}: {walked} is a value and has "
            "no fields"
          )
        target = target[part]
    if fields:
      raise ConfigError(
        f"{walked} is a section: set one of its fields, e.g. "
        f"--{walked}.{next(iter(fields))}=…"
      )
    target[name] = _read(text, kind)
  return raw


def _fields(kind: Any) -> dict[str, Any]:
  return _hints(kind) if dataclasses.is_dataclass(kind) else {}


def _paths(kinds: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Every dotted path below `kinds`."""
  found = []
  for name, kind in kinds.items():
    below = _fields(kind)
    found += _paths(below, f"{prefix}{name}.") if below else [prefix + name]
  return found


def _suggest(
  path: str, part: str, fields: Mapping[str, Any], kinds: Mapping[str, Any]
) -> str:
  """What may have been meant by `path`, which fails at `part`."""
  if difflib.get_close_matches(part, fields, n=1):
    return nearest(part, fields)
  everything = _paths(kinds)
  close = [p for p in everything if p.endswith("." + path)]
  close = close or difflib.get_close_matches(path, everything, n=1)
  if close:
    return "did you mean " + " or ".join(f"config.{p}" for p in close) + "?"
  return nearest(part, fields)


def _read(text: str, kind: Any) -> Any:
  """A flag's text as `kind`; the text itself where it does not read so."""
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    if text.strip()[:1] in ("(", "["):
      try:
        value = ast.literal_eval(text.strip())
      except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
      return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(_read(p.strip(), item) for p in text.split(",") if p.strip())
  if kind is bool:
    lowered = text.lower()
    return lowered in _TRUE if lowered in (*_TRUE, *_FALSE) else text
  try:
    return kind(text)
  except ValueError:
    return text


def parse_section(kind: type, values: Mapping[str, Any], path: str) -> Any:
  """One section by itself, without a job around it.

  Args:
    kind: its dataclass.
    values: its fields; what is left out takes its default.
    path: its name below "config", for messages.

  Raises:
    ConfigError: unknown field, wrong type, or a value out of its range.
  """
  built = _build(kind, values, path)
  for name, value, default in config_checks.leaves(built, path):
    config_checks.check_field(name, value, default)
  return built


def parse(config: Mapping[str, Any]) -> Config:
  """Turns a raw config into the typed view, or raises `ConfigError`.

  Args:
    config: an `ml_collections.ConfigDict` or a nested mapping.

  Returns:
    The validated config.

  Raises:
    ConfigError: unknown field, wrong type, a value out of its range, or fields
      that do not go together.
  """
  raw = _raw(config)
  kinds = _sections(raw)
  stages = _stages(raw)
  for name in raw:
    if name not in (*kinds, "seed", "stages"):
      raise ConfigError(
        f"unknown config field config.{name}: "
        f"{nearest(str(name), [*kinds, *STAGES, 'seed', 'stages'])}"
      )
  seed = _coerce(raw.get("seed", 0), int, "seed", 0)
  built = {
    name: _build(kind, raw.get(name, {}), name) for name, kind in kinds.items()
  }
  for path, value, default in [
    ("seed", seed, 0),
    *(
      leaf for name in built for leaf in config_checks.leaves(built[name], name)
    ),
  ]:
    config_checks.check_field(path, value, default)
  sections = {name: built.pop(name) for name in STAGES if name in built}
  parsed = Config(
    stages=stages,
    sections={stage: sections[stage] for stage in stages},
    seed=seed,
    **built,
  )
  config_checks.check(parsed)
  return parsed
