"""What is wrong with a config, said in one line."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
  """The user's config cannot be run; one line says what to change."""

  def __init__(self, message: str) -> None:
    # Names and values that a message quotes may have line breaks.
    super().__init__(" ".join(message.split()))


def nearest(name: str, valid: Iterable[str]) -> str:
  """Ends an error message: the valid name that is like `name`, or all."""
  valid = sorted(valid)
  close = difflib.get_close_matches(name, valid, n=1)
  if close:
    return f"did you mean {close[0]!r}?"
  return "valid: " + ", ".join(valid)
