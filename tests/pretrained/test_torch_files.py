"""Files of torch.save: what is read, and that nothing is executed."""

import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest

from psvae_jax.pretrained.torch_files import read_torch_file

torch = pytest.importorskip("torch")


class Evil:
  """Unpickled, it would create a file."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


def tensors():
  generator = torch.Generator().manual_seed(0)
  return {
    "a.weight": torch.randn(3, 4, generator=generator),
    "half": torch.randn(5, generator=generator).half(),
    "brain": torch.randn(2, 2, generator=generator).bfloat16(),
    "double": torch.randn(2, generator=generator).double(),
    "count": torch.tensor(7),
    "turned": torch.randn(3, 4, generator=generator).T,
  }


def save(path, value, legacy=False):
  torch.save(value, path, _use_new_zipfile_serialization=not legacy)
  return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", [None, "state_dict", "model", "ema"])
def test_tensors_are_read_out_of_either_format(tmp_path, legacy, container):
  want = tensors()
  value = want if container is None else {container: want, "epoch": 3}
  got = read_torch_file(save(tmp_path / "x.pth", value, legacy))
  assert set(got) == set(want)
  for key, tensor in want.items():
    kind = np.int64 if key == "count" else np.float32
    assert got[key].dtype == kind
    np.testing.assert_array_equal(got[key], tensor.to(torch.float64).numpy())


def test_parameters_and_tied_tensors_are_read(tmp_path):
  layer = torch.nn.Linear(3, 3)
  value = {"one": layer.weight, "two": layer.weight, "note": "text"}
  got = read_torch_file(save(tmp_path / "x.pth", value))
  assert set(got) == {"one", "two"}
  np.testing.assert_array_equal(got["one"], got["two"])


def test_of_several_containers_one_must_be_named(tmp_path):
  one, two = {"x": torch.zeros(1)}, {"x": torch.ones(1)}
  path = save(tmp_path / "x.pth", {"model": one, "ema": two, "own": two})
  with pytest.raises(ValueError, match="holds 'model' and 'ema'; say which"):
    read_torch_file(path)
  for container, value in (("model", 0), ("ema", 1), ("own", 1)):
    assert read_torch_file(path, container)["x"] == value
  with pytest.raises(ValueError, match="no dict 'x'; it has model, ema, own"):
    read_torch_file(path, "x")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_nothing_is_executed(tmp_path, legacy, depth):
  made = tmp_path / "made"
  value = Evil(made) if depth == 0 else {"a": torch.zeros(1), "b": Evil(made)}
  path = save(tmp_path / "x.pth", value, legacy)
  with pytest.raises(ValueError, match="refers to .*mkdir.*nothing of it is"):
    read_torch_file(path)
  assert not made.exists()
  if depth == 0:
    torch.load(path, weights_only=False)  # it would have been
    assert made.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_plain_pickle_is_refused(tmp_path, protocol):
  path = tmp_path / "x.pth"
  path.write_bytes(pickle.dumps(Evil(tmp_path / "made"), protocol))
  with pytest.raises(ValueError, match="no file of torch.save"):
    read_torch_file(path)
  assert not (tmp_path / "made").exists()


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
  """A file of today's format around any pickle."""
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("x/data.pkl", pickled)
    file.writestr("x/byteorder", "little")
    for i, content in enumerate(storages):
      file.writestr(f"x/data/{i}", content)
    file.writestr("x/version", "3\n")
  return path


def test_names_by_another_opcode_are_refused(tmp_path):
  for protocol in (2, 4):
    pickled = pickle.dumps(Evil(tmp_path / "made"), protocol)
    path = archive(tmp_path / f"{protocol}.pth", pickled)
    with pytest.raises(ValueError, match="which is more than tensors"):
      read_torch_file(path)
  assert not (tmp_path / "made").exists()


def test_a_request_for_memory_is_refused(tmp_path):
  # bytearray(2**40), which torch's own list of names allows.
  size = b"\x8a\x06" + (2**40).to_bytes(6, "little")
  pickled = b"\x80\x02cbuiltins\nbytearray\n" + size + b"\x85R."
  path = archive(tmp_path / "x.pth", pickled)
  with pytest.raises(ValueError, match="refers to builtins.bytearray"):
    read_torch_file(path)


class _Persistent(pickle.Pickler):
  """Writes storages as torch does: by (type, key, device, length)."""

  def persistent_id(self, value):
    return (
      value if isinstance(value, tuple) and value[:1] == ("storage",) else None
    )


def lying_tensor(length, size, stride):
  """A pickled dict with a tensor of any stated size."""
  buffer = io.BytesIO()

  class Tensor:
    def __reduce__(self):
      storage = ("storage", torch.FloatStorage, "0", "cpu", length)
      arguments = (storage, 0, size, stride, False, {})
      return torch._utils._rebuild_tensor_v2, arguments

  _Persistent(buffer, 2).dump({"x": Tensor()})
  return buffer.getvalue()


def test_tensors_cannot_be_larger_than_the_file(tmp_path):
  content = np.arange(4, dtype=np.float32).tobytes()
  good = archive(tmp_path / "0", lying_tensor(4, (2, 2), (2, 1)), [content])
  np.testing.assert_array_equal(read_torch_file(good)["x"], [[0, 1], [2, 3]])
  for name, lie in (
    ("storage", lying_tensor(10**9, (10**9,), (1,))),
    ("tensor", lying_tensor(4, (10**9,), (1,))),
    ("expanded", lying_tensor(4, (10**9,), (0,))),
  ):
    path = archive(tmp_path / name, lie, [content])
    with pytest.raises(ValueError, match=f"{name}.*(malformed|larger than)"):
      read_torch_file(path)


def test_a_compressed_archive_is_refused(tmp_path):
  path = archive(
    tmp_path / "x.pth",
    pickle.dumps({}, 2),
    [bytes(10**7)],
    zipfile.ZIP_DEFLATED,
  )
  assert path.stat().st_size < 10**5
  with pytest.raises(ValueError, match="members are compressed"):
    read_torch_file(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_truncation_and_flipped_bytes_are_clean_errors(tmp_path, legacy):
  path = save(tmp_path / "x.pth", {"a": torch.randn(6), "b": 3}, legacy)
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  damaged = [whole[:n] for n in range(0, len(whole), max(len(whole) // 60, 1))]
  for _ in range(100):
    copy = bytearray(whole)
    for place in rng.integers(0, min(len(whole), 900), 3):
      copy[place] = rng.integers(0, 256)
    damaged.append(bytes(copy))
  refused = 0
  for content in damaged:
    path.write_bytes(content)
    try:
      read_torch_file(path)
    except ValueError as error:
      assert str(path) in str(error) and "\n" not in str(error)
      refused += 1
  assert refused > len(damaged) // 4


def test_what_is_no_dict_of_tensors_is_said(tmp_path):
  path = tmp_path / "x.pth"
  with pytest.raises(FileNotFoundError, match="x.pth does not exist"):
    read_torch_file(path)
  with pytest.raises(FileNotFoundError, match="is a folder"):
    read_torch_file(tmp_path)
  save(path, [torch.zeros(1)])
  with pytest.raises(ValueError, match="holds a list, not a dict"):
    read_torch_file(path)
  save(path, {"epoch": 3})
  with pytest.raises(ValueError, match="holds no tensors"):
    read_torch_file(path)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
  path = save(tmp_path / "x.pth", tensors())
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ImportError, match=r"pip install psvae_jax\[convert\]"):
    read_torch_file(path)
