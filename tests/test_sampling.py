"""The sampler: guidance, seeds, batches, devices."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny
import tiny_generator

from psvae_jax import flow, sharding
from psvae_jax.config import MeshConfig, SampleConfig
from psvae_jax.models.generator import Generator
from psvae_jax.sampling import ImageSampler

PROMPTS = ["a red circle", "", "two green squares"]
SETTINGS = SampleConfig(steps=3, guidance=2.0, image_guidance=1.5, shift=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def made(folder):
  return tiny_generator.build(folder)


@pytest.fixture(scope="module")
def sampler(made):
  return ImageSampler(made.generator, batch_size=4, tokenizer=made.tokenizer)


def images(count):
  return tiny.batch(count)["image"]


def settings(**changes):
  return dataclasses.replace(SETTINGS, **changes)


def reference(made, prompts, seeds, options, *, source=None, strength=1.0):
  """The same with a loop in Python, one image and one evaluation at a time."""
  generator, frozen, out = made.generator, made.frozen, []

  @jax.jit
  def velocity(x, t, condition, source):
    t = np.full((1,), 1.0, np.float32) * t
    return generator.velocity(made.params, x, t, condition, source)

  times = np.linspace(1, 0, options.steps + 1)
  start = flow.shift_time(strength, 1 / options.shift)
  times = flow.shift_time(times * start, options.shift)
  for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
    tokens, mask = made.tokenizer([prompt])
    text = generator.encode_text(frozen, tokens, mask)
    full = {"text": np.where(mask[..., None], text, 0), "text_mask": mask}
    null = frozen["null"]
    key = jax.random.fold_in(jax.random.key(seed), 0)
    x = jax.random.normal(key, generator.latent_shape)[None]
    if strength < 1:
      x = (1 - strength) * source[i : i + 1] + strength * x
    shown = source[i : i + 1] if strength == 1 and source is not None else None
    for step, (t, after) in enumerate(itertools.pairwise(times)):
      inside = options.guidance_low <= t <= options.guidance_high
      s_text = options.guidance if inside else 1.0
      s_image = options.image_guidance if inside else 1.0
      v_null = velocity(x, t, null, None)
      v_full = velocity(x, t, full, shown)
      if shown is None:
        v = v_null + s_text * (v_full - v_null)
      else:
        v_image = velocity(x, t, null, shown)
        v = v_null + s_image * (v_image - v_null) + s_text * (v_full - v_image)
      if options.solver == "euler":
        x = x + (after - t) * v
        continue
      ratio = (1 - t) / t * after / (1 - after)
      key = jax.random.fold_in(jax.random.key(seed), 1 + step)
      fresh = jax.random.normal(key, generator.latent_shape)
      noise = ratio * (x + (1 - t) * v) + (1 - ratio**2) ** 0.5 * fresh
      x = (1 - after) * (x - t * v) + after * noise
    out.append(x[0])
  return np.stack(out)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"guidance": 1.0},
    {"guidance_low": 0.3, "guidance_high": 0.85},
    {"solver": "ancestral"},
  ],
  ids=["guided", "plain", "interval", "ancestral"],
)
def test_latents_equal_a_plain_loop(made, sampler, changes):
  options = settings(**changes)
  seeds = [3, 4, 3]
  z = sampler.generate(
    made.params, made.frozen, PROMPTS, seeds, options, latents=True
  )
  expected = reference(made, PROMPTS, seeds, options)
  np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-4)
  if "solver" in changes or not changes:  # neither prompt nor seed is idle
    assert np.abs(z[0] - z[2]).max() > 1e-2
    assert np.abs(z[0] - z[1]).max() > 1e-2


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"image_guidance": 1.0},
    {"guidance_high": 0.85},
  ],
  ids=["both", "text", "interval"],
)
def test_edits_equal_a_plain_loop(made, sampler, changes):
  options = settings(**changes)
  source = sampler.encode(made.frozen, images(3))
  found = sampler.edit(
    made.params, made.frozen, images(3), PROMPTS, [5, 6, 7], options
  )
  z = reference(made, PROMPTS, [5, 6, 7], options, source=source)
  expected = sampler.decode(made.frozen, z)
  assert np.abs(found.astype(int) - expected).max() <= 1
  assert (found != expected).mean() < 1e-3


def test_variations_equal_a_plain_loop(made, sampler):
  source = sampler.encode(made.frozen, images(3))
  found = sampler.vary(
    made.params, made.frozen, images(3), PROMPTS, 0.6, [5, 6, 7], SETTINGS
  )
  z = reference(made, PROMPTS, [5, 6, 7], SETTINGS, source=source, strength=0.6)
  expected = sampler.decode(made.frozen, z)
  assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_ends_of_strength(made, sampler):
  arguments = (made.params, made.frozen)
  whole = sampler.vary(*arguments, images(3), PROMPTS, 1.0, [1, 2, 3], SETTINGS)
  fresh = sampler.generate(*arguments, PROMPTS, [1, 2, 3], SETTINGS)
  assert np.abs(whole.astype(int) - fresh).max() <= 1
  none = sampler.vary(*arguments, images(3), PROMPTS, 0.0, [1, 2, 3], SETTINGS)
  z = sampler.encode(made.frozen, images(3))
  np.testing.assert_array_equal(none, sampler.decode(made.frozen, z))


@pytest.mark.parametrize("solver", ["euler", "ancestral"])
def test_an_image_depends_on_its_own_seed_alone(made, solver):
  """One at a time, eight at a time, and split over eight devices."""
  prompts = [f"{count} circles" for count in range(8)]
  seeds = [100, 7, 7, 2**32 - 1, 0, 1, 2, 3]
  mixed = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  options = settings(solver=solver)
  found, edits = {}, []
  for mesh, size in ((None, 1), (None, 8), (mixed, 8)):
    params, frozen = made.params, made.frozen
    if mesh is not None:
      params = sharding.put_tree(params, mesh)
      frozen = sharding.put_tree(frozen, mesh)
    sampler = ImageSampler(
      made.generator, batch_size=size, mesh=mesh, tokenizer=made.tokenizer
    )
    found[mesh, size] = sampler.generate(
      params, frozen, prompts, seeds, options, latents=True
    )
    if size == 8:
      edits.append(
        sampler.edit(params, frozen, images(8), prompts, seeds, options)
      )
  expected = found[None, 1]
  for key, z in found.items():
    np.testing.assert_allclose(z, expected, atol=1e-4, err_msg=str(key))
  assert np.abs(edits[0].astype(int) - edits[1]).max() <= 1
  assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_one_compilation_for_a_shape_solver_and_steps(made, monkeypatch):
  traced = []
  velocity = Generator.velocity

  def counted(self, params, z_t, *rest):
    traced.append(z_t.shape[0])
    return velocity(self, params, z_t, *rest)

  monkeypatch.setattr(Generator, "velocity", counted)
  sampler = ImageSampler(made.generator, batch_size=2, tokenizer=made.tokenizer)
  params, frozen = jax.device_put((made.params, made.frozen))

  def generate(count, **changes):
    sampler.generate(
      params, frozen, ["a"] * count, range(count), settings(**changes)
    )

  with jax.transfer_guard("disallow"):
    generate(5)
    assert len(traced) == 1 and traced[0] == 2 * 2
    for changes in (
      {"guidance": 7.0},
      {"shift": 1.0},
      {"grid": "diffusers"},
      {"guidance_low": 0.2},
      {"image_guidance": 9.0},
    ):
      generate(3, **changes)
    for strength in (0.3, 0.9):
      sampler.vary(
        params, frozen, images(2), ["a", "b"], strength, [0, 1], SETTINGS
      )
    assert len(traced) == 1
    generate(2, guidance=1.0)
    assert traced[1:] == [2]  # one evaluation a step


def test_denoising_ends_at_the_image(made, sampler):
  arguments = (made.params, made.frozen, PROMPTS, [1, 2, 3], SETTINGS)
  strips, times = sampler.denoise(*arguments, 3)
  assert strips.shape == (3, 3, 40, 40, 3) and strips.dtype == np.uint8
  np.testing.assert_allclose(times[[0, -1]], [1, 0])
  assert np.all(np.diff(times) < 0)
  final = sampler.generate(*arguments)
  assert np.abs(strips[:, -1].astype(int) - final).max() <= 1
  with pytest.raises(ValueError, match=r"points must lie in \[1, 4\]"):
    sampler.denoise(*arguments, 5)


def test_classes(folder):
  made = tiny_generator.build(folder, num_classes=3)
  sampler = ImageSampler(made.generator, batch_size=4)

  def generate(labels):
    seeds = [0] * len(labels)
    return sampler.generate(
      made.params, made.frozen, labels, seeds, SETTINGS, latents=True
    )

  z = generate([0, 2, 0])
  np.testing.assert_allclose(z[0], z[2], atol=1e-5)
  assert np.abs(z[0] - z[1]).max() > 1e-3
  with pytest.raises(ValueError, match=r"\[0, 3\), got 3"):
    generate([0, 3])
  with pytest.raises(ValueError, match="takes class labels, .* got 'a'"):
    generate(["a"])
  with pytest.raises(ValueError, match="needs its tokenizer"):
    ImageSampler(made.generator, batch_size=1, tokenizer=lambda _: None)


def test_no_images(made, sampler):
  arguments = (made.params, made.frozen, [], [], SETTINGS)
  assert sampler.generate(*arguments).shape == (0, 40, 40, 3)
  assert sampler.generate(*arguments, latents=True).shape == (0, 4, 4, 4)
  assert sampler.denoise(*arguments, 2)[0].shape == (0, 2, 40, 40, 3)


@pytest.mark.parametrize(
  "seeds, message",
  [
    ([1, 2], "1 prompts and 2 seeds"),
    ([-1], r"\[0, 2\^32\), got -1"),
    ([2**32], "got 4294967296"),
    ([0.5], "list of integers"),
  ],
)
def test_bad_seeds_are_named(made, sampler, seeds, message):
  with pytest.raises(ValueError, match=message):
    sampler.generate(made.params, made.frozen, ["a"], seeds, SETTINGS)
