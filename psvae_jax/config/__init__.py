"""Every field a config may have, with its meaning and default.

A config file returns an `ml_collections.ConfigDict`; `parser.parse` turns it
into the frozen dataclasses of this package before anything is compiled. Code
reads these only, so a field that is not declared here does not exist. Which
values a field may have is in `checks`.
"""

import dataclasses
from typing import Any

from psvae_jax.config.autoencoder import (
  AutoencoderLossConfig,
  AutoencoderModel,
  AutoencoderStage,
  DiscriminatorConfig,
  PerceptualConfig,
  PixelDecoderConfig,
  SemanticConfig,
)
from psvae_jax.config.encoders import (
  EncoderLossConfig,
  EncoderModel,
  EncoderStage,
  ParaphraseConfig,
  TextEncoderModel,
  TextEncoderStage,
  TextModel,
  VisionModel,
)
from psvae_jax.config.errors import ConfigError, nearest
from psvae_jax.config.generator import (
  AutoencoderConfig,
  CacheConfig,
  DiTConfig,
  FlowConfig,
  GeneratorModel,
  GeneratorStage,
  SampleConfig,
)
from psvae_jax.config.shared import (
  CheckpointConfig,
  ComputeConfig,
  DataConfig,
  EvalConfig,
  GuardConfig,
  MeshConfig,
  OptimConfig,
  TrainConfig,
)

__all__ = [
  "AutoencoderConfig",
  "AutoencoderLossConfig",
  "AutoencoderModel",
  "AutoencoderStage",
  "CacheConfig",
  "CheckpointConfig",
  "ComputeConfig",
  "Config",
  "ConfigError",
  "DataConfig",
  "DiTConfig",
  "DiscriminatorConfig",
  "EncoderLossConfig",
  "EncoderModel",
  "EncoderStage",
  "EvalConfig",
  "FlowConfig",
  "GeneratorModel",
  "GeneratorStage",
  "GuardConfig",
  "MeshConfig",
  "OptimConfig",
  "ParaphraseConfig",
  "PerceptualConfig",
  "PixelDecoderConfig",
  "STAGES",
  "SampleConfig",
  "SemanticConfig",
  "TextEncoderModel",
  "TextEncoderStage",
  "TextModel",
  "TrainConfig",
  "VisionModel",
  "nearest",
]

# Stage name → (type of `config.model`, type of the stage's own section). New
# ones go to the end: a stage's place decides its random numbers.
STAGES: dict[str, tuple[type, type]] = {
  "encoder": (EncoderModel, EncoderStage),
  "svae": (AutoencoderModel, AutoencoderStage),
  "psvae": (AutoencoderModel, AutoencoderStage),
  "t2i": (GeneratorModel, GeneratorStage),
  "edit": (GeneratorModel, GeneratorStage),
  "text_encoder": (TextEncoderModel, TextEncoderStage),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole job: shared sections, and one section a stage in `sections`."""

  stages: tuple[str, ...]
  sections: dict[str, Any]
  model: Any
  seed: int = 0
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  compute: ComputeConfig = ComputeConfig()
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  perceptual: PerceptualConfig = PerceptualConfig()
  guard: GuardConfig = GuardConfig()
  autoencoder: AutoencoderConfig = AutoencoderConfig()
  cache: CacheConfig = CacheConfig()
  sample: SampleConfig = SampleConfig()
