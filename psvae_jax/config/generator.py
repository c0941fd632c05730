"""The generator's model and stages, its latents and how it samples."""

import dataclasses

from psvae_jax.config.shared import OptimConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  """The generator's objective: rectified flow, t = 1 is noise.

  Attributes:
    time_mean, time_std: of the normal whose logistic is t before the shift.
    stratified: draw a batch's times from equally likely intervals, one each.
    shift: time shift s of training; 0 takes max(1, sqrt(h · w · C / 4096)).
    text_dropout: share of examples whose text (or class) is the null one.
    source_dropout: share of edit examples without source latents.
    edit_share: share of an edit stage's batch that is edits; the rest is
      text-to-image.
  """

  time_mean: float = 0.0
  time_std: float = 1.0
  stratified: bool = False
  shift: float = 0.0
  text_dropout: float = 0.1
  source_dropout: float = 0.1
  edit_share: float = 0.75


@dataclasses.dataclass(frozen=True)
class GeneratorStage:
  """One stage of the generator: text-to-image, or editing after it."""

  train: TrainConfig = TrainConfig(ema=0.9999)
  optim: OptimConfig = OptimConfig()
  loss: FlowConfig = FlowConfig()


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Shape of the diffusion transformer.

  Attributes:
    width, depth, num_heads: of the trunk.
    mlp_ratio: hidden width of the SwiGLU over the width.
    head_width, head_depth, head_num_heads: of the wide and shallow head that
      predicts the velocity from the trunk's tokens (DDT); depth 0 leaves it
      out.
  """

  width: int = 1152
  depth: int = 28
  num_heads: int = 16
  mlp_ratio: float = 2.6666666666666665
  head_width: int = 2048
  head_depth: int = 2
  head_num_heads: int = 16


@dataclasses.dataclass(frozen=True)
class GeneratorModel:
  """The generator. The autoencoder gives it latent channels and grid.

  Attributes:
    condition: "text" or "class".
    dit: the transformer.
    text_encoder: Hub id or folder of a T5 encoder; "" is the embedded
      miniature ("text" only).
    text_length: tokens a prompt is cut or padded to ("text" only).
    num_classes: labels, without the null one ("class" only); at least those
      of the data.
  """

  condition: str = "text"
  dit: DiTConfig = DiTConfig()
  text_encoder: str = ""
  text_length: int = 24
  num_classes: int = 0


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """Which autoencoder a generator's latents come from.

  Attributes:
    path: workdir or exported folder; "" is the job's own workdir, "embedded"
      the miniature that comes with the package.
    stage: its stage; "" takes the last one that has a checkpoint.
  """

  path: str = ""
  stage: str = ""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Latents and text features, computed once and read by the generator.

  Attributes:
    enabled: whether to; else every batch is encoded inside the step.
    root: folder of the caches; "" is `<workdir>/cache`.
    num_examples: training examples to cache; 0 takes all there are.
    views: augmented versions of every example.
    dtype: "float32", "bfloat16" or "float16" of what is stored (and of what a
      batch holds, cached or not).
    text: store text features, and not only tokens.
    shard_size: records a file.
    num_stats: training examples whose latents give mean and standard
      deviation; 0 takes all there are.
  """

  enabled: bool = True
  root: str = ""
  num_examples: int = 0
  views: int = 1
  dtype: str = "float16"
  text: bool = True
  shard_size: int = 4096
  num_stats: int = 50_000


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How images are sampled; saved with the generator as its defaults.

  Attributes:
    solver: "euler", "heun", "midpoint" or "ancestral".
    steps: of the time grid; Heun and midpoint evaluate twice a step.
    grid: "uniform" (1 to 0, then shifted), "diffusers" or "rae".
    shift: time shift of the grid.
    guidance: scale of the text's (or the class's) guidance; 1 is none.
    image_guidance: scale of the source image's, in edits.
    guidance_low, guidance_high: t between which guidance acts.
  """

  solver: str = "euler"
  steps: int = 50
  grid: str = "uniform"
  shift: float = 1.0
  guidance: float = 4.0
  image_guidance: float = 1.5
  guidance_low: float = 0.0
  guidance_high: float = 1.0
