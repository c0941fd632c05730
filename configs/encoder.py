"""Trains the embedded miniature's own encoders on scenes and their captions.

    python -m psvae_jax.main --config=configs/encoder.py --workdir=runs/encoder

Ten minutes on two CPU cores beside other work; expect eval/probe_accuracy 0.98
(chance 0.5, random encoder 0.73). What it leaves in `encoder/export/` of the
workdir, provenance.json included, is what ships in `psvae_jax/assets/`.
"""

import ml_collections

from psvae_jax.config.parser import with_defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  if arg:
    raise ValueError(f"configs/encoder.py has no variants, got {arg!r}")
  c = ml_collections.ConfigDict()
  c.stages = ("encoder",)
  c.seed = 0
  c.data = dict(source="scenes", num_train=1_000_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=500, keep=2)
  c.eval = dict(every_steps=500, batch_size=128, num_images=512, probe="scenes")
  c.compute = dict(dtype="float32", unroll=5)
  c.model = dict(
    vision=dict(
      width=128,
      depth=5,
      num_heads=4,
      patch_size=8,
      image_size=48,
      mlp_ratio=2.0,
      num_registers=2,
    ),
    text=dict(
      width=128,
      depth=2,
      num_heads=4,
      mlp_hidden=256,
      vocab_size=512,
      max_length=24,
    ),
    embed_dim=128,
  )
  c.encoder = dict(
    train=dict(steps=1500, batch_size=64, log_every=50, ema=0.998),
    optim=dict(
      name="muon",
      learning_rate=0.01,
      adam_learning_rate=1e-3,
      warmup_steps=100,
      schedule="cosine",
    ),
    loss=dict(contrastive=1.0, words=1.0),
  )
  return ml_collections.ConfigDict(with_defaults(c))
