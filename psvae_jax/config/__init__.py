"""Every field a config may have, with its meaning and default.

A config file returns an `ml_collections.ConfigDict`; `config_parser.parse`
turns it into the frozen dataclasses below before anything is compiled. Code
reads these only, so a field that is not declared here does not exist. Which
values a field may have is in `config_checks`.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


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


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where images come from and how one example is made.

  Attributes:
    source: "scenes" (procedural), "bundled" (scikit-image's pictures),
      "folder" (Hugging Face `imagefolder`) or "tfds" (a prepared TensorFlow
      Datasets builder, read without TensorFlow).
    root: folder of training images (`folder`), or TensorFlow Datasets'
      data_dir (`tfds`; "" is its default, ~/tensorflow_datasets).
    eval_root: folder of validation images; "" holds out 5 % of `root`.
    edits: folder of instruction edits for stage "edit", see
      `data.edit_folder`; `scenes` have their own.
    eval_edits: folder of validation edits; "" holds out 5 % of `edits`.
    num_train: training examples (and as many edits); 0 takes all there are.
    num_eval: validation examples (and as many edits); 0 takes all there are.
    builder: name of the builder, e.g. "imagenet2012" (`tfds` only).
    split, eval_split: its training and validation split (`tfds` only).
    max_bad_share: share of a split's records that may be unreadable. Those are
      skipped and named in `quarantine.jsonl`; one more stops the run. Every
      host counts those that it has read itself.
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
  edits: str = ""
  eval_edits: str = ""
  num_train: int = 0
  num_eval: int = 0
  builder: str = ""
  split: str = "train"
  eval_split: str = "validation"
  max_bad_share: float = 0.01
  augment: str = "none"
  min_scale: float = 0.5
  captions: str = "auto"
  seed: int = 0
  num_threads: int = 2
  prefetch: int = 4
  caption_variants: bool = True


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
    num_generated: images drawn for each of a generator's figures.
    num_quick: of them, those of an evaluation before the end of a stage.
    num_edits: edits that are made and judged.
    num_reference: real images that generated ones are compared with.
  """

  every_steps: int = 0
  batch_size: int = 128
  num_images: int = 512
  num_samples: int = 12
  probe: str = "none"
  num_probe_train: int = 2048
  num_probe_test: int = 1024
  num_generated: int = 300
  num_quick: int = 96
  num_edits: int = 300
  num_reference: int = 2000


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length and batch of a stage.

  Attributes:
    steps: optimizer steps.
    batch_size: global batch.
    accumulate: micro-batches the batch is computed in, one after another; it
      changes memory, never the function.
    log_every: steps between two lines of metrics.
    ema: EMA decay; step n uses min(ema, (1 + n) / (10 + n)).
  """

  steps: int = 1000
  batch_size: int = 64
  accumulate: int = 1
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
    l1, mse: weights inside the pixel loss.
    perceptual: weight of `losses.multiscale_gradient_loss` inside it.
    gan: weight of the adversarial term inside it; 0 builds no discriminator.
    gan_adaptive: multiply `gan` by λ, which gives the term the gradient norm
      of the rest of the pixel loss at the decoder's last layer (taming).
    gan_start: step from which the discriminator trains.
    gan_warmup: steps the discriminator trains alone before the pixel decoder
      feels it.
  """

  semantic: float = 1.0
  kl: float = 1e-4
  kl_reduction: str = "mean"
  pixel: float = 1.0
  l1: float = 1.0
  mse: float = 0.0
  perceptual: float = 0.0
  gan: float = 0.0
  gan_adaptive: bool = True
  gan_start: int = 0
  gan_warmup: int = 0


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
  """One stage of the autoencoder: its own length, optimizers and weights.

  The schedule of `discriminator_optim` begins at `loss.gan_start`.
  """

  train: TrainConfig = TrainConfig()
  optim: OptimConfig = OptimConfig()
  discriminator_optim: OptimConfig = OptimConfig(b1=0.5, b2=0.9)
  loss: AutoencoderLossConfig = AutoencoderLossConfig()


@dataclasses.dataclass(frozen=True)
class EncoderStage:
  """The job that trains the miniature's encoders."""

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
    solver: "euler", "heun" or "midpoint".
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
class TextEncoderModel:
  """What `configs/encoder.py:text` trains."""

  text: TextModel = TextModel()
  embed_dim: int = 128


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """The adversary of the pixel decoder. Not part of the fingerprint.

  Attributes:
    kind: "patch" (LDM's PatchGAN) or "dino" (RAE's: heads on the frozen
      features of DINO ViT-S/8).
    norm: "group"; "batch" as first published ("patch", LDM's: over the batch;
      "dino", StyleGAN-T's: over groups of eight images); or "instance" (RAE's).
    channels, num_layers: of the PatchGAN.
    weights: folder or Hub id of DINO ViT-S/8, e.g. facebook/dino-vits8.
    augment: DiffAug's operations on what the discriminator sees, among
      "color", "translation" and "cutout".
  """

  kind: str = "patch"
  norm: str = "group"
  channels: int = 64
  num_layers: int = 3
  weights: str = ""
  augment: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What happens when a step's loss or gradient is not finite.

  Attributes:
    max_skipped: such steps are skipped; after this many in a row the run saves
      its state and stops.
  """

  max_skipped: int = 10


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How the model is computed; changes speed and memory, not the function.

  Attributes:
    dtype: "float32" or "bfloat16" for matrix products and activations;
      "float64" where JAX runs in double precision.
    remat: recompute block activations in the backward pass.
    unroll: blocks per iteration of a scanned stack.
    convolution: "native", or "matmul": as slices and matrix products, which
      CPUs want where convolutions stand in a loop or under a condition.
    products: of the generator's blocks: "native", in `dtype`; or "mixed":
      operands rounded to bfloat16, results and all else in float32, which
      CPUs with AMX want.
  """

  dtype: str = "float32"
  remat: bool = False
  unroll: int = 1
  convolution: str = "native"
  products: str = "native"


# Stage name → (type of `config.model`, type of the stage's own section).
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
  guard: GuardConfig = GuardConfig()
  autoencoder: AutoencoderConfig = AutoencoderConfig()
  cache: CacheConfig = CacheConfig()
  sample: SampleConfig = SampleConfig()
