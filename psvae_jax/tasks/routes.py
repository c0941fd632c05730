"""The autoencoder's stages: what trains, and which loss reaches what.

`ROUTES` is the only place that knows the difference between stages. A loss
reaches a module if and only if the table says so; everything else is cut by
`stop_gradient`, and the tests read the table and check the gradients. The
adversarial term is a part of the pixel loss and goes where that goes.
"""

import dataclasses

from psvae_jax.models.autoencoder import MODULES

E = "encoder"
SE = "semantic_encoder"
SD = "semantic_decoder"
PD = "pixel_decoder"
D = "discriminator"


@dataclasses.dataclass(frozen=True)
class Route:
  """Gradient routes of one stage: loss → modules it reaches.

  Attributes:
    semantic_tuned: L_s of f′ = E(image) against the teacher; empty where E is
      the teacher itself.
    semantic_decoded: L_s of f″ against the teacher.
    kl: KL of the posterior.
    pixel: pixel loss of the decoded image.
    starts_from: the stage whose parameters start this one.
  """

  semantic_tuned: tuple[str, ...]
  semantic_decoded: tuple[str, ...]
  kl: tuple[str, ...]
  pixel: tuple[str, ...]
  starts_from: str | None = None

  def __post_init__(self):
    for name, reach in self.losses.items():
      # E's output is computed once for all losses: a loss that goes through
      # semantic_encoder goes on into E wherever E trains.
      if SE in reach and (E in reach) != (E in self.trains):
        raise ValueError(f"route of {name} passes {SE} but not {E}: {reach}")

  @property
  def losses(self) -> dict[str, tuple[str, ...]]:
    return {
      "semantic_tuned": self.semantic_tuned,
      "semantic_decoded": self.semantic_decoded,
      "kl": self.kl,
      "pixel": self.pixel,
    }

  @property
  def trains(self) -> tuple[str, ...]:
    """Trained modules, in the order of the data flow."""
    reached = {module for reach in self.losses.values() for module in reach}
    return tuple(name for name in MODULES if name in reached)


ROUTES: dict[str, Route] = {
  # Stage 1: compress frozen features; pixels see stop_gradient(z).
  "svae": Route(
    semantic_tuned=(),
    semantic_decoded=(SE, SD),
    kl=(SE,),
    pixel=(PD,),
  ),
  # Stage 2: everything trains, the frozen copy of E holds the semantics.
  "psvae": Route(
    semantic_tuned=(E,),
    semantic_decoded=(E, SE, SD),
    kl=(E, SE),
    pixel=(E, SE, PD),
    starts_from="svae",
  ),
}
