"""The argument of a config file: `variant[,option=value…]`.

    --config=configs/psvae.py:base,channels=32,decoder=vit

Config files call `parse_argument`; it imports nothing heavy, as they do.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from psvae_jax.config import nearest

# What an option takes: the words it may be, or text → value, which raises
# ValueError with a sentence that says what it takes.
OptionKind = tuple[str, ...] | Callable[[str], Any]


def parse_argument(
  arg: str, variants: Collection[str], options: Mapping[str, OptionKind]
) -> tuple[str, dict[str, Any]]:
  """Splits and checks a config file's argument.

  Args:
    arg: what follows the colon of `--config=FILE:ARG`.
    variants: names of the file's variants. "" is the one that is meant where
      the argument is empty or begins with an option.
    options: option name → what it takes.

  Returns:
    The variant, and the value of every option that was given.

  Raises:
    ValueError: an unknown or repeated name, or a bad value; one line.
  """
  variant, *rest = arg.split(",")
  if "=" in variant:
    variant, rest = "", [variant, *rest]
  if variant not in variants:
    named = [name for name in variants if name]
    hint = nearest(variant, named) if named else "the file has none"
    raise ValueError(f"unknown config variant {variant!r}; {hint}")
  values = {}
  for part in rest:
    name, given, text = part.partition("=")
    if name not in options:
      hint = nearest(name, options) if options else "the file has none"
      raise ValueError(f"unknown config option {name!r}; {hint}")
    if name in values:
      raise ValueError(f"config option {name!r} is given twice")
    if not given or not text:
      raise ValueError(f"config option {name!r} needs a value: {name}=VALUE")
    values[name] = _convert(name, text, options[name])
  return variant, values


def _convert(name: str, text: str, kind: OptionKind) -> Any:
  if isinstance(kind, tuple):
    if text not in kind:
      raise ValueError(
        f"config option {name}={text!r} is unknown; {nearest(text, kind)}"
      )
    return text
  try:
    return kind(text)
  except ValueError as error:
    raise ValueError(f"config option {name}={text!r}: {error}") from error


def positive_int(text: str) -> int:
  """An option's whole number from 1 upwards."""
  if not text.isdecimal() or not int(text):
    raise ValueError("it takes a whole number from 1 upwards, e.g. 32")
  return int(text)
