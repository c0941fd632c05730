"""The smallest autoencoder job that has every part of the real one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from psvae_jax.models.vit import ViT, ViTConfig
from psvae_jax.pretrained import dino, files, mapping
from psvae_jax.pretrained import encoder as encoder_lib

VIT = ViTConfig(
  width=16,
  depth=2,
  num_heads=2,
  patch_size=8,
  image_size=32,
  mlp_ratio=2.0,
  num_registers=1,
)


def randomise(params: Any, seed: int = 0, scale: float = 0.2) -> Any:
  """Noise on every parameter: zeros and ones hide wrong wiring.

  On the host: one small compilation a parameter would take seconds.
  """
  rng = np.random.default_rng(seed)

  def one(x):
    x = np.asarray(x)
    return (x + scale * rng.standard_normal(x.shape)).astype(x.dtype)

  return jax.tree.map(one, params)


def save_encoder(folder: Path) -> Path:
  """Writes a random encoder in the Hugging Face layout."""
  images = jnp.zeros((1, 32, 32, 3))
  params = jax.jit(ViT(VIT).init)(jax.random.key(0), images)["params"]
  encoder_lib.save_encoder(
    folder,
    VIT,
    randomise(params),
    encoder_lib.IMAGENET_MEAN,
    encoder_lib.IMAGENET_STD,
  )
  return folder


# The discriminator's eyes: deep enough for two of RAE's five maps.
DINO = ViTConfig(
  width=32,
  depth=5,
  num_heads=2,
  patch_size=8,
  image_size=32,
  mlp_ratio=2.0,
  layer_norm_eps=1e-12,
  layerscale_init=None,
)
DINO_PUBLISHED = {
  "model_type": "vit",
  "hidden_size": 32,
  "num_hidden_layers": 5,
  "num_attention_heads": 2,
  "patch_size": 8,
  "image_size": 32,
  "intermediate_size": 64,
}


def save_dino(folder: Path) -> Path:
  """Writes a small DINO as published: with a final norm and a pooler."""
  params = dino.random_dino(DINO).params
  tensors = mapping.export_params(dino.rules(DINO), params)
  for name in ("layernorm", "pooler.dense"):
    shape = (32, 32) if "pooler" in name else (32,)
    tensors[f"{name}.weight"] = np.ones(shape, np.float32)
    tensors[f"{name}.bias"] = np.zeros(32, np.float32)
  folder.mkdir(exist_ok=True)
  files.write_safetensors(folder / "model.safetensors", tensors)
  files.write_json(folder / "config.json", DINO_PUBLISHED)
  return folder


def config(encoder: Path, steps: int = 4) -> ml_collections.ConfigDict:
  """Both stages on 40 × 40 scenes, of which the encoder sees 32 × 32."""
  stage = dict(
    train=dict(steps=steps, batch_size=8, log_every=1, ema=0.9),
    optim=dict(name="adamw", learning_rate=1e-3, clip=1.0),
    loss=dict(semantic=1.0, kl=1e-3, pixel=1.0, l1=1.0, mse=0.5),
  )
  section = dict(depth=1, mlp_hidden=0, from_encoder=True)
  return ml_collections.ConfigDict(
    dict(
      stages=("svae", "psvae"),
      seed=0,
      data=dict(source="scenes", num_train=64, num_eval=12, num_threads=1),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      checkpoint=dict(every_steps=2, keep=2),
      eval=dict(batch_size=8, num_images=12, num_samples=4, probe="none"),
      compute=dict(dtype="float32", remat=False, unroll=1),
      model=dict(
        encoder=str(encoder),
        image_size=32,
        output_size=40,
        channels=4,
        semantic_encoder=section,
        semantic_decoder=section,
        pixel_decoder=dict(
          kind="vit", width=16, depth=1, num_heads=2, overlap=2
        ),
      ),
      svae=stage,
      psvae=stage,
    )
  )


def adversarial_config(
  encoder: Path, steps: int = 4, decoder: str = "vit", kind: str = "patch"
) -> ml_collections.ConfigDict:
  """`config` with an adversary from the first step on, 32 × 32 pixels out.

  The DINO kind is augmented; its network is written beside the encoder.
  """
  raw = config(encoder, steps)
  raw.model.output_size = 32
  if decoder == "conv":
    raw.model.pixel_decoder = dict(
      kind="conv",
      channels=64,  # two a GroupNorm group: with one, biases before it are idle
      channel_mult=(1, 1),
      num_res_blocks=0,
      output_patch=4,
    )
  raw.discriminator = dict(kind="patch", channels=8, num_layers=2)
  if kind == "dino":
    weights = save_dino(encoder.parent / "dino")
    augment = ("translation", "color", "cutout")
    raw.discriminator = dict(kind=kind, weights=str(weights), augment=augment)
  raw.compute.convolution = "matmul"  # the CPU's way
  for stage in raw.stages:
    raw[stage].discriminator_optim = dict(
      name="adamw", learning_rate=1e-3, b1=0.5, b2=0.9, clip=0.0
    )
    raw[stage].optim.update(clip=0.0, schedule="constant")
    raw[stage].discriminator_optim.update(schedule="constant")
    raw[stage].loss.update(gan=0.5, gan_start=0)
  return raw


def batch(
  size: int = 8, side: int = 40, seed: int = 0
) -> dict[str, np.ndarray]:
  """Random uint8 images."""
  rng = np.random.default_rng(seed)
  return {"image": rng.integers(0, 256, (size, side, side, 3), np.uint8)}
