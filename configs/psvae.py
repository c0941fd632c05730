"""PS-VAE: stage 1 `svae`, then stage 2 `psvae`.

    python -m psvae_jax.main --config=configs/psvae.py --workdir=runs/psvae

""        the embedded miniature: 48 × 48 scenes, about eight minutes on two CPU
          cores; expect eval/psnr 19.7 dB after stage 1, 31.3 dB after stage 2.
"photos"  64 × 64 crops of a folder of images with the same encoder; add
          --config.data.root=TRAIN --config.data.eval_root=VALIDATION.
"bundled" the same on scikit-image's pictures, no folder needed.
"""

import ml_collections

from psvae_jax.config_parser import with_defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of a variant: "", "photos" or "bundled"."""
  variants = {"": _miniature, "photos": _photos, "bundled": _bundled}
  if arg not in variants:
    raise ValueError(
      f"configs/psvae.py has no variant {arg!r}; there are "
      + ", ".join(repr(name) for name in variants)
    )
  return ml_collections.ConfigDict(with_defaults(variants[arg]()))


def _miniature() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.stages = ("svae", "psvae")
  c.seed = 0
  c.data = dict(source="scenes", root="", eval_root="")
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=250, keep=2)
  c.eval = dict(every_steps=400, batch_size=128, num_images=512, probe="scenes")
  c.compute = dict(dtype="float32", remat=False, unroll=1)
  c.model = dict(
    encoder="",  # the embedded one
    final_norm="affine",
    image_size=48,
    output_size=48,
    channels=24,
    semantic_encoder=dict(depth=1, mlp_hidden=0, from_encoder=True),
    semantic_decoder=dict(depth=1, mlp_hidden=0, from_encoder=False),
    pixel_decoder=dict(
      kind="vit",
      width=128,
      depth=3,
      num_heads=4,
      mlp_ratio=2.0,
      overlap=4,
      refine_channels=0,
    ),
  )
  c.svae = _stage(steps=500, batch_size=64, learning_rate=0.01)
  c.psvae = _stage(steps=1200, batch_size=32, learning_rate=0.006)
  c.psvae.loss.semantic = 0.1  # paper section 4.4: L_s : L_p = 0.1 : 1
  return c


def _stage(
  steps: int, batch_size: int, learning_rate: float
) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      train=dict(steps=steps, batch_size=batch_size, log_every=10, ema=0.99),
      optim=dict(
        name="muon",
        learning_rate=learning_rate,
        adam_learning_rate=1e-3,
        warmup_steps=20,
        schedule="cosine",
        clip=1.0,
        encoder_multiplier=1.0,
      ),
      loss=dict(
        semantic=1.0,
        kl=1e-4,
        pixel=1.0,
        l1=1.0,
        mse=0.0,
        perceptual=0.5,
      ),
    )
  )


def _photos() -> ml_collections.ConfigDict:
  c = _miniature()
  c.data = dict(source="folder", root="", eval_root="", augment="crop_flip")
  c.eval.probe = "none"
  c.eval.every_steps = 0
  c.svae.train.steps = 300  # 64 tokens an image, not 36
  c.psvae.train.steps = 900
  c.model.image_size = 64
  c.model.output_size = 64
  return c


def _bundled() -> ml_collections.ConfigDict:
  c = _photos()
  c.data = dict(source="bundled", augment="crop_flip")
  return c
