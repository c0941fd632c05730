"""CLIP's preprocessing, pixel by pixel as transformers has it."""

import json

import numpy as np
import pytest
import torchvision_ops  # noqa: F401  before transformers imports torchvision
from PIL import Image

from psvae_jax.pretrained import clip_images

transformers = pytest.importorskip("transformers")

SIZES = [(32, 32), (64, 40), (40, 65), (33, 97), (50, 19), (31, 32), (7, 9)]


def processor(size, crop, kind="CLIPImageProcessorPil"):
  return getattr(transformers, kind)(
    size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}
  )


def reference(images, size, crop, **options):
  """(B, crop, crop, 3) as the network would be given them."""
  batch = processor(size, crop, **options)(images, return_tensors="np")
  return batch["pixel_values"].transpose(0, 2, 3, 1)


def random_images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.mark.parametrize("size, crop", [(32, 32), (35, 32), (30, 23)])
def test_same_pixels_as_transformers(size, crop):
  images = random_images()
  ours = clip_images.ClipImages(size, crop)
  pixels = ours(images)
  assert pixels.shape == (len(images), crop, crop, 3)
  assert pixels.dtype == np.uint8
  expected = reference(images, size, crop)
  np.testing.assert_allclose(ours.normalize(pixels), expected, atol=1e-5)
  levels = expected * np.array(ours.std) + np.array(ours.mean)
  np.testing.assert_array_equal(pixels, np.round(levels * 255))


def test_photographs(photos):
  paths = sorted((photos / "validation").rglob("*.jpg"))[:4]
  images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
  images[0], images[1] = images[0][:, :150], images[1][:130]
  ours = clip_images.ClipImages(224, 224)
  expected = reference(images, 224, 224)
  np.testing.assert_allclose(ours.normalize(ours(images)), expected, atol=1e-5)


def test_torchvision_is_a_level_away_at_most():
  """What transformers takes where torchvision is installed."""
  ours = clip_images.ClipImages(32, 32)
  images = random_images()
  theirs = reference(images, 32, 32, kind="CLIPImageProcessor")
  difference = np.abs(ours.normalize(ours(images)) - theirs) * ours.std * 255
  assert difference.max() < 1.01


def test_an_array_is_many_images():
  images = np.stack([random_images()[1]] * 2)
  ours = clip_images.ClipImages(32, 32)
  np.testing.assert_array_equal(ours(images), ours(list(images)))
  assert ours(images[:0]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
  "image, message",
  [
    (np.zeros((8, 8, 3)), r"image 1 must be uint8 .* got float64 \(8, 8, 3\)"),
    (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
    (np.zeros((8, 8, 4), np.uint8), r"uint8 \(8, 8, 4\)"),
    (np.zeros((0, 8, 3), np.uint8), r"uint8 \(0, 8, 3\)"),
  ],
)
def test_bad_images(image, message):
  good = np.zeros((8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match=message):
    clip_images.ClipImages(8, 8)([good, image])


def write(folder, **values):
  raw = {"size": 40, "crop_size": 32, "resample": 3} | values
  (folder / "preprocessor_config.json").write_text(json.dumps(raw))
  return folder


def test_reads_what_is_published(tmp_path):
  """As OpenAI published it, and as transformers writes it now."""
  assert clip_images.read(tmp_path, 32) == clip_images.ClipImages(32, 32)
  mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
  want = clip_images.ClipImages(40, 32, tuple(mean), tuple(std))
  write(tmp_path, image_mean=mean, image_std=std)
  assert clip_images.read(tmp_path, 32) == want

  new = tmp_path / "new"
  theirs = processor(40, 32)
  theirs.image_mean, theirs.image_std = mean, std
  theirs.save_pretrained(new)
  assert clip_images.read(new, 32) == want

  composite = tmp_path / "composite"
  composite.mkdir()
  raw = json.loads((new / "preprocessor_config.json").read_text())
  text = json.dumps({"image_processor": raw})
  (composite / "processor_config.json").write_text(text)
  assert clip_images.read(composite, 32) == want


@pytest.mark.parametrize(
  "values, message",
  [
    ({"do_center_crop": False}, "do_center_crop False is not True"),
    ({"resample": 2}, "resample 2 is not 3"),
    ({"rescale_factor": 1.0}, "rescale_factor 1.0 is not 1/255"),
    ({"crop_size": 40}, "crop_size 40 is not the 32"),
    ({"crop_size": {"height": 32, "width": 30}}, "crop_size"),
    ({"size": 31}, "size 31 must be"),
    ({"size": {"height": 40, "width": 40}}, "'height': 40.* must be"),
    ({"size": {"shortest_edge": [40]}}, r"\[40\].* must be"),
    ({"image_mean": [0.5]}, "image_mean"),
    ({"image_std": [0.5, 0.5, 0]}, "image_std.*not positive"),
  ],
)
def test_bad_files(tmp_path, values, message):
  with pytest.raises(ValueError, match=message) as error:
    clip_images.read(write(tmp_path, **values), 32)
  assert "preprocessor_config.json" in str(error.value)


@pytest.mark.parametrize("missing", ["crop_size", "size"])
def test_a_network_of_absurd_images(tmp_path, missing):
  """Fields that a file leaves out are the network's, and may be too large."""
  side = 2**16 + 1
  raw = {"size": side, "crop_size": side, "resample": 3}
  del raw[missing]
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="crop_size 65537 .* at most 65536"):
    clip_images.read(tmp_path, side)


def test_bad_composite_file(tmp_path):
  (tmp_path / "processor_config.json").write_text("{}")
  with pytest.raises(ValueError, match="image_processor must be an object"):
    clip_images.read(tmp_path, 32)
