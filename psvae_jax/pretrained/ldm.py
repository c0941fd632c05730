"""Checkpoints of LDM's autoencoders, in the layout they were trained in.

MAR's `kl16.ckpt`, VA-VAE's `.pt`, FLUX's `ae.safetensors` and the first stage
of a Stable Diffusion checkpoint name their tensors as LDM's code does
(`encoder.down.0.block.0.conv1.weight`) and have no config beside them. They
become diffusers' folders, whose tensors are the same numbers.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models.kl_autoencoder import KLConfig
from psvae_jax.pretrained import autoencoder_kl, files, mapping

# The autoencoder within a whole latent diffusion model.
_FIRST_STAGE = "first_stage_model."
# What else a training checkpoint holds: discriminator and LPIPS, VA-VAE's
# foundation model and the projection to it, moving averages.
_OTHERS = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
# Not to be seen in the shapes.
_INVISIBLE = (
  "norm_num_groups",
  "scaling_factor",
  "shift_factor",
  "sample_size",
)


def convert(
  tensors: Mapping[str, np.ndarray],
  name: str | None = None,
  *,
  source: str = "the checkpoint",
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Renames a checkpoint's tensors; strict.

  Args:
    tensors: all tensors of the checkpoint by key, on the host, floating point
      ones as float32. Discriminators and other models beside the autoencoder
      are left out.
    name: a key of `autoencoder_kl.PUBLISHED`: what it is, which the shapes
      must agree with, and which has its scaling and shift factor. Without it
      the architecture is what the shapes say, with 32 groups in its norms as
      all of LDM's; the factors are 1 and 0 then: the latents as they come.
    source: file name for errors.

  Returns:
    config.json and tensors of a diffusers folder; see
    `autoencoder_kl.write_folder`.

  Raises:
    ValueError: an unknown `name`, one that the shapes do not agree with, or a
      missing, unexpected or mis-shaped tensor.
  """
  tensors = _autoencoder(tensors)
  config = infer_config(tensors, source)
  if name is not None:
    config = _named(config, name, source)
  params = mapping.import_params(
    autoencoder_kl.rules(config, autoencoder_kl.LDM),
    tensors,
    autoencoder_kl.param_shapes(config),
    source=source,
  )
  converted = mapping.export_params(autoencoder_kl.rules(config), params)
  return autoencoder_kl.format_config(config), converted


def infer_config(tensors: Mapping[str, np.ndarray], source: str) -> KLConfig:
  """The architecture that a checkpoint's names and shapes say.

  Args:
    tensors: the autoencoder's tensors by LDM's names.
    source: file name for errors.

  Raises:
    ValueError: they are not such an autoencoder's.
  """

  def first(pattern):
    """Numbers from 0 for which there is a tensor of that name."""
    counted = itertools.takewhile(
      lambda i: pattern.format(i) in tensors, itertools.count()
    )
    return list(counted)

  def side(key, axis):
    shape = tensors[key].shape if key in tensors else ()
    if len(shape) != 4:
      raise ValueError(
        f"{source} has no convolution {key}; it is not an autoencoder in LDM's "
        f"layout. It has: {files.list_names(set(tensors), 4)}"
      )
    return shape[axis]

  levels = first("encoder.down.{}.block.0.conv2.weight")
  blocks = first("encoder.down.0.block.{}.conv2.weight")
  latent_channels = side("decoder.conv_in.weight", 1)
  attended = [
    tuple(f"{network}.{level}.attn.0.q.weight" in tensors for level in order)
    for network, order in (
      ("encoder.down", levels),
      ("decoder.up", levels[::-1]),
    )
  ]
  try:
    return KLConfig(
      block_out_channels=tuple(
        side(f"encoder.down.{level}.block.0.conv2.weight", 0)
        for level in levels
      ),
      layers_per_block=len(blocks),
      latent_channels=latent_channels,
      down_attention=attended[0],
      up_attention=attended[1],
      mid_attention="encoder.mid.attn_1.q.weight" in tensors,
      use_quant_conv="quant_conv.weight" in tensors,
      use_post_quant_conv="post_quant_conv.weight" in tensors,
    )
  except ValueError as error:
    raise ValueError(
      f"{source} is not an autoencoder in LDM's layout: {error}"
    ) from error


def _autoencoder(
  tensors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """The autoencoder's tensors among all of a checkpoint's."""
  stage = {
    key.removeprefix(_FIRST_STAGE): tensor
    for key, tensor in tensors.items()
    if key.startswith(_FIRST_STAGE)
  }
  return {
    key: tensor
    for key, tensor in (stage or tensors).items()
    if not key.startswith(_OTHERS)
  }


def _named(inferred: KLConfig, name: str, source: str) -> KLConfig:
  """The published config of that name, if the shapes agree with it."""
  published = autoencoder_kl.PUBLISHED.get(name)
  if published is None:
    raise ValueError(
      f"unknown autoencoder {name!r}; {nearest(name, autoencoder_kl.PUBLISHED)}"
    )
  different = [
    f"{field.name} {getattr(inferred, field.name)} (of {name}: "
    f"{getattr(published, field.name)})"
    for field in dataclasses.fields(KLConfig)
    if field.name not in _INVISIBLE
    and getattr(inferred, field.name) != getattr(published, field.name)
  ]
  if different:
    raise ValueError(f"{source} is not {name}: it has {'; '.join(different)}")
  return published
