"""Reference .npz: ADM's layout, there and back, and what is refused."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from psvae_jax.data import pipeline
from psvae_jax.evaluators import npz_files, reference_npz
from psvae_jax.evaluators.npz_files import NpzError
from psvae_jax.evaluators.reference_npz import (
  NpzImages,
  ReferenceFile,
  write_reference,
)

MiB = 2**20
RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=6)
COVARIANCE = np.cov(RNG.normal(size=(6, 20)))
IMAGES = RNG.integers(0, 256, (23, 9, 8, 3), np.uint8)


def _adm(path, **changes):
  """A file as ADM publishes them, in its types."""
  arrays = {
    "arr_0": IMAGES,
    "arr_1": np.arange(23) % 4,
    "mu": MEAN.astype(np.float32),
    "sigma": COVARIANCE,
    "mu_s": MEAN[:4],
    "sigma_s": COVARIANCE[:4, :4],
  }
  arrays |= changes
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
  return path


def test_reads_what_adm_publishes(tmp_path):
  file = ReferenceFile(_adm(tmp_path / "a.npz"))
  assert set(file.statistics) == {"pool", "spatial"}
  mean, covariance = file.statistics["pool"]
  assert mean.dtype == covariance.dtype == np.float64
  np.testing.assert_array_equal(mean, MEAN.astype(np.float32))
  np.testing.assert_array_equal(covariance, COVARIANCE)
  np.testing.assert_array_equal(file.statistics["spatial"][0], MEAN[:4])
  assert (file.num_images, file.count, file.protocol) == (23, None, {})
  np.testing.assert_array_equal(file.labels(), np.arange(23) % 4)


def test_numpy_reads_what_is_written(tmp_path):
  path = tmp_path / "folder" / "a.npz"
  write_reference(
    path,
    {"pool": (MEAN, COVARIANCE), "dinov2": (MEAN[:3], COVARIANCE[:3, :3])},
    count=23,
    protocol={"size": 8, "name": "Größe"},
    images=[IMAGES[:10], IMAGES[10:]],
    image_shape=IMAGES.shape,
  )
  with np.load(path, allow_pickle=False) as found:
    assert set(found) == {
      *("mu", "sigma", "mu_dinov2", "sigma_dinov2"),
      *("count", "protocol", "arr_0"),
    }
    np.testing.assert_array_equal(found["arr_0"], IMAGES)
    np.testing.assert_array_equal(found["sigma"], COVARIANCE)
  file = ReferenceFile(path)
  assert set(file.statistics) == {"pool", "dinov2"}
  np.testing.assert_array_equal(file.statistics["dinov2"][0], MEAN[:3])
  assert file.count == 23
  assert file.protocol == {"size": 8, "name": "Größe"}
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("compressed", [False, True])
def test_images_one_by_one(tmp_path, monkeypatch, compressed):
  monkeypatch.setattr(reference_npz, "_CHUNK_BYTES", 4 * IMAGES[0].size)
  path = tmp_path / "a.npz"
  (np.savez_compressed if compressed else np.savez)(path, arr_0=IMAGES)
  source = NpzImages(path)
  assert len(source) == 23 and source.image_shape == (9, 8)
  # Forwards, back and far ahead.
  for index in (0, 1, 7, 3, 22, 0, 13):
    element = source[index]
    np.testing.assert_array_equal(element["image"], IMAGES[index])
    assert element["image"].flags.writeable
    assert element["path"].endswith(f"a.npz/arr_0[{index}]")
  with pytest.raises(IndexError):
    source[23]
  assert (source._mapped is None) == compressed
  if compressed:
    assert len(source._chunks) <= 4
    monkeypatch.setattr(reference_npz, "_CHUNK_BYTES", 1)
    large = NpzImages(path)  # for a chunk: one is read, and one kept
    for index in (0, 1, 7, 3, 22):
      np.testing.assert_array_equal(large[index]["image"], IMAGES[index])
      assert len(large._chunks) == 1 and large._chunk == 1
  # As threads read it.
  rows = [
    batch["image"][batch["mask"]]
    for batch in pipeline.eval_batches(source, image_size=8, batch_size=5)
  ]
  assert sum(map(len, rows)) == 23
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[5]["image"], IMAGES[5])


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(sigma=COVARIANCE[:5]), r"\(D, D\), .* got \(6,\) and \(5, 6\)"),
    (dict(mu=np.zeros(8193)), r"D at most 8192, got \(8193,\) and \(6, 6\)"),
    (dict(sigma=None), "no array 'sigma'; it has arr_0, arr_1, mu"),
    (dict(mu=np.arange(6)), "mu must hold floating point numbers, got int64"),
    (dict(mu=np.array([None] * 6)), "mu holds Python objects .a pickle."),
    (dict(arr_0=IMAGES / 255), "must hold images uint8 .*got float64"),
    (dict(arr_0=IMAGES[:0]), "must hold images uint8"),
    (
      dict(arr_0=np.zeros((1, 8193, 2, 3), np.uint8)),
      r"arr_0 are 8193 × 2, uint8 \(1, 8193, 2, 3\); .* 8192 pixels at most",
    ),
    (dict(arr_0=np.zeros((1, 2, 8193, 3), np.uint8)), "arr_0 are 2 × 8193"),
    (
      dict(arr_0=np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))),
      "channels come last",
    ),
    (dict(arr_0=np.asfortranarray(IMAGES)), "stored column by column"),
    (dict(count=np.array(-3)), "count must be one whole number"),
    (dict(protocol=np.array("[]")), "does not hold a JSON object"),
    (dict(protocol=np.array("[" * 10_000)), "does not hold a JSON object"),
  ],
)
def test_what_cannot_be_used_is_named(tmp_path, changes, message):
  path = _adm(tmp_path / "a.npz", **changes)
  with pytest.raises(NpzError, match=message) as error:
    ReferenceFile(path)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(mu=MEAN * np.nan), "mu holds NaN or infinity"),
    (dict(sigma=COVARIANCE * np.inf), "sigma holds NaN or infinity"),
    (dict(sigma=np.triu(COVARIANCE)), "sigma is not symmetric"),
  ],
)
def test_statistics_are_checked_where_they_are_asked_for(
  tmp_path, changes, message
):
  path = _adm(tmp_path / "a.npz", **changes)
  file = ReferenceFile(path)
  assert len(file.statistics) == 2 and "pool" in file.statistics
  np.testing.assert_array_equal(file.statistics["spatial"][0], MEAN[:4])
  with pytest.raises(NpzError, match=message) as error:
    file.statistics["pool"]
  assert str(path) in str(error.value)
  with pytest.raises(KeyError):
    file.statistics["dinov2"]


def test_the_longest_side_is_read(tmp_path):
  np.savez_compressed(tmp_path / "a.npz", arr_0=np.ones((2, 8192, 1, 3), "u1"))
  assert NpzImages(tmp_path / "a.npz")[1]["image"].shape == (8192, 1, 3)


def test_covariances_in_either_order_of_memory(tmp_path):
  file = ReferenceFile(
    _adm(tmp_path / "a.npz", sigma=np.asfortranarray(COVARIANCE))
  )
  np.testing.assert_array_equal(file.statistics["pool"][1], COVARIANCE)


def test_labels_that_do_not_fit(tmp_path):
  file = ReferenceFile(_adm(tmp_path / "a.npz", arr_1=np.arange(5)))
  with pytest.raises(NpzError, match="one whole number for each of the 23"):
    file.labels()
  assert ReferenceFile(_adm(tmp_path / "b.npz", arr_1=None)).labels() is None


def test_no_code_of_a_pickle_runs(tmp_path):
  class Malicious:
    def __reduce__(self):
      return (open, (str(tmp_path / "executed"), "w"))

  path = tmp_path / "a.npz"
  np.savez(path, mu=np.array([Malicious()], object), sigma=np.eye(1))
  with pytest.raises(NpzError, match="pickle"):
    ReferenceFile(path)
  path.write_bytes(pickle.dumps(Malicious()))
  with pytest.raises(NpzError, match="not a readable .npz"):
    ReferenceFile(path)
  assert not (tmp_path / "executed").exists()


def _with_header(path, shape, data):
  """An archive whose header may lie."""
  member = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    member, {"descr": "<f8", "fortran_order": False, "shape": shape}
  )
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("mu.npy", member.getvalue() + data)
    archive.writestr("sigma.npy", member.getvalue() + data)
  return path


def test_a_header_that_lies_and_files_that_are_cut_off(tmp_path):
  path = _with_header(tmp_path / "a.npz", (1 << 40,), bytes(16))
  with pytest.raises(NpzError, match="states float64 .1099511627776,., .* 16;"):
    ReferenceFile(path)
  path = _adm(tmp_path / "b.npz")
  path.write_bytes(path.read_bytes()[:-500])
  with pytest.raises(NpzError, match="not a readable .npz"):
    ReferenceFile(path)
  path = _adm(tmp_path / "c.npz")
  content = bytearray(path.read_bytes())
  at = content.index(b"\x93NUMPY", content.index(b"sigma.npy")) + 300
  content[at] ^= 255
  path.write_bytes(bytes(content))
  with pytest.raises(NpzError, match="sigma cannot be read .*CRC"):
    ReferenceFile(path)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    ReferenceFile(tmp_path / "none.npz")
  np.savez(tmp_path / "d.npz", other=np.zeros(2))
  with pytest.raises(NpzError, match="neither statistics .*; it has other"):
    ReferenceFile(tmp_path / "d.npz")


def _member(header, data=b"", version=1):
  """An array of any header, true or not."""
  length = len(header).to_bytes(2 * version, "little")
  return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def _peak(run):
  """What a call allocates at once, bytes."""
  tracemalloc.start()
  try:
    run()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_statistics_that_nothing_asks_for_are_not_read(tmp_path):
  wide = np.eye(1024)  # 8 MiB, a few KiB in the file
  arrays = {f"mu_{i}": wide[0] for i in range(3)}
  arrays |= {f"sigma_{i}": wide for i in range(3)}
  path = tmp_path / "a.npz"
  np.savez_compressed(path, mu=MEAN, sigma=COVARIANCE, **arrays)
  found = []

  def read():
    file = ReferenceFile(path)
    assert set(file.statistics) == {"pool", "0", "1", "2"}
    found.append(file.statistics["pool"])

  assert _peak(read) < MiB
  np.testing.assert_array_equal(found[0][1], COVARIANCE)


def test_a_long_header_is_not_read(tmp_path):
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("mu.npy", _member(b" " * 32 * MiB, version=2))
    archive.writestr("sigma.npy", _member(b""))

  def read():
    with pytest.raises(NpzError, match="mu cannot be read"):
      ReferenceFile(path)

  assert _peak(read) < MiB


@pytest.mark.parametrize(
  "field",
  [
    "'descr': ()",
    "'descr': ('a',)",
    "'descr': {}",
    "'descr': '<f8', 'shape': (" + "9" * 4000 + ", " + "9" * 4000 + ")",
    "'descr': '<f8', 'shape': (" + "1, " * 99 + ")",
    "'descr': '<f8', 'shape': (" + "-" * 3000 + "1,)",
    "'descr': '" + "x" * 5000 + "'",
    "'descr': [[[",
  ],
)
def test_headers_that_numpy_stumbles_over(tmp_path, field):
  if "'shape'" not in field:
    field += ", 'shape': (1,)"
  header = "{'fortran_order': False, " + field + "}"
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("mu.npy", _member(header.encode(), bytes(8)))
    archive.writestr("sigma.npy", _member(header.encode(), bytes(8)))
  with pytest.raises(NpzError, match="a.npz: .*mu ") as error:
    ReferenceFile(path)
  assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_sizes_that_the_archive_lies_about(tmp_path, kind):
  header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 1, 1, 3)}"
  member, count = _member(header % 10**9), 10**9
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w", kind) as archive:
    archive.writestr("arr_0.npy", member + bytes(1000))
    archive.getinfo("arr_0.npy").file_size = len(member) + 3 * count
  with pytest.raises(NpzError, match="arr_0 has 30.* than the file can hold"):
    ReferenceFile(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_bytes(tmp_path, compressed):
  """Loads, or one error that names the file; little memory either way."""
  path, rng = tmp_path / "a.npz", np.random.default_rng(0)
  (np.savez_compressed if compressed else np.savez)(
    path, mu=MEAN, sigma=COVARIANCE, arr_0=IMAGES[:2], arr_1=np.arange(2)
  )
  data = path.read_bytes()
  outcomes = set()

  def read():
    file = ReferenceFile(path)
    dict(file.statistics)
    file.labels()
    file.images()[1]

  def attempt():
    try:
      read()
    except NpzError as error:
      assert str(path) in str(error) and "\n" not in str(error)
      outcomes.add("error")
    else:
      outcomes.add("read")

  # Most of what names, sizes and places are in are the last bytes.
  for place in [*rng.integers(0, len(data), 60), *range(-200, 0)]:
    broken = bytearray(data)
    broken[place] = rng.choice([0, 127, 255, broken[place] ^ 1])
    path.unlink()  # much faster than to overwrite it
    path.write_bytes(broken)
    assert _peak(attempt) < 2 * MiB
  assert outcomes == {"error", "read"}


def test_widths_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(reference_npz, "_MAX_WIDTH", 5)
  with pytest.raises(NpzError, match=r"at most 5, got \(6,\) and \(6, 6\)"):
    ReferenceFile(_adm(tmp_path / "a.npz"))


def test_labels_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(reference_npz, "_MAX_BYTES", 23 * 8 - 1)
  file = ReferenceFile(_adm(tmp_path / "a.npz", mu=None, sigma=None))
  with pytest.raises(NpzError, match="184 bytes, more than the 183 that"):
    file.labels()


def test_images_that_were_not_announced_leave_no_file(tmp_path):
  path = tmp_path / "a.npz"
  for images, message in (
    ([IMAGES[:4]], "23 images were announced, there were 4"),
    ([IMAGES[:, :4]], "were announced, a batch is uint8"),
  ):
    with pytest.raises(ValueError, match=message):
      write_reference(path, {}, images=images, image_shape=IMAGES.shape)
  assert not list(tmp_path.iterdir())


def test_arrays_there_and_back(tmp_path):
  arrays = {"a/b": np.arange(6.0).reshape(2, 3), "text": np.array("x"), "n": 3}
  npz_files.write_npz(tmp_path / "a.npz", arrays)
  found = npz_files.read_npz(tmp_path / "a.npz")
  assert set(found) == set(arrays)
  np.testing.assert_array_equal(found["a/b"], arrays["a/b"])
  assert str(found["text"]) == "x" and int(found["n"]) == 3
  with pytest.raises(ValueError, match="[Oo]bject"):
    npz_files.write_npz(tmp_path / "b.npz", {"a": np.array([None])})
  assert not (tmp_path / "b.npz").exists()
  np.savez_compressed(tmp_path / "c.npz", a=np.zeros(10))
  with pytest.raises(NpzError, match="c.npz: a is compressed"):
    npz_files.read_npz(tmp_path / "c.npz")
