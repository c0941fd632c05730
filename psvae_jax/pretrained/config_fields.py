"""Fields of a published config.json, checked as they are read."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

_REQUIRED = object()
_KINDS = {
  bool: "true or false",
  int: "a whole number",
  float: "a finite number",
  str: "a string",
  list: "a list",
}


class Fields:
  """Reads fields; every error names the file and the field.

  Args:
    raw: the config.
    path: its file, for messages.
  """

  def __init__(self, raw: Mapping[str, Any], path: pathlib.Path) -> None:
    self._raw = raw
    self._path = path

  def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """One field.

    Args:
      name: the field.
      kind: bool, int, float (also whole numbers), str or list.
      default: of a file that leaves it out; None also allows a null. Without
        one the field is required.

    Raises:
      ValueError: missing, or of another type.
    """
    value = self._raw.get(name, default)
    if value is _REQUIRED:
      raise ValueError(f"{self._path}: {name} is missing")
    if value is None and default is None:
      return None
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
      self.fail(name, _KINDS[kind])
    return value

  def require(self, name: str, only: Any, default: Any = _REQUIRED) -> None:
    """Raises a ValueError where a field is not the one value supported."""
    value = self._raw.get(name, only if default is _REQUIRED else default)
    if value != only:
      self.fail(name, f"{only!r}, the one that is supported")

  def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
    """A field that is null, left out or a list of `count` finite numbers."""
    values = self.get(name, list, None)
    if values is None:
      return None
    good = len(values) == count and all(
      type(value) in (int, float) and math.isfinite(value) for value in values
    )
    if not good:
      self.fail(name, f"a list of {count} finite numbers")
    return tuple(float(value) for value in values)

  def fail(self, name: str, wanted: str) -> None:
    """Raises the ValueError of a field that is not what is `wanted`."""
    value = repr(self._raw.get(name))
    if len(value) > 80:
      value = value[:77] + "..."
    raise ValueError(f"{self._path}: {name} is {value}; it must be {wanted}")
