"""What holds of every family of published encoders."""

import jax
import numpy as np
import pytest
import vision_reference as reference

from psvae_jax.config import AutoencoderModel, ComputeConfig, PixelDecoderConfig
from psvae_jax.models import autoencoder, vit
from psvae_jax.pretrained import architectures, encoder

SHAPE = dict(
  width=16, depth=2, num_heads=2, patch_size=4, image_size=16, mlp_hidden=24
)
PLAIN = dict(layerscale_init=None, position_antialias=False)
# One network a family.
SMALL = {
  "dinov2": vit.ViTConfig(**{**SHAPE, "mlp_hidden": None}, num_registers=2),
  "dinov3": vit.ViTConfig(
    **SHAPE,
    num_registers=2,
    layer_norm_eps=1e-5,
    position_antialias=False,
    positions="rotary",
    key_bias=False,
  ),
  "siglip": vit.ViTConfig(
    **SHAPE, **PLAIN, activation="gelu_pytorch_tanh", cls_token=False
  ),
  "vit_mae": vit.ViTConfig(
    **SHAPE, **PLAIN, layer_norm_eps=1e-12, positions="fixed"
  ),
  "clip_vision": vit.ViTConfig(
    **SHAPE,
    **PLAIN,
    activation="quick_gelu",
    patch_bias=False,
    pre_norm=True,
  ),
}
GATED = vit.ViTConfig(
  **{**SMALL["dinov3"].__dict__, "swiglu": True, "activation": "silu"}
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# One id a family, of those that are not too large for a slow test.
FULL_SIZE = (
  "facebook/dinov2-with-registers-base",
  "facebook/dinov3-vits16plus-pretrain-lvd1689m",
  "facebook/vit-mae-base",
  "google/siglip-so400m-patch14-384",
  "openai/clip-vit-base-patch16",
)


def test_each_network_belongs_to_its_family(tmp_path):
  for name, config in SMALL.items():
    family = architectures.find(config)
    assert family.__name__.endswith(f".{name}")
    raw = architectures.format_config(config)
    assert raw["model_type"] in family.MODEL_TYPES
    parsed = architectures.parse_config(raw, tmp_path)
    assert parsed.block == config.block
    assert architectures.format_config(parsed) == raw


def test_published_configs_are_what_their_files_say(tmp_path):
  assert len(architectures.PUBLISHED) == 8 + 8 + 25 + 3 + 4
  for name, config in architectures.PUBLISHED.items():
    raw = architectures.format_config(config)
    assert architectures.parse_config(raw, tmp_path) == config, name


@pytest.mark.parametrize(
  "name",
  [
    "facebook/dinov2-giant",
    "facebook/dinov3-vits16plus-pretrain-lvd1689m",
    "facebook/dinov3-vit7b16-pretrain-lvd1689m",
    "facebook/vit-mae-huge",
    "google/siglip2-so400m-patch14-384",
    "google/siglip2-giant-opt-patch16-256",
    "openai/clip-vit-large-patch14-336",
  ],
)
def test_published_sizes_have_transformers_number_of_parameters(name):
  ours = encoder.abstract_encoder(f"random:{name}")
  want = reference.count(architectures.format_config(ours.module.config))
  assert sum(leaf.size for leaf in jax.tree.leaves(ours.params)) == want


def saved_parity(folder, config, final_norm, size):
  """Features of a saved network in transformers, against ours."""
  params = reference.random_params(config, final_norm)
  encoder.save_encoder(folder, config, params, MEAN, STD)
  loaded = encoder.load_encoder(folder, final_norm=final_norm)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  assert (loaded.mean, loaded.std) == (MEAN, STD)
  images = reference.images(2, *size, 3)
  want = reference.features(reference.reopen(folder), images, loaded)
  return reference.relative_error(loaded(images), want)


@pytest.mark.parametrize("name", SMALL)
def test_saved_folder_opens_in_transformers(tmp_path, name):
  assert saved_parity(tmp_path, SMALL[name], "affine", (24, 16)) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_affine_free_is_saved_with_an_identity_norm(tmp_path, name):
  assert saved_parity(tmp_path, SMALL[name], "affine_free", (16, 16)) < 1e-5


def test_gated_dinov3_opens_in_transformers(tmp_path):
  assert saved_parity(tmp_path, GATED, "affine", (12, 20)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_size_opens_in_transformers(tmp_path, name):
  config = architectures.PUBLISHED[name]
  shapes = encoder.abstract_encoder(name).params
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = path[-1].key
    scale = leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.2
    noise = np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)
    return noise + np.float32(kind == "scale")

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  encoder.save_encoder(tmp_path, config, params, MEAN, STD)
  loaded = encoder.load_encoder(tmp_path)
  images = reference.images(1, config.image_size, config.image_size, 3)
  want = reference.features(reference.reopen(tmp_path), images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_preprocessor_opens_in_transformers(tmp_path, name):
  transformers = reference.import_transformers()
  pytest.importorskip("torchvision")
  config = SMALL[name]
  params = reference.random_params(config)
  encoder.save_encoder(tmp_path, config, params, MEAN, STD)
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
  images = reference.images(1, 16, 16, 3)
  want = processor(images=images[0], return_tensors="np")["pixel_values"]
  loaded = encoder.load_encoder(tmp_path)
  got = loaded.normalize(images / np.float32(127.5) - 1)
  np.testing.assert_allclose(got, np.transpose(want, (0, 2, 3, 1)), atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_autoencoder_is_built_of_the_encoders_own_blocks(name):
  """Shapes alone: initial blocks are cut from the encoder's."""
  config = SMALL[name]
  section = AutoencoderModel(
    image_size=16,
    output_size=16,
    channels=4,
    pixel_decoder=PixelDecoderConfig(
      kind="vit", width=16, depth=1, num_heads=2, overlap=0
    ),
  )
  model = autoencoder.build(
    section, ComputeConfig(), vit.ViT(config), MEAN, STD
  )
  params = reference.random_params(config)
  blocks = jax.tree.map(lambda leaf: np.concatenate([leaf] * 2), params)[
    "blocks"
  ]
  params = {**params, "blocks": blocks}
  made = jax.eval_shape(model.init, jax.random.key(0), params)
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  features = jax.eval_shape(
    model.features, reference.random_params(config), images
  )
  z = jax.eval_shape(model.posterior, made["semantic_encoder"], features).mean
  assert z.shape == (1, 4, 4, 4)
  got = jax.eval_shape(model.decode_features, made["semantic_decoder"], z)
  assert got.shape == features.shape == (1, 4, 4, 16)


def test_constants_of_every_family():
  def constants(name):
    found = encoder.abstract_encoder(name)
    return found.mean, found.std

  imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  assert constants("facebook/dinov2-base") == imagenet
  assert constants("facebook/vit-mae-base") == imagenet
  assert constants("facebook/dinov3-vitb16-pretrain-lvd1689m") == imagenet
  satellite = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
  assert constants("facebook/dinov3-vitl16-pretrain-sat493m") == satellite
  half = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
  assert constants("google/siglip2-base-patch16-224") == half
  clip = constants("openai/clip-vit-base-patch32")
  assert clip[0] == (0.48145466, 0.4578275, 0.40821073)
  assert clip[1] == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("dinov3", {"pre_norm": True}, "DINOv3.*pre_norm=True"),
    ("dinov3", {"layerscale_init": None}, "LayerScale"),
    ("siglip", {"num_registers": 1}, "SigLIP.*num_registers=1"),
    ("vit_mae", {"swiglu": True}, "ViT-MAE.*swiglu=True"),
    ("clip_vision", {"patch_bias": True}, "CLIP.*patch_bias=True"),
    ("dinov2", {"mlp_hidden": 24}, "DINOv2.*mlp_hidden=24"),
  ],
)
def test_what_a_layout_cannot_say_is_refused(tmp_path, name, change, message):
  config = vit.ViTConfig(**{**SMALL[name].__dict__, **change})
  params = reference.random_params(config)
  with pytest.raises(ValueError, match=message):
    encoder.save_encoder(tmp_path / "out", config, params, MEAN, STD)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SMALL)
def test_missing_extra_and_misshaped_tensors_are_named(tmp_path, name):
  config = SMALL[name]
  params = reference.random_params(config)
  encoder.save_encoder(tmp_path, config, params, MEAN, STD)

  def change(tensors):
    keys = [key for key in tensors if ".1." in key and key.endswith("bias")]
    del tensors[keys[0]]
    tensors[keys[1]] = np.zeros(3, np.float32)
    tensors["classifier.weight"] = np.zeros((2, 2), np.float32)
    return keys[:2]

  missing, misshaped = reference.rewrite(tmp_path, change)
  with pytest.raises(ValueError) as error:
    encoder.load_encoder(tmp_path)
  text = str(error.value)
  assert f"missing: {missing}" in text
  assert "unexpected: classifier.weight" in text
  assert f"{misshaped} (file (3,)" in text


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("siglip", {"image_size": 2**20}, "position_embedding"),
    ("vit_mae", {"image_size": 2**20}, "position_embeddings"),
    ("clip_vision", {"num_hidden_layers": 10**7}, "10000000 layers"),
    ("dinov3", {"hidden_size": 2**20}, "at most 4096"),
    ("dinov3", {"num_attention_heads": 8}, "multiple of 4"),
    ("siglip", {"intermediate_size": 10**9}, "1000000000"),
    ("dinov3", {"rope_theta": 0}, "rotary_base 0"),
  ],
)
def test_absurd_configs_are_refused(tmp_path, name, fields, message):
  config = SMALL[name]
  params = reference.random_params(config)
  encoder.save_encoder(tmp_path, config, params, MEAN, STD)
  reference.set_config(tmp_path, **fields)
  with pytest.raises(ValueError, match=message):
    encoder.load_encoder(tmp_path)


def test_huge_images_of_rotary_positions_allocate_nothing(tmp_path):
  config = SMALL["dinov3"]
  params = reference.random_params(config)
  encoder.save_encoder(tmp_path, config, params, MEAN, STD)
  reference.set_config(tmp_path, image_size=2**24)
  loaded = encoder.load_encoder(tmp_path)
  assert loaded.module.config.image_size == 2**24
