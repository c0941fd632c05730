"""The autoencoder's model, stages and adversary."""

import dataclasses

from psvae_jax.config.shared import OptimConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
  """Weights of the autoencoder's losses (DESIGN: weights are config).

  Attributes:
    semantic: on L2 + (1 − cos) of f′ and f″ against the frozen encoder.
    kl: on the KL, reduced as `kl_reduction` says.
    kl_reduction: "mean" over latent dimensions or "sum" over them (LDM).
    pixel: on the whole pixel loss.
    l1, mse: weights inside the pixel loss.
    perceptual: weight of `losses.multiscale_gradient_loss` inside it, the
      miniature's term, which knows nothing of trained networks.
    lpips: weight of LPIPS inside it (LDM, RAE: 1), by the network of section
      `perceptual`; 0 loads none.
    gan: weight of the adversarial term inside it; 0 builds no discriminator.
    gan_adaptive: multiply `gan` by λ, which gives the term the gradient norm
      of the rest of the pixel loss at the decoder's last layer (taming).
    gan_start: step from which the discriminator trains.
    gan_warmup: steps the discriminator trains alone before the pixel decoder
      feels it.
  """

  semantic: float = 1.0
  kl: float = 1e-4
  kl_reduction: str = "mean"
  pixel: float = 1.0
  l1: float = 1.0
  mse: float = 0.0
  perceptual: float = 0.0
  lpips: float = 0.0
  gan: float = 0.0
  gan_adaptive: bool = True
  gan_start: int = 0
  gan_warmup: int = 0


@dataclasses.dataclass(frozen=True)
class AutoencoderStage:
  """One stage of the autoencoder: its own length, optimizers and weights.

  The schedule of `discriminator_optim` begins at `loss.gan_start`.
  """

  train: TrainConfig = TrainConfig()
  optim: OptimConfig = OptimConfig()
  discriminator_optim: OptimConfig = OptimConfig(b1=0.5, b2=0.9)
  loss: AutoencoderLossConfig = AutoencoderLossConfig()


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
  """SemanticEncoder or SemanticDecoder.

  Attributes:
    depth: transformer blocks of the encoder's own kind.
    mlp_hidden: hidden width of the projection MLP; 0 takes the encoder's width.
    from_encoder: start the blocks from the encoder's last ones.
  """

  depth: int = 3
  mlp_hidden: int = 0
  from_encoder: bool = False


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
  """Latent → image.

  Attributes:
    kind: "conv" (LDM) or "vit" (RAE).
    channels, channel_mult, num_res_blocks, output_patch: of the conv decoder.
    width, depth, num_heads, mlp_ratio, overlap, refine_channels: of the ViT.
  """

  kind: str = "conv"
  channels: int = 128
  channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  output_patch: int = 1
  width: int = 384
  depth: int = 6
  num_heads: int = 6
  mlp_ratio: float = 4.0
  overlap: int = 0
  refine_channels: int = 0


@dataclasses.dataclass(frozen=True)
class AutoencoderModel:
  """The autoencoder. With the encoder's bytes this is its fingerprint.

  Attributes:
    encoder: Hub id or folder of the representation encoder; "" is the
      embedded miniature.
    final_norm: norm of the encoder's tokens: "affine" as published or
      "affine_free" (RAE).
    image_size: side the encoder sees.
    output_size: side of the product.
    channels: latent channels C.
  """

  encoder: str = ""
  final_norm: str = "affine"
  image_size: int = 224
  output_size: int = 256
  channels: int = 96
  semantic_encoder: SemanticConfig = SemanticConfig()
  semantic_decoder: SemanticConfig = SemanticConfig()
  pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """The adversary of the pixel decoder. Not part of the fingerprint.

  Attributes:
    kind: "patch" (LDM's PatchGAN) or "dino" (RAE's: heads on the frozen
      features of DINO ViT-S/8).
    norm: "group"; "batch" as first published ("patch", LDM's: over the batch;
      "dino", StyleGAN-T's: over groups of eight images); or "instance" (RAE's).
    channels, num_layers: of the PatchGAN.
    weights: folder or Hub id of DINO ViT-S/8, e.g. facebook/dino-vits8.
    augment: DiffAug's operations on what the discriminator sees, among
      "color", "translation" and "cutout".
  """

  kind: str = "patch"
  norm: str = "group"
  channels: int = 64
  num_layers: int = 3
  weights: str = ""
  augment: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
  """The frozen network of LPIPS in the pixel loss. Not in the fingerprint.

  Attributes:
    weights: folder that `python -m psvae_jax.convert` wrote, or "random:vgg"
      for a dry run.
    network: "vgg" (VGG16: LDM's and RAE's) or "alex".
    dtype: of its products, "float32" whatever `compute.dtype` is, or
      "bfloat16", which accelerators compute many times as fast. Distances are
      taken in float32 either way.
  """

  weights: str = ""
  network: str = "vgg"
  dtype: str = "float32"
