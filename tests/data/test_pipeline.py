"""The order contract, resumption, transforms and evaluation batches."""

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from psvae_jax.data import (
  bundled,
  folder,
  pipeline,
  scenes,
  sources,
  transforms,
  views,
)


class ArraySource:
  """Noise images that tell their index: image[0, 0, 0] == index % 256."""

  def __init__(self, length: int, size: tuple[int, int] = (4, 4)):
    rng = np.random.default_rng(0)
    self._images = rng.integers(0, 256, (length, *size, 3), np.uint8)
    self._images[:, 0, 0, 0] = np.arange(length)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)
    return {
      "image": self._images[index],
      "caption": f"picture {index}",
      "index": np.int64(index),
      "path": f"{index}.png",
    }

  def __repr__(self) -> str:
    return f"ArraySource({len(self)})"


def tokenize(captions):
  """Character codes, padded to 12."""
  tokens = np.zeros((len(captions), 12), np.int32)
  for row, caption in zip(tokens, captions, strict=True):
    row[: len(caption)] = [ord(c) for c in caption]
  return tokens, tokens > 0


def jitter(element, rng):
  return {**element, "noise": rng.standard_normal(3).astype(np.float32)}


def train(source, **options):
  defaults = {"image_size": 4, "batch_size": 8, "seed": 0, "num_threads": 0}
  return pipeline.train_iterator(source, **{**defaults, **options})


def take(iterator, count: int) -> list[dict]:
  return [next(iterator) for _ in range(count)]


def assert_same(batches, others) -> None:
  assert len(batches) == len(others) > 0
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def over_hosts(make, hosts: int) -> list[dict]:
  """Global batches: the hosts' batches, concatenated in host order."""
  per_host = [make(process_index=h, process_count=hosts) for h in range(hosts)]
  return [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*per_host, strict=True)
  ]


def test_batches_hold_what_they_promise():
  source = ArraySource(20)
  batch = next(train(source, tokenize=tokenize, transform=jitter))
  assert set(batch) == {"image", "index", "tokens", "token_mask", "noise"}
  assert batch["image"].shape == (8, 4, 4, 3)
  assert batch["image"].dtype == np.uint8
  assert batch["index"].shape == (8,) and batch["index"].dtype == np.int64
  assert batch["tokens"].dtype == np.int32
  assert batch["token_mask"].dtype == np.bool_
  assert batch["noise"].shape == (8, 3)
  for row, index in enumerate(batch["index"]):
    np.testing.assert_array_equal(batch["image"][row], source[index]["image"])
    mask = batch["token_mask"][row]
    text = "".join(map(chr, batch["tokens"][row][mask]))
    assert text == f"picture {index}"
  assert set(next(train(source))) == {"image", "index"}


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_host_count(hosts):
  source = ArraySource(21, (9, 7))

  def make(**split):
    options = {"augment": "crop_flip", "tokenize": tokenize}
    return take(train(source, transform=jitter, **options, **split), 6)

  assert_same(over_hosts(make, hosts), make())


def test_each_host_holds_one_block_of_the_global_batch():
  whole = take(train(ArraySource(30)), 5)
  for host in range(4):
    part = take(train(ArraySource(30), process_index=host, process_count=4), 5)
    for batch, local in zip(whole, part, strict=True):
      expected = batch["index"][2 * host : 2 * host + 2]
      np.testing.assert_array_equal(local["index"], expected)


def test_epochs_are_different_permutations():
  batches = take(train(ArraySource(24)), 9)
  epochs = np.concatenate([batch["index"] for batch in batches]).reshape(3, 24)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(24), (3, 1)))
  assert (epochs[0] != np.arange(24)).any()
  assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_seed_decides_order_and_augmentation():
  source = ArraySource(30, (16, 16))
  options = {"augment": "crop_flip"}
  first = take(train(source, **options), 3)
  assert_same(first, take(train(source, **options), 3))
  other = take(train(source, seed=1, **options), 3)
  assert any(
    (a["index"] != b["index"]).any() for a, b in zip(first, other, strict=True)
  )


def test_augmentation_differs_between_epochs():
  iterator = train(ArraySource(1, (16, 16)), augment="crop", batch_size=1)
  images = [batch["image"] for batch in take(iterator, 4)]
  assert any((image != images[0]).any() for image in images[1:])


def test_further_transform_leaves_the_augmentation_alone():
  source = ArraySource(30, (16, 16))
  plain = take(train(source, augment="crop"), 3)
  extra = take(train(source, augment="crop", transform=jitter), 3)
  for a, b in zip(plain, extra, strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
  assert len(np.unique(np.concatenate([b["noise"] for b in extra]))) == 72


def test_threads_change_nothing():
  source = ArraySource(21, (9, 7))
  options = {"augment": "crop"}
  alone = take(train(source, **options), 6)
  threaded = train(source, num_threads=3, prefetch=5, **options)
  assert_same(alone, take(threaded, 6))


@pytest.mark.parametrize("length", [1, 3, 8])
def test_source_smaller_than_a_batch(length):
  batches = take(train(ArraySource(length), batch_size=8), 3)
  counts = np.bincount(np.concatenate([b["index"] for b in batches]))
  assert len(counts) == length and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_by_state(num_threads):
  options = {"augment": "crop_flip", "num_threads": num_threads}
  source = ArraySource(21, (9, 7))
  iterator = train(source, **options)
  take(iterator, 4)
  state = iterator.get_state()
  expected = take(iterator, 5)
  fresh = train(source, **options)
  fresh.set_state(state)
  assert_same(take(fresh, 5), expected)
  iterator.set_state(state)  # and back in time
  assert_same(take(iterator, 5), expected)


def test_state_holds_for_another_host_count():
  source = ArraySource(21)
  iterator = train(source)
  take(iterator, 3)
  state = iterator.get_state()

  def make(**split):
    resumed = train(source, **split)
    resumed.set_state(state)
    return take(resumed, 3)

  assert_same(over_hosts(make, 2), take(iterator, 3))


def test_resume_through_orbax(tmp_path):
  source = ArraySource(21)
  iterator = train(source, num_threads=2)
  take(iterator, 3)
  with ocp.CheckpointManager(tmp_path) as manager:
    save = grain.checkpoint.CheckpointSave(iterator)
    manager.save(3, args=ocp.args.Composite(data=save))
    manager.wait_until_finished()
    expected = take(iterator, 4)
    fresh = train(source, num_threads=2)
    restore = grain.checkpoint.CheckpointRestore(fresh)
    manager.restore(3, args=ocp.args.Composite(data=restore))
  assert_same(take(fresh, 4), expected)


def test_broken_image_stops_training_with_its_name(tmp_path):
  for i in range(4):
    Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
  (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
  iterator = train(folder.FolderSource(tmp_path), num_threads=2, batch_size=4)
  with pytest.raises(ValueError, match=r"2\.png: not a readable image"):
    next(iterator)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"process_count": 3}, "batch size 8 does not divide over 3 hosts"),
    ({"batch_size": 0}, "batch size 0"),
    ({"process_index": 2, "process_count": 2}, "process_index 2 is not below"),
    ({"augment": "cutmix"}, "'cutmix'; there are none, center, crop, crop_fl"),
    ({"augment": "crop", "min_scale": 1.5}, "min_scale must lie in"),
    ({"image_size": 0}, "image size must be at least 1"),
    ({"prefetch": 0}, "prefetch at least 1"),
    ({"seed": -1}, "seed must lie in"),
    ({"seed": 2**32}, "seed must lie in"),
  ],
)
def test_bad_train_settings(options, message):
  with pytest.raises(ValueError, match=message):
    train(ArraySource(9), **options)


def test_empty_source():
  class Empty(ArraySource):
    def __len__(self) -> int:
      return 0

  with pytest.raises(ValueError, match="no examples to train on"):
    train(Empty(1))


def test_wrong_size_without_augmentation_names_the_image():
  with pytest.raises(ValueError, match=r"png is 5 × 4 pixels.*4 × 4 are"):
    next(train(ArraySource(9, (5, 4))))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("num_examples", [1, 3, 4, 5, 8, 9, 11, None])
def test_evaluation_sees_every_example_once(num_examples, hosts):
  source = ArraySource(11)
  count = num_examples or 11

  def make(**split):
    options = {"image_size": 4, "batch_size": 4, "num_threads": 0}
    options["num_examples"] = num_examples
    return list(pipeline.eval_batches(source, **options, **split))

  batches = over_hosts(make, hosts)  # zip(strict=True): equal numbers
  assert len(batches) == -(-count // 4)
  joined = {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
  assert set(joined) == {"image", "index", "mask"}
  padding = len(batches) * 4 - count
  assert joined["mask"].dtype == np.bool_ and joined["index"].dtype == np.int64
  assert joined["mask"].tolist() == [True] * count + [False] * padding
  assert joined["index"].tolist() == [*range(count), *[-1] * padding]
  for index in range(count):
    np.testing.assert_array_equal(
      joined["image"][index], source[index]["image"]
    )
  assert not joined["image"][count:].any()


def test_evaluation_captions_and_crop():
  source = ArraySource(3, (4, 6))
  batches = pipeline.eval_batches(
    source, image_size=4, batch_size=2, captions=True
  )
  first, last = batches
  assert first["caption"] == ["picture 0", "picture 1"]
  assert last["caption"] == ["picture 2", ""]
  np.testing.assert_array_equal(last["image"][0], source[2]["image"][:, 1:5])


@pytest.mark.parametrize("num_examples", [0, 12])
def test_evaluation_beyond_the_source(num_examples):
  with pytest.raises(ValueError, match=r"ArraySource\(11\), which has 11"):
    pipeline.eval_batches(
      ArraySource(11), image_size=4, batch_size=4, num_examples=num_examples
    )
  with pytest.raises(ValueError, match="does not divide over 3 hosts"):
    pipeline.eval_batches(
      ArraySource(11), image_size=4, batch_size=4, process_count=3
    )


def test_scenes_and_bundled_through_both_ends():
  config = sources.DataConfig(num_train=6)
  scenes = sources.make_source(config, "train", 32)
  batch = next(train(scenes, image_size=32))
  np.testing.assert_array_equal(
    batch["image"][0], scenes[int(batch["index"][0])]["image"]
  )
  photographs = bundled.BundledSource("train", length=40)
  batch = next(train(photographs, image_size=32, augment="crop"))
  assert batch["image"].shape == (8, 32, 32, 3)
  assert len(np.unique(batch["image"].reshape(8, -1), axis=0)) == 8


# Transforms.


def apply(transform, image, seed: int = 0):
  element = {"image": image, "caption": "kept"}
  result = transform(element, np.random.default_rng(seed))
  assert result["caption"] == "kept"
  assert result["image"].dtype == np.uint8
  return result["image"]


def gradient(height: int, width: int) -> np.ndarray:
  """image[y, x] = (y, x, 0)."""
  y, x = np.mgrid[:height, :width]
  return np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (8, 8), (9, 8)])
def test_center_crop_takes_the_centre(shape):
  image = gradient(*shape)
  top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
  np.testing.assert_array_equal(
    apply(transforms.center_crop(8), image),
    image[top : top + 8, left : left + 8],
  )


def test_center_crop_halves_by_box_averages():
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  # Pillow rounds half up after each axis.
  halved = image.astype(int)
  halved = (halved[:, ::2] + halved[:, 1::2] + 1) // 2
  halved = (halved[::2] + halved[1::2] + 1) // 2
  result = apply(transforms.center_crop(16), image)
  np.testing.assert_array_equal(result, halved)
  # 31 < 2 · 16: bicubic alone, antialiased.
  expected = Image.fromarray(image[:31, :31]).resize((16, 16), 3)
  result = apply(transforms.center_crop(16), image[:31, :31])
  np.testing.assert_array_equal(result, np.array(expected))


@pytest.mark.parametrize("shape", [(3, 5), (7, 200), (333, 500), (1, 1)])
@pytest.mark.parametrize("name", ["center", "crop", "crop_flip"])
def test_any_size_becomes_the_asked_one(shape, name):
  transform = transforms.make_augment(name, size=16, min_scale=0.08)
  for seed in range(5):
    assert apply(transform, gradient(*shape), seed).shape == (16, 16, 3)


@pytest.mark.parametrize("turned", [False, True])
def test_center_crop_of_a_strip_is_the_same_and_small(monkeypatch, turned):
  strip = np.random.default_rng(0).integers(0, 256, (8, 3000, 3), np.uint8)
  strip = strip.swapaxes(0, 1) if turned else strip
  strip = np.ascontiguousarray(strip)
  result = apply(transforms.center_crop(16), strip)
  sizes, resize = [], Image.Image.resize

  def watched(self, size, *args):
    sizes.append(size)
    return resize(self, size, *args)

  monkeypatch.setattr(Image.Image, "resize", watched)
  apply(transforms.center_crop(16), strip)
  assert max(w * h for w, h in sizes) <= 16 * 16 * 64
  monkeypatch.setattr(transforms, "_MAX_ASPECT", 1000)
  np.testing.assert_array_equal(
    result, apply(transforms.center_crop(16), strip)
  )


def test_random_crop_stays_inside_and_uses_the_range():
  image = gradient(40, 60)
  transform = transforms.random_crop(20, min_scale=0.5)
  lowest, highest, sides = [], [], []
  for seed in range(300):
    crop = apply(transform, image, seed).astype(int)
    lowest.append(crop[..., :2].min((0, 1)))
    highest.append(crop[..., :2].max((0, 1)))
    # Image pixels per crop pixel, measured between rows 5 and 15.
    sides.append((crop[15, 10, 0] - crop[5, 10, 0]) * 2)
  np.testing.assert_array_equal(np.min(lowest, 0), [0, 0])
  np.testing.assert_array_equal(np.max(highest, 0), [39, 59])
  assert min(sides) <= 22 and max(sides) >= 38
  assert 28 <= np.mean(sides) <= 32  # uniform on [20, 40]


def test_whole_scale_of_a_square_is_the_plain_resize():
  image = np.random.default_rng(0).integers(0, 256, (23, 23, 3), np.uint8)
  np.testing.assert_array_equal(
    apply(transforms.random_crop(16, min_scale=1.0), image),
    apply(transforms.center_crop(16), image),
  )


def test_flip_is_a_mirror_half_of_the_time():
  image = gradient(4, 4)
  flipped = 0
  for seed in range(400):
    result = apply(transforms.random_flip, image, seed)
    is_flip = (result != image).any()
    flipped += is_flip
    np.testing.assert_array_equal(result, image[:, ::-1] if is_flip else image)
  assert 150 <= flipped <= 250


def test_crop_never_flips():
  transform = transforms.make_augment("crop", size=4, min_scale=0.5)
  for seed in range(50):
    columns = apply(transform, gradient(8, 8), seed)[0, :, 1].astype(int)
    assert (np.diff(columns) >= 0).all()


class EncodedSource:
  """Elements without images, as a cache's."""

  def __init__(self, length: int):
    self._length = length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index):
    latent = np.full((2, 2, 3), index, np.float16)
    return {"latent": latent, "index": np.int64(index)}


class BatchedSource(EncodedSource):
  """The same, read in batches; counts them."""

  reads = 0

  def read_batch(self, indices):
    self.reads += 1
    elements = [self[int(i)] for i in indices]
    return {n: np.stack([e[n] for e in elements]) for n in elements[0]}


def encoded(source, **options):
  return train(source, **{"image_size": None, **options})


def test_elements_without_images():
  batch = next(encoded(EncodedSource(20)))
  assert set(batch) == {"latent", "index"}
  assert batch["latent"].shape == (8, 2, 2, 3)
  assert batch["latent"].dtype == np.float16
  np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0], batch["index"])
  with pytest.raises(ValueError, match='augment="crop" needs images of a size'):
    encoded(EncodedSource(20), augment="crop")


def test_order_depends_on_length_and_seed_alone():
  """Images, latents one by one and latents in batches: one order."""
  batched = BatchedSource(21)
  orders = [
    [batch["index"] for batch in take(iterator, 7)]
    for iterator in (
      train(ArraySource(21)),
      encoded(EncodedSource(21)),
      encoded(batched),
    )
  ]
  np.testing.assert_array_equal(orders[0], orders[1])
  np.testing.assert_array_equal(orders[0], orders[2])
  assert batched.reads == 7


def test_a_transform_reads_one_by_one():
  batched = BatchedSource(21)
  batch = next(encoded(batched, transform=jitter))
  assert batch["noise"].shape == (8, 3) and not batched.reads


def test_tokens_that_are_there_are_kept():
  def tokens(element, rng):
    return {**element, "tokens": np.arange(3, dtype=np.int32)}

  batch = next(encoded(EncodedSource(20), transform=tokens, tokenize=tokenize))
  assert batch["tokens"].shape == (8, 3) and "token_mask" not in batch


def joint(parts=None, **options):
  parts = parts or {
    "t2i": pipeline.Part(ArraySource(21), 8, 4),
    "edit": pipeline.Part(EncodedSource(10), 4),
  }
  defaults = {"seed": 3, "num_threads": 0}
  return pipeline.joint_train_iterator(parts, **{**defaults, **options})


def test_parts_are_what_they_would_be_alone():
  batches = take(joint(), 5)
  assert all(set(batch) == {"t2i", "edit"} for batch in batches)
  alone = take(train(ArraySource(21), seed=3), 5)
  assert_same([batch["t2i"] for batch in batches], alone)
  alone = take(encoded(EncodedSource(10), seed=3, batch_size=4), 5)
  assert_same([batch["edit"] for batch in batches], alone)


def test_parts_are_cut_into_hosts_each_by_itself():
  whole = take(joint(), 4)
  for name in ("t2i", "edit"):

    def make(name=name, **split):
      return [batch[name] for batch in take(joint(**split), 4)]

    assert_same(over_hosts(make, 2), [batch[name] for batch in whole])


@pytest.mark.parametrize("num_threads", [0, 2])
def test_joint_batches_resume(num_threads):
  iterator = joint(num_threads=num_threads)
  take(iterator, 4)
  state = iterator.get_state()
  expected = take(iterator, 4)
  fresh = joint(num_threads=num_threads)
  fresh.set_state(state)
  for batch, other in zip(take(fresh, 4), expected, strict=True):
    for name in other:
      assert_same([batch[name]], [other[name]])


def test_edits_on_the_fly():
  edits = views.EditExamples(scenes.EditSource("train", 6, 32))
  parts = {"edit": pipeline.Part(edits, 4, 16, "crop", min_scale=0.9)}

  def lengths(texts):
    return np.array([[len(text)] for text in texts]), np.ones((len(texts), 1))

  batch = next(joint(parts, tokenize=lengths))["edit"]
  assert set(batch) == {"image", "source", "index", "tokens", "token_mask"}
  assert batch["source"].shape == batch["image"].shape == (4, 16, 16, 3)
  for row, index in enumerate(batch["index"]):
    assert batch["tokens"][row] == len(edits[index]["caption"])
  # One crop for both: a share of the pixels is as equal as before.
  different = (batch["source"] != batch["image"]).any(-1).mean((1, 2))
  assert (different < 0.5).all()


def test_bad_joint_settings():
  with pytest.raises(ValueError, match="at least one part"):
    pipeline.joint_train_iterator({}, seed=0)
  with pytest.raises(
    ValueError, match="Part 'edit': .*batch size 4 does not d"
  ):
    joint(process_count=8)
