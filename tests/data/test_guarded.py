"""Bad records are replaced without moving any other, and masked out."""

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from psvae_jax.config import DataConfig
from psvae_jax.data import folder, guarded, pipeline, quarantine, sources

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def write_image(path, value: int = 0) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


@pytest.fixture
def root(tmp_path):
  """60 images of 4 × 4 whose red is their number."""
  for i in range(60):
    write_image(tmp_path / "images" / f"{i:02d}.png", i)
  write_image(tmp_path / "eval" / "x.png")
  return tmp_path / "images"


def make(root, file=None, split="train", **options):
  options = {"max_bad_share": 0.2, **options}
  config = DataConfig(
    source="folder",
    root=str(root),
    eval_root=str(root.parent / "eval"),
    **options,
  )
  return sources.make_source(config, split, 4, file)


def train(source, **options):
  defaults = {"image_size": 4, "batch_size": 8, "seed": 3, "num_threads": 0}
  return pipeline.train_iterator(source, **{**defaults, **options})


def take(iterator, count: int) -> list[np.ndarray]:
  """Batches as (index, red value)."""
  batches = [next(iterator) for _ in range(count)]
  return [np.stack([b["index"], b["image"][:, 0, 0, 0]]) for b in batches]


def cut(path) -> None:
  data = path.read_bytes()
  path.write_bytes(data[: data.index(b"IDAT") + 7])


def grow(path) -> None:
  with open(path, "r+b") as file:
    file.truncate(3 << 30)  # a sparse file


def bomb(path) -> None:
  Image.new("1", (20_000, 20_000)).save(path)


def pipe(path) -> None:
  path.unlink()
  os.mkfifo(path)


FAULTS = {
  "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
  "cut": (cut, "cannot decode the image"),
  "text": (lambda path: path.write_text("<html>"), "not a readable image"),
  "bomb": (bomb, "pixels"),
  "huge file": (grow, "3221225472 bytes exceed the limit"),
  "gone": (lambda path: path.unlink(), "No such file"),
  "pipe": (pipe, "not a regular file"),
  "flipped": (
    lambda path: path.write_bytes(PNG_HEAD + bytes(60)),
    "not a readable image",
  ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_listed_and_skipped(root, tmp_path, name, caplog):
  file = tmp_path / "run" / "quarantine.jsonl"
  damage, cause = FAULTS[name]
  source = make(root, file)
  damage(root / "07.png")
  element = source[7]
  assert element["index"] != 7
  assert element["path"] == f"{int(element['index']):02d}.png"
  assert element["image"][0, 0, 0] == element["index"]
  assert source[7]["index"] == element["index"]
  (entry,) = quarantine.read(file)
  assert entry.pop("time").endswith("+00:00")
  assert cause in entry.pop("cause")
  assert entry == {
    "split": "train",
    "source": str(root),
    "index": 7,
    "path": "07.png",
    "kind": "image",
  }
  assert len(source.quarantine) == 1
  assert "Skipping 07.png of the train split" in caplog.text


def test_other_positions_keep_their_examples(root, tmp_path):
  expected = take(train(make(root)), 20)
  bad = [3, 17, 40]
  for i in bad:
    cut(root / f"{i:02d}.png")
  found = take(train(make(root)), 20)
  replaced = np.isin(np.stack(expected)[:, 0], bad)
  assert 0 < replaced.sum() < 20
  np.testing.assert_array_equal(
    np.stack(expected)[:, 0][~replaced], np.stack(found)[:, 0][~replaced]
  )
  assert not np.isin(np.stack(found)[:, 0], bad).any()
  # Image and index belong together.
  np.testing.assert_array_equal(np.stack(found)[:, 0], np.stack(found)[:, 1])


def test_same_stream_for_any_hosts_threads_and_after_resume(root, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  for i in (3, 4, 17, 40, 41, 42, 59):
    cut(root / f"{i:02d}.png")
  expected = take(train(make(root)), 30)
  threaded = train(make(root, file), num_threads=4, prefetch=7)
  np.testing.assert_array_equal(take(threaded, 30), expected)
  hosts = [
    take(train(make(root, file), process_index=h, process_count=4), 30)
    for h in range(4)
  ]
  joined = [np.concatenate(parts, 1) for parts in zip(*hosts, strict=True)]
  np.testing.assert_array_equal(joined, expected)
  iterator = train(make(root, file))
  take(iterator, 11)
  state = iterator.get_state()
  resumed = train(make(root, file))  # knows nothing of what the first one met
  resumed.set_state(state)
  np.testing.assert_array_equal(take(resumed, 19), expected[11:])
  assert len(quarantine.read(file)) == 7
  assert len(file.read_text().splitlines()) == 7


def test_resume_after_the_bad_files_were_removed(root, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  for i in (3, 17, 40):
    cut(root / f"{i:02d}.png")
  iterator = train(make(root, file))
  take(iterator, 15)  # met all of them
  state = iterator.get_state()
  expected = take(iterator, 15)
  for i in (3, 17):
    (root / f"{i:02d}.png").unlink()
  source = make(root, file)
  assert len(source) == 60
  resumed = train(source)
  resumed.set_state(state)
  np.testing.assert_array_equal(take(resumed, 15), expected)
  assert len(quarantine.read(file)) == 3


def test_hold_out_does_not_move_when_bad_files_are_removed(root, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  config = DataConfig(source="folder", root=str(root), max_bad_share=0.5)

  def splits():
    found = [sources.make_source(config, s, 4, file) for s in sources.SPLITS]
    return [[s.path(i) for i in range(len(s))] for s in found]

  before = splits()
  for paths, split in zip(before, sources.SPLITS, strict=True):
    source = sources.make_source(config, split, 4, file)
    (root / paths[0]).write_bytes(b"")
    source.read(0)
    (root / paths[0]).unlink()
  assert len(quarantine.read(file)) == 2
  assert splits() == before


def test_repaired_file_is_used_again(root, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  whole = (root / "07.png").read_bytes()
  cut(root / "07.png")
  source = make(root, file)
  assert source[7]["index"] != 7
  (root / "07.png").write_bytes(whole)
  assert source[7]["index"] != 7  # this run goes on as it began
  assert make(root, file)[7]["index"] == 7


def test_replacements_are_spread_over_the_source(root):
  for i in range(20, 30):
    cut(root / f"{i}.png")
  source = make(root)
  used = {int(source[i]["index"]) for i in range(20, 30)}
  assert len(used) > 5 and used.isdisjoint(range(20, 30))
  assert max(used) - min(used) > 30


@pytest.mark.parametrize("share, limit", [(0.0, 0), (0.05, 3), (0.29, 17)])
def test_one_more_than_allowed_is_an_error(root, tmp_path, share, limit):
  file = tmp_path / "quarantine.jsonl"
  source = make(root, file, max_bad_share=share)
  assert source.quarantine.limit == limit
  for i in range(limit):
    cut(root / f"{i:02d}.png")
    source[i]
  cut(root / "58.png")
  with pytest.raises(quarantine.DataError) as raised:
    source[58]
  message = str(raised.value)
  assert f"{limit + 1} of the 60 records of the train split" in message
  assert f"max_bad_share={share:g} allows {limit}" in message
  assert str(file) in message and str(root) in message
  assert ("58.png" if limit < 3 else "00.png") in message
  assert "Repair or remove" in message
  assert len(quarantine.read(file)) == limit + 1


def test_error_reaches_the_training_loop_through_threads(root, tmp_path):
  source = make(root, tmp_path / "quarantine.jsonl", max_bad_share=0.02)
  for i in range(0, 60, 2):
    cut(root / f"{i:02d}.png")
  iterator = train(source, num_threads=3)
  with pytest.raises(quarantine.DataError, match=r"allows 1\. They are named"):
    for _ in range(20):
      next(iterator)


def test_nothing_but_the_data_is_caught(root):
  with pytest.raises(ValueError, match="5 × 5 are needed"):
    next(train(make(root), image_size=5))
  with pytest.raises(IndexError):
    make(root)[60]


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_masks_bad_records(root, tmp_path, hosts):
  file = tmp_path / "quarantine.jsonl"
  for i in (0, 7, 8, 59):
    cut(root / f"{i:02d}.png")
  parts = [
    list(
      pipeline.eval_batches(
        make(root, file),
        image_size=4,
        batch_size=8,
        num_threads=2,
        process_index=h,
        process_count=hosts,
        captions=True,
      )
    )
    for h in range(hosts)
  ]
  batches = [
    {k: np.concatenate([part[k] for part in group]) for k in group[0]}
    for group in zip(*parts, strict=True)
  ]
  assert len(batches) == 8
  mask = np.concatenate([b["mask"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  image = np.concatenate([b["image"] for b in batches])
  good = sorted(set(range(60)) - {0, 7, 8, 59})
  assert np.flatnonzero(mask).tolist() == good
  assert index[mask].tolist() == good and (index[~mask] == -1).all()
  assert not image[~mask].any()
  assert image[mask][:, 0, 0, 0].tolist() == good
  assert len(quarantine.read(file)) == 4


def write_rows(root, rows) -> None:
  lines = [json.dumps(row) + "\n" for row in rows]
  (root / "metadata.jsonl").write_text("".join(lines))


def test_broken_captions_are_bad_records(root, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  rows = [{"file_name": f"{i:02d}.png", "text": f"no. {i}"} for i in range(60)]
  write_rows(root, rows)
  expected = take(train(make(root)), 15)
  rows[5]["text"], rows[9]["text"] = 7, "\ud800"
  (root / "30.png").unlink()
  write_rows(root, rows)
  source = make(root, file)
  assert len(source) == 60
  kinds = {entry["index"]: entry["kind"] for entry in quarantine.read(file)}
  assert kinds == {5: "caption", 9: "caption", 30: "image"}
  element = source[5]
  assert element["caption"] == f"no. {element['index']}"
  found = np.stack(take(train(source), 15))
  moved = found[:, 0] != np.stack(expected)[:, 0]
  assert np.isin(np.stack(expected)[:, 0][moved], [5, 9, 30]).all()
  with pytest.raises(quarantine.DataError, match=r"3 of the 60 .* allows 1"):
    make(root, file, max_bad_share=0.02)
  assert len(quarantine.read(file)) == 3


def test_null_captions_where_a_column_is_asked_for(root):
  rows = [{"file_name": f"{i:02d}.png", "alt": f"no. {i}"} for i in range(60)]
  rows[5]["alt"] = None
  del rows[6]["alt"]
  write_rows(root, rows)
  source = make(root, captions="alt")
  assert len(source.quarantine) == 2
  assert {fault.kind for fault in source.source.faults.values()} == {"caption"}
  assert source.read(5) is None and source.read(7)["caption"] == "no. 7"


def test_vanished_folder_ends_quickly_and_lists_nothing(root, tmp_path):
  file = tmp_path / "quarantine.jsonl"
  source = make(root, file)
  shutil.rmtree(root)
  with pytest.raises(quarantine.DataError, match="disk or its mount is gone"):
    source[0]
  with pytest.raises(quarantine.DataError, match="mount is gone"):
    list(pipeline.eval_batches(source, image_size=4, batch_size=8))
  assert quarantine.read(file) == []


class Unmounted:
  """A million records, of which none is there, on a mount that is."""

  name = "/mnt/data"
  faults: dict = {}

  def __init__(self, error=None):
    self.reads = 0
    self.error = error or FileNotFoundError(errno.ENOENT, "No such file")

  def __len__(self) -> int:
    return 10**10

  def __getitem__(self, index):
    self.reads += 1
    raise self.error

  def path(self, index: int) -> str:
    return f"{index}.png"

  def is_available(self) -> bool:
    return True


@pytest.mark.parametrize("share, reads", [(0.01, 8), (0.5, 30), (0.9, 197)])
def test_empty_mount_ends_quickly_and_lists_nothing(tmp_path, share, reads):
  file = tmp_path / "quarantine.jsonl"
  source = Unmounted()
  guard = guarded.GuardedSource(
    source, split="train", max_bad_share=share, file=file
  )
  with pytest.raises(quarantine.DataError, match="one after the other"):
    guard[12345]
  assert source.reads == reads and not file.exists()
  assert len(guard.quarantine) == 0


def test_shortage_of_the_machine_is_no_fault_of_the_record():
  error = OSError(errno.EMFILE, "Too many open files")
  guard = guarded.GuardedSource(
    Unmounted(error), split="train", max_bad_share=0.01
  )
  with pytest.raises(OSError, match="Too many open files"):
    guard[0]
  assert len(guard.quarantine) == 0


class Memory:
  """Allocations as they would be with so little memory left."""

  def __init__(self, monkeypatch, left: int):
    self.left, self.calls = left, 0
    load = Image.Image.load

    def loading(image):
      self.calls += 1
      self._take(1000)
      return load(image)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", loading)
    monkeypatch.setattr(guarded.np, "empty", self._empty)
    monkeypatch.setattr(guarded, "_WAITS", (0, 0))

  def _take(self, size: int) -> None:
    if size > self.left:
      raise MemoryError(f"Unable to allocate {size} bytes")

  def _empty(self, size: int, dtype) -> None:
    self._take(size)


def test_want_of_memory_is_no_fault_of_the_record(root, tmp_path, monkeypatch):
  file = tmp_path / "quarantine.jsonl"
  source = make(root, file)
  memory = Memory(monkeypatch, left=10)
  for read in (source.__getitem__, source.read):
    with pytest.raises(MemoryError, match=r"07\.png .* lower data.num_threads"):
      read(7)
  assert memory.calls == 6
  assert len(source.quarantine) == 0 and not file.exists()


def test_record_that_fails_for_memory_while_there_is_plenty(
  root, tmp_path, monkeypatch
):
  """A hostile image must not end every run that meets it."""
  file = tmp_path / "quarantine.jsonl"
  source = make(root, file)
  read = folder.FolderSource.__getitem__

  def hostile(self, index):
    if index == 7:
      raise MemoryError
    return read(self, index)

  monkeypatch.setattr(folder.FolderSource, "__getitem__", hostile)
  monkeypatch.setattr(guarded, "_WAITS", (0, 0))
  monkeypatch.setattr(guarded, "_ROOM", 1 << 20)  # of any machine
  assert source[7]["index"] != 7
  (entry,) = quarantine.read(file)
  assert entry["index"] == 7 and "of memory" in entry["cause"]


def test_passing_want_of_memory_is_tried_again(root, monkeypatch):
  source = make(root)
  read, calls = folder.FolderSource.__getitem__, []

  def short(self, index):
    calls.append(index)
    if len(calls) < 3:
      raise MemoryError
    return read(self, index)

  monkeypatch.setattr(folder.FolderSource, "__getitem__", short)
  monkeypatch.setattr(guarded, "_WAITS", (0, 0))
  assert source[7]["index"] == 7 and calls == [7, 7, 7]
  assert len(source.quarantine) == 0


def test_passing_errors_are_tried_again(root, monkeypatch):
  source = make(root)
  read, calls = folder.FolderSource.__getitem__, []

  def flaky(self, index):
    calls.append(index)
    if len(calls) < 3:
      raise OSError(errno.EIO, "Input/output error")
    return read(self, index)

  monkeypatch.setattr(folder.FolderSource, "__getitem__", flaky)
  monkeypatch.setattr(guarded, "_WAITS", (0, 0))
  assert source[7]["index"] == 7 and calls == [7, 7, 7]
  assert len(source.quarantine) == 0


def test_almost_all_bad_still_finds_the_good_one(root):
  for i in range(59):
    (root / f"{i:02d}.png").write_bytes(b"")
  source = make(root, max_bad_share=0.99)
  assert {int(source[i]["index"]) for i in range(60)} == {59}
  assert len(source.quarantine) == 59


def test_copy_keeps_its_list(root):
  cut(root / "07.png")
  source = make(root)
  source[7]
  copy = pickle.loads(pickle.dumps(source))
  assert 7 in copy.quarantine and copy[7]["index"] == source[7]["index"]
  assert repr(copy) == repr(source)


def test_memory_holds_bad_records_only():
  source = Unmounted()
  source.__class__ = type("Odd", (Unmounted,), {"__getitem__": _odd_only})
  guard = guarded.GuardedSource(source, split="train", max_bad_share=0.9)
  for index in range(0, 10**10, 10**7):
    assert guard[index + 1]["index"] == index + 1
  assert len(guard.quarantine) == 0
  guard[10**9]
  assert 1 <= len(guard.quarantine) < 200


def _odd_only(self, index):
  if index % 2 == 0:
    raise ValueError(f"{index}: even")
  return {"index": np.int64(index)}


def test_a_second_source_logs_only_what_is_new(root, tmp_path, caplog):
  """Every evaluation opens the data anew; its log need not repeat itself."""
  file = tmp_path / "quarantine.jsonl"
  cut(root / "07.png")
  make(root, file)[7]
  cut(root / "08.png")
  source = make(root, file)
  assert source.read(7) is None and source.read(8) is None
  assert caplog.text.count("Skipping 07.png") == 1
  assert caplog.text.count("Skipping 08.png") == 1


def test_log_names_ten(root, tmp_path, caplog):
  file = tmp_path / "quarantine.jsonl"
  for i in range(12):
    (root / f"{i:02d}.png").write_bytes(b"")
  source = make(root, file, max_bad_share=0.5)
  for i in range(12):
    source.read(i)
  assert caplog.text.count("Skipping") == 10
  assert caplog.text.count(f"named in {file} only") == 1
  assert len(quarantine.read(file)) == 12
