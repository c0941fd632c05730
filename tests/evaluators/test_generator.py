"""The generator's evaluation, on generators whose figures are known."""

import dataclasses
import runpy
from pathlib import Path

import fake_generator
import numpy as np
import pytest
from PIL import Image

from psvae_jax.config import ConfigError
from psvae_jax.config import parser as config_parser
from psvae_jax.data import captions, scene_sampling
from psvae_jax.evaluators import joint_accuracy, prompts, sample_pictures
from psvae_jax.evaluators.generator import GeneratorEvaluator

_ROOT = Path(__file__).resolve().parents[2]
COUNT, REFERENCE, QUICK = 24, 60, 18


def make_config(data=None, model=None, **changes):
  raw = runpy.run_path(str(_ROOT / "configs" / "t2i.py"))["get_config"]("")
  raw.eval.update(
    dict(num_generated=COUNT, num_reference=REFERENCE, num_quick=QUICK)
    | dict(batch_size=16)
    | changes
  )
  raw.data.update(data or {})
  raw.model.update(model or {})
  return config_parser.parse(raw)


@pytest.fixture(scope="module")
def model():
  return fake_generator.TrueScenes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("t2i")


@pytest.fixture(scope="module")
def evaluated(folder):
  """Figures of the right generator, and how many images it drew."""
  model = fake_generator.TrueScenes()
  metrics = GeneratorEvaluator(make_config(), 48).evaluate(model, folder)
  return metrics, model.drawn


@pytest.fixture(scope="module")
def metrics(evaluated):
  return evaluated[0]


def test_prompts_of_scenes():
  asked = prompts.make(make_config(), 48)
  seen, one, two, held_out = (
    asked.groups[k] for k in ("seen", "one_object", "two_object", "heldout")
  )
  assert len(seen) == len(one) == len(held_out) == COUNT
  objects = np.array([len(spec.objects) for spec in asked.specs])
  assert (objects[one] == 1).all() and (objects[two] == 2).all()
  assert set(two) | (set(one) & set(seen)) == set(seen)
  # An image that two groups share is drawn once, from one seed.
  assert len(set(asked.seeds)) == len(asked.seeds) == len(asked.texts)
  assert len(asked.texts) < 3 * COUNT

  # As training says it, and never a combination that training has seen.
  for row in range(COUNT):
    scene = scene_sampling.sample_scene("validation", row)
    assert asked.texts[row] == captions.caption(scene)
    assert not scene_sampling.is_held_out(scene)
    heldout = scene_sampling.sample_scene("heldout", row)
    assert asked.texts[held_out[row]] == captions.caption(heldout)
    assert scene_sampling.is_held_out(heldout)
  for text, spec in zip(asked.texts, asked.specs, strict=True):
    assert captions.parse_spec(text) == spec


def test_real_images_are_disjoint():
  asked = prompts.make(make_config(), 48)
  originals = np.concatenate(list(asked.originals()))
  reference = np.concatenate(list(asked.reference()))
  training = [images for images, _ in asked.training()]
  training = np.concatenate(training)
  assert len(originals) == len(asked.texts)
  assert len(reference) == REFERENCE and len(training) == REFERENCE + COUNT
  sets = [originals[:COUNT], reference, training]
  names = [{image.tobytes() for image in images} for images in sets]
  assert len(set.union(*names)) == sum(map(len, names)) == sum(map(len, sets))


def test_a_right_generator_has_every_figure_right(metrics):
  joint = {k: v for k, v in metrics.items() if "/joint_" in k}
  for group in ("", "_one_object", "_two_object", "_heldout"):
    for end in ("", "_ceiling"):
      assert joint[f"eval/joint_accuracy{group}{end}"] == 1.0
  for part in joint_accuracy.PARTS:
    assert joint[f"eval/joint_{part}"] == joint[f"eval/joint_{part}_heldout"]
  assert set(joint.values()) == {1.0}
  # Its pictures are as far from the reference as other real ones.
  floor = metrics["eval/frechet_distance_floor"]
  assert metrics["eval/frechet_distance_ceiling"] == floor
  assert metrics["eval/frechet_distance"] < 1.5 * floor
  assert abs(metrics["eval/kernel_distance"]) < 0.02
  assert metrics["eval/off_manifold_share"] < 0.2
  matched, ceiling, shuffled = (
    metrics[f"eval/caption_similarity{end}"]
    for end in ("", "_ceiling", "_floor")
  )
  assert shuffled < 0.02 < matched
  assert ceiling == pytest.approx(matched, abs=0.05)


def test_noise_has_none(metrics):
  noise = fake_generator.Noise()
  wrong = GeneratorEvaluator(make_config(), 48).evaluate(noise)
  assert set(wrong) == set(metrics)
  for group in ("", "_one_object", "_two_object", "_heldout"):
    assert wrong[f"eval/joint_accuracy{group}"] == 0.0
  # What does not depend on the generator is the same.
  same = {k for k in wrong if k.endswith(("_ceiling", "_real"))}
  same.add("eval/frechet_distance_floor")
  assert {k: wrong[k] for k in same} == {k: metrics[k] for k in same}
  distance = "eval/frechet_distance"
  assert wrong[distance] > 5 * wrong[f"{distance}_floor"]
  assert wrong["eval/kernel_distance"] > 0.02
  assert wrong["eval/off_manifold_share"] == 1.0
  tail = wrong["eval/manifold_distance_tail"]
  assert tail > wrong["eval/manifold_distance_tail_real"]
  assert wrong["eval/caption_similarity"] < 0.05


def test_each_image_is_drawn_once(evaluated):
  drawn = evaluated[1]
  pictures = len(sample_pictures.GUIDANCE) * len(sample_pictures.STEPS) * 3 + 4
  assert drawn == len(prompts.make(make_config(), 48).texts) + pictures


def test_batches_change_nothing(model, metrics):
  other = GeneratorEvaluator(make_config(batch_size=7), 48).evaluate(model)
  assert other == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_a_copying_generator_is_on_the_manifold(model):
  images = np.concatenate(
    [i for i, _ in prompts.make(make_config(), 48).training()]
  )

  class Copies(fake_generator.TrueScenes):
    def generate(self, texts, seeds, **settings):
      return images[np.asarray(seeds) % REFERENCE]

  got = GeneratorEvaluator(make_config(), 48).evaluate(Copies())
  assert got["eval/manifold_distance"] == 0.0
  assert got["eval/off_manifold_share"] == 0.0
  assert got["eval/joint_accuracy"] < 0.2


def test_a_diverged_generator_is_scored():
  class Diverged(fake_generator.TrueScenes):
    def generate_latents(self, texts, seeds, **settings):
      latents = super().generate_latents(texts, seeds)
      return np.full_like(latents, np.nan)

    def decode(self, latents):
      return super().decode(np.nan_to_num(latents))

    def features(self, images):
      features = super().features(images)
      grey = (images == 128).all((1, 2, 3))
      return np.where(grey[:, None], np.float32(np.nan), features)

  got = GeneratorEvaluator(make_config(), 48).evaluate(Diverged())
  assert np.isnan(got["eval/frechet_distance"])
  assert np.isnan(got["eval/kernel_distance"])
  assert np.isnan(got["eval/manifold_distance"])
  assert got["eval/off_manifold_share"] == 1.0
  assert got["eval/joint_accuracy"] == 0.0
  assert np.isfinite(got["eval/frechet_distance_floor"])


def test_quick_is_the_first_of_the_whole(tmp_path, folder, metrics):
  model = fake_generator.TrueScenes()
  got = GeneratorEvaluator(make_config(), 48).evaluate(
    model, tmp_path, quick=True, step=40
  )
  assert model.drawn == QUICK
  assert [p.name for p in tmp_path.iterdir()] == ["generated_40.npz"]
  assert set(got) < set(metrics)
  assert "eval/joint_accuracy" in got
  assert not [k for k in got if "heldout" in k or "ceiling" in k]
  with np.load(tmp_path / "generated_40.npz") as quick:
    with np.load(folder / "generated.npz") as whole:
      for name in ("images", "captions", "correct"):
        count = sample_pictures.NUM_QUICK
        np.testing.assert_array_equal(quick[name], whole[name][:count])


def test_pictures(folder, metrics):
  model = fake_generator.TrueScenes()
  files = {p.name: dict(np.load(p)) for p in folder.iterdir()}
  assert set(files) == {
    "generated.npz",
    "guidance_grid.npz",
    "denoising.npz",
  }
  asked = prompts.make(make_config(), 48)
  generated = files["generated.npz"]
  assert generated["images"].shape == (24, 48, 48, 3)
  assert generated["images"].dtype == np.uint8
  assert list(generated["captions"]) == asked.texts[:24]
  assert generated["correct"].dtype == bool and generated["correct"].all()
  np.testing.assert_array_equal(
    generated["images"], model.generate(asked.texts[:24], asked.seeds[:24])
  )
  grid = files["guidance_grid.npz"]
  assert grid["images"].shape == (4, 4, 3, 48, 48, 3)
  assert grid["correct"].shape == (4, 4, 3)
  assert list(grid["captions"]) == asked.texts[:3]
  strips = files["denoising.npz"]
  assert strips["images"].shape == (4, 8, 48, 48, 3)
  assert strips["times"][0] == 1.0 and strips["times"].shape == (8,)


def test_the_grid_has_guidance_down_and_steps_across(tmp_path):
  class Marked(fake_generator.TrueScenes):
    def generate(self, texts, seeds, guidance=0, steps=0, **settings):
      images = super().generate(texts, seeds)
      images[..., 0], images[..., 1] = guidance, steps
      return images

  asked = prompts.make(make_config(), 48)
  sample_pictures.write(
    Marked(), asked, np.zeros((1, 48, 48, 3), np.uint8), [], tmp_path
  )
  with np.load(tmp_path / "guidance_grid.npz") as grid:
    for row, guidance in enumerate(grid["guidance"]):
      for column, steps in enumerate(grid["steps"]):
        cell = grid["images"][row, column, :, 0, 0]
        assert (cell[:, 0] == guidance).all() and (cell[:, 1] == steps).all()


def test_parts_are_shares_of_their_group():
  specs = [
    captions.parse_spec(text)
    for text in ("a red star", "a red star above a blue ring", "a blue ring")
  ]
  right = dict.fromkeys((*joint_accuracy.PARTS, "all"), True)
  checks = [right, right | {"relation": False, "all": False}, right]
  groups = {
    "seen": np.arange(3),
    "one_object": np.array([0, 2]),
    "heldout": np.array([1]),
    "two_object": np.array([], int),
  }
  got = joint_accuracy.joint_metrics(checks, specs, groups, "_x")
  assert got["eval/joint_accuracy_x"] == pytest.approx(2 / 3)
  assert got["eval/joint_relation_x"] == 0.0  # one caption names one
  assert got["eval/joint_shape_x"] == 1.0
  assert got["eval/joint_accuracy_one_object_x"] == 1.0
  assert got["eval/joint_accuracy_heldout_x"] == 0.0
  assert not [k for k in got if "two_object" in k]


class Photographs(fake_generator.TrueScenes):
  """Draws one flat colour a seed."""

  def generate(self, texts, seeds, **settings):
    self.texts = texts
    shape = (1, self.image_size, self.image_size, 3)
    return np.concatenate([np.full(shape, s % 256, np.uint8) for s in seeds])


def test_photographs(photos, tmp_path):
  config = make_config(
    dict(
      source="folder",
      root=str(photos / "train"),
      eval_root=str(photos / "validation"),
      augment="center",
      num_train=60,
      num_eval=41,
    )
  )
  asked = prompts.make(config, 48)
  assert len(asked.texts) == 20  # half of the validation split
  assert sum(len(images) for images in asked.reference()) == 21
  got = GeneratorEvaluator(config, 48).evaluate(Photographs(), tmp_path)
  assert not [k for k in got if "joint" in k]
  assert got["eval/frechet_distance"] > got["eval/frechet_distance_floor"]
  assert got["eval/off_manifold_share"] <= 1.0
  assert np.isfinite(list(got.values())).all()
  assert ("eval/caption_similarity" in got) == asked.captioned
  with np.load(tmp_path / "generated.npz") as arrays:
    assert "correct" not in arrays
  quick = GeneratorEvaluator(config, 48).evaluate(
    Photographs(), tmp_path, quick=True, step=3
  )
  assert quick == {}
  assert (tmp_path / "generated_3.npz").is_file()


def test_classes_are_drawn_in_turn():
  config = make_config(dict(source="bundled"))
  model = dataclasses.replace(config.model, condition="class", num_classes=4)
  config = dataclasses.replace(config, model=model)
  asked = prompts.make(config, 48)
  assert asked.texts == list(range(4))[: len(asked.texts)]
  assert not asked.captioned and asked.specs is None


@pytest.mark.parametrize(
  "num_classes, count, wanted",
  [
    (3, 7, [0, 1, 2, 0, 1, 2, 0]),
    (7, 3, [0, 2, 4]),
    (4, 4, [0, 1, 2, 3]),
    (1, 2, [0, 0]),
  ],
)
def test_classes_are_spread(num_classes, count, wanted):
  assert prompts._in_turn(num_classes, count) == wanted


def test_images_of_all_classes_are_compared(tmp_path):
  """Folders list one class after the other."""
  for number in range(4):
    for i in range(20):
      path = tmp_path / f"class {number}" / f"{i}.png"
      path.parent.mkdir(exist_ok=True)
      Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(path)
  (tmp_path / "class 2" / "7.png").write_bytes(b"")
  asked = prompts.make(
    make_config(
      dict(
        source="folder", root=str(tmp_path), augment="center", max_bad_share=0.1
      ),
      dict(condition="class", num_classes=9),
      num_generated=6,
      num_reference=12,
    ),
    8,
  )
  # Of the data's classes, not of those that the generator could learn.
  assert set(asked.texts) <= set(range(4))
  images = np.concatenate([part for part, _ in asked.training()])
  assert {int(image[0, 0, 0]) // 60 for image in images} == set(range(4))


@pytest.mark.parametrize("name", ["num_generated", "num_reference"])
def test_one_image_has_no_distance(name):
  with pytest.raises(ConfigError, match=f"eval.{name}=1 must be at least 2"):
    make_config(**{name: 1})
