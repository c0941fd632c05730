"""Per-channel mean and standard deviation of an autoencoder's latents.

A generator works on latents of mean 0 and standard deviation 1. The figures are
those of the posterior means over the train split without augmentation, and they
belong to one autoencoder: they carry its `latent_fingerprint`, and loading them
for another is refused.

The sums are exact integers, and only the last division rounds. So the figures
are the same, bit for bit, for any batch size, order and number of hosts.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from psvae_jax.pretrained import files

# A channel that does not vary normalises to 0 and denormalises to its mean;
# its standard deviation is stored as this, not as 0.
STD_FLOOR = 1e-6

# float32 = m · 2^(e − 24) with |m| < 2^24; e as `np.frexp` gives it.
_MANTISSA_BITS = 24
_LEAST_EXPONENT = -148
_NUM_EXPONENTS = 128 - _LEAST_EXPONENT + 1
# Latent values an update works on at once: bounds its memory.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class LatentStats:
  """Normalises latents of one autoencoder.

  Attributes:
    mean: float32 (C,).
    std: float32 (C,), of the whole population (not the sample estimate); at
      least `STD_FLOOR`.
    count: images they are from.
    fingerprint: `latent_fingerprint` of the autoencoder.
    data: what was encoded, JSON values; a job on other data refuses them.
  """

  mean: np.ndarray
  std: np.ndarray
  count: int
  fingerprint: str
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    for name in ("mean", "std"):
      value = np.asarray(getattr(self, name), np.float32)
      object.__setattr__(self, name, value)
    if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
      raise ValueError(
        "latent statistics need one mean and one standard deviation a "
        f"channel, got shapes {self.mean.shape} and {self.std.shape}"
      )
    if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all()):
      raise ValueError("latent statistics are not finite")
    if not (self.std > 0).all():
      raise ValueError("a latent standard deviation is not positive")

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """{"mean": (C,), "std": (C,)}, as a generator's frozen tree holds them."""
    return {"mean": self.mean, "std": self.std}

  def normalise(self, z: Any) -> Any:
    """z (…, C) → float32 (z − mean) / std; numpy or JAX arrays."""
    return (z.astype(np.float32) - self.mean) / self.std

  def denormalise(self, z: Any) -> Any:
    """The inverse of `normalise`, float32."""
    return z.astype(np.float32) * self.std + self.mean

  def save(self, path: str | os.PathLike) -> None:
    """Writes a small JSON file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(
      path,
      {
        "fingerprint": self.fingerprint,
        "count": self.count,
        "data": dict(self.data),
        # A float32 as the double of the same value: JSON keeps it exactly.
        "mean": [float(x) for x in self.mean],
        "std": [float(x) for x in self.std],
      },
    )

  @classmethod
  def load(cls, path: str | os.PathLike, fingerprint: str) -> "LatentStats":
    """Reads what `save` wrote.

    Args:
      path: the file.
      fingerprint: `latent_fingerprint` of the autoencoder they are to be used
        with.

    Raises:
      FileNotFoundError: no such file.
      ValueError: they are of another autoencoder, or the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
      raise FileNotFoundError(
        f"{path} is missing: the latents' mean and standard deviation are "
        "measured when the generator's training starts"
      )
    try:
      raw = json.loads(path.read_text(encoding="utf-8"))
      stats = cls(
        np.array(raw["mean"], np.float32),
        np.array(raw["std"], np.float32),
        int(raw["count"]),
        str(raw["fingerprint"]),
        dict(raw["data"]),
      )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(
        f"{path} does not hold latent statistics ({error}); delete it and "
        "start the same command again"
      ) from error
    if stats.fingerprint != fingerprint:
      raise ValueError(
        f"{path} is of the autoencoder {stats.fingerprint}, not of "
        f"{fingerprint}: a generator works with the autoencoder it was trained "
        "on only; give that one, or train in another workdir"
      )
    return stats


class LatentMoments:
  """Sums of latents and their squares, exact whatever the order.

  Per channel and binary exponent it adds up the integer mantissas of the
  float32 values: products and sums of integers do not round. Good for 2^37
  values a channel.

  Args:
    channels: C.

  Attributes:
    count: images so far.
  """

  def __init__(self, channels: int) -> None:
    self.count = 0
    self._values = 0  # a channel
    # [sum, sum of squares: high half, low half], channel, exponent.
    self._sums = np.zeros((3, channels, _NUM_EXPONENTS), np.int64)

  @property
  def channels(self) -> int:
    return self._sums.shape[1]

  def update(self, z: Any, mask: np.ndarray | None = None) -> None:
    """Adds images.

    Args:
      z: (B, h, w, C), of float32 or a smaller type.
      mask: bool (B,), False for rows to leave out; all count by default.

    Raises:
      ValueError: another shape, or a value that is not finite.
    """
    z = np.asarray(jax.device_get(z))
    if z.ndim != 4 or z.shape[-1] != self.channels:
      raise ValueError(
        f"latents must have the shape (B, h, w, {self.channels}), got {z.shape}"
      )
    if np.result_type(z.dtype, np.float32) != np.float32:
      raise ValueError(f"latents must be float32 or smaller, got {z.dtype}")
    if mask is not None:
      z = z[np.asarray(mask, bool)]
    z = z.astype(np.float32)
    finite = np.isfinite(z).all(axis=(1, 2, 3))
    if not finite.all():
      raise ValueError(
        f"the latents of {np.count_nonzero(~finite)} of {len(z)} images are "
        "not finite: the autoencoder is broken, or its compute type overflows"
      )
    self.count += len(z)
    self._values += len(z) * z.shape[1] * z.shape[2]
    flat = z.reshape(-1, self.channels)
    step = max(1, _CHUNK // self.channels)
    for start in range(0, len(flat), step):
      self._add(flat[start : start + step])

  def merge(self, other: "LatentMoments") -> None:
    """Adds another host's, or another batch's, sums."""
    if other.channels != self.channels:
      raise ValueError(
        f"cannot merge latents of {other.channels} and {self.channels} channels"
      )
    self.count += other.count
    self._values += other._values
    self._sums += other._sums

  def over_hosts(self) -> "LatentMoments":
    """The sums of all hosts; all of them must call it."""
    if jax.process_count() == 1:
      return self
    from jax.experimental import multihost_utils

    # As bytes: a collective would cut int64 down to int32.
    everyone = np.asarray(multihost_utils.process_allgather(self._pack()))
    total = LatentMoments(self.channels)
    for packed in everyone:
      total.merge(self._unpack(packed))
    return total

  def result(
    self, fingerprint: str, data: Mapping[str, Any] | None = None
  ) -> LatentStats:
    """The statistics, rounded once.

    Args:
      fingerprint: `latent_fingerprint` of the autoencoder.
      data: what was encoded, JSON values.

    Raises:
      ValueError: no image was added.
    """
    if not self.count:
      raise ValueError("latent statistics of no images: the data set is empty")
    mean, std = [], []
    for channel in range(self.channels):
      first, second = self._total(channel)
      average = first / self._values
      variance = second / self._values - average**2
      mean.append(float(average))
      std.append(max(math.sqrt(variance), STD_FLOOR))
    return LatentStats(
      np.array(mean, np.float32),
      np.array(std, np.float32),
      self.count,
      fingerprint,
      dict(data or {}),
    )

  def _add(self, flat: np.ndarray) -> None:
    """Adds float32 (n, C); n · C ≤ max(_CHUNK, C)."""
    fraction, exponent = np.frexp(flat)
    mantissa = (fraction.astype(np.float64) * 2**_MANTISSA_BITS).astype(
      np.int64
    )
    squares = mantissa * mantissa  # below 2^48
    bins = exponent - _LEAST_EXPONENT + self._first_bin
    parts = (
      mantissa,
      squares >> _MANTISSA_BITS,
      squares & ((1 << _MANTISSA_BITS) - 1),
    )
    for total, part in zip(self._sums, parts, strict=True):
      # Its float64 sums are exact: at most 2^20 terms below 2^24.
      added = np.bincount(bins.ravel(), part.ravel(), minlength=total.size)
      total += added.astype(np.int64).reshape(total.shape)

  @property
  def _first_bin(self) -> np.ndarray:
    return np.arange(self.channels) * _NUM_EXPONENTS

  def _total(self, channel: int) -> tuple[Fraction, Fraction]:
    """Exact sums of one channel's values and of their squares."""
    first, second = Fraction(0), Fraction(0)
    for bin_index in np.flatnonzero(self._sums[:, channel].any(axis=0)):
      values, high, low = (int(x) for x in self._sums[:, channel, bin_index])
      unit = Fraction(2) ** (int(bin_index) + _LEAST_EXPONENT - _MANTISSA_BITS)
      first += values * unit
      second += ((high << _MANTISSA_BITS) + low) * unit**2
    return first, second

  def _pack(self) -> np.ndarray:
    head = np.array([self.count, self._values], np.int64)
    return np.concatenate([head, self._sums.ravel()]).view(np.uint8)

  def _unpack(self, packed: np.ndarray) -> "LatentMoments":
    numbers = np.ascontiguousarray(packed).view(np.int64)
    moments = LatentMoments(self.channels)
    moments.count, moments._values = (int(x) for x in numbers[:2])
    moments._sums = numbers[2:].reshape(self._sums.shape).copy()
    return moments


class LatentSource(Protocol):
  """Random access to elements with "latent" (h, w, C) and "index"."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def measure(
  source: LatentSource,
  *,
  fingerprint: str,
  count: int = 0,
  data: Mapping[str, Any] | None = None,
  batch_size: int = 256,
) -> LatentStats:
  """Statistics of latents that are stored, e.g. a `CachedSource`'s.

  A record whose "index" is not its place stands for a bad one, and is left out:
  it counts at its own place.

  Args:
    source: the latents.
    fingerprint: `latent_fingerprint` of the autoencoder.
    count: of the first so many; 0 takes all.
    data: what was encoded, JSON values.
    batch_size: changes memory, never a figure.
  """
  count = min(count or len(source), len(source))
  moments: LatentMoments | None = None
  for start in range(0, count, batch_size):
    places = range(start, min(start + batch_size, count))
    elements = [source[place] for place in places]
    z = np.stack([element["latent"] for element in elements])
    own = [int(e["index"]) == i for e, i in zip(elements, places, strict=True)]
    moments = moments or LatentMoments(z.shape[-1])
    moments.update(z, np.array(own))
  if moments is None:
    raise ValueError(f"{source!r} is empty: it has no latents to measure")
  return moments.result(fingerprint, data)
