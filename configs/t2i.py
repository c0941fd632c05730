"""Text-to-image: stage `t2i`, one DiT on the latents of a PS-VAE.

    python -m psvae_jax.main --config=configs/t2i.py --workdir=runs/psvae
    python -m psvae_jax.main --config=configs/t2i.py:VARIANT,OPTION=VALUE ...

The autoencoder is the workdir's own (train it with configs/psvae.py), or that
of --config.autoencoder.path=FOLDER; "embedded" is the trained miniature that
comes with the package.

Variants
""        the embedded miniature, 48 × 48 scenes: 52 minutes on two CPU cores
          with AMX, cache and evaluation included, to eval/joint_accuracy 0.80
          (one object 0.85, held-out combinations 0.67, ceiling 0.99).
"photos"  captioned pictures of a folder, through the autoencoder of
          configs/psvae.py:photos; add --config.data.root=TRAIN
          --config.data.eval_root=VALIDATION.
"0.65B"   the paper's budget: 653 M parameters with the head, 200 000 steps of
          730 images (rounded to 736), for captioned images in a folder
          (--config.data.root=…), T5-XL text features. Nothing measured; the
          paper's own generator is Qwen2.5-0.5B with a DDT head and reaches
          GenEval 76.6.
"1.7B"    the same with the paper's larger budget (its figure 10).
"class"   ImageNet's 1000 classes in place of text, RAE's schedule. Other data
          with classes, a builder or a folder with one sub-folder a class, want
          their number in --config.model.num_classes=….

Options, of every variant
size=tiny|B|L|XL|0.65B|1.7B   the DiT.

The paper leaves weight decay, schedule, dropout of captions and the latents'
normalisation open; values below are the paper's where a comment names its
section, RAE's where it names that, and our choice elsewhere.
"""

import ml_collections

from psvae_jax.config.argument import parse_argument
from psvae_jax.config.dit_sizes import SIZES
from psvae_jax.config.parser import with_defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of `variant[,option=value…]`, see the docstring."""
  variants = {
    "": _miniature,
    "photos": _photos,
    "0.65B": lambda: _paper("0.65B"),
    "1.7B": lambda: _paper("1.7B"),
    "class": _classes,
  }
  variant, options = parse_argument(arg, variants, {"size": tuple(SIZES)})
  c = variants[variant]()
  if "size" in options:
    c.model.dit = SIZES[options["size"]]
  return ml_collections.ConfigDict(with_defaults(c))


def _miniature() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.stages = ("t2i",)
  c.seed = 0
  c.data = dict(source="scenes")
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=1000, keep=2)
  c.eval = dict(every_steps=3500, batch_size=64, probe="scenes")
  # mixed: for CPUs with AMX (python -m psvae_jax.benchmarks.products).
  c.compute = dict(dtype="float32", products="mixed", remat=False, unroll=6)
  c.model = dict(
    condition="text",
    dit=SIZES["tiny"],
    text_encoder="",  # the embedded one
    text_length=16,  # the longest caption has 16 tokens
  )
  c.cache = dict(num_examples=128_000, num_stats=64_000, dtype="float16")
  # Ours; chosen on the validation split's captions, other seeds.
  c.sample = dict(solver="ancestral", steps=100, guidance=2.5, shift=1.0)
  c.t2i = dict(
    train=dict(steps=7_000, batch_size=64, log_every=50, ema=0.999),
    optim=dict(
      name="muon",
      learning_rate=0.01,
      adam_learning_rate=1e-3,
      warmup_steps=100,
      schedule="cosine",
      end_factor=0.0,
      clip=1.0,
    ),
    loss=dict(text_dropout=0.1, stratified=True),
  )
  return c


def _photos() -> ml_collections.ConfigDict:
  c = _miniature()
  c.data = dict(
    source="folder", root="", eval_root="", augment="crop_flip", min_scale=0.5
  )
  c.eval.probe = "none"
  c.eval.every_steps = 0
  c.cache = dict(views=8, dtype="float16")
  c.model.text_length = 32
  c.t2i.train.steps = 1500
  return c


def _paper(size: str) -> ml_collections.ConfigDict:
  """The paper's generator at one of its two sizes."""
  c = ml_collections.ConfigDict()
  c.stages = ("t2i",)
  c.seed = 0
  c.data = dict(
    source="folder", root="", augment="center", num_threads=16, prefetch=8
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=5_000, keep=2)
  c.eval = dict(every_steps=50_000, batch_size=64, probe="none")
  c.compute = dict(dtype="bfloat16", remat=True, unroll=1)
  c.model = dict(
    condition="text",
    dit=SIZES[size],
    text_encoder="google/t5-v1_1-xl",
    text_length=128,
  )
  c.cache = dict(dtype="bfloat16", shard_size=16_384, num_stats=50_000)
  # The paper: 50 Euler steps, shift 3, guidance 6.5.
  c.sample = dict(solver="euler", steps=50, shift=3.0, guidance=6.5)
  c.t2i = dict(
    train=dict(
      steps=200_000,  # paper
      batch_size=736,  # paper: about 730; this divides over 32 devices
      log_every=100,
      ema=0.9999,  # paper
    ),
    optim=dict(
      name="adamw",
      learning_rate=1e-4,  # paper
      warmup_steps=2_000,
      schedule="constant",
      b1=0.9,
      b2=0.95,
      weight_decay=0.0,
      clip=1.0,
    ),
    loss=dict(text_dropout=0.1),
  )
  return c


def _classes() -> ml_collections.ConfigDict:
  c = _paper("0.65B")
  c.data = dict(
    source="tfds",
    builder="imagenet2012",
    split="train",
    eval_split="validation",
    augment="center",
    num_threads=16,
    prefetch=8,
  )
  c.model = dict(condition="class", num_classes=1000, dit=SIZES["XL"])
  c.sample = dict(solver="euler", steps=50, shift=1.0, guidance=1.5)
  c.t2i.train = dict(
    steps=100_000,  # 80 epochs
    batch_size=1024,  # RAE
    log_every=100,
    ema=0.9995,  # RAE
  )
  c.t2i.optim.update(
    learning_rate=2e-4,  # RAE
    schedule="linear",
    end_factor=0.1,  # RAE
  )
  return c
