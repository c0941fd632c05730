"""DINO's features against transformers' ViTModel, and strict files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from psvae_jax.config import ComputeConfig, DiscriminatorConfig
from psvae_jax.models.discriminator import build_discriminator
from psvae_jax.pretrained import dino, files

CONFIG, PUBLISHED = tiny.DINO, tiny.DINO_PUBLISHED


def random_images(*shape):
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, shape).astype(np.float32)


def relative_error(got, want):
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


@pytest.fixture(name="folder")
def _folder(tmp_path):
  return tiny.save_dino(tmp_path)


def torch_model(**options):
  """A transformers ViT with every parameter random."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("torchvision_ops")  # before transformers imports it
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    **{k: v for k, v in PUBLISHED.items() if k != "model_type"} | options
  )
  model = transformers.ViTModel(config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      matrix = parameter.ndim > 1 and "embeddings.c" not in name
      scale = parameter[0].numel() ** -0.5 if matrix else 0.5
      if "position" in name:
        scale = 0.5
      gain = "layernorm" in name and name.endswith("weight")
      parameter.copy_(scale * noise + (1.0 if gain else 0.0))
  return model.eval()


def torch_features(model, images, blocks):
  """RAE's maps: the last block's, then those of `blocks`; no CLS."""
  torch = pytest.importorskip("torch")
  x = images.permute(0, 3, 1, 2)
  side = model.config.image_size
  x = torch.nn.functional.interpolate(
    x, size=(side, side), mode="bilinear", align_corners=False
  )
  mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
  std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
  x = x * (0.5 / std) + (0.5 - mean) / std
  outputs = {}
  hooks = [
    layer.register_forward_hook(
      lambda _, __, out, i=i: outputs.update(
        {i: out[0] if isinstance(out, tuple) else out}
      )
    )
    for i, layer in enumerate(model.layers)
  ]
  model(x)
  for hook in hooks:
    hook.remove()
  return [outputs[i][:, 1:] for i in (len(model.layers) - 1, *blocks)]


@pytest.mark.parametrize(
  ("size", "blocks", "options"),
  [
    ((40, 40), (2,), {}),
    ((32, 32), (2,), {"qkv_bias": False, "intermediate_size": 49}),
    (
      (24, 48),
      (2, 5, 8, 11),
      {"num_hidden_layers": 12, "layer_norm_eps": 1e-6},
    ),
  ],
)
def test_features_and_gradients_equal_transformers(
  tmp_path, size, blocks, options
):
  torch = pytest.importorskip("torch")
  model = torch_model(**options)
  model.save_pretrained(tmp_path)
  network = dino.load_dino(tmp_path)
  images = random_images(2, *size, 3)

  @jax.jit
  def evaluate(params, images):
    def loss(images):
      maps = network.features(params, images)
      return sum(jnp.mean(jnp.sin(x)) for x in maps), maps

    return jax.grad(loss, has_aux=True)(images)

  grad, got = evaluate(network.params, images)
  leaf = torch.from_numpy(images).requires_grad_()
  want = torch_features(model, leaf, blocks)
  sum(x.sin().mean() for x in want).backward()
  assert len(got) == len(want) == len(blocks) + 1
  for ours, theirs in zip(got, want, strict=True):
    assert ours.dtype == jnp.float32
    assert relative_error(ours, theirs.detach()) < 1e-5
  assert relative_error(grad, leaf.grad) < 1e-4


def test_options_change_speed_alone_and_bfloat16_stays_close(folder):
  images = random_images(2, 32, 32, 3)

  def features(**options):
    network = dino.load_dino(folder, **options)
    return jax.jit(network.features)(network.params, images)

  want = features()
  assert [x.shape for x in want] == [(2, 16, 32)] * 2
  for a, b in zip(features(remat=True, unroll=2), want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for a, b in zip(features(dtype=jnp.bfloat16), want, strict=True):
    assert a.dtype == jnp.float32 and 0 < relative_error(a, b) < 0.1


def test_fingerprint_is_the_weights(folder):
  network = dino.load_dino(folder)
  assert network.fingerprint == files.fingerprint_params(network.params)
  assert network.fingerprint == dino.random_dino(CONFIG).fingerprint
  assert network.fingerprint != dino.random_dino(CONFIG, seed=1).fingerprint
  assert network.name == str(folder)


def test_random_weights_are_the_published_network():
  name = "random:facebook/dino-vits8"
  network = dino.load_dino(name)
  assert network.name == name
  # DINO ViT-S/8: 21 670 272 parameters, less its final norm.
  count = sum(p.size for p in jax.tree.leaves(network.params))
  assert count == 21_670_272 - 2 * 384
  images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
  maps = jax.eval_shape(network.features, network.params, images)
  assert [x.shape for x in maps] == [(2, 784, 384)] * 5
  assert network.module.taps == (2, 5, 8, 11)
  with pytest.raises(ValueError, match="did you mean 'random:facebook/dino-v"):
    dino.load_dino("random:facebook/dino-vits9")


def test_the_discriminator_of_an_image_of_the_product(folder):
  """The whole: frozen network, heads, state; its parameters an argument."""
  network = dino.load_dino(folder)
  built = build_discriminator(
    DiscriminatorConfig(kind="dino"), ComputeConfig(), network
  )
  init = jax.jit(lambda rng, frozen: built.init(rng, 40, frozen))
  params, state = init(jax.random.key(0), network.params)
  assert set(params) == set(state) == {"head0", "head1"}
  images = random_images(2, 40, 40, 3)

  def loss(images, frozen):
    return jnp.mean(built.logits(params, state, frozen, images))

  grad = jax.jit(jax.grad(loss))
  other = dino.random_dino(CONFIG, seed=1).params
  one, two = grad(images, network.params), grad(images, other)
  assert np.abs(one).max() > 0 and np.abs(one - two).max() > 0


# Files.


def rewrite(folder, change):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  files.write_safetensors(path, tensors)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda t: t.pop("encoder.layer.3.output.dense.bias"),
      "missing: encoder.layer.3.output.dense.bias",
    ),
    (lambda t: t.update(extra=np.zeros(1)), "unexpected: extra"),
    (
      lambda t: t.update({"embeddings.cls_token": np.zeros((1, 1, 4))}),
      r"wrong shape: embeddings.cls_token \(file \(1, 1, 4\), model",
    ),
    (
      lambda t: t.update({"pooler.dense.bias": np.zeros(5)}),
      "wrong shape: pooler.dense.bias",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
  rewrite(folder, change)
  with pytest.raises(ValueError, match=message):
    dino.load_dino(folder)


def test_final_norm_and_pooler_may_be_absent(folder):
  before = dino.load_dino(folder).fingerprint
  unused = ("layernorm.weight", "layernorm.bias")
  unused += ("pooler.dense.weight", "pooler.dense.bias")
  rewrite(folder, lambda t: [t.pop(key) for key in unused])
  assert dino.load_dino(folder).fingerprint == before


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "dinov2"}, "'dinov2' is not supported"),
    ({"num_channels": 1}, "num_channels 1"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": 0}, "width 0"),
    ({"layer_norm_eps": "x"}, "layer_norm_eps is 'x'"),
    ({"image_size": 36}, "36 is not a multiple of patch_size 8"),
    ({"num_attention_heads": 5}, "num_heads 5"),
  ],
)
def test_a_config_that_does_not_fit_is_named(folder, fields, message):
  path = folder / "config.json"
  path.write_text(json.dumps({**PUBLISHED, **fields}))
  with pytest.raises(ValueError, match=message) as error:
    dino.load_dino(folder)
  assert str(path) in str(error.value)


def test_missing_weights_say_how_to_get_them(folder, tmp_path):
  how = "hf download facebook/dino-vits8.*config.discriminator.weights=FOLDER"
  with pytest.raises(ValueError, match=f"weights is empty.*{how}"):
    dino.load_dino("")
  with pytest.raises(FileNotFoundError, match=f"does not exist.*{how}"):
    dino.load_dino(tmp_path / "absent")
  with pytest.raises(FileNotFoundError, match=f"hub did not give it.*{how}"):
    dino.load_dino("nobody/no-such-network")
  (folder / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="save_pretrained"):
    dino.load_dino(folder)


@pytest.mark.parametrize("width", range(1, 60, 7))
def test_hidden_widths_survive_the_ratio(tmp_path, width):
  path = tmp_path / "config.json"
  for hidden in range(1, 300):
    raw = {
      **PUBLISHED,
      "hidden_size": width,
      "num_attention_heads": 1,
      "intermediate_size": hidden,
    }
    assert dino.parse_config(raw, path).block.mlp_hidden == hidden
