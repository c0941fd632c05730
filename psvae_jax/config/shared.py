"""Sections that every job has, or every stage of one."""

import dataclasses


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
