"""The jobs that train the miniature's own encoders."""

import dataclasses

from psvae_jax.config.shared import OptimConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class EncoderLossConfig:
  """Weights of the miniature encoder's losses.

  Attributes:
    contrastive: CLIP's softmax loss of images and captions, with foils.
    words: the caption's words, each from the patches that show it.
  """

  contrastive: float = 1.0
  words: float = 1.0


@dataclasses.dataclass(frozen=True)
class EncoderStage:
  """The job that trains the miniature's image encoder."""

  train: TrainConfig = TrainConfig()
  optim: OptimConfig = OptimConfig()
  loss: EncoderLossConfig = EncoderLossConfig()


@dataclasses.dataclass(frozen=True)
class ParaphraseConfig:
  """The miniature text encoder's objective.

  Attributes:
    paraphrase: weight of finding the other wording of a statement.
    roles: weight of saying where each word's object stands.
    foils: statements that are nearly right, for each statement.
  """

  paraphrase: float = 1.0
  roles: float = 1.0
  foils: int = 3


@dataclasses.dataclass(frozen=True)
class TextEncoderStage:
  """The job that trains the miniature's text encoder by itself."""

  train: TrainConfig = TrainConfig()
  optim: OptimConfig = OptimConfig()
  loss: ParaphraseConfig = ParaphraseConfig()


@dataclasses.dataclass(frozen=True)
class VisionModel:
  """Shape of the miniature's ViT, in DINOv2's terms."""

  width: int = 128
  depth: int = 5
  num_heads: int = 4
  patch_size: int = 8
  image_size: int = 48
  mlp_ratio: float = 2.0
  num_registers: int = 2


@dataclasses.dataclass(frozen=True)
class TextModel:
  """Shape of the miniature's T5 encoder."""

  width: int = 128
  depth: int = 2
  num_heads: int = 4
  mlp_hidden: int = 256
  vocab_size: int = 512
  max_length: int = 24


@dataclasses.dataclass(frozen=True)
class EncoderModel:
  """What `configs/encoder.py` trains without a variant."""

  vision: VisionModel = VisionModel()
  text: TextModel = TextModel()
  embed_dim: int = 128


@dataclasses.dataclass(frozen=True)
class TextEncoderModel:
  """What `configs/encoder.py:text` trains."""

  text: TextModel = TextModel()
  embed_dim: int = 128
