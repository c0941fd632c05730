"""Pixel decoders against diffusers' LDM decoder and against plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import layers
from psvae_jax.models.pixels import (
  ConvPixelDecoder,
  ViTPixelDecoder,
  last_layer,
  overlap_add,
)

BLOCK = layers.BlockConfig(width=16, num_heads=2, mlp_hidden=24)


def _params(module, x, seed=7):
  """Random parameters, none at its initial value; nothing is compiled."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    assert leaf.dtype == jnp.float32, path
    noise = rng.normal(size=leaf.shape)
    if path[-1].key == "kernel":
      value = noise / np.sqrt(np.prod(leaf.shape[-4:-1]))
    else:
      value = 0.2 * noise + (path[-1].key == "scale")
    return jnp.asarray(value, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(module, params, x):
  return jax.jit(module.apply)({"params": params}, x)


def _small_conv(**kwargs):
  return ConvPixelDecoder(
    **{"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, **kwargs}
  )


# Parity with diffusers.AutoencoderKL.


def _diffusers_decoder(channels, channel_mult, groups, latent_channels):
  pytest.importorskip("torch")
  pytest.importorskip("torchvision_ops")  # before diffusers imports it
  vae = pytest.importorskip("diffusers.models.autoencoders.vae")
  levels = len(channel_mult)
  return vae.Decoder(
    in_channels=latent_channels,
    out_channels=3,
    up_block_types=("AttnUpDecoderBlock2D",)
    + ("UpDecoderBlock2D",) * (levels - 1),
    block_out_channels=tuple(channels * mult for mult in channel_mult),
    layers_per_block=2,
    norm_num_groups=groups,
    mid_block_add_attention=True,
  )


def _from_torch(state):
  """LDM's parameters (diffusers' names) as a ConvPixelDecoder tree."""

  def norm(name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

  def conv(name):
    kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": state[f"{name}.bias"]}

  def dense(name):
    weight = state[f"{name}.weight"]
    return {
      "kernel": weight.reshape(weight.shape[:2]).T,
      "bias": state[f"{name}.bias"],
    }

  def res(name):
    params = {
      "norm1": norm(f"{name}.norm1"),
      "conv1": conv(f"{name}.conv1"),
      "norm2": norm(f"{name}.norm2"),
      "conv2": conv(f"{name}.conv2"),
    }
    if f"{name}.conv_shortcut.weight" in state:
      params["shortcut"] = dense(f"{name}.conv_shortcut")
    return params

  def attention(name):
    return {
      "norm": norm(f"{name}.group_norm"),
      "query": dense(f"{name}.to_q"),
      "key": dense(f"{name}.to_k"),
      "value": dense(f"{name}.to_v"),
      "out": dense(f"{name}.to_out.0"),
    }

  params = {
    "conv_in": conv("conv_in"),
    "mid_res0": res("mid_block.resnets.0"),
    "mid_attention": attention("mid_block.attentions.0"),
    "mid_res1": res("mid_block.resnets.1"),
    "norm_out": norm("conv_norm_out"),
    "conv_out": conv("conv_out"),
  }
  level = 0
  while f"up_blocks.{level}.resnets.0.conv1.weight" in state:
    block = f"up_blocks.{level}"
    for i in range(3):
      params[f"up{level}_res{i}"] = res(f"{block}.resnets.{i}")
      if level == 0:
        params[f"up0_attention{i}"] = attention(f"{block}.attentions.{i}")
    if f"{block}.upsamplers.0.conv.weight" in state:
      params[f"up{level}_upsample"] = conv(f"{block}.upsamplers.0.conv")
    level += 1
  return params


@pytest.mark.parametrize(
  "channels, channel_mult, groups, latent_channels",
  [
    (32, (1, 1, 2, 2, 4), 32, 96),  # LDM f16, a quarter of its width
    (24, (1, 1), 8, 16),  # fewer than 32 channels: gcd(32, 24) groups
  ],
)
def test_conv_decoder_matches_diffusers(
  channels, channel_mult, groups, latent_channels
):
  reference = _diffusers_decoder(
    channels, channel_mult, groups, latent_channels
  )
  import torch

  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in reference.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * noise)
    z = torch.randn((2, latent_channels, 4, 3), generator=generator)
    expected = reference(z).permute(0, 2, 3, 1).numpy()

  state = {k: v.numpy() for k, v in reference.state_dict().items()}
  params = jax.tree.map(jnp.asarray, _from_torch(state))
  decoder = ConvPixelDecoder(channels=channels, channel_mult=channel_mult)
  z = jnp.asarray(z.permute(0, 2, 3, 1).numpy())
  shapes = jax.eval_shape(decoder.init, jax.random.key(0), z)["params"]
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)

  image = jax.jit(decoder.apply)({"params": params}, z)
  assert np.abs(expected).max() > 0.5  # else the tolerance below says nothing
  np.testing.assert_allclose(image, expected, atol=5e-5)


def test_paper_scale_decoder_has_ldm_s_size():
  decoder = ConvPixelDecoder()
  z = jax.ShapeDtypeStruct((2, 16, 16, 96), jnp.float32)
  params = jax.eval_shape(decoder.init, jax.random.key(0), z)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == 41_712_515
  assert jax.eval_shape(decoder.apply, params, z).shape == (2, 256, 256, 3)

  torch = pytest.importorskip("torch")
  with torch.device("meta"):
    reference = _diffusers_decoder(128, (1, 1, 2, 2, 4), 32, 96)
  assert count == sum(p.numel() for p in reference.parameters())


# ConvPixelDecoder's own options.


@pytest.mark.parametrize(
  "channel_mult, output_patch", [((1, 2, 2, 4), 1), ((1, 2, 4), 2)]
)
def test_conv_decoder_output_size(channel_mult, output_patch):
  decoder = ConvPixelDecoder(
    channels=32, channel_mult=channel_mult, output_patch=output_patch
  )
  z = jax.ShapeDtypeStruct((2, 6, 6, 24), jnp.bfloat16)
  image, _ = jax.eval_shape(decoder.init_with_output, jax.random.key(0), z)
  assert (image.shape, image.dtype) == ((2, 48, 48, 3), jnp.float32)


def test_output_patch_is_depth_to_space_of_the_last_convolution():
  decoder = _small_conv(output_patch=2, channel_mult=(1,))
  z = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
  params = _params(decoder, z)
  image = _apply(decoder, params, z)
  plain = _small_conv(channel_mult=(1,), out_channels=12)
  features = _apply(plain, params, z)
  for row in range(6):
    for column in range(6):
      first = 3 * (2 * (row % 2) + column % 2)
      np.testing.assert_array_equal(
        image[0, row, column],
        features[0, row // 2, column // 2, first : first + 3],
      )


def test_attention_can_be_left_out():
  z = jnp.zeros((1, 2, 2, 4))
  params = _params(_small_conv(attention=False), z)
  assert not [name for name in params if "attention" in name]


def test_conv_decoder_remat_keeps_values_and_gradients():
  z = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
  plain = _small_conv(channel_mult=(1,))
  other = _small_conv(channel_mult=(1,), remat=True)
  params = _params(plain, z)
  for decoder in (plain, other):
    equations = jax.make_jaxpr(decoder.apply)({"params": params}, z).eqns
    primitives = {equation.primitive.name for equation in equations}
    recomputes = bool(primitives & {"remat", "remat2", "checkpoint"})
    assert recomputes == decoder.remat

  def gradient(decoder):
    def loss(params):
      return jnp.sum(jnp.sin(decoder.apply({"params": params}, z)))

    return jax.jit(jax.grad(loss))(params)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
  jax.tree.map(close, gradient(plain), gradient(other))


def test_bfloat16_compute_stays_close_and_returns_float32():
  z = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
  for build in (
    _small_conv,
    lambda **kw: ViTPixelDecoder(BLOCK, 2, output_size=12, overlap=1, **kw),
  ):
    exact, fast = build(), build(dtype=jnp.bfloat16)
    params = _params(exact, z)
    image = _apply(fast, params, z)
    assert image.dtype == jnp.float32
    reference = _apply(exact, params, z)
    error = np.abs(image - reference).max() / np.abs(reference).max()
    assert 0 < error < 0.05


# Overlapping patches.


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
def test_constant_patches_make_a_constant_image(overlap):
  reach = 8 + 2 * overlap
  image = overlap_add(jnp.full((2, 3, 4, reach, reach, 3), 0.7), overlap)
  assert image.shape == (2, 24, 32, 3)
  np.testing.assert_allclose(image, 0.7, rtol=1e-6)


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_patches_cut_out_of_an_image_give_it_back(overlap):
  height, width, patch = 3, 2, 6
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, height * patch, width * patch, 3))
  edge = (overlap, overlap)
  padded = np.pad(
    image, ((0, 0), edge, edge, (0, 0)), constant_values=np.float32(9.0)
  )
  reach = patch + 2 * overlap
  patches = np.empty((2, height, width, reach, reach, 3), np.float32)
  for i in range(height):
    for j in range(width):
      top, left = i * patch, j * patch
      patches[:, i, j] = padded[:, top : top + reach, left : left + reach]
  np.testing.assert_allclose(
    overlap_add(jnp.asarray(patches), overlap), image, atol=1e-5
  )


def test_a_patch_fades_out_inside_its_neighbours():
  patches = np.zeros((1, 3, 3, 8, 8, 1), np.float32)
  patches[0, 1, 1] = 1.0
  image = np.asarray(overlap_add(jnp.asarray(patches), 2))[0, :, :, 0]
  ramp = np.sin(np.pi / 8 * (np.arange(4) + 0.5)) ** 2
  profile = np.concatenate([[0, 0], ramp, ramp[::-1], [0, 0]])
  np.testing.assert_allclose(image, np.outer(profile, profile), atol=1e-6)


@pytest.mark.parametrize("overlap", [-1, 3])
def test_overlap_beyond_half_a_patch_is_an_error(overlap):
  reach = 4 + 2 * overlap
  with pytest.raises(ValueError, match=f"4 pixels, got {overlap}"):
    overlap_add(jnp.zeros((1, 2, 2, reach, reach, 3)), overlap)


# ViTPixelDecoder.


@pytest.mark.parametrize(
  "grid, channels, output_size, overlap, refine_channels",
  [(16, 96, 256, 4, 0), (6, 24, 48, 4, 8), (6, 24, 48, 0, 0)],
)
def test_vit_decoder_output_size(
  grid, channels, output_size, overlap, refine_channels
):
  decoder = ViTPixelDecoder(
    BLOCK,
    depth=2,
    output_size=output_size,
    overlap=overlap,
    refine_channels=refine_channels,
  )
  z = jax.ShapeDtypeStruct((2, grid, grid, channels), jnp.float32)
  image, _ = jax.eval_shape(decoder.init_with_output, jax.random.key(0), z)
  assert image.shape == (2, output_size, output_size, 3)


def test_vit_decoder_output_is_a_blend_of_the_head_s_patches():
  decoder = ViTPixelDecoder(BLOCK, depth=2, output_size=12, overlap=1)
  z = jax.random.normal(jax.random.key(0), (2, 3, 3, 5))
  params = _params(decoder, z)
  run = functools.partial(decoder.apply, capture_intermediates=True)
  image, sown = jax.jit(run)({"params": params}, z)
  head = sown["intermediates"]["head"]["__call__"][0]
  patches = head.reshape(2, 3, 3, 6, 6, 3)
  np.testing.assert_allclose(image, overlap_add(patches, 1), atol=1e-6)
  # Pixels of the top-left token that no neighbour reaches are its own.
  np.testing.assert_allclose(
    image[:, :3, :3], patches[:, 0, 0, 1:4, 1:4], atol=1e-6
  )


def test_vit_decoder_knows_where_a_token_is():
  decoder = ViTPixelDecoder(BLOCK, depth=1, output_size=6)
  z = jnp.ones((1, 3, 3, 5))
  params = _params(decoder, z)
  image = np.asarray(_apply(decoder, params, z))[0]
  tokens = image.reshape(3, 2, 3, 2, 3).transpose(0, 2, 1, 3, 4).reshape(9, -1)
  distance = np.linalg.norm(tokens[:, None] - tokens[None], axis=-1)
  assert distance[~np.eye(9, dtype=bool)].min() > 1e-2


def test_refinement_adds_to_the_blended_image():
  z = jax.random.normal(jax.random.key(0), (1, 2, 2, 5))
  refined = ViTPixelDecoder(BLOCK, 1, output_size=8, refine_channels=4)
  params = _params(refined, z)
  image = _apply(refined, params, z)

  plain = ViTPixelDecoder(BLOCK, 1, output_size=8)
  base = {k: v for k, v in params.items() if not k.startswith("refine")}
  image0 = _apply(plain, base, z)

  def conv(x, layer):
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.asarray(layer["bias"])
    for i in range(3):
      for j in range(3):
        out = out + padded[:, i : i + 8, j : j + 8] @ layer["kernel"][i, j]
    return out

  hidden = jax.nn.gelu(conv(image0, params["refine_in"]), approximate=False)
  np.testing.assert_allclose(
    image, image0 + conv(hidden, params["refine_out"]), atol=1e-5
  )


@pytest.mark.parametrize("shape", [(1, 3, 3, 4), (1, 2, 4, 4)])
def test_vit_decoder_names_a_grid_it_cannot_serve(shape):
  decoder = ViTPixelDecoder(BLOCK, depth=1, output_size=16)
  with pytest.raises(ValueError, match=f"{shape[1]}x{shape[2]}"):
    _params(decoder, jnp.zeros(shape))


# The last layer.


@pytest.mark.parametrize(
  "decoder, shape",
  [
    (_small_conv(), (3, 3, 8, 3)),
    (_small_conv(output_patch=2), (3, 3, 8, 12)),
    (ViTPixelDecoder(BLOCK, 1, 16, overlap=2), (16, 12 * 12 * 3)),
    (ViTPixelDecoder(BLOCK, 1, 16, refine_channels=4), (3, 3, 4, 3)),
  ],
)
def test_last_layer_acts_linearly_on_the_image(decoder, shape):
  z = jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
  params = _params(decoder, z)
  assert last_layer(decoder, params).shape == shape

  module, _ = decoder.last_layer_path

  def image(scale):
    layer = jax.tree.map(lambda leaf: scale * leaf, params[module])
    return decoder.apply({"params": {**params, module: layer}}, z)

  image = jax.jit(image)

  np.testing.assert_allclose(
    image(3.0) - image(2.0), image(2.0) - image(1.0), atol=1e-4
  )
