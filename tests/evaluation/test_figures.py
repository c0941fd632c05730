"""Both tables, from networks that cost nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_metrics
from PIL import Image

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.evaluation import (
  generation,
  models,
  output,
  reconstruction,
  references,
)
from psvae_jax.evaluation.figures import Evaluation, cell
from psvae_jax.evaluation.image_sets import open_set
from psvae_jax.evaluators import comparison
from psvae_jax.evaluators.feature_networks import FeatureExtractor
from psvae_jax.evaluators.frechet import FeatureMoments, distance_between
from psvae_jax.evaluators.kernel_distance import kernel_distance
from psvae_jax.evaluators.reference_npz import ReferenceFile, write_reference


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig())


def _settings(tmp_path, **changes):
  return references.Settings(tmp_path / "state", batch_size=8, **changes)


def _model(name="dark", shift=-0.1, size=24, divisor=8):
  """Reconstructs images a little darker."""

  def reconstruct(params, images):
    return images.astype(jnp.float32) / 127.5 - 1.0 + params["shift"]

  return models.Model(
    name,
    f"fingerprint of {shift}",
    {"shift": np.float32(shift)},
    reconstruct,
    size,
    divisor,
    "float32",
    "a model of one number",
  )


def _pixels(images):
  return np.concatenate([b["image"][b["mask"]] for b in images.batches(8)])


def _features(pixels, kind="pool"):
  network = tiny_metrics.inception()
  return np.asarray(network.features(network.params, pixels)[kind])


def _distance(x, y):
  both = [FeatureMoments().update(z) for z in (x, y)]
  return distance_between(*both)


def test_reconstruction(mesh, tmp_path):
  images = open_set("scenes", size=24, count=30)
  found = reconstruction.evaluate(
    [_model(), _model("same", 0.0)],
    images,
    tiny_metrics.networks(),
    _settings(tmp_path),
    mesh,
  )
  pixels = _pixels(images)
  dark = np.round(np.clip(pixels - 12.75, 0, 255)).astype(np.uint8)
  row = found.rows["dark"]
  want = comparison.psnr(dark, pixels).mean()
  assert row["psnr"] == pytest.approx(want, abs=0.05)
  for key, kind in (("rfid", "pool"), ("rsfid", "spatial")):
    want = _distance(_features(dark, kind), _features(pixels, kind))
    assert row[key] == pytest.approx(want, rel=0.02)
  same = found.rows["same"]
  assert same["psnr"] == 100 and same["rfid"] < 1e-6 and same["ssim"] > 0.9999
  assert found.columns == ["psnr", "ssim", "rfid", "rsfid", "rfd_dinov2"]
  assert found.left_out == {"lpips": "--lpips was not given"}
  assert found.of["rfid"]["inception"] == "tiny"
  assert found.of["rfid"]["reference"] == "the set's own images, as many"
  assert found.of["rfid"]["count"] == 30
  assert "reconstructions" in found.of["rfid"]["definition"]
  assert not any(key.startswith("g") for key in found.rows["dark"])


def test_rounding_is_named_and_half_a_level_apart(mesh, tmp_path):
  images = open_set("scenes", size=24, count=8)
  # Just below the level: what rounds up is cut off.
  model = [_model("below", -0.3 / 127.5)]
  rows = {}
  for rounding in ("round", "truncate"):
    settings = _settings(tmp_path, rounding=rounding)
    found = reconstruction.evaluate(
      model, images, tiny_metrics.networks(), settings, mesh
    )
    assert found.protocol["rounding"] == f"{rounding} to 8 bits"
    rows[rounding] = found.rows["below"]["psnr"]
  assert rows["round"] == 100
  # Every value is one level too dark, but those that were 0 before.
  assert rows["truncate"] == pytest.approx(20 * np.log10(255), abs=0.1)


def test_models_of_other_sizes(mesh, tmp_path):
  small, large = _model(size=24), _model("large", size=40, divisor=0)
  with pytest.raises(ValueError, match=r"\(dark 24, large 40\).*--size=N"):
    models.common_size([small, large], None)
  assert models.common_size([small, large], 32) == 32
  assert small.takes(32) and not small.takes(30) and not large.takes(32)
  assert small.resize(32) == "none, 32 × 32"
  assert "32 → 40 before and 40 → 32 after" in large.resize(32)
  images = open_set("scenes", size=32, count=8)
  large = _model("large", 0.0, size=40, divisor=0)
  found = reconstruction.evaluate(
    [large], images, tiny_metrics.networks(), _settings(tmp_path), mesh
  )
  there = [
    np.asarray(Image.fromarray(x).resize((40, 40), Image.Resampling.BICUBIC))
    for x in _pixels(images)
  ]
  back = [
    np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC))
    for x in there
  ]
  want = comparison.psnr(np.stack(back), _pixels(images)).mean()
  assert found.rows["large"]["psnr"] == pytest.approx(want, abs=0.02)


def test_reconstructions_that_are_not_finite_are_counted(mesh, tmp_path):
  images = open_set("scenes", size=24, count=8)
  found = reconstruction.evaluate(
    [_model(shift=np.nan)],
    images,
    tiny_metrics.networks(),
    _settings(tmp_path),
    mesh,
  )
  assert "dark: 8 reconstructions held NaN or infinity" in found.notes


@pytest.fixture(scope="module")
def sets():
  made = open_set("scenes:heldout", size=24, count=40)
  return made, open_set("scenes", size=24, count=50)


def test_generation(mesh, tmp_path, sets):
  made, real = sets
  given, settings = tiny_metrics.networks(), _settings(tmp_path)
  reference = references.of_images(real, given, settings, mesh, rows=("pool",))
  found = generation.evaluate([made], given, settings, mesh, reference)
  row = found.rows["scenes:heldout"]
  x, y = _features(_pixels(made)), _features(_pixels(real))
  assert row["gfid"] == pytest.approx(_distance(x, y), rel=1e-3)
  kid, _ = kernel_distance(x, y, num_subsets=100, subset_size=1000)
  assert row["kid"] == pytest.approx(kid, rel=1e-3, abs=1e-5)
  assert 0 < row["precision"] <= 1 and 0 < row["recall"] <= 1
  assert row["inception_score"] > 1 and row["inception_score_std"] >= 0
  assert found.of["kid"]["subsets"] == 100
  assert found.of["kid"]["subset_size"] == {"scenes:heldout": 40}
  assert found.of["precision"]["neighbours"] == 3
  assert found.of["gfid"]["reference_count"] == 50
  assert found.left_out == {"clip_score": "--clip was not given"}
  assert not any(key.startswith("r") and key != "recall" for key in row)
  described = found.of_row["scenes:heldout"]
  assert described["label_sampling"] == "not stated"


def test_against_statistics_of_a_file(mesh, tmp_path, sets):
  made, real = sets
  given, settings = tiny_metrics.networks(), _settings(tmp_path)
  moments = FeatureMoments().update(_features(_pixels(real)))
  path = tmp_path / "reference.npz"
  statistics = {"pool": (moments.mean, moments.covariance)}
  write_reference(path, statistics, count=50)
  reference = references.of_file(ReferenceFile(path), given, 24)
  found = generation.evaluate([made], given, settings, mesh, reference)
  row = found.rows["scenes:heldout"]
  want = _distance(_features(_pixels(made)), _features(_pixels(real)))
  assert row["gfid"] == pytest.approx(want, rel=1e-3)
  assert "gsfid" not in row and "kid" not in row
  assert found.left_out["gsfid"] == (
    "the reference has no statistics of spatial features"
  )
  assert "no images" in found.left_out["recall"]
  # What the file says of its network must be what is at hand.
  for recorded, message in (
    ({"inception_fingerprint": "seed 0", "inception": "elsewhere"}, None),
    ({"inception_fingerprint": "seed 1"}, "fingerprint 'seed 1', this"),
  ):
    protocol = {"networks": {"inception": recorded}, "size": 64}
    write_reference(path, statistics, count=50, protocol=protocol)
    if message is None:
      found = references.of_file(ReferenceFile(path), given, 24)
      assert "64 pixels a side" in found.notes[0]
      continue
    with pytest.raises(ValueError, match=message):
      references.of_file(ReferenceFile(path), given, 24)
  write_reference(path, {"pool": (np.zeros(9), np.eye(9))})
  with pytest.raises(ValueError, match="statistics of 9 pool .* makes 6"):
    references.of_file(ReferenceFile(path), given, 24)


def test_few_images_are_left_out_and_said(mesh, tmp_path, sets):
  few = open_set("scenes:heldout", size=24, count=3)
  given, settings = tiny_metrics.networks(), _settings(tmp_path)
  reference = references.of_images(
    sets[1], given, settings, mesh, rows=("pool",)
  )
  found = generation.evaluate([few], given, settings, mesh, reference)
  assert set(found.rows["scenes:heldout"]) == {
    *("gfid", "gsfid", "gfd_dinov2", "kid", "kid_std")
  }
  assert "fewer than the 10 splits" in found.left_out["inception_score"]
  assert "3 neighbours need more" in found.left_out["precision"]
  assert "biased far upwards" in found.notes[0]
  one = open_set("scenes:heldout", size=24, count=1)
  with pytest.raises(ValueError, match="1 readable image: .* two or more"):
    generation.evaluate([one], given, settings, mesh, reference)


def test_prompts_go_with_the_images_they_are_of(tmp_path):
  folder = tmp_path / "made"
  folder.mkdir()
  for name in ("1", "2", "10"):
    Image.new("RGB", (12, 12)).save(folder / f"{name}.png")
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a\nb\nc\n\n")
  with pytest.raises(ValueError, match="10.png sorts before 2.png"):
    generation.read_prompts(str(prompts), open_set(str(folder)))
  (folder / "10.png").rename(folder / "3.png")
  images = open_set(str(folder))
  found = generation.read_prompts(str(prompts), images)
  assert list(found.texts) == ["a", "b", "c"]
  prompts.write_text("a\u2028A\nb\r\nc", encoding="utf-8")
  found = generation.read_prompts(str(prompts), images)
  assert list(found.texts) == ["a\u2028A", "b", "c"]
  prompts.write_text("a\nb\n")
  with pytest.raises(ValueError, match="has 2 prompts, .* 3 images"):
    generation.read_prompts(str(prompts), images)
  with pytest.raises(ValueError, match="3 of the 3 images .* have no caption"):
    generation.read_prompts("captions", images)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    generation.read_prompts(str(tmp_path / "none.txt"), images)
  rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in (1, 2, 3)]
  (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
  found = generation.read_prompts("captions", open_set(str(folder)))
  assert list(found.texts) == ["number 1", "number 2", "number 3"]


class _TinyClip:
  """Embeds colours; texts name one."""

  name, fingerprint = "tiny", "f" * 64
  params = {"scale": np.float32(1)}
  colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}

  def images(self, images):
    return np.stack(images).astype(np.float32)

  def embed_pixels(self, params, pixels):
    x = pixels.mean((1, 2)) * params["scale"]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def text_embeds(self, texts):
    return np.array([self.colours[text] for text in texts], np.float32)


def test_clip_score_pairs_images_with_prompts(mesh, tmp_path):
  folder = tmp_path / "made"
  folder.mkdir()
  colours = ["red", "red", "blue", "red", "blue"]
  for i, colour in enumerate(colours):
    Image.new("RGB", (12, 12), colour).save(folder / f"{i}.png")
  images = open_set(str(folder))
  given = generation.Networks(clip=_TinyClip())

  def score(texts):
    prompts = {images.name: generation.Prompts("test", texts)}
    found = generation.evaluate(
      [images], given, _settings(tmp_path), mesh, None, prompts
    )
    assert found.columns == ["clip_score"]
    return found.rows[images.name]["clip_score"]

  assert score(colours) == pytest.approx(100)
  assert score(["red"] * 4 + ["blue"]) == pytest.approx(80)
  assert score(["green"] * 5) == pytest.approx(0)


def test_output_names_everything(mesh, tmp_path, capsys):
  found = Evaluation("generation", {"reference": {"data": "x", "count": 7}})
  found.rows = {
    "a|b": {"gfid": 1.23456, "kid": 0.5, "kid_std": 0.1},
    "c": {"gfid": float("nan")},
  }
  found.explain("gfid", inception_resize="tf1")
  found.left_out["clip_score"] = "--clip was not given"
  found.note("take care")
  found.note("take care")
  paths = output.write(found, tmp_path)
  table = paths[1].read_text()
  assert "| images | gFID ↓ |             KID ↓ |" in table
  assert "1.235 | 0.50000 ± 0.10000" in table
  assert "nan |                 –" in table
  for text in (
    "reference: data: x; count: 7",
    "gFID: definition: squared Fréchet distance",
    "inception resize: tf1",
    "CLIP score: --clip was not given",
  ):
    assert text in table
  assert table.count("take care") == 1
  saved = json.loads(paths[0].read_text())
  assert saved["kind"] == "generation"
  assert saved["figures"]["a|b"]["gfid"] == 1.23456
  assert saved["figures"]["c"]["gfid"] == "NaN"
  output.show(found)
  assert "gFID" in capsys.readouterr().out
  assert cell("kid", {}) == "–"


def test_features_do_not_depend_on_default_precision(mesh):
  with jax.default_matmul_precision("bfloat16"):
    extractor = FeatureExtractor([tiny_metrics.inception()], mesh)
    images = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), np.uint8)
    put = sharding.put_batch({"image": images}, mesh)["image"]
    found = extractor(put)["pool"]
  np.testing.assert_allclose(found, _features(images), rtol=1e-5, atol=1e-5)
