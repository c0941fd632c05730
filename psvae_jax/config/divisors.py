"""Sizes that must divide each other, and the nearest ones that do."""

from psvae_jax.config.errors import ConfigError


def nearest_multiple(value: int, factor: int) -> int:
  """The multiple of `factor`, at least one, that is nearest to `value`."""
  return max(factor, (value + factor // 2) // factor * factor)


def check_heads(path: str, width: int, heads: int) -> None:
  """Raises ConfigError where attention heads do not divide the width."""
  if width % heads:
    raise ConfigError(
      f"config.{path}.num_heads={heads} does not divide config.{path}.width="
      f"{width}; {nearest_divisor(width, heads)} would"
    )


def nearest_divisor(value: int, divisor: int) -> int:
  """The divisor of `value` that is nearest to `divisor`."""
  fitting = [n for n in range(1, value + 1) if value % n == 0]
  return min(fitting, key=lambda n: abs(n - divisor))
