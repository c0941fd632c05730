"""PS-VAE: stage 1 `svae`, then stage 2 `psvae`.

    python -m psvae_jax.main --config=configs/psvae.py --workdir=runs/psvae
    python -m psvae_jax.main --config=configs/psvae.py:VARIANT,OPTION=VALUE ...

Variants
""        the embedded miniature: 48 × 48 scenes, eight to eleven minutes on two
          CPU cores; expect eval/psnr 19.7 dB after stage 1, 31.4 after stage 2.
"gan"     the miniature with a small PatchGAN for the last third of stage 2.
          Wall time not measured alone; expect 31.1 dB, and sharpness 1.04 where
          it was 0.97 before the term.
"photos"  64 × 64 crops of a folder of images with the same encoder; add
          --config.data.root=TRAIN --config.data.eval_root=VALIDATION. Eleven
          minutes on two busy CPU cores; expect 26.7 dB after stage 2.
"bundled" the same on scikit-image's pictures, no folder needed.
"base"    the paper's: DINOv2-B with registers, 224² → 256², 96 channels,
          ImageNet-1K, LDM's decoder and adversary. It wants the encoder's
          weights (downloaded, or encoder=FOLDER), LPIPS's network (a folder
          that `python -m psvae_jax.convert vgg16` makes of two published files:
          --config.perceptual.weights=FOLDER), ImageNet as TensorFlow Datasets
          prepares it (--config.data.root=DATA_DIR), and a TPU slice
          or several GPUs: psvae_jax.model_table says what it costs. Wall time
          and figures not measured; the paper reports PSNR 28.79 dB and SSIM
          0.817 for its own training.
"large"   the same with DINOv2-L (D = 1024). Nothing measured; the paper does
          not have it.

Options, of every variant
channels=N   latent channels; the paper sweeps 32, 48, 64, 80, 96, 112, 256.
decoder=conv LDM's; the default of "base" and "large", 41.7 M parameters.
decoder=vit  RAE's kind with overlapping patches; at paper scale as wide and as
             deep as the encoder. The default of the others.
encoder=NAME folder or Hub id of another encoder (those of patch 16 want
             --config.model.image_size=256), or random:ID for a dry run
             without weights, e.g. random:facebook/dinov2-with-registers-base.
             Then --config.perceptual.weights=random:vgg too.

The paper leaves much of the training open (its supplement is not at hand).
Values below are the paper's where a comment names its section, LDM's or RAE's
where it names those, and our choice elsewhere.
"""

import ml_collections

from psvae_jax.config.argument import parse_argument, positive_int
from psvae_jax.config.parser import with_defaults

_OPTIONS = {
  "channels": positive_int,
  "decoder": ("conv", "vit"),
  "encoder": str,
}

_DINOV2 = "facebook/dinov2-with-registers-"

# The embedded miniature's pixel decoders, 8 × the token grid.
_SMALL_VIT = dict(
  kind="vit",
  width=128,
  depth=3,
  num_heads=4,
  mlp_ratio=2.0,
  overlap=4,
  refine_channels=0,
)
_SMALL_CONV = dict(kind="conv", channels=32, channel_mult=(1, 2, 2, 4))

# LDM's f16 decoder; the paper adopts "the LDM architecture" (section 4.1).
_LDM = dict(
  kind="conv", channels=128, channel_mult=(1, 1, 2, 2, 4), num_res_blocks=2
)


def _rae(width: int, depth: int, num_heads: int) -> dict:
  """RAE's kind of decoder; the overlap, a quarter of a patch, is ours."""
  return dict(
    kind="vit", width=width, depth=depth, num_heads=num_heads, overlap=4
  )


# Pixel decoders by the option's value; the first is the variant's default.
_DECODERS = {
  "": {"vit": _SMALL_VIT, "conv": _SMALL_CONV},
  "base": {"conv": _LDM, "vit": _rae(768, 12, 12)},
  "large": {"conv": _LDM, "vit": _rae(1024, 24, 16)},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of `variant[,option=value…]`, see the docstring."""
  variants = {
    "": _miniature,
    "gan": _gan,
    "photos": _photos,
    "bundled": _bundled,
    "base": lambda: _paper("base"),
    "large": lambda: _paper("large"),
  }
  variant, options = parse_argument(arg, variants, _OPTIONS)
  c = variants[variant]()
  decoders = _DECODERS.get(variant, _DECODERS[""])
  kind = options.get("decoder", next(iter(decoders)))
  c.model.pixel_decoder = decoders[kind]
  c.model.channels = options.get("channels", c.model.channels)
  c.model.encoder = options.get("encoder", c.model.encoder)
  return ml_collections.ConfigDict(with_defaults(c))


def _miniature() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.stages = ("svae", "psvae")
  c.seed = 0
  c.data = dict(source="scenes", root="", eval_root="")
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=250, keep=2)
  c.eval = dict(every_steps=400, batch_size=128, num_images=512, probe="scenes")
  # matmul: made for CPUs, where the adversary's convolutions, which stand
  # under a condition, would otherwise take some fifteen times as long
  # (python -m psvae_jax.benchmarks.convolution).
  c.compute = dict(dtype="float32", remat=False, unroll=1, convolution="matmul")
  c.model = dict(
    encoder="",  # the embedded one
    final_norm="affine",
    image_size=48,
    output_size=48,
    channels=24,
    semantic_encoder=dict(depth=1, mlp_hidden=0, from_encoder=True),
    semantic_decoder=dict(depth=1, mlp_hidden=0, from_encoder=False),
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


def _gan() -> ml_collections.ConfigDict:
  c = _miniature()
  # A logit sees 34 of the 48 pixels; LDM's three layers would see 70.
  c.discriminator = dict(kind="patch", channels=32, num_layers=2)
  c.psvae.loss.update(gan=0.5, gan_start=c.psvae.train.steps * 2 // 3)
  c.psvae.loss.gan_warmup = 50
  c.psvae.discriminator_optim = dict(
    learning_rate=5e-4, b1=0.5, b2=0.9, warmup_steps=20
  )
  return c


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


def _paper(size: str) -> ml_collections.ConfigDict:
  """Section 4.1's autoencoder on DINOv2 of one size."""
  c = ml_collections.ConfigDict()
  c.stages = ("svae", "psvae")
  c.seed = 0
  c.data = dict(
    source="tfds",
    builder="imagenet2012",  # section 4.1: ImageNet-1K alone
    split="train",
    eval_split="validation",
    augment="crop_flip",
    num_threads=16,
    prefetch=8,
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.checkpoint = dict(every_steps=5_000, keep=2)
  # The whole validation split, as the paper's figures.
  c.eval = dict(
    every_steps=50_000, batch_size=96, num_images=50_000, probe="none"
  )
  c.compute = dict(dtype="bfloat16", remat=True, unroll=1)
  c.model = dict(
    encoder=_DINOV2 + size,  # registers: RAE's, whose settings the paper takes
    final_norm="affine_free",  # RAE
    image_size=224,  # section 4.1
    output_size=256,  # section 4.1
    channels=96,  # section 4.1
    # Section 3.3: three blocks and an MLP, of unstated width. Whether
    # "inherited from the encoder" means weights too is open: as the miniature.
    semantic_encoder=dict(depth=3, mlp_hidden=0, from_encoder=True),
    semantic_decoder=dict(depth=3, mlp_hidden=0, from_encoder=False),
  )
  # LDM's, with GroupNorm, which no division into devices changes.
  c.discriminator = dict(
    kind="patch", norm="group", channels=64, num_layers=3, augment=()
  )
  # LDM's and RAE's network of LPIPS; there is no default for its weights.
  c.perceptual = dict(weights="", network="vgg")
  # An epoch is 13 346 steps. Stage 1 brings the adversary in halfway, at LDM's
  # step 50 000; stage 2 starts with that one, after the learning rate's rise.
  c.svae = _paper_stage(steps=100_000, gan_start=50_000)
  c.psvae = _paper_stage(steps=200_000, gan_start=5_000)
  c.psvae.loss.semantic = 0.1  # section 4.4; section 4.1 says 1 : 0.1
  return c


def _paper_stage(steps: int, gan_start: int) -> ml_collections.ConfigDict:
  learning_rate = 1e-4  # section 4.1
  return ml_collections.ConfigDict(
    dict(
      train=dict(
        steps=steps,
        batch_size=96,  # section 4.1
        accumulate=1,
        log_every=100,
        ema=0.9999,
      ),
      optim=dict(
        name="adamw",
        learning_rate=learning_rate,
        warmup_steps=5_000,
        schedule="cosine",
        end_factor=0.1,  # RAE
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,  # RAE
        clip=1.0,
        encoder_multiplier=1.0,
      ),
      discriminator_optim=dict(
        name="adamw",
        learning_rate=learning_rate,  # LDM: the autoencoder's
        warmup_steps=1_000,
        schedule="cosine",
        end_factor=0.1,
        b1=0.5,  # LDM
        b2=0.9,  # LDM
        weight_decay=0.0,
        clip=1.0,
      ),
      loss=dict(
        semantic=1.0,
        kl=1e-4,
        kl_reduction="mean",
        pixel=1.0,
        l1=1.0,  # LDM
        mse=0.0,
        perceptual=0.0,
        lpips=1.0,  # LDM, RAE
        gan=0.5,  # LDM
        gan_adaptive=True,  # LDM
        gan_start=gan_start,
        gan_warmup=1_000,  # while the discriminator's learning rate rises
      ),
    )
  )
