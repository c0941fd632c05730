"""Fields of a published config.json, read with the types they must have."""

import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = 20


def show(value: Any) -> str:
  """`repr` of what a file says, a long one without its middle."""
  return _SHORT.repr(value)


class Fields:
  """Reads one JSON object; errors name the file and the field."""

  def __init__(self, raw: Mapping[str, Any], path: pathlib.Path):
    self._raw = raw
    self._path = path

  def get(self, name: str, kind: type, default: Any = None) -> Any:
    """A field of exactly the type `kind`; an integer does for a float.

    Raises:
      ValueError: another type, not finite, or absent without a default.
    """
    value = self._raw.get(name, default)
    found = value
    if kind is float and type(value) is int:
      try:
        value = float(value)
      except OverflowError:  # hundreds of digits
        value = math.inf
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
      raise ValueError(
        f"{self._path}: {name} is {show(found)}, it must be one {kind.__name__}"
      )
    return value

  def side(self, name: str, default: int | None = None) -> int:
    """A side in pixels; [14, 14] says no more than 14."""
    value = self._raw.get(name, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
      return Fields({name: value[0]}, self._path).get(name, int)
    return self.get(name, int, default)

  def section(self, name: str) -> "Fields":
    """A nested object; an absent one, or null, is empty."""
    value = self._raw.get(name)
    if value is not None and not isinstance(value, dict):
      raise ValueError(f"{self._path}: {name} must be a JSON object")
    return Fields(value or {}, self._path)

  def has(self, name: str) -> bool:
    """Whether a field is there and is not null."""
    return self._raw.get(name) is not None

  def expect(self, **wanted: Any) -> None:
    """Checks fields that must have one value, if they are there.

    Raises:
      ValueError: another value.
    """
    for name, value in wanted.items():
      found = self._raw.get(name, value)
      if found != value:
        raise ValueError(
          f"{self._path}: {name} {show(found)} is not {value!r}, which alone "
          "is supported"
        )

  def build(self, kind: type, **fields: Any) -> Any:
    """`kind(**fields)`; its ValueErrors then name the file."""
    try:
      return kind(**fields)
    except ValueError as error:
      raise ValueError(f"{self._path}: {error}") from error
