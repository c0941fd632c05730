"""The smallest generator job with every part of the real one."""

from pathlib import Path

import ml_collections
import tiny

from psvae_jax import main


def train_autoencoder(encoder: Path, workdir: Path, seed: int = 0) -> None:
  """One step of stage 1: a workdir whose autoencoder can be loaded."""
  raw = tiny.config(encoder, steps=1)
  raw.stages = ("svae",)
  raw.seed = seed
  main.run(raw, workdir)


def config(*stages: str, steps: int = 4) -> ml_collections.ConfigDict:
  """Generator stages on the latents of `train_autoencoder`'s workdir."""
  stage = dict(
    train=dict(steps=steps, batch_size=16, log_every=1, ema=0.9),
    optim=dict(name="adamw", learning_rate=1e-3, clip=1.0),
    loss=dict(text_dropout=0.25, source_dropout=0.25, edit_share=0.5),
  )
  return ml_collections.ConfigDict(
    dict(
      stages=stages,
      seed=0,
      data=dict(source="scenes", num_train=24, num_eval=24, num_threads=1),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      checkpoint=dict(every_steps=2, keep=2),
      eval=dict(
        batch_size=8,
        num_images=12,
        num_generated=3,
        num_quick=2,
        num_edits=2,
        num_reference=8,
        probe="scenes",
      ),
      compute=dict(dtype="float32", remat=False, unroll=1),
      model=dict(
        condition="text",
        text_length=12,
        dit=dict(
          width=16,
          depth=2,
          num_heads=2,
          mlp_ratio=2.0,
          head_width=16,
          head_depth=1,
          head_num_heads=2,
        ),
      ),
      # float32: cached and encoded in the step differ by rounding alone.
      cache=dict(dtype="float32", shard_size=16, num_stats=0),
      sample=dict(steps=2, guidance=2.0),
      t2i=stage,
      edit=stage,
    )
  )
