"""Variants and options of configs/psvae.py, and the argument's grammar."""

import pathlib
import runpy

import jax
import pytest

from psvae_jax.config import parser as config_parser
from psvae_jax.config.argument import parse_argument, positive_int
from psvae_jax.models import autoencoder
from psvae_jax.pretrained.encoder import abstract_encoder

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_EMBEDDED = _ROOT / "psvae_jax" / "assets" / "encoder"


@pytest.fixture(name="get_config", scope="module")
def _get_config():
  return runpy.run_path(str(_ROOT / "configs" / "psvae.py"))["get_config"]


def parse(raw):
  if raw.data.source == "folder":
    raw.data.root = "photos"
  return config_parser.parse(raw)


def build(config):
  """The model of a config, and its parameters' shapes."""
  encoder = abstract_encoder(
    config.model.encoder or _EMBEDDED, final_norm=config.model.final_norm
  )
  model = autoencoder.build(
    config.model, config.compute, encoder.module, encoder.mean, encoder.std
  )
  params = jax.eval_shape(model.init, jax.random.key(0), encoder.params)
  return model, {"encoder": encoder.params, **params}


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_base_has_the_published_sizes(get_config):
  config = parse(get_config("base"))
  model, params = build(config)
  millions = {name: count(tree) / 1e6 for name, tree in params.items()}
  # DINOv2-B less the affine of its final norm, which RAE leaves out.
  assert count(params["encoder"]) == 86_582_784 - 2 * 768
  assert millions["pixel_decoder"] == pytest.approx(41.7, abs=0.05)
  assert millions["semantic_encoder"] == pytest.approx(22.0, abs=0.1)
  assert millions["semantic_decoder"] == pytest.approx(21.9, abs=0.1)
  assert model.grid == 16 and config.model.channels == 96
  for stage in ("svae", "psvae"):
    section = config.sections[stage]
    assert section.train.batch_size == 96
    assert section.optim.learning_rate == 1e-4
    assert section.loss.kl == 1e-4 and section.loss.kl_reduction == "mean"
    assert section.loss.gan == 0.5
    assert section.loss.lpips == 1.0 and section.loss.perceptual == 0.0
    assert 0 < section.loss.gan_start < section.train.steps
  loss = config.sections["psvae"].loss
  assert loss.semantic / loss.pixel == pytest.approx(0.1)
  assert config.compute.dtype == "bfloat16" and config.compute.remat
  assert config.data.builder == "imagenet2012"


@pytest.mark.parametrize("variant", ["", "photos", "base", "large"])
@pytest.mark.parametrize("decoder", ["conv", "vit"])
def test_every_variant_with_every_decoder_makes_its_image(
  get_config, variant, decoder
):
  config = parse(get_config(f"{variant},channels=32,decoder={decoder}"))
  assert config.model.channels == 32
  assert config.model.pixel_decoder.kind == decoder
  model, params = build(config)
  side = config.model.output_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), "float32")

  def reconstruct(params, images):
    features = model.features(params["encoder"], images)
    z = model.posterior(params["semantic_encoder"], features).mode()
    tokens = model.decode_features(params["semantic_decoder"], z)
    return z, tokens, model.decode_pixels(params["pixel_decoder"], z)

  z, tokens, pixels = jax.eval_shape(reconstruct, params, images)
  grid = model.grid
  assert z.shape == (1, grid, grid, 32)
  assert tokens.shape == (1, grid, grid, model.encoder.config.width)
  assert pixels.shape == images.shape


def test_large_is_the_large_encoder(get_config):
  _, params = build(parse(get_config("large")))
  assert count(params["encoder"]) == 304_371_712 - 2 * 1024
  assert count(params["pixel_decoder"]) / 1e6 == pytest.approx(41.7, abs=0.05)


def test_encoder_option(get_config):
  name = "random:facebook/dinov2-small"
  config = get_config(f"base,encoder={name}")
  assert config.model.encoder == name
  model, _ = build(parse(config))
  assert model.semantic_encoder.block.width == 384
  assert get_config("base,encoder=a=b").model.encoder == "a=b"


def test_defaults_and_a_leading_option(get_config):
  assert get_config("channels=8") == get_config(",channels=8")
  changed = get_config("channels=8")
  changed.model.channels = get_config().model.channels
  assert changed == get_config()
  assert get_config("base,decoder=conv") == get_config("base")
  assert get_config("decoder=vit") == get_config()


def test_gan_differs_in_the_adversary_alone(get_config):
  plain, gan = get_config(), get_config("gan")
  loss = gan.psvae.loss
  assert loss.gan_start * 3 == 2 * gan.psvae.train.steps
  gan.discriminator = plain.discriminator
  gan.psvae.discriminator_optim = plain.psvae.discriminator_optim
  loss.update(gan=0.0, gan_start=0, gan_warmup=0)
  assert gan == plain


@pytest.mark.parametrize(
  "argument, message",
  [
    ("bass", "variant 'bass'; did you mean 'base'"),
    ("base,chanels=32", "option 'chanels'; did you mean 'channels'"),
    ("chanels=32", "option 'chanels'; did you mean 'channels'"),
    ("base,large", "option 'large'; valid: channels, decoder, encoder"),
    ("base,", "option ''"),
    ("base,decoder=con", "decoder='con' is unknown; did you mean 'conv'"),
    ("base,decoder", "'decoder' needs a value"),
    ("base,encoder=", "'encoder' needs a value"),
    ("base,channels=0", "channels='0': it takes a whole number"),
    ("base,channels=3.5", "channels='3.5': it takes a whole number"),
    ("base,channels=-8", "channels='-8': it takes a whole number"),
    ("base,channels=8,channels=9", "'channels' is given twice"),
  ],
)
def test_errors_are_one_line_with_the_nearest(get_config, argument, message):
  with pytest.raises(ValueError, match=message) as error:
    get_config(argument)
  assert "\n" not in str(error.value)


def test_a_file_without_variants_or_options():
  assert parse_argument("", [""], {}) == ("", {})
  with pytest.raises(ValueError, match="'x'; the file has none"):
    parse_argument("x", [""], {})
  with pytest.raises(ValueError, match="'n'; the file has none"):
    parse_argument("n=1", [""], {})
  assert parse_argument("n=7", [""], {"n": positive_int}) == ("", {"n": 7})
