"""The adversarial step: against torch, in micro-batches, before its start."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax import losses, optim, train, train_state
from psvae_jax.config import parser as config_parser
from psvae_jax.tasks.autoencoder import AutoencoderTask

STEPS = 4


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def make_task(
  encoder_folder,
  stage,
  accumulate=1,
  dtype="float32",
  decoder="vit",
  kind="patch",
  convolution="matmul",
  **loss,
):
  raw = tiny.adversarial_config(encoder_folder, decoder=decoder, kind=kind)
  raw.compute.update(dtype=dtype, convolution=convolution)
  raw.perceptual = dict(weights="random:alex", network="alex")
  raw[stage].loss.update(loss)
  raw[stage].train.update(accumulate=accumulate)
  for name in ("optim", "discriminator_optim"):
    # Adam divides rounding by rounding where a gradient is all but zero.
    raw[stage][name].update(eps=1e-3)
  return AutoencoderTask(stage, config_parser.parse(raw), encoder_folder)


def start(task, dtype="float32"):
  """A randomised state and the frozen arrays; a module's noise is its own."""

  def cast(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), tree)

  params, model_state = jax.jit(task.init)(jax.random.key(0), task.frozen)
  params = {
    name: tiny.randomise(value, seed=len(name), scale=0.1)
    for name, value in params.items()
  }
  tx = optim.make_optimizer(task.modules, STEPS)
  state = train_state.create(cast(params), cast(model_state), tx, task.modules)
  step = jax.jit(train.make_train_step(task, tx, 0.9))
  return state, cast(task.frozen), step


def run(task, steps=STEPS, dtype="float32"):
  """States before the first and after every step, and every step's metrics."""
  state, frozen, step = start(task, dtype)
  states, metrics = [state], []
  for n in range(steps):
    batch = tiny.batch(8, task.image_size, seed=n)
    state, values, flags = step(state, frozen, batch, jax.random.key(5))
    assert bool(jnp.all(flags))
    states.append(state)
    metrics.append(jax.device_get(values))
  return states, metrics


# A transcription in torch: functions of a tree of tensors.


def _torch_tree(tree):
  import torch

  def one(x):
    return torch.tensor(np.asarray(x), requires_grad=True)

  return jax.tree.map(one, tree)


def _conv(p, x, stride=1):
  from torch.nn import functional

  # Contiguous: what convolutions in double precision ask for.
  kernel = p["kernel"].permute(3, 2, 0, 1).contiguous()
  return functional.conv2d(x, kernel, p.get("bias"), stride, padding=1)


def _norm(p, x, groups, epsilon):
  from torch.nn import functional

  return functional.group_norm(x, groups, p["scale"], p["bias"], epsilon)


def _decode(p, z, patch):
  """LDM's decoder with two levels of one width and no attention after them."""
  import torch
  from torch.nn import functional

  def act(p, x):
    return functional.silu(_norm(p, x, 32, 1e-6))

  def res(p, x):
    y = _conv(p["conv1"], act(p["norm1"], x))
    return x + _conv(p["conv2"], act(p["norm2"], y))

  def attention(p, x):
    batch, channels, height, width = x.shape
    y = _norm(p["norm"], x, 32, 1e-6).flatten(2).mT
    query, key, value = (
      y @ p[name]["kernel"] + p[name]["bias"]
      for name in ("query", "key", "value")
    )
    weights = torch.softmax(query @ key.mT / channels**0.5, dim=-1)
    y = weights @ value @ p["out"]["kernel"] + p["out"]["bias"]
    return x + y.mT.reshape(batch, channels, height, width)

  x = _conv(p["conv_in"], z.permute(0, 3, 1, 2))
  x = res(p["mid_res1"], attention(p["mid_attention"], res(p["mid_res0"], x)))
  x = attention(p["up0_attention0"], res(p["up0_res0"], x))
  x = functional.interpolate(x, scale_factor=2, mode="nearest")
  x = _conv(p["up0_upsample"], x)
  x = res(p["up1_res0"], x)
  x = _conv(p["conv_out"], act(p["norm_out"], x)).permute(0, 2, 3, 1)
  batch, height, width, _ = x.shape
  x = x.reshape(batch, height, width, patch, patch, 3).transpose(2, 3)
  return x.reshape(batch, height * patch, width * patch, 3)


def _judge(p, images):
  """PatchGAN of two strided layers; GroupNorm of two channels a group."""
  from torch.nn.functional import leaky_relu

  x = leaky_relu(_conv(p["conv_in"], images.permute(0, 3, 1, 2), 2), 0.2)
  for i, stride in ((1, 2), (2, 1)):
    x = _conv(p[f"conv{i}"], x, stride)
    groups = min(32, x.shape[1] // 2)
    x = leaky_relu(_norm(p[f"norm{i}"], x, groups, 1e-5), 0.2)
  return _conv(p["conv_out"], x)


def _lpips(p, images, references):
  """Mean LPIPS with AlexNet, as the `lpips` package computes it."""
  import torch
  from torch.nn import functional

  def activations(x):
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=x.dtype)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=x.dtype)
    x = ((x - shift) / scale).permute(0, 3, 1, 2)
    for i, (pool, stride, padding) in enumerate(
      ((False, 4, 2), (True, 1, 2), (True, 1, 1), (False, 1, 1), (False, 1, 1))
    ):
      x = functional.max_pool2d(x, 3, 2) if pool else x
      conv = p[f"stage{i}"]["conv0"]
      kernel = conv["kernel"].permute(3, 2, 0, 1).contiguous()
      x = functional.conv2d(x, kernel, conv["bias"], stride, padding).relu()
      yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

  total = 0.0
  pairs = zip(activations(images), activations(references), strict=True)
  for i, (x, y) in enumerate(pairs):
    head = p[f"head{i}"][:, None, None]
    total = total + ((x - y).square() * head).sum(1).mean()
  return total


def _torch_step(params, z, images, loss, felt, started):
  """Losses, λ and the gradients of both modules, by autograd.

  As LDM's: λ compares the adversary with all else there is of the pixel loss,
  LPIPS included.
  """
  import torch

  real = torch.tensor(images.astype(np.float64) / 127.5 - 1.0)
  decoder, critic = params["pixel_decoder"], params["discriminator"]
  fake = _decode(decoder, torch.tensor(z), 4)
  rest = loss.l1 * (fake - real).abs().mean()
  rest = rest + loss.mse * (fake - real).square().mean()
  distance = _lpips(params["perceptual"], fake, real)
  rest = rest + loss.lpips * distance
  generator = -_judge(critic, fake).mean()
  last = decoder["conv_out"]["kernel"]
  of_rest, of_gan = (
    torch.autograd.grad(value, last, retain_graph=True)[0].norm()
    for value in (rest, generator)
  )
  weight = loss.gan * min((of_rest / (of_gan + 1e-4)).item(), 1e4) * felt
  (loss.pixel * (rest + weight * generator)).backward(
    inputs=jax.tree.leaves(decoder), retain_graph=True
  )
  on_real, on_fake = _judge(critic, real), _judge(critic, fake.detach())
  hinge = 0.5 * (
    torch.relu(1 - on_real).mean() + torch.relu(1 + on_fake).mean()
  )
  if started:
    hinge.backward(inputs=jax.tree.leaves(critic))
  return {
    "loss_lpips": distance.item(),
    "gan_weight": weight,
    "loss_generator": generator.item() * started,
    "loss_discriminator": hinge.item() * started,
    "logits_real": on_real.mean().item() * started,
    "logits_fake": on_fake.mean().item() * started,
  }


def _adam(optim_config, params):
  import torch

  return torch.optim.Adam(
    jax.tree.leaves(params),
    lr=optim_config.learning_rate,
    betas=(optim_config.b1, optim_config.b2),
    eps=optim_config.eps,
  )


def test_two_optimizer_step_equals_torch(encoder_folder):
  """λ, losses, gradients and parameters of four steps of both optimizers.

  The discriminator starts at the second step, the decoder feels it from the
  third on. In double precision: nothing but a difference of the two is left.
  """
  pytest.importorskip("torch")
  loss = dict(gan=0.7, gan_start=1, gan_warmup=1, lpips=0.3)
  with jax.enable_x64(True):
    options = dict(decoder="conv", dtype="float64", convolution="native")
    task = make_task(encoder_folder, "svae", **options, **loss)
    states, metrics = run(task, dtype="float64")
    latents = [
      _latents(task, states[n], tiny.batch(8, task.image_size, seed=n), n)
      for n in range(STEPS)
    ]
    states = jax.device_get(states)
  modules = ("pixel_decoder", "discriminator")
  params = _torch_tree({k: states[0].params[k] for k in modules})
  params["perceptual"] = _torch_tree(
    jax.tree.map(np.float64, task.frozen["perceptual"])
  )
  section = task.section
  optimizers = {
    "pixel_decoder": _adam(section.optim, params["pixel_decoder"]),
    "discriminator": _adam(
      section.discriminator_optim, params["discriminator"]
    ),
  }
  for n in range(STEPS):
    for optimizer in optimizers.values():
      optimizer.zero_grad()
    images = tiny.batch(8, task.image_size, seed=n)["image"]
    started = n >= 1
    expected = _torch_step(
      params, latents[n], images, section.loss, n >= 2, started
    )
    for name, value in expected.items():
      found = float(metrics[n][f"train/{name}"])
      assert found == pytest.approx(value, rel=1e-8, abs=1e-12), (n, name)
    optimizers["pixel_decoder"].step()
    if started:
      optimizers["discriminator"].step()
    for name in modules:
      wanted = jax.tree.map(lambda t: t.detach().numpy(), params[name])
      chex.assert_trees_all_close(
        states[n + 1].params[name], wanted, rtol=0, atol=1e-8
      )
  assert metrics[-1]["train/gan_weight"] > 0


def _latents(task, state, batch, n):
  """z of a step, as the step itself draws it."""
  x = batch["image"].astype(np.float64) / 127.5 - 1.0
  teacher = jax.tree.map(np.float64, task.frozen["teacher"])
  features = task.model.features(teacher, x)
  posterior = task.model.posterior(state.params["semantic_encoder"], features)
  rng = jax.random.fold_in(jax.random.key(5), n)
  noise = jax.random.normal(rng, posterior.mean.shape, np.float64)
  return np.asarray(posterior.at(noise))


def test_adaptive_weight_by_hand():
  pixel, gan = jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)
  weight = losses.adaptive_weight(pixel, gan)
  assert float(weight) == pytest.approx(6.0 / (1.0 + 1e-4), rel=1e-6)
  nothing = jnp.zeros((2, 2))
  assert float(losses.adaptive_weight(pixel, nothing)) == 1e4
  assert float(losses.adaptive_weight(nothing, nothing)) == 0.0
  gradient = jax.grad(lambda g: losses.adaptive_weight(pixel, g))(gan)
  assert not np.any(gradient)


def test_hinge_loss_by_hand():
  real, fake = jnp.array([2.0, 0.0]), jnp.array([[-3.0], [0.5]])
  # ½ · (mean(0, 1) + mean(0, 1.5))
  assert float(losses.hinge_loss(real, fake)) == pytest.approx(0.625)
  assert float(losses.generator_loss(fake)) == pytest.approx(1.25)


def test_before_its_start_and_its_warm_up(encoder_folder):
  """Two steps without a discriminator, one in which it trains unfelt."""
  changes = dict(kind="dino", gan=0.5, gan_start=2, gan_warmup=1)
  states, metrics = run(make_task(encoder_folder, "psvae", **changes))
  for name in ("params", "opt_state", "model_state"):
    first, *rest = (getattr(state, name)["discriminator"] for state in states)
    chex.assert_trees_all_equal(first, rest[0], rest[1])
    with pytest.raises(AssertionError):
      chex.assert_trees_all_equal(rest[1], rest[2])
  felt = [float(m["train/gan_weight"]) > 0 for m in metrics]
  assert felt == [False, False, False, True]
  assert [float(m["train/logits_fake"]) != 0 for m in metrics] == [
    False,
    False,
    True,
    True,
  ]
  assert "discriminator" not in states[-1].ema_params

  plain, _ = run(make_task(encoder_folder, "psvae", gan=0.0))
  names = list(plain[0].params)
  for n, equal in enumerate((True, True, True, True, False)):
    found = {name: states[n].params[name] for name in names}
    wanted = plain[n].params
    if equal:
      chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-6)
    else:
      with pytest.raises(AssertionError):
        chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["svae", "psvae"])
def test_the_term_reaches_what_the_pixel_loss_reaches(encoder_folder, stage):
  """The same state and batch, in the last step unfelt and the first felt."""
  task = make_task(encoder_folder, stage, gan=0.5, gan_start=0, gan_warmup=1)
  state, frozen, _ = start(task)
  batch = tiny.batch(8, task.image_size)
  function = jax.jit(
    lambda s: task.gradients(s, frozen, batch, jax.random.key(1))[0]
  )
  without, felt = (function(state.replace(step=n)) for n in (0, 1))
  for name in task.route.trains:
    difference = jax.tree.map(lambda a, b: a - b, without[name], felt[name])
    moved = any(np.abs(d).max() > 1e-6 for d in jax.tree.leaves(difference))
    assert moved == (name in task.route.pixel), name
  # Its own loss does not know the weight.
  chex.assert_trees_all_equal(without["discriminator"], felt["discriminator"])
  assert any(np.any(g) for g in jax.tree.leaves(felt["discriminator"]))


def test_accumulation_equals_the_big_batch(encoder_folder):
  """DESIGN section 4: gradients ≤ 1e-5 relative L2 per tensor, λ included.

  On DINO's features and augmented: every draw goes with its own example.
  """

  def gradients(accumulate):
    task = make_task(encoder_folder, "psvae", accumulate, kind="dino", gan=0.5)
    state, frozen, _ = start(task)
    batch = tiny.batch(8, task.image_size)
    grads, model_state, metrics = jax.jit(task.gradients)(
      state, frozen, batch, jax.random.key(2)
    )
    return jax.device_get((grads, metrics)), jax.device_get(model_state)

  (grads, metrics), vectors = gradients(1)
  scale = max(float(np.linalg.norm(x)) for x in jax.tree.leaves(grads))

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    # A key bias shifts all logits of a query alike: its true gradient is 0.
    idle = name.endswith("['key']['bias']")
    size = 1e-1 * scale if idle else np.linalg.norm(a)
    assert np.linalg.norm(a - b) <= 1e-5 * size, name

  for accumulate in (2, 4):
    (found, of_parts), found_vectors = gradients(accumulate)
    chex.assert_trees_all_close(found_vectors, vectors, rtol=0, atol=1e-6)
    jax.tree_util.tree_map_with_path(check, grads, found)
    assert set(metrics) == set(of_parts)
    for name, value in metrics.items():
      assert of_parts[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
  assert metrics["gan_weight"] > 0


def test_accumulation_in_float64_after_three_steps(encoder_folder):
  def train_for(accumulate):
    task = make_task(encoder_folder, "svae", accumulate, "float64", gan=0.5)
    return jax.device_get(run(task, 3, "float64")[0][-1].params)

  with jax.enable_x64(True):
    whole, parts = train_for(1), train_for(4)
  assert {x.dtype for x in jax.tree.leaves(whole)} == {np.dtype("float64")}
  chex.assert_trees_all_close(whole, parts, rtol=0, atol=1e-9)


def test_spectral_norms_settle_on_parameters_of_another_stage(encoder_folder):
  """σ by one iteration from a settled vector is the largest singular value."""
  task = make_task(encoder_folder, "psvae", kind="dino", gan=0.5)
  state, *_ = start(task)  # its parameters are not those of its vectors
  settled = jax.jit(task.settle)(state.params, state.model_state)
  kernels = jax.tree_util.tree_flatten_with_path(state.params["discriminator"])[
    0
  ]
  checked = 0
  for path, kernel in kernels:
    if path[-1].key != "kernel" or kernel.shape[-1] == 1:
      continue
    vectors = settled["discriminator"]
    for key in path[:-1]:
      vectors = vectors[key.key]
    matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1])
    largest = np.linalg.svd(matrix, compute_uv=False)[0]
    assert np.linalg.norm(matrix @ vectors["u"]) > 0.99 * largest
    checked += 1
  assert checked == 4  # two a head
