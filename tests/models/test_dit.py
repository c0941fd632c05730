"""What the diffusion transformer computes, and what must not change it."""

import dataclasses
import functools

import dit_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import sharding
from psvae_jax.config import DiTConfig, MeshConfig
from psvae_jax.models import dit_block, rotary
from psvae_jax.models.dit import DiT, Trunk

CONFIG = DiTConfig(
  width=16,
  depth=3,
  num_heads=2,
  mlp_ratio=1.5,
  head_width=24,
  head_depth=1,
  head_num_heads=2,
)
CHANNELS, TEXT_DIM, LENGTH, CLASSES = 3, 5, 4, 7
TEXT = DiT(CONFIG, CHANNELS, TEXT_DIM, LENGTH)
CLASS = DiT(CONFIG, CHANNELS, num_classes=CLASSES)


@functools.cache
def inputs(batch=2, seed=0):
  """(x_t, t, text keywords) on a 2 × 3 grid; the first prompt is padded."""
  rng = np.random.default_rng(seed)
  noisy = rng.standard_normal((batch, 2, 3, CHANNELS)).astype(np.float32)
  t = rng.uniform(size=batch).astype(np.float32)
  text = rng.standard_normal((batch, LENGTH, TEXT_DIM)).astype(np.float32)
  mask = np.ones((batch, LENGTH), bool)
  mask[0, 2:] = False
  return noisy, t, {"text": text, "text_mask": mask}


def condition_of(module):
  if module.num_classes:
    return {"labels": np.array([1, 2])}
  return inputs()[2]


@functools.cache
def shapes(module):
  """Without a source; it adds no parameter, as a test says."""
  noisy, t, _ = inputs()
  init = functools.partial(module.init, jax.random.key(0))
  return jax.eval_shape(init, noisy, t, **condition_of(module))["params"]


@functools.cache
def params_of(module, scale=0.3):
  """Nothing is zero, nothing is one, and nothing is compiled."""

  def start(path, x):
    is_gain = jax.tree_util.keystr(path).endswith("_norm']")
    return np.full(x.shape, float(is_gain), x.dtype)

  start = jax.tree_util.tree_map_with_path(start, shapes(module))
  return tiny.randomise(start, scale=scale)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, noisy, t, **condition):
  return module.apply({"params": params}, noisy, t, **condition)


def run(module=TEXT, **change):
  noisy, t, text = inputs()
  given = {"noisy": noisy, "t": t, **text, **change}
  return np.asarray(apply(module, params_of(module), **given))


@pytest.mark.parametrize("depth, dtype", [(1, jnp.float32), (0, jnp.bfloat16)])
def test_velocity_is_zero_at_the_start_and_float32(depth, dtype):
  noisy, t, text = inputs()
  config = dataclasses.replace(CONFIG, head_depth=depth)
  module = dataclasses.replace(TEXT, config=config, dtype=dtype)
  start = jax.jit(module.init_with_output)
  v, variables = start(jax.random.key(0), noisy, t, source=noisy, **text)
  assert v.shape == noisy.shape and v.dtype == jnp.float32
  assert not np.any(v)
  params = variables["params"]
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    closed = "modulation" in name or "velocity" in name
    assert np.any(x) != (closed or name.endswith("['bias']")), name
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  # Made with a source, and the same as without.
  want = jax.tree.map(lambda x: x.shape, shapes(module))
  assert jax.tree.map(jnp.shape, params) == want


def test_padded_text_changes_nothing():
  noisy, _, text = inputs()
  want = run(source=noisy)
  other = np.where(text["text_mask"][..., None], text["text"], np.nan)
  np.testing.assert_array_equal(run(source=noisy, text=other), want)
  # Nor does its being there: the first prompt alone, cut to its length.
  short = {key: value[:1, :2] for key, value in text.items()}
  first = {"noisy": noisy[:1], "t": inputs()[1][:1], **short}
  got = run(**first, source=noisy[:1])
  np.testing.assert_allclose(got, want[:1], atol=1e-5)
  assert np.abs(run(text=text["text"] + 1) - run()).max() > 0.1


def test_source_that_is_left_out():
  noisy, _, _ = inputs()
  source = np.roll(noisy, 1)
  rows = np.array([False, True])
  source[0] = np.nan
  got, without = run(source=source, source_mask=rows), run()
  np.testing.assert_allclose(got[0], without[0], atol=1e-5)
  assert np.abs(got[1] - without[1]).max() > 0.1
  source[0] = 0
  np.testing.assert_allclose(run(source=source)[1], got[1], atol=1e-5)


def test_examples_do_not_meet():
  noisy, t, text = inputs()
  order = [1, 0]
  swapped = {key: value[order] for key, value in text.items()}
  got = run(noisy=noisy[order], t=t[order], source=noisy[order], **swapped)
  np.testing.assert_allclose(got[order], run(source=noisy), atol=1e-5)


def test_every_input_reaches_the_velocity():
  """Also time and place: neither is lost on the way."""
  noisy, t, text = inputs()
  want = run(source=noisy)
  changes = {
    "t": {"t": t + 0.1},
    "text": {"text": text["text"][:, ::-1]},  # the pooled mean of row 1 stays
    "source": {"source": noisy + 1},
    "place of the source": {"source": noisy[:, :, ::-1]},
    "order": {"source": noisy, "text_mask": np.ones((2, LENGTH), bool)},
  }
  for name, change in changes.items():
    got = run(**{"source": noisy, **change})
    assert np.abs(got - want).max() > 1e-2, name
  turned = run(noisy=noisy[:, :, ::-1], source=noisy[:, :, ::-1])
  assert np.abs(turned[:, :, ::-1] - want).max() > 1e-2


def test_clean_tokens_do_not_see_the_time():
  """They are modulated at t = 0: of the trunk, only noisy tokens see t."""
  config = dit_block.DiTBlockConfig(16, 2, 24)
  block = dit_block.DiTBlock(config, clean=4)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, 10, 16)).astype(np.float32)
  condition = rng.standard_normal((1, 2, 16)).astype(np.float32)
  angles = np.zeros((10, 4))
  mask = np.arange(10)[None] < 4  # clean tokens see each other alone
  params = jax.jit(block.init)(jax.random.key(0), x, condition, angles, mask)
  params = tiny.randomise(params)
  call = jax.jit(block.apply)
  one = call(params, x, condition, angles, mask)
  # Not in place: the call may still be reading.
  later = condition + np.array([0, 1], np.float32)[:, None]
  other = call(params, x, later, angles, mask)
  np.testing.assert_array_equal(one[:, :4], other[:, :4])
  assert np.abs(one[:, 4:] - other[:, 4:]).min(axis=-1).max() > 1e-3


def test_classes():
  noisy, t, _ = inputs()
  params = params_of(CLASS)
  assert params["label"]["embedding"].shape == (CLASSES + 1, 16)
  classes = [np.array([label, CLASSES]) for label in (0, 1)]
  one, other = (apply(CLASS, params, noisy, t, labels=x) for x in classes)
  assert np.abs(one[0] - other[0]).max() > 0.1
  np.testing.assert_array_equal(one[1], other[1])


def test_stacked_blocks_are_blocks_one_after_another():
  """The scan, and the last block that computes noisy tokens alone."""
  config = dit_block.DiTBlockConfig(16, 2, 24)
  trunk = Trunk(config, depth=3, clean=4)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 10, 16)).astype(np.float32)
  condition = rng.standard_normal((2, 2, 16)).astype(np.float32)
  angles = rng.standard_normal((10, 4))
  mask = np.arange(10)[None] != np.array([[1], [2]])
  rest = condition, angles, mask
  params = tiny.randomise(
    jax.jit(trunk.init)(jax.random.key(0), x, *rest)["params"]
  )
  got = jax.jit(trunk.apply)({"params": params}, x, *rest)
  block = dit_block.DiTBlock(config, clean=4)
  call = jax.jit(block.apply)
  for i in range(2):
    each = jax.tree.map(lambda p, i=i: p[i], params["block"])
    x = call({"params": each}, x, *rest)
  want = call({"params": params["last"]}, x, *rest)[:, 4:]
  np.testing.assert_allclose(got, want, atol=1e-5)


def _double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_whole_model_against_numpy():
  noisy, t, text = inputs()
  mask = {
    "text_mask": text["text_mask"],
    "source_mask": np.array([True, False]),
  }
  noisy, t, words = _double((noisy, t, text["text"]))
  arrays = {"text": words, "source": np.roll(noisy, 1)}
  params = _double(params_of(TEXT))
  with jax.enable_x64(True):
    module = dataclasses.replace(TEXT, dtype=jnp.float64)
    got = apply(module, params, noisy, t, **arrays, **mask)
  want = dit_reference.dit(CONFIG, params, noisy, t, **arrays, **mask)
  np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("clean", [4, None])
def test_block_against_numpy(clean):
  config = dit_block.DiTBlockConfig(16, 2, 24)
  block = dit_block.DiTBlock(config, clean=clean)
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, 10, 16))
  condition = rng.standard_normal((2, 10 if clean is None else 2, 16))
  angles = rng.standard_normal((10, 4))
  mask = np.arange(10)[None] != np.array([[1], [2]])
  with jax.enable_x64(True):
    rest = condition, angles, mask
    params = jax.jit(block.init)(jax.random.key(0), x, *rest)["params"]
    params = _double(tiny.randomise(params))
    double = dataclasses.replace(block, dtype=jnp.float64)
    got = jax.jit(double.apply)({"params": params}, x, *rest)
    assert got.dtype == np.float64
  each = condition if clean is None else condition[:, [0] * 4 + [1] * 6]
  want = dit_reference.block(params, config, x, each, angles, mask)
  np.testing.assert_allclose(got, want, atol=1e-12)


def test_rotary_logits_depend_on_offsets_alone():
  rng = np.random.default_rng(0)
  query, key = rng.standard_normal((2, 1, 20, 1, 8))
  with jax.enable_x64(True):
    whole = rotary.grid_angles(9, 9, 8)

    def logits(row, column):
      """Of a 4 × 5 window at a place in the grid."""
      angles = whole.reshape(9, 9, 4)[row : row + 4, column : column + 5]
      angles = angles.reshape(20, 4)
      turned = [rotary.rotate(jnp.asarray(x), angles) for x in (query, key)]
      return np.einsum("bqhd,bkhd->bhqk", *turned)

    want = logits(0, 0)
    for row, column in [(3, 0), (0, 4), (5, 2)]:
      np.testing.assert_allclose(logits(row, column), want, atol=1e-12)
    plain = np.einsum("bqhd,bkhd->bhqk", query, key)
  assert np.abs(want - plain).max() > 0.5
  np.testing.assert_allclose(
    np.diagonal(want, axis1=2, axis2=3), np.diagonal(plain, axis1=2, axis2=3)
  )
  # Rows and columns are told apart, and no two places are one.
  assert len(np.unique(whole.round(9), axis=0)) == 81
  np.testing.assert_array_equal(whole[0], 0)
  np.testing.assert_array_equal(whole[1, :2], 0)
  np.testing.assert_array_equal(whole[9, 2:], 0)
  assert whole[1, 2] == whole[9, 0] == 1


def test_bfloat16_is_close_to_float32():
  noisy, _, _ = inputs()
  half = dataclasses.replace(TEXT, dtype=jnp.bfloat16)
  params = params_of(TEXT, 0.15)
  _, t, text = inputs()
  want = apply(TEXT, params, noisy, t, source=noisy, **text)
  got = apply(half, params, noisy, t, source=noisy, **text)
  assert got.dtype == jnp.float32
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert 1e-5 < error < 2e-2


def test_float64_is_float64_throughout():
  noisy, t, text = inputs()
  with jax.enable_x64(True):
    module = dataclasses.replace(TEXT, dtype=jnp.float64)
    variables = {"params": _double(params_of(TEXT))}
    mask, text = text["text_mask"], _double(text["text"])
    call = functools.partial(module.apply, text_mask=mask)
    noisy, t = _double((noisy, t))
    program = jax.make_jaxpr(call)(variables, noisy, t, text=text)
  assert program.out_avals[0].dtype == np.float64
  assert "f64[" in str(program) and "f32[" not in str(program)


@functools.cache
def gradient(options=(), sizes=()):
  """Velocity and gradient of a batch half of which has a source: float64."""
  with jax.enable_x64(True):
    return _gradient(options, sizes)


def _gradient(options, sizes):
  noisy, t, text = inputs(8)
  batch = {"noisy": noisy, "t": t, "source": noisy + 1, **text}
  batch = {k: v if v.dtype == bool else _double(v) for k, v in batch.items()}
  batch["source_mask"] = np.arange(8) % 2 == 0
  module = dataclasses.replace(TEXT, dtype=jnp.float64, **dict(options))

  def loss(params, batch):
    v = module.apply({"params": params}, **batch)
    return jnp.mean(jnp.sin(v)), v

  step = jax.value_and_grad(loss, has_aux=True)
  devices = jax.devices()[: 8 if sizes else 1]
  mesh = sharding.make_mesh(MeshConfig(**dict(sizes)), devices)
  with jax.set_mesh(mesh):
    params = sharding.put_tree(_double(params_of(TEXT)), mesh)
    out = jax.jit(step)(params, sharding.put_batch(batch, mesh))
    (_, v), grads = jax.device_get(out)
  return v, grads


def assert_same_gradient(got, want):
  np.testing.assert_allclose(got[0], want[0], atol=1e-12)

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b), name

  jax.tree_util.tree_map_with_path(check, got[1], want[1])


def test_gradient_reaches_every_parameter():
  for path, x in jax.tree_util.tree_leaves_with_path(gradient()[1]):
    rows = np.abs(x).reshape(len(x), -1).max(axis=1)
    assert np.all(rows > 0), jax.tree_util.keystr(path)


def test_remat_and_unroll_change_neither_value_nor_gradient():
  got = gradient((("remat", True), ("unroll", 2)))
  assert_same_gradient(got, gradient())


def test_eight_devices_agree_with_one():
  sizes = (("data", 2), ("fsdp", 2), ("tensor", 2))
  assert_same_gradient(gradient(sizes=sizes), gradient())


def test_matrices_are_sharded_as_the_autoencoder_s():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices())
  shardings = sharding.infer_sharding(shapes(TEXT), mesh)
  block = jax.tree.map(lambda s: tuple(s.spec), shardings["trunk"]["block"])
  column, row = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
  attention, mlp = block["attention"], block["mlp"]
  for name in ("query", "key", "value"):
    assert attention[name]["kernel"] == column
  assert attention["out"]["kernel"] == mlp["fc2"]["kernel"] == row
  assert mlp["fc1"]["kernel"] == mlp["gate"]["kernel"] == column
  assert block["modulation"]["dense"]["kernel"] == (None, None, "fsdp")


@pytest.mark.parametrize(
  "module, change, message",
  [
    (TEXT, {"labels": np.zeros(2, int)}, "conditioned by text"),
    (TEXT, {"text": None}, "conditioned by text"),
    (CLASS, {}, "conditioned by labels"),
    (TEXT, {"noisy": np.zeros((2, 2, 3, 4))}, "do not have 3 channels"),
    (TEXT, {"source": np.zeros((2, 3, 3, 3))}, "differ in shape"),
    (TEXT, {"text": np.zeros((2, 4, 6))}, "do not have width 5"),
    (TEXT, {"text": np.zeros((2, 5, 5))}, "5 tokens is longer than 4"),
    (DiT(CONFIG, CHANNELS), {}, "set one of"),
    (
      DiT(dataclasses.replace(CONFIG, num_heads=3), CHANNELS, 5, 4),
      {},
      "width 16 is not a multiple of num_heads 3",
    ),
    (
      DiT(dataclasses.replace(CONFIG, head_num_heads=4), CHANNELS, 5, 4),
      {},
      "multiple of 4, not 6",
    ),
  ],
)
def test_bad_calls_are_named(module, change, message):
  noisy, t, text = inputs()
  given = {"noisy": noisy, "t": t, **text, **change}
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(module.init, jax.random.key(0)), **given)
