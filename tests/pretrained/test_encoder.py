"""Encoders: parity with transformers, and strict files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import vision_reference

from psvae_jax.models import vit
from psvae_jax.pretrained import architectures, dinov2, files
from psvae_jax.pretrained import encoder as encoder_lib

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CONFIG = vit.ViTConfig(
  width=16,
  depth=2,
  num_heads=2,
  patch_size=4,
  image_size=16,
  mlp_ratio=2,
  num_registers=2,
)


def random_params(config, final_norm="affine"):
  module = vit.ViT(config, final_norm=final_norm)
  side = config.image_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes
  )


def random_images(*shape):
  return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture(name="folder")
def _folder(tmp_path):
  folder = tmp_path / "encoder"
  encoder_lib.save_encoder(folder, CONFIG, random_params(CONFIG), MEAN, STD)
  return folder


def rewrite(folder, change):
  """Applies `change` to the dict of tensors of a saved encoder."""
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  files.write_safetensors(path, tensors)


def set_config(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Parity.


def torch_model(registers, **options):
  """A transformers DINOv2 with every parameter random."""
  torch = pytest.importorskip("torch")
  transformers = vision_reference.import_transformers()
  fields = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 70,
    "mlp_ratio": 3,
    **options,
  }
  torch.manual_seed(0)
  if registers is None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**fields))
  else:
    config = transformers.Dinov2WithRegistersConfig(
      num_register_tokens=registers, **fields
    )
    model = transformers.Dinov2WithRegistersModel(config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      gain = "norm" in name and name.endswith("weight")
      matrix = parameter.ndim > 1 and "token" not in name
      scale = parameter[0].numel() ** -0.5 if matrix else 0.5
      if "position" in name:
        scale = 0.5
      parameter.copy_(scale * noise + (1.0 if gain else 0.0))
  return model.eval()


def torch_features(model, images, mean, std, skip):
  """Patch features of uint8 images, as a grid, straight from transformers."""
  torch = pytest.importorskip("torch")
  pixels = (images / 255.0 - np.array(mean)) / np.array(std)
  pixels = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    out = model(pixels).last_hidden_state[:, skip:]
  patch = model.config.patch_size
  grid = images.shape[1] // patch, images.shape[2] // patch
  return out.reshape(len(images), *grid, -1).numpy()


def relative_error(got, want):
  assert got.shape == want.shape
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
  ("registers", "size", "options"),
  [
    (None, (70, 70), {"num_hidden_layers": 3}),
    (None, (42, 98), {"use_swiglu_ffn": True}),
    (None, (56, 56), {"qkv_bias": False, "hidden_act": "gelu_new"}),
    (None, (35 * 4, 28), {"image_size": 112}),
    (0, (56, 56), {}),
    (1, (70, 70), {}),
    (4, (42, 98), {}),
    (4, (56, 56), {"image_size": 112, "use_swiglu_ffn": True}),
    (None, (224, 224), {"image_size": 518}),
    (4, (224, 224), {"image_size": 518}),
    (4, (252, 196), {"image_size": 518}),
  ],
)
def test_parity_with_transformers(tmp_path, registers, size, options):
  model = torch_model(registers, **options)
  model.save_pretrained(tmp_path)
  encoder = encoder_lib.load_encoder(tmp_path)
  assert encoder.patch_size == 14 and encoder.width == 32
  images = random_images(2, *size, 3)
  got = encoder(images)
  assert got.dtype == jnp.float32
  want = torch_features(
    model, images, encoder.mean, encoder.std, 1 + (registers or 0)
  )
  assert relative_error(got, want) < 1e-5


def test_affine_free_norm_is_torchs_layer_norm(tmp_path):
  torch = pytest.importorskip("torch")
  model = torch_model(4)
  model.save_pretrained(tmp_path)
  encoder = encoder_lib.load_encoder(tmp_path, final_norm="affine_free")
  model.layernorm = torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)
  images = random_images(2, 56, 70, 3)
  want = torch_features(model, images, encoder.mean, encoder.std, 5)
  assert relative_error(encoder(images), want) < 1e-5
  assert "norm" not in encoder.params


@pytest.mark.parametrize(
  ("options", "final_norm"),
  [
    ({}, "affine"),
    ({}, "affine_free"),
    ({"num_registers": 0}, "affine"),
    ({"num_registers": 0, "position_antialias": True}, "affine"),
    ({"swiglu": True, "qkv_bias": False}, "affine"),
  ],
)
def test_saved_folder_opens_in_transformers(tmp_path, options, final_norm):
  transformers = vision_reference.import_transformers()
  config = vit.ViTConfig(**{**CONFIG.__dict__, **options})
  params = random_params(config, final_norm)
  encoder_lib.save_encoder(tmp_path, config, params, MEAN, STD)
  model, info = transformers.AutoModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info.values()), info
  images = random_images(2, 24, 16, 3)
  encoder = encoder_lib.load_encoder(tmp_path, final_norm=final_norm)
  want = torch_features(
    model.eval(), images, MEAN, STD, 1 + config.num_registers
  )
  assert relative_error(encoder(images), want) < 1e-5


def test_preprocessor_opens_in_transformers(folder):
  transformers = vision_reference.import_transformers()
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  assert type(processor).__name__.startswith("BitImageProcessor")
  images = random_images(1, 16, 16, 3)
  want = processor(images=images[0], return_tensors="np")["pixel_values"]
  encoder = encoder_lib.load_encoder(folder)
  got = encoder.normalize(images / np.float32(127.5) - 1)
  np.testing.assert_allclose(got, want.transpose(0, 2, 3, 1), atol=1e-6)


# The Encoder object.


def test_round_trip_keeps_every_bit(folder):
  encoder = encoder_lib.load_encoder(folder)
  want = random_params(CONFIG)
  jax.tree.map(np.testing.assert_array_equal, encoder.params, want)
  assert encoder.fingerprint == files.fingerprint_params(want)
  assert (encoder.mean, encoder.std) == (MEAN, STD)
  assert encoder.module.config.antialias
  assert encoder.name == str(folder)


def test_compiles_once_per_shape(folder):
  first, second = (encoder_lib.load_encoder(folder) for _ in range(2))
  count = encoder_lib._features._cache_size
  start = count()
  with jax.transfer_guard("disallow"):
    for shape in [(1, 16, 16, 3), (3, 16, 16, 3), (1, 8, 20, 3)]:
      for encoder in (first, second, first):
        encoder(random_images(*shape))
  assert count() - start == 3


def test_call_refuses_floats_and_bad_sizes(folder):
  encoder = encoder_lib.load_encoder(folder)
  with pytest.raises(ValueError, match="float32"):
    encoder(np.zeros((1, 16, 16, 3), np.float32))
  with pytest.raises(ValueError, match="16x18"):
    encoder(random_images(1, 16, 18, 3))


def test_save_refuses_what_the_layout_cannot_say(tmp_path):
  params = random_params(CONFIG)

  def save(params=params, std=STD, **change):
    config = vit.ViTConfig(**{**CONFIG.__dict__, **change})
    encoder_lib.save_encoder(tmp_path / "out", config, params, MEAN, std)

  with pytest.raises(ValueError, match="LayerScale"):
    save(layerscale_init=None)
  with pytest.raises(ValueError, match="position_antialias=False"):
    save(position_antialias=False)
  with pytest.raises(ValueError, match=r"mlp_ratio 2\.5"):
    save(mlp_ratio=2.5)
  with pytest.raises(ValueError, match=r"cls_token \(given \(1, 1, 16\)"):
    save(width=32)
  with pytest.raises(ValueError, match="std"):
    save(std=(0.0, 1.0, 1.0))
  assert not (tmp_path / "out").exists()


# Files.


def test_missing_extra_and_misshaped_are_one_error(folder):
  def change(tensors):
    del tensors["encoder.layer.1.norm2.bias"]
    tensors["head.weight"] = np.zeros((2, 2), np.float32)
    tensors["layernorm.bias"] = np.zeros(5, np.float32)

  rewrite(folder, change)
  with pytest.raises(ValueError) as error:
    encoder_lib.load_encoder(folder)
  text = str(error.value)
  assert str(folder) in text
  assert "missing: encoder.layer.1.norm2.bias" in text
  assert "unexpected: head.weight" in text
  assert "layernorm.bias (file (5,), model (16,))" in text


def test_mask_token_may_be_absent_but_not_misshaped(folder):
  rewrite(folder, lambda tensors: tensors.pop("embeddings.mask_token"))
  encoder_lib.load_encoder(folder)
  wrong = {"embeddings.mask_token": np.zeros(3, np.float32)}
  rewrite(folder, lambda tensors: tensors.update(wrong))
  with pytest.raises(ValueError, match="mask_token"):
    encoder_lib.load_encoder(folder)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "vit"}, "'vit'.*dinov2, dinov2_with_registers"),
    ({"model_type": None}, "None"),
    ({"hidden_size": "16"}, "hidden_size is '16'"),
    ({"hidden_size": 10**9}, "1000000000"),
    ({"hidden_size": 2**20}, r"cls_token \(file .*1048576"),
    ({"num_hidden_layers": 10**7}, "10000000 layers"),
    ({"num_hidden_layers": 1}, "unexpected: encoder.layer.1"),
    ({"image_size": 2**20}, "position_embeddings"),
    ({"num_attention_heads": 3}, "not a multiple of num_heads 3"),
    ({"mlp_ratio": float("inf")}, "mlp_ratio"),
    ({"num_channels": 4}, "num_channels 4"),
    ({"patch_size": [4, 2]}, "patch_size"),
    ({"use_swiglu_ffn": True}, "weights_in"),
    ({"num_register_tokens": 0}, "register_tokens"),
  ],
)
def test_config_that_does_not_fit_is_an_error(folder, fields, message):
  set_config(folder, **fields)
  with pytest.raises(ValueError, match=message):
    encoder_lib.load_encoder(folder)


def test_list_patch_size_is_the_number(folder):
  set_config(folder, patch_size=[4, 4], image_size=[16, 16])
  assert encoder_lib.load_encoder(folder).patch_size == 4


def test_broken_files_are_named(folder):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  for broken in (data[:-10], data[:100], b"", b"\xff" * 64):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
      encoder_lib.load_encoder(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match="model.safetensors"):
    encoder_lib.load_encoder(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not valid JSON"):
    encoder_lib.load_encoder(folder)
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="config.json"):
    encoder_lib.load_encoder(folder)


def test_missing_folder_says_what_to_do(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="existing folder"):
    encoder_lib.load_encoder(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="is a file"):
    (tmp_path / "file").touch()
    encoder_lib.load_encoder(tmp_path / "file")

  pytest.importorskip("huggingface_hub")  # offline, as conftest sets it
  with pytest.raises(FileNotFoundError, match="hf download owner/model"):
    encoder_lib.load_encoder("owner/model")


def test_hub_name_downloads_only_what_is_read(folder, monkeypatch):
  hub = pytest.importorskip("huggingface_hub")
  asked = []

  def download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(folder)

  monkeypatch.setattr(hub, "snapshot_download", download)
  encoder = encoder_lib.load_encoder("owner/model")
  assert encoder.name == "owner/model"
  assert asked[0][0] == "owner/model"
  assert not any("bin" in pattern for pattern in asked[0][1])


def test_preprocessor_variants(folder):
  path = folder / "preprocessor_config.json"
  raw = json.loads(path.read_text())

  def load(**fields):
    path.write_text(json.dumps({**raw, **fields}))
    return encoder_lib.load_encoder(folder)

  assert load(do_normalize=False).std == (1.0, 1.0, 1.0)
  with pytest.raises(ValueError, match="1/255"):
    load(rescale_factor=1.0)
  with pytest.raises(ValueError, match="image_mean"):
    load(image_mean=[0.5])
  path.unlink()
  encoder = encoder_lib.load_encoder(folder)
  assert encoder.mean == encoder_lib.IMAGENET_MEAN


def shard(folder):
  """Splits the tensor file in two, with an index."""
  tensors = files.read_safetensors(folder)
  (folder / "model.safetensors").unlink()
  weight_map = {}
  for index, keys in enumerate((sorted(tensors)[:5], sorted(tensors)[5:])):
    name = f"model-{index}.safetensors"
    files.write_safetensors(folder / name, {k: tensors[k] for k in keys})
    weight_map.update(dict.fromkeys(keys, name))
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return index


def test_sharded_files(folder):
  want = encoder_lib.load_encoder(folder).fingerprint
  index = shard(folder)
  assert encoder_lib.load_encoder(folder).fingerprint == want

  weight_map = json.loads(index.read_text())["weight_map"]
  index.write_text(json.dumps({"weight_map": {**weight_map, "x": "../y"}}))
  with pytest.raises(ValueError, match="weight_map"):
    encoder_lib.load_encoder(folder)
  weight_map["x"] = "model-0.safetensors"
  index.write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(ValueError, match="model-0.safetensors .*: x"):
    encoder_lib.load_encoder(folder)
  del weight_map["x"]
  index.write_text(json.dumps({"weight_map": weight_map}))
  (folder / "model-1.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="model-1.safetensors"):
    encoder_lib.load_encoder(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(folder, dtype):
  want = encoder_lib.load_encoder(folder).params
  dtype = jnp.dtype(dtype)

  def change(tensors):
    for key, value in tensors.items():
      tensors[key] = value.astype(dtype)

  rewrite(folder, change)
  got = encoder_lib.load_encoder(folder).params
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(
      a, np.asarray(b).astype(dtype).astype(np.float32)
    ),
    got,
    want,
  )


def test_transposed_views_are_written_in_order(tmp_path):
  value = np.arange(6, dtype=np.float32).reshape(2, 3)
  tensors = {"x": value.T, "scalar": np.float32(2)}
  files.write_safetensors(tmp_path / "model.safetensors", tensors)
  read = files.read_safetensors(tmp_path)
  np.testing.assert_array_equal(read["x"], value.T)
  assert read["scalar"].shape == () and read["scalar"] == 2


def test_fingerprint_sees_names_shapes_types_and_bytes():
  x = np.arange(6, dtype=np.float32)
  base = files.fingerprint_params({"a": {"b": x}, "c": x})
  assert base == files.fingerprint_params({"c": jnp.asarray(x), "a": {"b": x}})
  bumped = x.copy()
  bumped[0] = np.nextafter(0, 1, dtype=np.float32)
  others = [
    {"a": {"d": x}, "c": x},
    {"a": {"b": x.reshape(2, 3)}, "c": x},
    {"a": {"b": x.view(np.int32)}, "c": x},
    {"a": {"b": bumped}, "c": x},
  ]
  assert len({base, *map(files.fingerprint_params, others)}) == 5
  assert len(base) == 64


def test_copied_folder_is_the_same_encoder(folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / "copy")
  assert (
    encoder_lib.load_encoder(copy).fingerprint
    == encoder_lib.load_encoder(folder).fingerprint
  )


# Published architectures without their weights.


def test_published_architectures_are_what_their_configs_say(tmp_path):
  assert len(dinov2.PUBLISHED) == 8
  for name, config in dinov2.PUBLISHED.items():
    raw = dinov2.format_config(config)
    assert ("num_register_tokens" in raw) == ("registers" in name)
    assert dinov2.parse_config(raw, tmp_path / "config.json") == config


@pytest.mark.parametrize(
  "name, count",
  # As transformers counts them, less the mask token.
  [
    ("facebook/dinov2-base", 86_579_712),
    ("facebook/dinov2-with-registers-base", 86_582_784),
    ("facebook/dinov2-with-registers-large", 304_371_712),
    ("facebook/dinov2-giant", 1_136_479_232),
  ],
)
def test_abstract_encoder_counts_the_published_parameters(name, count):
  for prefix in ("", "random:"):
    encoder = encoder_lib.abstract_encoder(prefix + name)
    leaves = jax.tree.leaves(encoder.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == count
    assert encoder.mean == encoder_lib.IMAGENET_MEAN


def test_abstract_encoder_of_a_folder_needs_no_tensors(folder):
  want = encoder_lib.load_encoder(folder, dtype=jnp.bfloat16)
  (folder / "model.safetensors").unlink()
  got = encoder_lib.abstract_encoder(folder, dtype=jnp.bfloat16)
  assert got.module == want.module
  assert (got.mean, got.std, got.name) == (want.mean, want.std, want.name)
  shapes = jax.tree.map(lambda x: x.shape, (got.params, want.params))
  assert shapes[0] == shapes[1]


@pytest.fixture(name="published")
def _published(monkeypatch):
  """One small published architecture."""
  name = "facebook/dinov2-test"
  monkeypatch.setitem(architectures.PUBLISHED, name, CONFIG)
  return name


def test_random_encoder_is_seeded_and_scaled(published):
  first, second = (
    encoder_lib.load_encoder(f"random:{published}") for _ in range(2)
  )
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  assert first.fingerprint == second.fingerprint
  assert first.fingerprint == files.fingerprint_params(first.params)
  kernels = first.params["blocks"]["block"]["attention"]
  assert not np.array_equal(
    kernels["query"]["kernel"], kernels["key"]["kernel"]
  )
  assert np.std(kernels["query"]["kernel"]) == pytest.approx(0.25, rel=0.1)
  features = np.asarray(first(random_images(2, 16, 16, 3)))
  assert np.std(features) == pytest.approx(1, rel=0.01)
  assert np.abs(features[0] - features[1]).mean() > 0.1


def test_random_encoder_is_saved_and_loaded_like_any(published, tmp_path):
  random = encoder_lib.load_encoder(
    f"random:{published}", final_norm="affine_free"
  )
  config = random.module.config
  encoder_lib.save_encoder(tmp_path, config, random.params, MEAN, STD)
  loaded = encoder_lib.load_encoder(tmp_path, final_norm="affine_free")
  assert loaded.fingerprint == random.fingerprint


def test_unknown_architecture_names_the_nearest(tmp_path):
  with pytest.raises(ValueError, match="mean 'facebook/dinov2-with-registers-"):
    encoder_lib.load_encoder("random:facebook/dinov2-with-register-base")
  with pytest.raises(ValueError, match="no folder and no published"):
    encoder_lib.abstract_encoder(tmp_path / "nowhere")


def test_missing_published_weights_say_how_to_go_on():
  pytest.importorskip("huggingface_hub")  # offline, as conftest sets it
  name = "facebook/dinov2-with-registers-base"
  with pytest.raises(
    FileNotFoundError, match=f'hf download {name}.*"random:{name}"'
  ):
    encoder_lib.load_encoder(name)
  with pytest.raises(FileNotFoundError, match="did you mean 'facebook/dinov2-"):
    encoder_lib.load_encoder("facebook/dinov2-bass")
