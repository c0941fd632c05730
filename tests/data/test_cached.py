"""Reading a cache: what it refuses, damage, threads, batches."""

import json
import pickle
import threading

import numpy as np
import pytest
import tiny_cache

from psvae_jax import cache
from psvae_jax.data import cached


@pytest.fixture
def root(tmp_path):
  tiny_cache.write(tmp_path)
  return tmp_path


def read_all(source):
  return [source[i] for i in range(len(source))]


def assert_same(elements, others):
  for element, other in zip(elements, others, strict=True):
    assert element.keys() == other.keys()
    for name in element:
      np.testing.assert_array_equal(element[name], other[name], err_msg=name)


def manifest(root, **changes):
  path = root / cached.MANIFEST_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_batches_are_stacked_elements(root):
  source = cached.CachedSource(root)
  places = [22, 3, 9, 10, 3]
  batch = source.read_batch(places)
  elements = [source[i] for i in places]
  assert batch.keys() == elements[0].keys()
  for name, value in batch.items():
    np.testing.assert_array_equal(value, np.stack([e[name] for e in elements]))
    assert value.dtype == elements[0][name].dtype
  assert batch["latent"].shape == (5, 2, 2, 6)
  assert batch["text"].shape == (5, tiny_cache.LENGTH, tiny_cache.WIDTH)
  assert batch["index"].tolist() == places


def test_mask_need_not_be_a_prefix(tmp_path):
  def padded_left(captions):
    return tuple(x[:, ::-1] for x in tiny_cache.encode_text(captions))

  encoder = tiny_cache.encoders(text=padded_left)
  found = tiny_cache.write(tmp_path, encoder=encoder, dtype="float32")
  tokens, mask, text = padded_left(["xxx"])
  np.testing.assert_array_equal(found[2]["tokens"], tokens[0])
  np.testing.assert_array_equal(
    found[2]["text"], np.where(mask[0][:, None], text[0], 0)
  )


def test_pickled_and_shared_by_threads(root):
  source = cached.CachedSource(root)
  expected = read_all(source)
  copy = pickle.loads(pickle.dumps(source))
  assert repr(copy) == repr(source)
  found = {}

  def read(number):
    found[number] = read_all(copy)

  threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for elements in found.values():
    assert_same(elements, expected)
  assert len(found) == 4


def test_moved_cache_is_the_same_source(root, tmp_path_factory):
  source = cached.CachedSource(root)
  expected = read_all(source)
  moved = cached.CachedSource(root.rename(tmp_path_factory.mktemp("b") / "a"))
  assert repr(moved) == repr(source)
  assert_same(read_all(moved), expected)


@pytest.mark.parametrize("index", [-1, 23])
def test_no_such_record(root, index):
  with pytest.raises(IndexError, match=f"index {index} of CachedSource"):
    cached.CachedSource(root)[index]


def test_changed_byte_names_the_file(root):
  path = root / "00001-of-00003.arrayrecord"
  source = cached.CachedSource(root)
  latent = source[14]["latent"].tobytes()
  content = bytearray(path.read_bytes())
  place = content.find(latent)
  assert place > 0
  content[place + 5] ^= 1
  path.write_bytes(content)
  source = cached.CachedSource(root)
  with pytest.raises(cached.CacheError, match=r"00001-of-00003.*record 4: .*"):
    source[14]
  for index in (0, 13, 15, 22):
    assert source[index]["index"] == index


def test_no_changed_byte_goes_unnoticed(root):
  path = root / "00002-of-00003.arrayrecord"
  content = path.read_bytes()
  expected = read_all(cached.CachedSource(root))[20:]
  rng, noticed = np.random.default_rng(0), 0
  # Most of the file is padding, in which nothing can go wrong.
  inside = np.flatnonzero(np.frombuffer(content, np.uint8))
  for place in rng.choice(inside, 60, replace=False):
    changed = bytearray(content)
    changed[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(changed)
    source = cached.CachedSource(root)
    for index, element in zip(range(20, 23), expected, strict=True):
      try:
        assert_same([source[index]], [element])
      except cached.CacheError as error:
        assert str(path) in str(error)
        noticed += 1
  assert noticed


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda b: b[:-1], "bytes, .* were written: delete"),
    (lambda b: b"", "has 0 bytes"),
    (lambda b: bytes(len(b)), r"damaged \(0 records, 10 were written\)"),
    (None, "is missing: delete"),
  ],
)
def test_damaged_file_is_named(root, damage, message):
  path = root / "00000-of-00003.arrayrecord"
  content = path.read_bytes()
  path.unlink()
  if damage is not None:
    path.write_bytes(damage(content))
  with pytest.raises(cached.CacheError, match=f"00000-of-00003.*{message}"):
    cached.CachedSource(root)[0]


def test_folder_that_is_no_cache(tmp_path):
  for folder in (tmp_path, tmp_path / "none"):
    with pytest.raises(cached.CacheError, match="manifest.json is missing"):
      cached.CachedSource(folder)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"format": 99}, "has format 99, this version reads 1"),
    ({"shards": [{"file": "a"}]}, "manifest.json is damaged"),
    ({"shards": None}, "manifest.json is damaged"),
    ({"spec": {}}, "manifest.json is damaged"),
    ({"shard_size": None}, "manifest.json is damaged"),
  ],
)
def test_damaged_manifest(root, changes, message):
  manifest(root, **changes)
  with pytest.raises(cached.CacheError, match=message):
    cached.CachedSource(root)


def test_cut_manifest(root):
  path = root / cached.MANIFEST_FILE
  path.write_text(path.read_text()[:40])
  with pytest.raises(cached.CacheError, match="manifest.json is damaged"):
    cached.CachedSource(root)


def test_spec_that_fits_and_one_that_does_not(root):
  spec = cache.make_spec(tiny_cache.viewed(), tiny_cache.encoders(), "float16")
  assert cached.CachedSource(root, spec).spec == spec.to_json()
  other = cache.make_spec(
    tiny_cache.viewed(), tiny_cache.encoders(autoencoder="b"), "float32"
  )
  with pytest.raises(
    cached.CacheError,
    match=r"autoencoder is 'auto', wanted 'b'; dtype is 'float16', wanted 'fl",
  ):
    cached.CachedSource(root, other)
