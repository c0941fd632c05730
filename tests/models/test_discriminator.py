"""Discriminators against PyTorch transcriptions of LDM's and RAE's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import sharding
from psvae_jax.config import ComputeConfig, DiscriminatorConfig, MeshConfig
from psvae_jax.models.discriminator import (
  DinoDiscriminator,
  Norm,
  PatchDiscriminator,
  build_discriminator,
)


def _normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def _randomise(variables, seed=0):
  """Random variables from shapes; nothing is compiled."""
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variables)
  params = tiny.randomise(zeros["params"], seed)
  params = jax.tree_util.tree_map_with_path(
    lambda path, p: p + 1 if path[-1].key == "scale" else p, params
  )
  vectors = tiny.randomise(zeros.get("spectral", {}), seed + 1)
  unit = jax.tree.map(lambda u: u / np.linalg.norm(u), vectors)
  return {"params": params, "spectral": unit}


def _variables(module, x):
  return _randomise(jax.eval_shape(module.init, jax.random.key(0), x))


def _tensor(torch, x):
  return torch.from_numpy(np.array(x, np.float32))


def _relative(got, want):
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


# Norms.


@pytest.mark.parametrize(("kind", "images"), [("batch", 0), ("instance", 0)])
def test_norms_equal_torch(kind, images):
  torch = pytest.importorskip("torch")
  x = 3 + 2 * _normal(6, 5, 4, 8)
  module = Norm(kind, images)
  variables = _variables(module, x)
  got = jax.jit(module.apply)(variables, x)
  reference = {
    "batch": torch.nn.functional.batch_norm,
    "instance": torch.nn.functional.instance_norm,
  }[kind]
  options = {"batch": dict(training=True), "instance": {}}[kind]
  want = reference(
    _tensor(torch, x).permute(0, 3, 1, 2),
    None,
    None,
    weight=_tensor(torch, variables["params"]["scale"]),
    bias=_tensor(torch, variables["params"]["bias"]),
    eps=1e-5,
    **options,
  )
  np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=1e-5)


def _local_norm(torch, x, scale, bias, images, epsilon):
  """StyleGAN-T's norm of (B, C, N): statistics of sets of images."""
  sets = -(-len(x) // images)
  y = x.view(sets, -1, *x.shape[1:])
  mean = y.mean((1, 3), keepdim=True)
  variance = y.var((1, 3), keepdim=True, unbiased=False)
  y = ((y - mean) / torch.sqrt(variance + epsilon)).view(x.shape)
  return y * scale[:, None] + bias[:, None]


@pytest.mark.parametrize("batch", [4, 8, 16, 10])
def test_local_batch_norm_equals_its_formula(batch):
  torch = pytest.importorskip("torch")
  x = _normal(batch, 7, 5) + np.arange(batch, dtype=np.float32)[:, None, None]
  module = Norm("batch", images=8, epsilon=1e-6)
  variables = _variables(module, x)
  want = _local_norm(
    torch,
    _tensor(torch, x).permute(0, 2, 1),
    _tensor(torch, variables["params"]["scale"]),
    _tensor(torch, variables["params"]["bias"]),
    8,
    1e-6,
  )
  got = jax.jit(module.apply)(variables, x)
  np.testing.assert_allclose(got, want.permute(0, 2, 1), atol=2e-5)


@pytest.mark.parametrize(
  ("channels", "groups"),
  [(384, 32), (64, 32), (48, 24), (16, 8), (6, 3), (2, 1), (5, 1), (1, 1)],
)
def test_groups_have_two_channels_or_more(channels, groups):
  torch = pytest.importorskip("torch")
  x = _normal(3, 6, channels)
  module = Norm()
  variables = _variables(module, x)
  want = torch.nn.functional.group_norm(
    _tensor(torch, x).permute(0, 2, 1),
    groups,
    _tensor(torch, variables["params"]["scale"]),
    _tensor(torch, variables["params"]["bias"]),
  )
  got = jax.jit(module.apply)(variables, x)
  np.testing.assert_allclose(got, want.permute(0, 2, 1), atol=1e-5)


def test_unequal_groups_and_unknown_norms_are_errors():
  x = _normal(9, 4, 6)
  with pytest.raises(ValueError, match="9 images .* groups of 8"):
    Norm("batch", images=8).init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="did you mean 'group'"):
    Norm("groups").init(jax.random.key(0), x)


# PatchGAN.


def _torch_patch(torch, params, images, num_layers, norm):
  """NLayerDiscriminator's forward pass."""
  functional = torch.nn.functional

  def conv(x, name, stride):
    kernel = _tensor(torch, params[name]["kernel"]).permute(3, 2, 0, 1)
    bias = params[name].get("bias")
    bias = None if bias is None else _tensor(torch, bias)
    return functional.conv2d(x, kernel, bias, stride=stride, padding=1)

  def normalise(x, name):
    weight = _tensor(torch, params[name]["scale"])
    bias = _tensor(torch, params[name]["bias"])
    if norm == "group":
      groups = max(g for g in (32, 16, 8, 4, 2) if 2 * g <= x.shape[1])
      return functional.group_norm(x, groups, weight, bias)
    return functional.batch_norm(x, None, None, weight, bias, training=True)

  x = _tensor(torch, images).permute(0, 3, 1, 2)
  x = functional.leaky_relu(conv(x, "conv_in", 2), 0.2)
  for i in range(1, num_layers + 1):
    x = conv(x, f"conv{i}", 2 if i < num_layers else 1)
    x = functional.leaky_relu(normalise(x, f"norm{i}"), 0.2)
  return conv(x, "conv_out", 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
  ("norm", "num_layers", "size"),
  [("group", 3, (37, 32)), ("batch", 3, (32, 32)), ("group", 1, (9, 8))],
)
def test_patch_discriminator_equals_torch(norm, num_layers, size):
  torch = pytest.importorskip("torch")
  images = np.tanh(_normal(3, *size, 3))
  module = PatchDiscriminator(8, num_layers, norm)
  variables = _variables(module, images)
  got = jax.jit(module.apply)(variables, images)
  want = _torch_patch(torch, variables["params"], images, num_layers, norm)
  assert got.dtype == jnp.float32
  assert _relative(got, want) < 1e-5


def test_patch_discriminator_has_ldm_s_size():
  images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)

  def build(norm, num_layers=3):
    module = PatchDiscriminator(norm=norm, num_layers=num_layers)
    out, variables = jax.eval_shape(
      module.init_with_output, jax.random.key(0), images
    )
    return out, variables["params"]

  out, params = build("batch")
  assert out.shape == (2, 30, 30, 1)
  assert set(params["conv1"]) == {"kernel"}
  # LDM's widths: convolutions, then gain and bias of the norms.
  widths = (64, 128, 256, 512)
  convs = zip((3, *widths), (*widths, 1), strict=True)
  count = sum(16 * a * b for a, b in convs) + 64 + 1
  count += 2 * sum(widths[1:])
  assert sum(p.size for p in jax.tree.leaves(params)) == count == 2_765_633
  _, params = build("group", num_layers=5)
  assert params["conv4"]["kernel"].shape == (4, 4, 512, 512)  # 8 at most
  assert params["conv4"]["bias"].shape == (512,)


def test_patch_discriminator_s_initial_values():
  module = PatchDiscriminator(16)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))[
    "params"
  ]
  for name, layer in params.items():
    if name.startswith("conv"):
      assert 0.018 < np.std(layer["kernel"]) < 0.022, name
    else:
      assert 0 < np.std(layer["scale"]) < 0.04, name
      assert abs(np.mean(layer["scale"]) - 1) < 0.02, name
    if "bias" in layer:
      np.testing.assert_array_equal(layer["bias"], 0)


def test_small_images_are_told_what_fits():
  def init(side, num_layers=3):
    images = jax.ShapeDtypeStruct((1, side, 64, 3), jnp.float32)
    module = PatchDiscriminator(8, num_layers)
    return jax.eval_shape(module.init_with_output, jax.random.key(0), images)

  assert init(24)[0].shape[1] == 1
  with pytest.raises(ValueError, match="needs 24 .* at most num_layers=2"):
    init(23)
  assert init(23, num_layers=2)[0].shape[1] == 3
  with pytest.raises(ValueError, match="needs 24 pixels a side; none fits"):
    init(5)
  with pytest.raises(ValueError, match="num_layers 0"):
    init(24, num_layers=0)


# The heads on DINO.


def _torch_heads(torch, variables, features, norm, kernel_size=9):
  """RAE's DinoDisc.forward without the network, a training-mode pass.

  Returns:
    The logits, and the gradient of the mean of their sines at the parameters.
  """
  functional = torch.nn.functional
  tensors = jax.tree.map(
    lambda x: _tensor(torch, x).requires_grad_(), variables["params"]
  )

  def spectral(params, u):
    weight = params["kernel"].permute(2, 1, 0)
    matrix, u = weight.reshape(len(weight), -1), _tensor(torch, u)
    with torch.no_grad():
      v = functional.normalize(matrix.T @ u, dim=0, eps=1e-12)
      u = functional.normalize(matrix @ v, dim=0, eps=1e-12)
    return weight / torch.dot(u, matrix @ v)

  logits = []
  for i, x in enumerate(features):
    params = tensors[f"head{i}"]
    vectors = variables["spectral"][f"head{i}"]

    def conv(x, name, params=params, vectors=vectors):
      weight = spectral(params[name], vectors[name]["u"])
      reach = weight.shape[-1] // 2
      x = functional.pad(x, (reach, reach), mode="circular")
      return functional.conv1d(x, weight, params[name].get("bias"))

    def block(x, name, conv=conv, params=params):
      x = conv(x, f"conv_{name}")
      scale = params[f"norm_{name}"]["scale"]
      bias = params[f"norm_{name}"]["bias"]
      if norm == "group":
        x = functional.group_norm(x, 8, scale, bias, eps=1e-6)
      else:
        images = {"batch": 8, "instance": 1}[norm]
        x = _local_norm(torch, x, scale, bias, images, 1e-6)
      return functional.leaky_relu(x, 0.2)

    x = block(_tensor(torch, x).permute(0, 2, 1), "in")
    x = (block(x, "mid") + x) / np.sqrt(2)
    logits.append(conv(x, "conv_out").reshape(len(x), -1))
  logits = torch.cat(logits, dim=1)
  torch.sin(logits).mean().backward()
  grads = jax.tree.map(lambda x: x.grad.numpy(), tensors)
  return logits.detach().numpy(), grads


def _features(batch=8, count=2):
  return tuple(_normal(batch, 12, 16, seed=i) for i in range(count))


@pytest.mark.parametrize("norm", ["group", "batch", "instance"])
def test_dino_heads_equal_torch(norm):
  torch = pytest.importorskip("torch")
  features = _features(16, 3)
  module = DinoDiscriminator(norm=norm)
  variables = _variables(module, features)

  @jax.jit
  def run(params):
    def loss(params):
      logits = module.apply({**variables, "params": params}, features)
      return jnp.mean(jnp.sin(logits)), logits

    return jax.grad(loss, has_aux=True)(params)

  grads, got = run(variables["params"])
  assert got.shape == (16, 3 * 12) and got.dtype == jnp.float32
  want, want_grads = _torch_heads(torch, variables, features, norm)
  assert _relative(got, want) < 1e-5
  for (path, a), b in zip(
    jax.tree_util.tree_flatten_with_path(grads)[0],
    jax.tree.leaves(want_grads),
    strict=True,
  ):
    assert _relative(a, b) < 1e-4, jax.tree_util.keystr(path)


def test_even_kernels_are_an_error():
  with pytest.raises(ValueError, match="kernel_size 8 must be odd"):
    DinoDiscriminator(kernel_size=8).init(jax.random.key(0), _features())


# Both, behind `build_discriminator`.


class _Patches:
  """A feature network that is no network: scaled patches of the image."""

  def features(self, params, images):
    batch, side = images.shape[:2]
    x = images.reshape(batch, side // 8, 8, side // 8, 8, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 192)
    x = jnp.tanh(x[..., :32] * params["gain"])
    return x, jnp.square(x)


@functools.cache
def _built(kind, norm="group", dtype="float32"):
  """(the discriminator, jitted logits, (params, state, frozen))."""
  config = DiscriminatorConfig(kind=kind, norm=norm, channels=8, num_layers=2)
  network = _Patches() if kind == "dino" else None
  built = build_discriminator(config, ComputeConfig(dtype=dtype), network)
  frozen = {"gain": np.float32(1.5)} if kind == "dino" else {}
  params, state = jax.eval_shape(
    lambda rng: built.init(rng, 24, frozen), jax.random.key(0)
  )
  variables = _randomise({"params": params, "spectral": state})
  trees = variables["params"], variables["spectral"], frozen
  return built, jax.jit(built.logits), trees


KINDS = pytest.mark.parametrize("kind", ["patch", "dino"])


@KINDS
def test_every_parameter_learns(kind):
  built, _, (params, state, frozen) = _built(kind)
  images = np.tanh(_normal(4, 24, 24, 3))

  def loss(params):
    return jnp.mean(jnp.sin(built.logits(params, state, frozen, images)))

  grads = jax.jit(jax.grad(loss))(params)
  assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads))


@KINDS
def test_group_norm_judges_each_image_alone(kind):
  images = np.tanh(_normal(16, 24, 24, 3))
  others = np.concatenate([images[:1], -images[1:]])
  _, logits, trees = _built(kind)
  first = logits(*trees, images)[0]
  assert np.ptp(first) > 0.1
  np.testing.assert_array_equal(logits(*trees, others)[0], first)
  _, logits, trees = _built(kind, "batch")
  moved = logits(*trees, images)[0] - logits(*trees, others)[0]
  assert np.abs(moved).max() > 1e-2


@KINDS
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_eight_devices_agree(kind, norm):
  _, logits, trees = _built(kind, norm)
  images = np.tanh(_normal(16, 24, 24, 3))
  want = logits(*trees, images)
  mesh = sharding.make_mesh(MeshConfig(data=8))
  trees = jax.device_put(trees, sharding.replicated(mesh))
  split = jax.device_put(images, sharding.batch_sharding(mesh))
  got = logits(*trees, split)
  assert not got.sharding.is_fully_replicated
  assert _relative(got, want) < 1e-5


@KINDS
def test_bfloat16_compute_gives_float32_logits(kind):
  _, logits, trees = _built(kind, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(trees)} == {np.dtype("float32")}
  images = np.tanh(_normal(16, 24, 24, 3))
  got = logits(*trees, images)
  assert got.dtype == jnp.float32 and np.isfinite(got).all()
  exact = _built(kind)[1](*trees, images)
  assert 0 < _relative(got, exact) < 0.1


@KINDS
def test_double_precision_reaches_the_logits(kind):
  with jax.enable_x64(True):
    built, _, trees = _built(kind, dtype="float64")
    assert {x.dtype for x in jax.tree.leaves(trees)} == {np.dtype("float32")}
    trees = jax.tree.map(lambda x: np.asarray(x, np.float64), trees)
    images = np.tanh(_normal(16, 24, 24, 3)).astype(np.float64)
    program = jax.make_jaxpr(built.logits)(*trees, images)
  assert program.out_avals[0].dtype == np.float64
  assert "f32" not in str(program)


@KINDS
def test_state_advances_where_there_is_some(kind):
  built, _, (params, state, _) = _built(kind)
  moved = jax.jit(built.advance)(params, state)
  assert jax.tree.structure(moved) == jax.tree.structure(state)
  changed = [
    bool(np.any(np.abs(a - b) > 1e-3))
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True)
    if a.size > 1  # a vector of one is 1 or −1
  ]
  assert len(changed) == {"patch": 0, "dino": 4}[kind] and all(changed)


def test_what_cannot_be_built_is_said():
  compute = ComputeConfig()
  with pytest.raises(ValueError, match="kind='patches'.*'patch'"):
    build_discriminator(DiscriminatorConfig(kind="patches"), compute)
  with pytest.raises(ValueError, match="norm='bath'.*'batch'"):
    build_discriminator(DiscriminatorConfig(norm="bath"), compute)
  with pytest.raises(ValueError, match="load_dino"):
    build_discriminator(DiscriminatorConfig(kind="dino"), compute)
