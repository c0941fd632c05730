"""The networks of metrics that the user has given, and what they give."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from psvae_jax.evaluators import feature_networks
from psvae_jax.evaluators.feature_networks import (
  FeatureExtractor,
  FeatureNetwork,
)
from psvae_jax.evaluators.reference_npz import POOL, SPATIAL

# Flag → figures that need it.
NEEDED_BY: dict[str, tuple[str, ...]] = {
  "lpips": ("lpips",),
  "inception": (
    "rfid",
    "rsfid",
    "gfid",
    "gsfid",
    "inception_score",
    "kid",
    "precision",
    "recall",
  ),
  "dinov2": ("rfd_dinov2", "gfd_dinov2"),
  "clip": ("clip_score",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
  """What was given; None for what was not.

  Attributes:
    inception, dinov2: see `feature_networks`.
    lpips: a `pretrained.lpips.PerceptualNetwork`.
    clip: a `pretrained.clip.Clip`.
  """

  _extractors: dict[Mesh, FeatureExtractor] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  inception: FeatureNetwork | None = None
  dinov2: FeatureNetwork | None = None
  lpips: Any = None
  clip: Any = None

  @property
  def features(self) -> list[FeatureNetwork]:
    """Those that give features of an image."""
    return [n for n in (self.inception, self.dinov2) if n is not None]

  def extractor(self, mesh: Mesh) -> FeatureExtractor:
    """What runs `features` on a mesh: compiled once, for all sets."""
    if mesh not in self._extractors:
      self._extractors[mesh] = FeatureExtractor(self.features, mesh)
    return self._extractors[mesh]

  @property
  def moments(self) -> list[str]:
    """Kinds of features that Fréchet distances are taken of."""
    kinds = [POOL, SPATIAL] if self.inception is not None else []
    return kinds + ([feature_networks.DINOV2] if self.dinov2 else [])

  def identity(self) -> dict[str, Any]:
    """What decides the features, JSON values."""
    return {n.name: dict(n.protocol) for n in self.features}

  def missing(self, figures: Sequence[str]) -> dict[str, str]:
    """Figure → why it cannot be had, of those that lack their network."""
    found = {}
    for flag, needing in NEEDED_BY.items():
      if getattr(self, flag) is None:
        why = f"--{flag} was not given"
        found |= {key: why for key in needing if key in figures}
    return found


def load(
  *,
  inception: str = "",
  inception_resize: str = "tf1",
  lpips: str = "",
  dinov2: str = "",
  clip: str = "",
) -> Networks:
  """Loads what was given; "" leaves one out.

  Raises:
    FileNotFoundError, ValueError: see the loaders.
  """
  found: dict[str, Any] = {}
  if inception:
    found["inception"] = feature_networks.inception(inception, inception_resize)
  if dinov2:
    found["dinov2"] = feature_networks.dinov2(dinov2)
  if lpips:
    from psvae_jax.pretrained.lpips import load_lpips

    found["lpips"] = load_lpips(lpips)
  if clip:
    from psvae_jax.pretrained.clip import load_clip

    found["clip"] = load_clip(clip)
  return Networks(**found)


def kind_of(figure: str) -> str:
  """Kind of features that a Fréchet distance is of."""
  kinds: Mapping[str, str] = {
    "fid": POOL,
    "sfid": SPATIAL,
    "fd_dinov2": feature_networks.DINOV2,
  }
  return kinds[figure[1:]]


def network_of(networks: Networks, figure: str) -> FeatureNetwork:
  """The network that a Fréchet distance's features are of."""
  dinov2 = kind_of(figure) == feature_networks.DINOV2
  return networks.dinov2 if dinov2 else networks.inception
