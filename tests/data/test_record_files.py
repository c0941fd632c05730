"""Record files: what is written is read, whole files only, clear errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.data import record_files

ELEMENT = {
  "latent": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
  "text": np.zeros((0, 4), jnp.bfloat16),
  "tokens": np.arange(3, dtype=np.int32)[::-1],
  "mask": np.array([True, False]),
  "index": np.int64(7),
}


def test_records_come_back():
  found = record_files.decode(record_files.encode(ELEMENT))
  assert found.keys() == ELEMENT.keys()
  for name, value in ELEMENT.items():
    np.testing.assert_array_equal(found[name], value)
    assert found[name].dtype == value.dtype
    assert found[name].shape == np.shape(value)


@pytest.mark.parametrize(
  "record",
  [
    b"",
    b"\x02" + bytes(7) + b"[]",
    b"\x03" + bytes(7) + b"xyz",
    record_files.encode(ELEMENT)[:-1],
    record_files.encode(ELEMENT).replace(b'"F16"', b'"F99"'),
  ],
)
def test_what_is_no_record(record):
  with pytest.raises(ValueError):
    record_files.decode(record)


def test_files_appear_when_they_are_complete(tmp_path):
  path = tmp_path / "a.arrayrecord"
  left = record_files.RecordWriter(path)
  left.write(b"from a job that was killed")
  assert not path.exists() and record_files.num_records(path) == -1
  writer = record_files.RecordWriter(path)
  for i in range(5):
    writer.write(bytes([i]))
  writer.close()
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  assert record_files.num_records(path) == 5
  assert record_files.open_reader(path).read([3]) == [b"\x03"]
  path.write_bytes(path.read_bytes()[:-1])
  assert record_files.num_records(path) < 1


def test_folder_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match="none"):
    record_files.RecordWriter(tmp_path / "none" / "a.arrayrecord")
