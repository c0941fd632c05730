"""Trains the embedded miniature's own encoders on scenes and their captions.

    python -m psvae_jax.main --config=configs/encoder.py --workdir=runs/encoder

Ten minutes on two CPU cores beside other work; expect eval/probe_accuracy 0.98
(chance 0.5, random encoder 0.73). The encoder it leaves in
`encoder/export/encoder/` of the workdir is what ships in `psvae_jax/assets/`,
with its provenance.json. The text encoder beside it, trained on images, is not
the one that ships; that is

    python -m psvae_jax.main --config=configs/encoder.py:text ...

five minutes on captions and instructions alone (`text_encoder/export/`); expect
eval/role_accuracy and eval/foil_accuracy 1.00, of statements most of which
training has had: the language is small.
"""

import ml_collections

from psvae_jax.config.argument import parse_argument
from psvae_jax.config.parser import with_defaults

_TEXT = dict(
  width=128,
  depth=2,
  num_heads=4,
  mlp_hidden=256,
  vocab_size=512,
  max_length=24,
)
_OPTIM = dict(
  name="muon",
  learning_rate=0.01,
  adam_learning_rate=1e-3,
  warmup_steps=100,
  schedule="cosine",
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of a variant: "" or "text"."""
  variants = {"": _encoders, "text": _text}
  variant, _ = parse_argument(arg, variants, {})
  return ml_collections.ConfigDict(with_defaults(variants[variant]()))


def _encoders() -> ml_collections.ConfigDict:
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
    text=dict(_TEXT),
    embed_dim=128,
  )
  c.encoder = dict(
    train=dict(steps=1500, batch_size=64, log_every=50, ema=0.998),
    optim=dict(_OPTIM),
    loss=dict(contrastive=1.0, words=1.0),
  )
  return c


def _text() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.stages = ("text_encoder",)
  c.seed = 0
  c.data = dict(source="scenes", num_train=10_000_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=400, keep=2)
  c.eval = dict(every_steps=400, batch_size=128, num_images=1024, probe="none")
  c.compute = dict(dtype="float32", unroll=2)
  c.model = dict(
    text=dict(_TEXT),
    embed_dim=128,
  )
  c.text_encoder = dict(
    train=dict(steps=800, batch_size=128, log_every=50, ema=0.998),
    optim=dict(_OPTIM),
    loss=dict(paraphrase=1.0, roles=1.0, foils=3),
  )
  return c
