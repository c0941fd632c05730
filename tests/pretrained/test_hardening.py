"""Files that are broken, or lie: one line, little memory, nothing executed."""

import copy
import dataclasses
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
import tiny

from psvae_jax import exported
from psvae_jax.models import clip_text as models_clip_text
from psvae_jax.models import qwen2 as models_qwen2
from psvae_jax.models import text as models_text
from psvae_jax.models import vit
from psvae_jax.models.kl_autoencoder import KLConfig
from psvae_jax.pretrained import (
  architectures,
  autoencoder_kl,
  autoencoder_rae,
  clip_images,
  clip_text,
  dino,
  encoder,
  files,
  inception,
  lpips,
  preprocessing,
  qwen2,
  safetensors_file,
  text,
)

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


# Every field of every published config replaced by what it cannot be.


VALUES = ["x", None, [], {}, -1, 0, 1e308, 10**400, True, [1, 2, 3], "9" * 400]
VALUES += [[10**400] * 3]


def _vits():
  """A small encoder of every family: model_type → config."""
  base = dict(width=16, depth=2, num_heads=2, patch_size=4, image_size=16)
  other = dict(
    base, mlp_hidden=32, layerscale_init=None, position_antialias=False
  )
  configs = [
    vit.ViTConfig(**base, position_antialias=False),
    vit.ViTConfig(**base, num_registers=2, swiglu=True),
    vit.ViTConfig(**base, mlp_hidden=32, positions="rotary", key_bias=False),
    vit.ViTConfig(**other, cls_token=False),
    vit.ViTConfig(**other, positions="fixed"),
    vit.ViTConfig(**other, patch_bias=False, pre_norm=True),
  ]
  raws = map(architectures.format_config, configs)
  return {raw["model_type"]: raw for raw in raws}


def _fields(kind, **values):
  """A config.json of a dataclass's own fields."""
  return {**dataclasses.asdict(kind(**values)), "head_dim": None}


def _clip():
  halves = {
    "vision_config": _vits()["clip_vision_model"],
    "text_config": _fields(models_clip_text.ClipTextConfig, hidden_size=16),
  }
  older = {f"{name}_dict": None for name in halves}
  return {"model_type": "clip", "projection_dim": 8, **halves, **older}


def _qwen2():
  sizes = (37, 24, 40, 3, 6, 2)
  names = [f.name for f in dataclasses.fields(models_qwen2.Qwen2Config)]
  return {
    **_fields(
      models_qwen2.Qwen2Config, **dict(zip(names, sizes, strict=False))
    ),
    "model_type": "qwen2",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "layer_types": ["full_attention"],
  }


def _kl():
  return autoencoder_kl.format_config(
    KLConfig(
      block_out_channels=(16, 24),
      layers_per_block=1,
      latent_channels=6,
      down_attention=(False, True),
      up_attention=(False, False),
      norm_num_groups=4,
      shift_factor=0.1,
    )
  )


def _rae():
  return {
    "_class_name": autoencoder_rae.CLASS_NAME,
    "encoder_type": "dinov2",
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 2,
    "encoder_patch_size": 14,
    "encoder_input_size": 42,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
    "patch_size": 4,
    "image_size": 12,
    "encoder_norm_mean": [0.4, 0.5, 0.6],
    "encoder_norm_std": [0.2, 0.3, 0.25],
    "scaling_factor": 2.0,
    "num_channels": 3,
    "reshape_to_2d": True,
  }


def _images():
  """Of all preprocessor files."""
  return {
    "do_resize": True,
    "size": {"shortest_edge": 16},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
  }


# Name → (its file, how it is read of a path, shapes of what is read).
def _of_folder(read):
  return lambda path: read(path.parent)


def _of_json(parse):
  return lambda path: parse(files.read_json(path), path)


def _vit_shapes(config):
  return encoder._param_shapes(vit.ViT(config))


def _text_shapes(config):
  return text._param_shapes(models_text.T5Encoder(config))


def _clip_text_shapes(config):
  return clip_text.param_shapes(models_clip_text.ClipText(config))


def _qwen2_shapes(config):
  return qwen2._param_shapes(models_qwen2.Qwen2(config))


_VIT = (_of_json(architectures.parse_config), _vit_shapes)
READERS = {
  **{name: (raw, *_VIT) for name, raw in _vits().items()},
  "dino": (tiny.DINO_PUBLISHED, _of_json(dino.parse_config), _vit_shapes),
  "clip, vision half": (_clip(), *_VIT),
  "clip, text half": (
    _clip(),
    _of_json(clip_text.parse_config),
    _clip_text_shapes,
  ),
  "qwen2": (_qwen2(), _of_json(qwen2.parse_config), _qwen2_shapes),
  "t5": (
    text._format_config(models_text.T5Config(d_model=16, vocab_size=9)),
    _of_json(text.parse_config),
    _text_shapes,
  ),
  "AutoencoderKL": (
    _kl(),
    _of_json(autoencoder_kl.parse_config),
    autoencoder_kl.param_shapes,
  ),
  "AutoencoderRAE": (
    _rae(),
    _of_json(autoencoder_rae.parse_config),
    autoencoder_rae.param_shapes,
  ),
  "lpips": (
    {"model_type": "lpips", "network": "alex", "version": lpips.VERSION},
    _of_folder(lambda folder: lpips._read_network(folder, str(folder), None)),
    None,
  ),
  "inception": (
    {
      "model_type": inception.MODEL_TYPE,
      "graph": inception.GRAPH,
      "port": "pytorch-fid",
    },
    _of_folder(inception._read_port),
    None,
  ),
  "images": (
    _images(),
    lambda path: preprocessing.read(path, architectures.dinov2.PROCESSOR),
    None,
  ),
  "images of CLIP": (
    _images(),
    _of_folder(lambda folder: clip_images.read(folder, 16)),
    None,
  ),
}


def _places(raw):
  """(keys down to a value, the value) of all of a config."""
  items = raw.items() if isinstance(raw, dict) else enumerate(raw)
  for key, value in items:
    yield (key,), value
    if isinstance(value, (dict, list)):
      yield from (((key, *place), v) for place, v in _places(value))


def _put(raw, place, value):
  """A config with one value replaced."""
  changed = copy.deepcopy(raw)
  section = changed
  for key in place[:-1]:
    section = section[key]
  section[place[-1]] = value
  return changed


@pytest.fixture(name="read")
def _read(tmp_path):
  """(reader's name, config) → what the reader makes of a file of it."""

  def read(name, raw):
    kind = "preprocessor_config" if name.startswith("images") else "config"
    path = tmp_path / f"{kind}.json"
    path.unlink(missing_ok=True)  # much faster than to overwrite it
    path.write_text(json.dumps(raw))
    return READERS[name][1](path)

  return read


@pytest.mark.parametrize("name", READERS)
def test_every_field_replaced(tmp_path, read, name):
  raw = READERS[name][0]
  read(name, raw)
  refused = 0
  for place, _ in _places(raw):
    for value in VALUES:
      try:
        read(name, _put(raw, place, value))
      except ValueError as error:
        message = str(error)
        assert str(tmp_path) in message, (place, value)
        assert "\n" not in message and len(message) < 2000, (place, value)
        refused += 1
  assert refused > len(raw)


@pytest.mark.parametrize("name", [n for n in READERS if READERS[n][2]])
def test_the_largest_sizes_that_are_read_cost_nothing(read, name):
  """Shapes are made before tensors show that they do not fit."""
  raw, _, shapes = READERS[name]
  config = read(name, raw)
  for place in [place for place, old in _places(raw) if type(old) is int]:
    for size in (2**24, 2**14, 2**10):
      changed = _put(raw, place, size)
      try:
        config = read(name, changed)
      except ValueError:
        continue
      raw = changed
      break
  tracemalloc.start()
  try:
    shapes(config)
    assert tracemalloc.get_traced_memory()[1] < 64 * MiB
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("dinov2", {"layer_norm_eps": 10**400}, "eps is 10+[.]{3}0+, it must be"),
    ("dinov2", {"mlp_ratio": 1e308}, r"mlp_ratio 1e\+308 makes an MLP hidden"),
    ("dinov2", {"patch_size": [4, 4, 9]}, r"patch_size is \[4, 4, 9\]"),
    ("dino", {"intermediate_size": 10**400}, "MLP hidden width 10+ is not in"),
    (
      "dinov3_vit",
      {"num_register_tokens": 2**24},
      r"num_registers 16777216 is not in \[0, 1024\]",
    ),
    (
      "dinov3_vit",
      {"hidden_size": 2**24, "num_attention_heads": 1},
      "16777216 .*at most 4096",
    ),
    (
      "qwen2",
      {"hidden_size": 2**24, "num_attention_heads": 2, "head_dim": None},
      "hidden_size 16777216 / num_attention_heads 2 is above 4096",
    ),
    ("t5", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    ("t5", {"num_layers": 2**25}, "num_layers is 33554432; .* at most 167772"),
    ("AutoencoderKL", {"layers_per_block": 33}, "33 of 2 levels are more than"),
    ("images", {"rescale_factor": None}, "rescale_factor is None"),
    ("images", {"rescale_factor": 2}, "rescale_factor is 2.0"),
    ("images", {"image_mean": "123"}, "image_mean '123' is not 3 finite"),
    ("images", {"image_mean": [0.5, "1", 0.5]}, "'1', 0.5] is not 3 finite"),
    ("images", {"image_mean": {"0": 1, "1": 1, "2": 1}}, "is not 3 finite"),
    ("images of CLIP", {"image_std": [1, 1, 10**400]}, "is not 3 finite"),
    ("images of CLIP", {"image_std": [1, 1, True]}, "is not 3 finite"),
  ],
)
def test_absurd_values_are_named(tmp_path, read, name, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    read(name, {**READERS[name][0], **changes})
  assert str(tmp_path) in str(error.value)


def test_positions_of_many_tokens_are_not_made(read):
  """A decoder's, to know the shapes of its parameters."""
  sizes = {"encoder_patch_size": 1, "encoder_input_size": 512}
  sizes |= {"decoder_hidden_size": 64, "image_size": None}
  config = read("AutoencoderRAE", {**_rae(), **sizes})
  tracemalloc.start()
  try:
    autoencoder_rae.param_shapes(config)
    assert tracemalloc.get_traced_memory()[1] < 64 * MiB
  finally:
    tracemalloc.stop()
