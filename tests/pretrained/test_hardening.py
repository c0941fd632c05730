"""Files that are broken, or lie: one line, little memory, nothing executed."""

import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from psvae_jax import exported
from psvae_jax.pretrained import files, safetensors_file

TENSORS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "bias": np.array([0.5, -1.0], np.float32),
  "layer/kernel": np.ones((3, 1), np.float32),
  "scalar": np.array(7, np.float32),
}
EXPECTED = {
  "a": jax.ShapeDtypeStruct((2, 3), np.float32),
  "bias": jax.ShapeDtypeStruct((2,), np.float32),
  "layer": {"kernel": jax.ShapeDtypeStruct((3, 1), np.float32)},
  "scalar": jax.ShapeDtypeStruct((), np.float32),
}
MiB = 2**20


@pytest.fixture(name="path")
def _path(tmp_path):
  path = tmp_path / "part" / "model.safetensors"
  path.parent.mkdir()
  safetensors.numpy.save_file(TENSORS, path, metadata={"format": "pt"})
  return path


def read(path):
  return exported.read_part(path.parent.parent, "part", EXPECTED)


def write(path, header, data=b"", length=None):
  """A file of any header (bytes, or what JSON has) and any stated length."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  length = len(header) if length is None else length
  path.write_bytes(struct.pack("<Q", length) + header + data)


def entry(begin, end, shape=(1,), dtype="F32"):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def error_of(path, kinds=ValueError, least=0):
  """The message, and a check that it took next to no memory."""
  tracemalloc.start()
  try:
    with pytest.raises(kinds) as caught:
      files.read_safetensors(path.parent)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 4 * MiB + least, peak
  message = str(caught.value)
  assert "\n" not in message and str(path.parent) in message
  assert len(message) < 1000
  return message


# The reader against the library.


@pytest.mark.parametrize(
  "dtype",
  ["float64", "float32", "float16", "int64", "int32", "int16", "int8"]
  + ["uint64", "uint32", "uint16", "uint8", "bool"]
  + ["bfloat16", "float8_e4m3fn", "float8_e5m2"],
)
def test_every_dtype_as_the_library_reads_it(tmp_path, dtype):
  path = tmp_path / "model.safetensors"
  values = np.random.default_rng(0).normal(size=(3, 5)) * 4
  tensors = {
    "x": values.astype(jax.numpy.dtype(dtype)),
    "empty": np.zeros((0, 4), jax.numpy.dtype(dtype)),
    "y": np.abs(values[0]).astype(jax.numpy.dtype(dtype)),
  }
  safetensors.numpy.save_file(tensors, path)
  found = safetensors_file.read_tensors(path)
  assert set(found) == set(tensors)
  for name, value in tensors.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value)


def test_reading_equals_the_library_and_leaves_the_file_as_it_is(path):
  before = path.read_bytes()
  found = read(path)
  wanted = safetensors.numpy.load_file(path)
  np.testing.assert_array_equal(
    found["layer"]["kernel"], TENSORS["layer/kernel"]
  )
  assert set(wanted) == set(TENSORS)
  found["a"][:] = 0  # an array of its own, not a view of the file
  assert path.read_bytes() == before


def test_memory_is_what_the_file_holds(tmp_path):
  path = tmp_path / "model.safetensors"
  size = 16 * MiB
  safetensors.numpy.save_file({"x": np.ones(size // 4, np.float32)}, path)
  tracemalloc.start()
  files.read_safetensors(tmp_path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1.1 * size


# Headers that lie.


@pytest.mark.parametrize(
  "header, data, message",
  [
    ([], b"", "no JSON object"),
    (b"{", b"", "not JSON"),
    (b"\xff\xfe{}", b"", "not JSON"),
    (b"[" * 100_000, b"", "not JSON"),
    (b'{"a":' * 50_000, b"", "not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
    ({"a": 3}, b"", "'a' of its header has not"),
    ({"a": {**entry(0, 4), "more": 1}}, b"1234", "has not"),
    ({"a": entry(0, 4, dtype="F33")}, b"1234", "unknown dtype 'F33'"),
    ({"a": entry(0, 4, dtype=["F32"])}, b"1234", "unknown dtype"),
    ({"a": entry(0, 4, shape=(-1,))}, b"1234", "impossible shape"),
    ({"a": entry(0, 4, shape=(1.0,))}, b"1234", "impossible shape"),
    ({"a": entry(0, 4, shape=(True,))}, b"1234", "impossible shape"),
    ({"a": entry(0, 4, shape=(1,) * 99)}, b"1234", "impossible shape"),
    ({"a": {**entry(0, 4), "shape": 1}}, b"1234", "impossible shape"),
    # 2^32 · 2^32 elements are none in 64 bits.
    ({"a": entry(0, 4, shape=(2**32, 2**32))}, b"1234", "impossible shape"),
    ({"a": entry(0, 0, shape=(0, 2**70))}, b"", "impossible shape"),
    ({"a": entry(0, 4, shape=(2**40,))}, b"1234", "do not fit its shape"),
    ({"a": entry(0, 2**42, shape=(2**40,))}, b"1234", "tensors take"),
    ({"a": entry(4, 0)}, b"1234", "do not fit its shape"),
    ({"a": entry(-4, 0)}, b"1234", "impossible offsets"),
    ({"a": entry(0, 4.0)}, b"1234", "impossible offsets"),
    ({"a": {**entry(0, 4), "data_offsets": [0]}}, b"1234", "impossible off"),
    ({"a": entry(2**62, 2**62 + 4)}, b"1234", "after a gap"),
    ({"a": entry(4, 8)}, b"12345678", "after a gap"),
    ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlaps"),
    ({"a": entry(0, 8, (2,)), "b": entry(4, 8)}, b"12345678", "overlaps"),
    ({"a": entry(0, 4)}, b"12345678", "take 4 bytes, it has 8"),
    ({"a": entry(0, 4)}, b"12", "take 4 bytes, it has 2"),
    ({}, b"1234", "take 0 bytes, it has 4"),
    ({"a\n\x1b[2J": entry(0, 4)}, b"1234", "not printable"),
    ({"a" * 5000: entry(0, 4)}, b"1234", "too long"),
    ({"__metadata__": {"format": 3}}, b"", "__metadata__"),
    ({"__metadata__": "x"}, b"", "__metadata__"),
    (
      b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
      b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
      b"1234",
      "twice",
    ),
  ],
)
def test_a_header_that_lies_is_named(tmp_path, header, data, message):
  path = tmp_path / "model.safetensors"
  write(path, header, data)
  text = error_of(path, least=32 * MiB if len(header) > 10_000 else 0)
  assert message in text and "model.safetensors is truncated or not" in text


@pytest.mark.parametrize("length", [0, 2**63 - 1, 2**64 - 1, 10**8, 20])
def test_a_header_of_another_length(path, length):
  data = path.read_bytes()
  path.write_bytes(struct.pack("<Q", length) + data[8:])
  error_of(path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path):
  path = tmp_path / "model.safetensors"
  length = safetensors_file.MAX_HEADER + 1
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", length))
    file.truncate(8 + length)  # sparse: takes no disk
  assert "header claims 8,388,609 bytes" in error_of(path)


# Other files in the place of weights.


class _Bomb:
  """Unpickling it would make a folder."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, "torch"])
def test_a_pickle_is_not_opened(tmp_path, protocol):
  path, trap = tmp_path / "model.safetensors", tmp_path / "trap"
  bomb = pickle.dumps(_Bomb(trap), 2 if protocol == "torch" else protocol)
  path.write_bytes(bomb)
  if protocol == "torch":
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("archive/data.pkl", bomb)
  message = error_of(path)
  if protocol:
    assert "never opened" in message
  assert not trap.exists()


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "it has 0 bytes"),
    (b"\x08\0\0", "it has 3 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "lfs pull"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"\xff" * 64, "header claims"),
  ],
)
def test_something_else_is_said_to_be_it(tmp_path, content, message):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  assert message in error_of(path)


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling", "pipe"])
def test_what_is_no_file(tmp_path, kind):
  path = tmp_path / "model.safetensors"
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)  # opening it would wait for ever
  else:
    path.symlink_to(path.name if kind == "loop" else "nowhere")
  message = error_of(path, (ValueError, FileNotFoundError))
  assert ("is a folder" if kind == "folder" else "no regular file") in message


# config.json and the index.


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "not valid JSON"),
    (b"[1]", "must hold a JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"\xff\xff", "not valid JSON"),
    (None, "is a folder"),
    (17 * MiB, "more than any model's"),
  ],
)
def test_a_broken_config_is_named(tmp_path, content, message):
  path = tmp_path / "config.json"
  if content is None:
    path.mkdir()
  elif isinstance(content, int):
    with open(path, "wb") as file:
      file.truncate(content)
  else:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    files.read_config(tmp_path)
  assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name",
  ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors"]
  + ["a\\b.safetensors", ".hidden.safetensors", "x\0.safetensors", "x.bin", 3],
)
def test_an_index_stays_in_its_folder(tmp_path, name):
  folder = tmp_path / "model"
  folder.mkdir()
  safetensors.numpy.save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": name}}))
  with pytest.raises(ValueError, match="weight_map"):
    files.read_safetensors(folder)


@pytest.mark.parametrize("count", [0, 5000])
def test_an_index_of_thousands_of_shards(tmp_path, count):
  weights = {f"t{i}": f"m-{i}.safetensors" for i in range(count)}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weights}))
  with pytest.raises(ValueError, match=f"names {count:,} files"):
    files.read_safetensors(tmp_path)


def test_missing_shards_are_named_before_any_is_read(tmp_path):
  (tmp_path / "m-0.safetensors").write_bytes(b"broken")
  weights = {f"t{i}": f"m-{i}.safetensors" for i in range(3)}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weights}))
  with pytest.raises(FileNotFoundError, match="m-1.*m-2"):
    files.read_safetensors(tmp_path)


# Random damage.


def _check(path, data, what):
  """Either all is as it was, or one error that names the place."""
  path.unlink(missing_ok=True)  # much faster than to overwrite it
  path.write_bytes(data)
  try:
    found = read(path)
  except (ValueError, FileNotFoundError) as error:
    assert str(path.parent) in str(error), what
    assert "\n" not in str(error), what
    return False
  wanted = {"a": TENSORS["a"], "bias": TENSORS["bias"]}
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=str(what))
  assert found["scalar"] == TENSORS["scalar"], what
  return True


def test_truncation_at_every_byte(path):
  data = path.read_bytes()
  loaded = [n for n in range(len(data)) if _check(path, data[:n], n)]
  assert not loaded
  assert _check(path, data, "whole")
  assert not _check(path, data + b"\0", "longer")


def test_every_flipped_bit_of_the_header(path):
  data = path.read_bytes()
  end = 8 + struct.unpack("<Q", data[:8])[0]
  harmless = 0
  for place in range(end):
    for bit in range(8):
      broken = bytearray(data)
      broken[place] ^= 1 << bit
      harmless += _check(path, bytes(broken), (place, bit))
  # In the metadata's text, and in white space.
  assert 0 < harmless < end


def test_random_damage(path):
  """Bytes replaced, removed, doubled: two thousand files of one seed."""
  data, rng = path.read_bytes(), np.random.default_rng(0)
  end = 8 + struct.unpack("<Q", data[:8])[0]
  alphabet = np.frombuffer(b'0123456789"{}[],:-eF \xff', np.uint8)
  for number in range(2000):
    broken = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, end, rng.integers(1, 5))
    broken[places] = rng.choice(alphabet, len(places))
    broken = broken.tobytes()
    if rng.random() < 0.3:
      start, stop = np.sort(rng.integers(0, len(data), 2))
      middle = broken[start:stop] * int(rng.integers(0, 3))
      broken = broken[:start] + middle + broken[stop:]
    _check(path, broken, number)


# Configs of absurd sizes.


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"image_size": 2**30}, "image_size=1073741824 is beyond"),
    ({"output_size": 2**30}, "output_size=1073741824 is beyond"),
    ({"image_size": 4096, "output_size": 4096}, "tokens of width"),
    (
      {"pixel_decoder": {"kind": "conv", "num_res_blocks": 10**6}},
      "in .0, 64.",
    ),
    (
      {"pixel_decoder": {"kind": "conv", "channel_mult": [1] * 100}},
      "100 levels",
    ),
    ({"channels": 2**30}, "semantic_encoder does not fit"),
    ({"pixel_decoder": {"kind": "vit", "depth": 10**9}}, "does not fit"),
  ],
)
def test_an_export_of_absurd_sizes(tmp_path, changes, message):
  """Changed in description and fingerprint too, as one who means harm would."""
  folder = exported.resolve("embedded", "autoencoder")
  for item in folder.iterdir():
    if item.is_dir():
      (tmp_path / item.name).symlink_to(item)
  raw = json.loads((folder / "config.json").read_text())
  model = {**raw["model"], **changes}
  for name, value in changes.items():
    if isinstance(value, dict):
      model[name] = {**raw["model"][name], **value}
  raw["model"] = raw["description"]["model"] = model
  raw["fingerprint"] = exported.fingerprint_of(raw["description"])
  (tmp_path / "config.json").write_text(json.dumps(raw))
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=message) as error:
      exported.load_autoencoder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 64 * MiB
  assert "\n" not in str(error.value)
