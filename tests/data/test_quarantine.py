"""The list of bad records: whole lines, each once, whatever happens."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from psvae_jax.data import quarantine


def ledger(file, split="train", records=1000):
  return quarantine.Quarantine(
    split=split,
    source="/data",
    num_records=records,
    max_bad_share=0.9,
    file=file,
  )


def fault(index: int, kind: str = "image"):
  return {index: (f"{index}.png", quarantine.Fault(kind, "damaged"))}


def test_lines_are_whole_and_listed_once_by_many_writers(tmp_path):
  file = tmp_path / "quarantine.jsonl"
  lists = [ledger(file) for _ in range(4)]

  def write(own):
    for i in range(50):
      own.add(fault(i))

  threads = [threading.Thread(target=write, args=(own,)) for own in lists * 2]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  lines = file.read_text().splitlines()
  assert sorted(json.loads(line)["index"] for line in lines) == list(range(50))
  assert [len(own) for own in lists] == [50] * 4


_WRITER = """
import sys
from psvae_jax.data import quarantine
own = quarantine.Quarantine(
  split="train", source="/data", num_records=1000, max_bad_share=0.9,
  file=sys.argv[1],
)
sys.stdin.readline()
for i in range(int(sys.argv[2]), int(sys.argv[2]) + 60):
  own.add({i: (f"{i}.png", quarantine.Fault("image", "damaged"))})
"""


def test_several_processes_write_one_list(tmp_path):
  file = tmp_path / "quarantine.jsonl"
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", _WRITER, str(file), str(first)],
      stdin=subprocess.PIPE,
    )
    for first in (0, 20, 40)
  ]
  for worker in workers:  # all at once
    worker.stdin.write(b"\n")
    worker.stdin.flush()
  for worker in workers:
    assert worker.wait(60) == 0
    worker.stdin.close()
  lines = file.read_text().splitlines()
  assert sorted(json.loads(line)["index"] for line in lines) == list(range(100))


def test_line_cut_by_a_kill_spoils_no_other(tmp_path):
  file = tmp_path / "quarantine.jsonl"
  ledger(file).add(fault(1) | fault(2, "caption"))
  file.write_bytes(file.read_bytes()[:-25])
  assert [e["index"] for e in quarantine.read(file)] == [1]
  ledger(file).add(fault(1) | fault(2, "caption") | fault(3))
  assert [e["index"] for e in quarantine.read(file)] == [1, 2, 3]
  ledger(file, "validation").add(fault(1))
  listed = [(e["split"], e["index"], e["kind"]) for e in quarantine.read(file)]
  assert listed == [
    ("train", 1, "image"),
    ("train", 2, "caption"),
    ("train", 3, "image"),
    ("validation", 1, "image"),
  ]
  file.write_bytes(file.read_bytes() * 2)  # where files cannot be locked
  assert len(quarantine.read(file)) == 4


def test_what_is_no_entry_is_passed_over(tmp_path):
  file = tmp_path / "quarantine.jsonl"
  assert quarantine.read(file) == []
  ledger(file).add(fault(1))
  (entry,) = quarantine.read(file)
  endless = json.dumps({**entry, "index": 0}).replace(" 0,", " 1e999,")
  lines = [b"[]", b'{"split": 1}', b"null", b"\xff", endless.encode()]
  file.write_bytes(b"\n".join(lines))
  assert quarantine.read(file) == []


def test_file_that_cannot_be_written_warns_once(tmp_path, caplog):
  file = tmp_path / "folder" / "quarantine.jsonl"
  (tmp_path / "folder").write_text("a file where a folder is needed")
  own = ledger(file)
  with caplog.at_level(logging.WARNING):
    for i in range(5):
      own.add(fault(i))
  assert caplog.text.count("training goes on") == 1
  assert len(own) == 5
  (tmp_path / "folder").unlink()
  own.add(fault(5))  # and what was kept is written when it can be
  assert [e["index"] for e in quarantine.read(file)] == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 64 KiB."""
  place = tmp_path / "small"
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("needs the right to mount a tmpfs")
  yield place
  subprocess.run(["umount", str(place)], check=True)


def test_full_disk_costs_no_training_and_leaves_no_half_line(small_disk):
  file = small_disk / "quarantine.jsonl"
  own = ledger(file)
  own.add(fault(0))
  filler = small_disk / "filler"
  with pytest.raises(OSError, match="No space"):
    filler.write_bytes(bytes(1 << 20))
  for i in range(1, 200):
    own.add(fault(i))
  lines = file.read_text().splitlines()
  assert 0 < len(lines) < 200 and all(json.loads(line) for line in lines)
  filler.unlink()
  own.add(fault(200))
  assert [e["index"] for e in quarantine.read(file)] == list(range(201))


def test_paths_that_are_no_text_survive_the_file(tmp_path):
  file = tmp_path / "quarantine.jsonl"
  name = os.fsdecode(b"\xff.png")
  own = ledger(file)
  own.add({3: (name, quarantine.Fault("image", "damaged"))})
  ledger(file).add({3: (name, quarantine.Fault("image", "damaged"))})
  (entry,) = quarantine.read(file)
  assert entry["path"] == name
  assert file.read_bytes().isascii()
