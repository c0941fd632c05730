"""Typed, validated view of a job's config.

A config file returns an `ml_collections.ConfigDict`; `parse` turns it into the
frozen dataclasses below before anything is compiled. An unknown field, a wrong
type or an impossible combination is a `ConfigError` that names the field, and
the nearest valid name where there is one. Code reads these dataclasses only, so
a field that is not declared here does not exist.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
  """The user's config cannot be run; the message says what to change."""


def _nearest(name: str, valid: typing.Iterable[str]) -> str:
  valid = sorted(valid)
  close = difflib.get_close_matches(name, valid, n=1)
  if close:
    return f"did you mean {close[0]!r}?"
  return "valid: " + ", ".join(valid)


def _one_of(field: str, value: str, valid: typing.Iterable[str]) -> None:
  if value not in valid:
    raise ConfigError(
      f"config.{field}={value!r} is unknown; {_nearest(str(value), valid)}"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where images come from and how one example is made.

  Attributes:
    source: "scenes" (procedural), "bundled" (scikit-image's pictures) or
      "folder" (Hugging Face `imagefolder`).
    root: folder of training images (`folder` only).
    eval_root: folder of validation images; "" holds out 5 % of `root`.
    num_train: training examples; 0 takes all there are.
    num_eval: validation examples; 0 takes all there are.
    augment: "none" (images have the right size), "center", "crop" (random
      resized crop) or "crop_flip".
    min_scale: least side of a random crop, as a share of the shorter side.
    captions: column of captions; see `data.folder.FolderSource`.
    seed: decides the scenes, the order and the augmentation.
    num_threads: reader threads per host.
    prefetch: batches prepared ahead per host.
    caption_variants: draw paraphrased captions (`scenes` only).
  """

  source: str = "scenes"
  root: str = ""
  eval_root: str = ""
  num_train: int = 0
  num_eval: int = 0
  augment: str = "none"
  min_scale: float = 0.5
  captions: str = "auto"
  seed: int = 0
  num_threads: int = 2
  prefetch: int = 4
  caption_variants: bool = True

  def __post_init__(self):
    _one_of("data.source", self.source, ("scenes", "bundled", "folder"))
    augments = ("none", "center", "crop", "crop_flip")
    _one_of("data.augment", self.augment, augments)
    if self.source == "folder" and not self.root:
      raise ConfigError(
        "config.data.source='folder' needs a folder: pass "
        "--config.data.root=FOLDER"
      )
    if self.source != "folder" and (self.root or self.eval_root):
      raise ConfigError(
        "config.data.root and eval_root are for config.data.source='folder', "
        f"not {self.source!r}"
      )
    if min(self.num_train, self.num_eval) < 0:
      raise ConfigError(
        "config.data.num_train and num_eval must be at least 0 (0 = all), "
        f"not {self.num_train} and {self.num_eval}"
      )
    if not 0 <= self.seed < 2**31:
      raise ConfigError(
        f"config.data.seed must be in [0, 2³¹), got {self.seed}"
      )
    if not 0 < self.min_scale <= 1:
      raise ConfigError(
        f"config.data.min_scale must be in (0, 1], got {self.min_scale}"
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis; at most one axis is -1 and takes what is left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Save every `every_steps` (and at the end); keep the newest `keep`."""

  every_steps: int = 1000
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation on held-out images.

  Attributes:
    every_steps: evaluate that often; 0 evaluates at the end of a stage only.
    batch_size: global batch; changes speed, never a figure.
    num_images: images for PSNR, SSIM, latents (and the scene checker).
    num_samples: fixed images whose reconstructions the report shows.
    probe: "scenes" fits the attribute probe and runs the scene checker;
      "none" leaves both out.
    num_probe_train: scenes the probe is fitted on.
    num_probe_test: held-out scenes it is scored on.
  """

  every_steps: int = 0
  batch_size: int = 128
  num_images: int = 512
  num_samples: int = 12
  probe: str = "none"
  num_probe_train: int = 2048
  num_probe_test: int = 1024


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length and batch of a stage.

  Attributes:
    steps: optimizer steps.
    batch_size: global batch.
    log_every: steps between two lines of metrics.
    ema: EMA decay; step n uses min(ema, (1 + n) / (10 + n)).
  """

  steps: int = 1000
  batch_size: int = 64
  log_every: int = 50
  ema: float = 0.999


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Optimizer and schedule of a stage.

  Attributes:
    name: "adamw" or "muon" (matrices by Muon, the rest by AdamW at
      `adam_learning_rate`).
    learning_rate: peak learning rate.
    adam_learning_rate: peak rate of the parameters Muon leaves to AdamW.
    warmup_steps: linear warm-up from 0.
    schedule: "cosine", "linear" or "constant" after the warm-up.
    end_factor: last learning rate as a share of the peak.
    b1, b2, eps: Adam's moments.
    weight_decay: decoupled, on matrices only.
    clip: global-norm clip of each module's gradient by itself; 0 is off.
    encoder_multiplier: factor on the encoder's learning rate.
  """

  name: str = "adamw"
  learning_rate: float = 1e-4
  adam_learning_rate: float = 1e-3
  warmup_steps: int = 0
  schedule: str = "cosine"
  end_factor: float = 0.0
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0
  encoder_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
  """Weights of the autoencoder's losses (DESIGN: weights are config).

  Attributes:
    semantic: on L2 + (1 − cos) of f′ and f″ against the frozen encoder.
    kl: on the KL, reduced as `kl_reduction` says.
    kl_reduction: "mean" over latent dimensions or "sum" over them (LDM).
    pixel: on the whole pixel loss.
    l1, mse, perceptual: weights inside the pixel loss.
    perceptual_kind: "multiscale_gradient" (knows no pretrained network).
  """

  semantic: float = 1.0
  kl: float = 1e-4
  kl_reduction: str = "mean"
  pixel: float = 1.0
  l1: float = 1.0
  mse: float = 0.0
  perceptual: float = 0.0
  perceptual_kind: str = "multiscale_gradient"


@dataclasses.dataclass(frozen=True)
class EncoderLossConfig:
  """Weights of the miniature encoder's losses.

  Attributes:
    contrastive: sigmoid image-caption loss with hard negatives.
    words: caption-word presence from the pooled patch tokens.
  """

  contrastive: float = 1.0
  words: float = 1.0


@dataclasses.dataclass(frozen=True)
class AutoencoderStage:
  """One stage of the autoencoder: its own length, optimizer and weights."""

  train: TrainConfig = TrainConfig()
  optim: OptimConfig = OptimConfig()
  loss: AutoencoderLossConfig = AutoencoderLossConfig()


@dataclasses.dataclass(frozen=True)
class EncoderStage:
  """The job that trains the miniature's encoders."""

  train: TrainConfig = TrainConfig()
  optim: OptimConfig = OptimConfig()
  loss: EncoderLossConfig = EncoderLossConfig()


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
  """SemanticEncoder or SemanticDecoder.

  Attributes:
    depth: transformer blocks of the encoder's own kind.
    mlp_hidden: hidden width of the projection MLP; 0 takes the encoder's width.
    from_encoder: start the blocks from the encoder's last ones.
  """

  depth: int = 3
  mlp_hidden: int = 0
  from_encoder: bool = False


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
  """Latent → image.

  Attributes:
    kind: "conv" (LDM) or "vit" (RAE).
    channels, channel_mult, num_res_blocks, output_patch: of the conv decoder.
    width, depth, num_heads, mlp_ratio, overlap, refine_channels: of the ViT.
  """

  kind: str = "conv"
  channels: int = 128
  channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  output_patch: int = 1
  width: int = 384
  depth: int = 6
  num_heads: int = 6
  mlp_ratio: float = 4.0
  overlap: int = 0
  refine_channels: int = 0


@dataclasses.dataclass(frozen=True)
class AutoencoderModel:
  """The autoencoder. With the encoder's bytes this is its fingerprint.

  Attributes:
    encoder: Hub id or folder of the representation encoder; "" is the
      embedded miniature.
    final_norm: norm of the encoder's tokens: "affine" as published or
      "affine_free" (RAE).
    image_size: side the encoder sees.
    output_size: side of the product.
    channels: latent channels C.
  """

  encoder: str = ""
  final_norm: str = "affine"
  image_size: int = 224
  output_size: int = 256
  channels: int = 96
  semantic_encoder: SemanticConfig = SemanticConfig()
  semantic_decoder: SemanticConfig = SemanticConfig()
  pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()


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
  """What `configs/encoder.py` trains."""

  vision: VisionModel = VisionModel()
  text: TextModel = TextModel()
  embed_dim: int = 128


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How the model is computed; changes speed and memory, not the function.

  Attributes:
    dtype: "float32" or "bfloat16" for matrix products and activations;
      "float64" where JAX runs in double precision.
    remat: recompute block activations in the backward pass.
    unroll: blocks per iteration of a scanned stack.
  """

  dtype: str = "float32"
  remat: bool = False
  unroll: int = 1


# Stage name → (type of `config.model`, type of the stage's own section).
STAGES: dict[str, tuple[type, type]] = {
  "encoder": (EncoderModel, EncoderStage),
  "svae": (AutoencoderModel, AutoencoderStage),
  "psvae": (AutoencoderModel, AutoencoderStage),
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


_CHOICES = {
  "eval.probe": ("scenes", "none"),
  "compute.dtype": ("float32", "bfloat16", "float64"),
  "model.final_norm": ("affine", "affine_free"),
  "model.pixel_decoder.kind": ("conv", "vit"),
  "*.optim.name": ("adamw", "muon"),
  "*.optim.schedule": ("cosine", "linear", "constant"),
  "*.loss.kl_reduction": ("mean", "sum"),
  "*.loss.perceptual_kind": ("multiscale_gradient",),
}


def _coerce(value: Any, kind: Any, path: str) -> Any:
  """Checks `value` against the annotation `kind`; widens int to float."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, path)
  origin = typing.get_origin(kind)
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise ConfigError(f"config.{path} must be a tuple, got {value!r}")
    item = typing.get_args(kind)[0]
    return tuple(_coerce(v, item, f"{path}[{i}]") for i, v in enumerate(value))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind is Any or isinstance(kind, types.UnionType):
    return value
  # bool is a subclass of int: `steps=True` is a mistake, not a number.
  wrong_bool = isinstance(value, bool) and kind is not bool
  if not isinstance(value, kind) or wrong_bool:
    raise ConfigError(
      f"config.{path} must be {kind.__name__}, got {value!r} "
      f"({type(value).__name__})"
    )
  return value


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  """Builds dataclass `cls` from a mapping, strictly."""
  hints = typing.get_type_hints(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  if not isinstance(values, Mapping):
    raise ConfigError(f"config.{path} must be a section, got {values!r}")
  for name in values:
    if name not in names:
      raise ConfigError(
        f"unknown config field config.{path}.{name}: {_nearest(name, names)}"
      )
  built = {
    name: _coerce(values[name], hints[name], f"{path}.{name}")
    for name in names
    if name in values
  }
  return cls(**built)


def _check_choices(config: Config) -> None:
  for key, valid in _CHOICES.items():
    head, _, tail = key.partition(".")
    roots = config.sections if head == "*" else {head: getattr(config, head)}
    for name, value in roots.items():
      for part in tail.split("."):
        value = getattr(value, part, None)
        if value is None:
          break
      if value is not None:
        _one_of(f"{name}.{tail}", value, valid)


def _check_positive(config: Config) -> None:
  counts = {
    "checkpoint.every_steps": config.checkpoint.every_steps,
    "checkpoint.keep": config.checkpoint.keep,
    "eval.batch_size": config.eval.batch_size,
    "eval.num_images": config.eval.num_images,
    "compute.unroll": config.compute.unroll,
  }
  for stage, section in config.sections.items():
    counts |= {
      f"{stage}.train.steps": section.train.steps,
      f"{stage}.train.batch_size": section.train.batch_size,
      f"{stage}.train.log_every": section.train.log_every,
    }
  for name, value in counts.items():
    if value < 1:
      raise ConfigError(f"config.{name} must be at least 1, got {value}")
  for stage, section in config.sections.items():
    if not 0 <= section.train.ema < 1:
      raise ConfigError(
        f"config.{stage}.train.ema must be in [0, 1), got {section.train.ema}"
      )


def parse(config: Mapping[str, Any]) -> Config:
  """Turns a raw config into the typed view, or raises `ConfigError`.

  Args:
    config: an `ml_collections.ConfigDict` or a nested mapping.

  Returns:
    The validated config.

  Raises:
    ConfigError: unknown field, wrong type, or a value out of its range.
  """
  raw = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  raw.pop("workdir", None)  # where to write is main's business
  stages = tuple(raw.pop("stages", ()))
  if not stages:
    raise ConfigError("config.stages is empty: name at least one stage")
  for stage in stages:
    if stage not in STAGES:
      raise ConfigError(
        f"unknown stage {stage!r} in config.stages: {_nearest(stage, STAGES)}"
      )
  if len(set(stages)) != len(stages):
    raise ConfigError(f"config.stages names a stage twice: {stages}")
  models = {STAGES[stage][0] for stage in stages}
  if len(models) > 1:
    raise ConfigError(f"config.stages={stages} cannot share one model section")
  model = _build(models.pop(), raw.pop("model", {}), "model")
  sections = {
    stage: _build(STAGES[stage][1], raw.pop(stage, {}), stage)
    for stage in stages
  }
  # A section of a stage that is not run this time is legal, but still checked.
  for stage in [name for name in raw if name in STAGES]:
    _build(STAGES[stage][1], raw.pop(stage), stage)
  shared = {
    f.name: f
    for f in dataclasses.fields(Config)
    if f.name not in ("stages", "sections", "model")
  }
  for name in raw:
    if name not in shared:
      raise ConfigError(
        f"unknown config field config.{name}: "
        f"{_nearest(name, [*shared, *STAGES, 'model', 'stages'])}"
      )
  hints = typing.get_type_hints(Config)
  built = {name: _coerce(raw[name], hints[name], name) for name in raw}
  parsed = Config(stages=stages, sections=sections, model=model, **built)
  _check_choices(parsed)
  _check_positive(parsed)
  return parsed
