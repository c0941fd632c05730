"""Image editing: stage `edit`, which continues the generator of `t2i`.

    python -m psvae_jax.main --config=configs/edit.py --workdir=runs/psvae
    python -m psvae_jax.main --config=configs/edit.py:0.65B \\
      --workdir=runs/paper --config.data.root=IMAGES --config.data.edits=EDITS

One sequence holds the clean source latents, the instruction and the noisy
latents. Every batch has a part of edits and a part of text-to-image, so that
the one is not forgotten over the other. It starts from the workdir's `t2i`.

Variants
""        the embedded miniature: recolour, reshape, resize, add, remove, move.
          37 minutes on two CPU cores with AMX, a restart, cache and evaluation
          included, to eval/edit_success 0.77 (ceiling 0.96, a copy of the
          source 0) with eval/joint_accuracy 0.81 (0.80 before).
"0.65B"   the paper's budget: 50 000 steps from the workdir's `t2i`, trained by
          configs/t2i.py:0.65B (paper), on triples like OmniEdit's (1.2 M,
          paper) in a folder (--config.data.edits=…), mixed with the captioned
          images of --config.data.root=…. Nothing measured.
"1.7B"    the same with the paper's larger budget (its figure 10).

A folder of edits is Hugging Face's `imagefolder` with two images a row of
metadata.jsonl; 5 % of it are held out unless --config.data.eval_edits=… is:
    {"file_name": "after/1.jpg", "source_file_name": "before/1.jpg",
     "instruction": "make the door red"}

Option, of every variant
size=tiny|B|L|XL|0.65B|1.7B   the DiT; as that of `t2i`.

The paper leaves batch, learning rate, the share of edits, dropout and guidance
of the editing stage open; those below are our choice where no comment says
otherwise.
"""

import ml_collections

from psvae_jax.config.argument import parse_argument
from psvae_jax.config.dit_sizes import SIZES
from psvae_jax.config.parser import with_defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of `variant[,option=value…]`, see the docstring."""
  variants = {
    "": _miniature,
    "0.65B": lambda: _paper("0.65B"),
    "1.7B": lambda: _paper("1.7B"),
  }
  variant, options = parse_argument(arg, variants, {"size": tuple(SIZES)})
  c = variants[variant]()
  if "size" in options:
    c.model.dit = SIZES[options["size"]]
  return ml_collections.ConfigDict(with_defaults(c))


def _miniature() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.stages = ("edit",)
  c.seed = 0
  c.data = dict(source="scenes")
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=250, keep=2)
  c.eval = dict(every_steps=1000, batch_size=64, probe="scenes")
  # mixed: for CPUs with AMX (python -m psvae_jax.benchmarks.products).
  c.compute = dict(dtype="float32", products="mixed", remat=False, unroll=6)
  c.model = dict(
    condition="text", dit=SIZES["tiny"], text_encoder="", text_length=16
  )
  # As configs/t2i.py, whose cache is read again.
  c.cache = dict(num_examples=128_000, num_stats=64_000, dtype="float16")
  c.sample = dict(
    solver="ancestral", steps=100, guidance=2.5, image_guidance=1.5, shift=1.0
  )
  c.edit = dict(
    train=dict(steps=2000, batch_size=64, log_every=50, ema=0.999),
    optim=dict(
      name="muon",
      learning_rate=0.005,
      adam_learning_rate=5e-4,
      warmup_steps=100,
      schedule="cosine",
      clip=1.0,
    ),
    loss=dict(text_dropout=0.1, source_dropout=0.1, edit_share=0.75),
  )
  return c


def _paper(size: str) -> ml_collections.ConfigDict:
  """The paper's editing stage; model and text as in configs/t2i.py."""
  c = ml_collections.ConfigDict()
  c.stages = ("edit",)
  c.seed = 0
  c.data = dict(
    source="folder",
    root="",
    edits="",
    augment="center",
    num_threads=16,
    prefetch=8,
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=5_000, keep=2)
  c.eval = dict(every_steps=10_000, batch_size=64, probe="none")
  c.compute = dict(dtype="bfloat16", remat=True, unroll=1)
  c.model = dict(
    condition="text",
    dit=SIZES[size],
    text_encoder="google/t5-v1_1-xl",
    text_length=128,
  )
  c.cache = dict(dtype="bfloat16", shard_size=16_384, num_stats=50_000)
  # The paper's 50 Euler steps with shift 3; its scales of edits are not given.
  c.sample = dict(
    solver="euler", steps=50, shift=3.0, guidance=6.5, image_guidance=1.5
  )
  c.edit = dict(
    train=dict(
      steps=50_000,  # paper
      batch_size=768,  # parts of 576 and 192 divide over 64 devices
      log_every=100,
      ema=0.9999,  # paper, of its generator
    ),
    optim=dict(
      name="adamw",
      learning_rate=1e-4,  # paper, of its generator
      warmup_steps=1_000,
      schedule="constant",
      b1=0.9,
      b2=0.95,
      weight_decay=0.0,
      clip=1.0,
    ),
    loss=dict(text_dropout=0.1, source_dropout=0.1, edit_share=0.75),
  )
  return c
