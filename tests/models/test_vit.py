"""The vision transformer as a module; parity is in test_encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import layers, vit

CONFIG = vit.ViTConfig(
  width=16,
  depth=2,
  num_heads=2,
  patch_size=4,
  image_size=16,
  mlp_ratio=2,
  num_registers=2,
)


def random_params(module, seed=0):
  """Parameters with no zeros or ones that could hide wrong wiring."""
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes
  )


def random_images(shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_parameter_names_and_shapes():
  module = vit.ViT(CONFIG)
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  assert set(params) == {
    "patch_embed",
    "cls_token",
    "register_tokens",
    "pos_embed",
    "blocks",
    "norm",
  }
  assert params["patch_embed"]["kernel"].shape == (4 * 4 * 3, 16)
  assert params["pos_embed"].shape == (1, 17, 16)
  assert params["register_tokens"].shape == (1, 2, 16)
  free = vit.ViT(CONFIG, final_norm="affine_free")
  params = jax.eval_shape(free.init, jax.random.key(0), images)["params"]
  assert "norm" not in params


def test_registers_do_not_start_equal():
  init = jax.jit(vit.ViT(CONFIG).init)
  params = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  registers = params["register_tokens"][0]
  assert np.abs(registers[0] - registers[1]).max() > 1e-3


def test_patch_embedding_is_a_convolution():
  images = random_images((2, 8, 12, 3))
  kernel = random_images((4, 4, 3, 5))
  want = jax.lax.conv_general_dilated(
    images,
    kernel,
    (4, 4),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision="highest",
  )
  got = vit.patchify(images, 4) @ kernel.reshape(-1, 5)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_remat_and_unroll_change_nothing():
  images = random_images((2, 16, 24, 3))
  plain = vit.ViT(CONFIG)
  params = random_params(plain)

  def gradient(module):
    def loss(params):
      return jnp.mean(module.apply({"params": params}, images) ** 2)

    return jax.jit(jax.grad(loss))(params)

  want = gradient(plain)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want))
  for options in ({"remat": True}, {"unroll": 2}):
    got = gradient(vit.ViT(CONFIG, **options))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      got,
      want,
    )


def test_bfloat16_features_are_float32_and_close():
  images = random_images((1, 16, 16, 3))
  module = vit.ViT(CONFIG)
  params = random_params(module)
  want = jax.jit(module.apply)({"params": params}, images)
  half = vit.ViT(CONFIG, dtype=jnp.bfloat16)
  got = jax.jit(half.apply)({"params": params}, images)
  assert got.dtype == jnp.float32
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert 0 < error < 0.03


def test_antialias_follows_registers_unless_told():
  def resolved(**options):
    return vit.ViTConfig(8, 1, 2, 4, 16, 2, **options).antialias

  assert resolved(num_registers=4) and not resolved()
  assert resolved(position_antialias=True)
  assert not resolved(num_registers=4, position_antialias=False)


def test_swiglu_hidden_width_is_dinov2_giants():
  giant = vit.ViTConfig(1536, 40, 24, 14, 518, 4, swiglu=True)
  assert giant.block.mlp_hidden == 4096
  assert giant.grid == 37


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"width": 15}, "15 is not a multiple of num_heads 2"),
    ({"depth": 0}, "depth 0"),
    ({"image_size": 3}, "image_size 3 is below patch_size 4"),
    ({"activation": "tanh"}, "'tanh'"),
    ({"num_registers": -1}, "num_registers -1"),
  ],
)
def test_bad_config_is_named(change, message):
  fields = {**CONFIG.__dict__, **change}
  with pytest.raises(ValueError, match=message):
    vit.ViTConfig(**fields)


def test_bad_input_is_named():
  module = vit.ViT(CONFIG)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="16x18 .* patch size 4"):
    module.init(key, jnp.zeros((1, 16, 18, 3)))
  with pytest.raises(ValueError, match=r"\(1, 16, 16, 4\)"):
    module.init(key, jnp.zeros((1, 16, 16, 4)))
  with pytest.raises(ValueError, match="'none'"):
    vit.ViT(CONFIG, final_norm="none").init(key, jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize("options", [{}, {"remat": True, "unroll": 2}])
def test_taps_are_what_shallower_networks_end_with(options):
  config = dataclasses.replace(CONFIG, depth=4)
  images = random_images((2, 16, 24, 3))
  tapped = vit.ViT(config, taps=(0, 2), **options)
  params = random_params(tapped)
  whole = random_params(vit.ViT(config))
  assert whole.keys() - params.keys() == {"norm"}
  got = jax.jit(tapped.apply)({"params": params}, images)
  norm = layers.LayerNorm()
  for depth, patches in zip((1, 3), got, strict=True):
    assert patches.shape == (2, 24, 16) and patches.dtype == jnp.float32
    shallow = vit.ViT(dataclasses.replace(config, depth=depth))
    blocks = jax.tree.map(lambda p, n=depth: p[:n], params["blocks"])
    gain = {"norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}
    variables = {"params": {**params, "blocks": blocks, "norm": gain}}
    want = jax.jit(shallow.apply)(variables, images).reshape(2, 24, 16)
    normed = norm.apply({"params": gain}, patches)
    np.testing.assert_allclose(normed, want, atol=1e-5)

  def loss(images, module):
    maps = module.apply({"params": params}, images)
    return sum(jnp.mean(jnp.sin(x)) for x in maps)

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  plain = vit.ViT(config, taps=(0, 2))
  np.testing.assert_allclose(
    grad(images, tapped), grad(images, plain), rtol=1e-4, atol=1e-7
  )


@pytest.mark.parametrize("taps", [(2,), (1, 0), (0, 0), (-1,)])
def test_bad_taps_are_an_error(taps):
  images = jnp.zeros((1, 16, 16, 3))
  with pytest.raises(ValueError, match="must ascend within 2 blocks"):
    vit.ViT(CONFIG, taps=taps).init(jax.random.key(0), images)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"positions": "polar"}, "'polar'; known: learned, fixed, rotary"),
    ({"positions": "rotary", "num_heads": 8}, "multiple of 4, not 2"),
    ({"positions": "rotary", "rotary_base": 1.0}, r"rotary_base 1\.0"),
    ({"positions": "fixed", "width": 18}, "multiple of 4, not 18"),
    ({"mlp_hidden": 0}, "MLP hidden width 0"),
  ],
)
def test_bad_positions_and_widths_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_mlp_hidden_is_taken_as_it_is():
  gated = dataclasses.replace(CONFIG, swiglu=True, mlp_hidden=23)
  assert gated.block.mlp_hidden == 23
  assert dataclasses.replace(gated, mlp_hidden=None).block.mlp_hidden == 24


def test_cls_is_the_normed_first_token():
  images = random_images((2, 16, 24, 3))
  cls = vit.ViT(CONFIG, output="cls")
  params = random_params(cls)
  got = jax.jit(cls.apply)({"params": params}, images)
  assert got.shape == (2, 16) and got.dtype == jnp.float32
  patches = jax.jit(vit.ViT(CONFIG).apply)({"params": params}, images)
  apart = np.abs(np.asarray(patches) - got[:, None, None]).max(axis=-1)
  assert apart.min() > 1e-3  # one set of parameters, another token
  free = vit.ViT(CONFIG, final_norm="affine_free", output="cls")
  kept = {name: leaf for name, leaf in params.items() if name != "norm"}
  normed = jax.jit(free.apply)({"params": kept}, images)
  gain = params["norm"]["norm"]
  np.testing.assert_allclose(
    got, normed * gain["scale"] + gain["bias"], atol=1e-5
  )


def test_output_that_is_not_there_is_an_error():
  key, images = jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  without = dataclasses.replace(CONFIG, num_registers=0, cls_token=False)
  with pytest.raises(ValueError, match="wants a CLS token"):
    vit.ViT(without, output="cls").init(key, images)
  with pytest.raises(ValueError, match="'pooled'"):
    vit.ViT(CONFIG, output="pooled").init(key, images)


def test_parameters_follow_the_config():
  def names(**change):
    module = vit.ViT(dataclasses.replace(CONFIG, **change))
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]

  assert "pos_embed" not in names(positions="rotary")
  assert names(positions="fixed")["pos_embed"].shape == (1, 17, 16)
  plain = names(cls_token=False, num_registers=0)
  assert plain["pos_embed"].shape == (1, 16, 16)
  assert not {"cls_token", "register_tokens"} & set(plain)
  assert "pre_norm" in names(pre_norm=True)
  assert set(names(patch_bias=False)["patch_embed"]) == {"kernel"}
  attention = names(key_bias=False)["blocks"]["block"]["attention"]
  assert set(attention["key"]) == {"kernel"}
  assert set(attention["value"]) == {"kernel", "bias"}


def test_pixels_past_the_last_patch_of_the_native_size_are_not_seen():
  """As by a convolution; any other size that does not fit is an error."""
  config = dataclasses.replace(CONFIG, image_size=18)
  module = vit.ViT(config)
  images = random_images((1, 18, 18, 3))
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  assert shapes["pos_embed"].shape == (1, 17, 16)
  params = random_params(module)
  apply = jax.jit(module.apply)
  got = apply({"params": params}, images)
  assert got.shape == (1, 4, 4, 16)
  want = apply({"params": params}, images[:, :16, :16])
  np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match="17x18 .* patch size 4"):
    module.init(jax.random.key(0), jnp.zeros((1, 17, 18, 3)))


def test_fixed_positions_get_no_gradient():
  module = vit.ViT(dataclasses.replace(CONFIG, positions="fixed"))
  images = random_images((1, 16, 24, 3))
  params = random_params(module)

  def loss(params):
    return jnp.mean(jnp.sin(module.apply({"params": params}, images)))

  gradient = jax.jit(jax.grad(loss))(params)
  assert not np.any(gradient.pop("pos_embed"))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_rotary_tokens_know_their_place():
  """Equal patches on a grid give features that differ by place alone."""
  config = dataclasses.replace(CONFIG, positions="rotary")
  module = vit.ViT(config)
  params = random_params(module)
  patch = random_images((1, 4, 4, 3))
  images = np.tile(patch, (1, 4, 4, 1))
  images[:, :4, :4] += 1.0  # attention that is not uniform
  got = np.asarray(jax.jit(module.apply)({"params": params}, images))[0]
  assert np.abs(got[1, 1] - got[1, 2]).max() > 1e-3
  assert np.abs(got[1, 2] - got[2, 1]).max() > 1e-3
  remat = vit.ViT(config, remat=True, unroll=2)
  again = jax.jit(remat.apply)({"params": params}, images)[0]
  np.testing.assert_allclose(again, got, atol=1e-5)
