"""Small autoencoders of diffusers, every parameter random, as parity tests'
references and as the folders that they save."""

import numpy as np
import pytest
import torchvision_ops  # noqa: F401  before diffusers imports torchvision

# Named after what they are small versions of.
KL = {
  "sd": dict(
    block_out_channels=(16, 16, 32),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=16,
    scaling_factor=0.18215,
  ),
  "va-vae": dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    layers_per_block=2,
    latent_channels=6,
    sample_size=16,
    scaling_factor=1.0,
  ),
  "mar": dict(
    block_out_channels=(32, 32),
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=6,
    sample_size=16,
    scaling_factor=0.2325,
  ),
  "flux": dict(
    block_out_channels=(16, 24),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=6,
    norm_num_groups=4,
    sample_size=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
  ),
}
RAE = {
  "dinov2": dict(encoder_patch_size=14, encoder_input_size=42),
  "mae": dict(encoder_patch_size=16, encoder_input_size=48),
  "siglip2": dict(encoder_patch_size=16, encoder_input_size=48),
}
RAE_SIZES = dict(
  encoder_hidden_size=64,
  encoder_num_hidden_layers=2,
  decoder_hidden_size=24,
  decoder_num_hidden_layers=2,
  decoder_num_attention_heads=2,
  decoder_intermediate_size=40,
  patch_size=4,
  encoder_norm_mean=[0.4, 0.5, 0.6],
  encoder_norm_std=[0.2, 0.3, 0.25],
  noise_tau=0.8,
  scaling_factor=2.0,
)


def randomise(model, seed=0):
  """Every parameter in place, so that no layer is idle; returns the model."""
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      shape = tuple(parameter.shape)
      noise = rng.standard_normal(shape)
      if len(shape) > 1 and "token" not in name and "position" not in name:
        value = noise / np.sqrt(np.prod(shape[1:]))
      else:
        value = 0.3 * noise + ("norm" in name and name.endswith("weight"))
      parameter.copy_(torch.from_numpy(value))
  return model.eval()


def kl(name, **changes):
  """A random `AutoencoderKL`; its first norms see variances near epsilon."""
  diffusers = pytest.importorskip("diffusers")
  model = randomise(diffusers.AutoencoderKL(**{**KL[name], **changes}))
  for first in (model.encoder.conv_in, model.decoder.conv_in):
    first.weight.data *= 1e-3
    first.bias.data *= 1e-3
  return model


def rae_options(kind, **changes):
  """Options of `AutoencoderRAE`: with statistics of every latent number."""
  rng = np.random.default_rng(3)
  shape = (64, 3, 3)
  return {
    **RAE_SIZES,
    **RAE[kind],
    "encoder_type": kind,
    "latents_mean": rng.normal(size=shape).astype(np.float32).tolist(),
    "latents_std": rng.uniform(0.02, 2, shape).astype(np.float32).tolist(),
    **changes,
  }


def rae(kind, **changes):
  """A random `AutoencoderRAE`; norms of CLS see variances near epsilon."""
  diffusers = pytest.importorskip("diffusers")
  model = diffusers.AutoencoderRAE(**rae_options(kind, **changes))
  randomise(model)
  model.decoder.trainable_cls_token.data *= 1e-5
  embeddings = model.encoder.embeddings
  embeddings.cls_token.data *= 1e-4
  embeddings.position_embeddings.data[:, :1] *= 1e-4
  return model


def images(*shape, seed=1):
  """Random uint8 images (B, H, W, 3)."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*shape, 3), np.uint8)


def to_torch(x):
  """(B, H, W, C) of numpy → (B, C, H, W) of torch."""
  torch = pytest.importorskip("torch")
  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def to_numpy(x):
  """(B, C, H, W) of torch → (B, H, W, C) of numpy."""
  return x.detach().numpy().transpose(0, 2, 3, 1)
