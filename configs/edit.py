"""Image editing: stage `edit`, which continues the generator of `t2i`.

    python -m psvae_jax.main --config=configs/edit.py --workdir=runs/psvae

One sequence holds the clean source latents, the instruction and the noisy
latents. Every batch has a part of edits and a part of text-to-image, so that
the one is not forgotten over the other. It starts from the workdir's `t2i`.

Variants
""        the embedded miniature: recolour, reshape, resize, add, remove, move.
"0.65B"   the paper's: 50 000 steps (paper). Triples are read from a
          folder (--config.data.root=…, section "edits" of its metadata).
"""

import ml_collections

from psvae_jax.config.argument import parse_argument
from psvae_jax.config.dit_sizes import SIZES
from psvae_jax.config.parser import with_defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of `variant[,option=value…]`, see the docstring."""
  variants = {"": _miniature}
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
  c.eval = dict(every_steps=500, batch_size=64, probe="scenes")
  c.compute = dict(dtype="float32", remat=False, unroll=6)
  c.model = dict(
    condition="text", dit=SIZES["tiny"], text_encoder="", text_length=16
  )
  c.cache = dict(num_examples=32_000, num_stats=48_000, dtype="float16")
  c.sample = dict(
    solver="euler", steps=50, guidance=4.0, image_guidance=1.5, shift=1.0
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
