"""Names of classes → the numbers by which a generator knows them."""

from collections.abc import Iterable

# What an example's label is where its class is not known.
UNKNOWN = -1

_MAX_DIGITS = 9  # longer ones are names, not places in a list


class ClassLabels:
  """Classes in the order of their sorted names, as Hugging Face numbers them.

  Names that are all numbers stand for themselves where that is asked for: a
  metadata column of numbers holds classes that somebody has numbered already.

  Args:
    names: of the examples or folders, in any order and number; "" is none.
    may_be_numbers: see above.

  Attributes:
    count: labels lie in [0, count); 0 if there are no classes.
  """

  def __init__(
    self, names: Iterable[str] = (), *, may_be_numbers: bool = False
  ) -> None:
    ordered = sorted(set(names) - {""})
    self._are_numbers = may_be_numbers and all(map(_is_number, ordered))
    if self._are_numbers:
      self.count = max(map(int, ordered), default=-1) + 1
      self._labels = {}
    else:
      self._labels = {name: label for label, name in enumerate(ordered)}
      self.count = len(ordered)

  def label(self, name: str) -> int:
    """The number of a class; `UNKNOWN` for "" and for any other name."""
    if self._are_numbers:
      known = _is_number(name) and int(name) < self.count
      return int(name) if known else UNKNOWN
    return self._labels.get(name, UNKNOWN)


def _is_number(name: str) -> bool:
  return name.isascii() and name.isdecimal() and len(name) <= _MAX_DIGITS
