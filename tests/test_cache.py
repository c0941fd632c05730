"""What a cache holds, that it survives a kill, and that it stays its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_disk
import tiny
import tiny_autoencoder
import tiny_cache

from psvae_jax import cache, latent_stats
from psvae_jax.data import cached, pipeline, scenes, views
from psvae_jax.psvae import PSVAE


def contents(root):
  """Every file of a finished cache."""
  return {
    path.name: path.read_bytes()
    for path in root.iterdir()
    if path.stat().st_size
  }


def test_every_example_is_there(tmp_path):
  source = tiny_cache.viewed()
  found = tiny_cache.write(tmp_path, source, dtype="float32")
  assert len(found) == 23
  for i in range(23):
    element, example = found[i], source[i]
    latent = tiny_cache.encode_images(example["image"][None])[0]
    tokens, mask, text = tiny_cache.encode_text([example["caption"]])
    np.testing.assert_array_equal(element["latent"], latent)
    np.testing.assert_array_equal(element["tokens"], tokens[0])
    np.testing.assert_array_equal(element["token_mask"], mask[0])
    np.testing.assert_array_equal(
      element["text"], np.where(mask[0][:, None], text[0], 0)
    )
    assert element["index"] == i
    assert set(element) == {"latent", "tokens", "token_mask", "text", "index"}
  names = sorted(path.name for path in tmp_path.glob("*.arrayrecord"))
  assert names == [f"{k:05d}-of-00003.arrayrecord" for k in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(tmp_path, dtype):
  element = tiny_cache.write(tmp_path, dtype=dtype)[3]
  latent = tiny_cache.encode_images(tiny_cache.viewed()[3]["image"][None])[0]
  assert element["latent"].dtype == element["text"].dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(element["latent"], latent.astype(dtype))
  assert element["tokens"].dtype == np.int32
  assert element["token_mask"].dtype == np.bool_
  assert element["index"].dtype == np.int64 and element["index"].ndim == 0


def test_tokens_without_features_labels_and_no_text(tmp_path):
  only_tokens = tiny_cache.encoders(
    text=lambda captions: (*tiny_cache.tokenize(captions), None),
    text_encoder="",
  )
  found = tiny_cache.write(tmp_path / "tokens", encoder=only_tokens)[0]
  assert set(found) == {"latent", "tokens", "token_mask", "index"}
  source = tiny_cache.Examples(23, extra={"label": np.int64(7)})
  found = tiny_cache.write(
    tmp_path / "label",
    tiny_cache.viewed(source),
    cache.Encoders(tiny_cache.encode_images, "auto"),
  )[0]
  assert set(found) == {"latent", "label", "index"} and found["label"] == 7


def test_only_real_tokens_take_room(tmp_path):
  """Padding's features, NaN here, are neither stored nor checked."""

  def encode(captions):
    tokens, mask, text = tiny_cache.encode_text(captions)
    return tokens, mask, np.where(mask[..., None], text, np.nan)

  tiny_cache.write(tmp_path / "a")
  tiny_cache.write(tmp_path / "b", encoder=tiny_cache.encoders(text=encode))
  assert contents(tmp_path / "a") == contents(tmp_path / "b")
  short = tiny_cache.write(
    tmp_path / "c",
    encoder=tiny_cache.encoders(
      text=lambda captions: tiny_cache.encode_text([c[:1] for c in captions])
    ),
  )
  sizes = [
    sum(path.stat().st_size for path in (tmp_path / name).glob("*.arrayrecord"))
    for name in "ac"
  ]
  assert sizes[1] <= sizes[0] and not short[11]["text"][1:].any()


def test_edits(tmp_path):
  edits = tiny_cache.Edits(9)
  found = tiny_cache.write(
    tmp_path,
    tiny_cache.viewed(views.EditExamples(edits)),
    dtype="float32",
  )
  for i in range(9):
    for name, image in (("latent", "target"), ("source_latent", "source")):
      expected = tiny_cache.encode_images(edits[i][image][None])[0]
      np.testing.assert_array_equal(found[i][name], expected)
    assert found[i]["token_mask"].sum() == len(edits[i]["instruction"])


def test_views(tmp_path):
  source = tiny_cache.viewed(
    tiny_cache.Examples(6, 11), augment="crop", views=3, seed=5
  )
  found = tiny_cache.write(tmp_path, source, dtype="float32")
  assert len(found) == 18 and (found.num_examples, found.views) == (6, 3)
  for i in range(18):
    latent = tiny_cache.encode_images(source[i]["image"][None])[0]
    np.testing.assert_array_equal(found[i]["latent"], latent)
    assert found[i]["index"] == i % 6


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"num_threads": 3}])
def test_batches_and_threads_change_nothing(tmp_path, options):
  tiny_cache.write(tmp_path / "a")
  tiny_cache.write(tmp_path / "b", **options)
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_encoders_see_one_batch_size(tmp_path):
  shapes = set()

  def encode(images):
    shapes.add(images.shape)
    return tiny_cache.encode_images(images)

  def text(captions):
    shapes.add(len(captions))
    return tiny_cache.encode_text(captions)

  tiny_cache.write(
    tmp_path, encoder=tiny_cache.encoders(images=encode, text=text)
  )
  assert shapes == {(4, 8, 8, 3), 4}


def test_two_hosts_write_one_cache(tmp_path):
  tiny_cache.write(tmp_path / "alone")
  root, barrier, found = tmp_path / "both", threading.Barrier(2, timeout=30), {}

  def host(index, wait=barrier.wait):
    options = {"process_index": index, "process_count": 2, "barrier": wait}
    found[index] = tiny_cache.write(root, **options)

  first = threading.Thread(target=host, args=(0,))

  def late():
    """The second host has come this far before the first one starts."""
    if first.ident is None:
      assert not list(root.iterdir()), "only the first host says what it is"
      first.start()
    barrier.wait()

  host(1, late)
  first.join()
  assert contents(tmp_path / "alone") == contents(root)
  assert len(found[0]) == len(found[1]) == 23


def test_host_that_does_not_share_the_folder(tmp_path):
  with pytest.raises(cached.CacheError, match="00001-of-00003.* same folder"):
    tiny_cache.write(tmp_path / "first", process_index=0, process_count=2)
  # The other host says so before it has encoded anything.
  with pytest.raises(cached.CacheError, match="first host has written, is mis"):
    tiny_cache.write(tmp_path / "other", process_index=1, process_count=2)


class Killed(BaseException):
  pass


def kill_at(monkeypatch, moment):
  """Raises at the n-th batch, rename or removal; returns what has happened."""
  events = []

  def guarded(name, function):
    def call(*args, **kwargs):
      events.append(name)
      if len(events) == moment:
        raise Killed
      return function(*args, **kwargs)

    return call

  monkeypatch.setattr(os, "replace", guarded("rename", os.replace))
  monkeypatch.setattr(Path, "unlink", guarded("remove", Path.unlink))
  encode = guarded("encode", tiny_cache.encode_images)
  return tiny_cache.encoders(images=encode), events


def test_killed_at_any_moment(tmp_path, monkeypatch):
  tiny_cache.write(tmp_path / "whole")
  moment, kinds = 0, set()
  while True:
    moment += 1
    root = tmp_path / str(moment)
    with monkeypatch.context() as patch:
      encoder, events = kill_at(patch, moment)
      try:
        tiny_cache.write(root, encoder=encoder)
        break
      except Killed:
        kinds.add(events[-1])
    complete = {
      path: path.stat().st_ino for path in root.glob("0*.arrayrecord")
    }
    found = tiny_cache.write(root)
    assert len(found) == 23
    assert contents(root) == contents(tmp_path / "whole")
    for path, inode in complete.items():
      assert path.stat().st_ino == inode, "a complete file was written again"
  assert kinds == {"encode", "rename", "remove"} and moment > 12


_SLOW_JOB = """
import sys, time
sys.path.insert(0, sys.argv[1])
import tiny_cache
def encode(images):
  time.sleep(0.2)
  return tiny_cache.encode_images(images)
tiny_cache.write(sys.argv[2], encoder=tiny_cache.encoders(images=encode))
"""


@pytest.mark.slow
def test_killed_for_real(tmp_path):
  root = tmp_path / "killed"
  job = subprocess.Popen(
    [sys.executable, "-c", _SLOW_JOB, str(Path(__file__).parent), str(root)]
  )
  try:
    deadline = time.monotonic() + 60
    while not list(root.glob("0*.arrayrecord")):
      assert time.monotonic() < deadline and job.poll() is None
      time.sleep(0.02)
    # Another job is told to wait, and harms nothing.
    with pytest.raises(cached.CacheError, match="being written by another job"):
      tiny_cache.write(root)
  finally:
    job.send_signal(signal.SIGKILL)
    job.wait()
  assert not (root / cached.MANIFEST_FILE).exists()
  with pytest.raises(cached.CacheError, match="no finished cache"):
    cached.CachedSource(root)
  tiny_cache.write(root)
  tiny_cache.write(tmp_path / "whole")
  assert contents(root) == contents(tmp_path / "whole")


def test_finished_cache_is_not_written_again(tmp_path):
  tiny_cache.write(tmp_path)

  def encode(images):
    raise AssertionError("encoded again")

  again = tiny_cache.write(
    tmp_path, encoder=tiny_cache.encoders(images=encode), shard_size=7
  )
  assert len(again) == 23


CHANGES = [
  ({"encoder": {"autoencoder": "new"}}, "autoencoder is 'auto', wanted 'new'"),
  ({"encoder": {"tokenizer": "new"}}, "tokenizer is 'letters', wanted 'new'"),
  ({"encoder": {"text_encoder": "n"}}, "text_encoder is 'sine', wanted 'n'"),
  ({"encoder": {"text_length": 9}}, "text_length is 12, wanted 9"),
  ({"dtype": "float32"}, "dtype is 'float16', wanted 'float32'"),
  ({"source": {"num_examples": 9}}, "data.num_examples is 23, wanted 9"),
  ({"source": {"augment": "center"}}, "data.augment is None, wanted 'center'"),
  (
    {"source": {"source": tiny_cache.Examples(24), "num_examples": 23}},
    r"data.source is 'Examples\(23\)', wanted 'Examples\(24\)'",
  ),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change, message", CHANGES)
def test_cache_of_something_else(tmp_path, change, message, finished):
  if finished:
    tiny_cache.write(tmp_path)
  else:
    with pytest.raises(Killed):
      tiny_cache.write(tmp_path, barrier=stopped)
  before = contents(tmp_path)
  options = {name: change[name] for name in change if name == "dtype"}
  with pytest.raises(cached.CacheError, match=message) as error:
    tiny_cache.write(
      tmp_path,
      tiny_cache.viewed(**change.get("source", {})),
      tiny_cache.encoders(**change.get("encoder", {})),
      **options,
    )
  assert f"delete {tmp_path}" in str(error.value)
  assert ";" not in str(error.value).split(" wanted")[0]  # nothing else differs
  assert contents(tmp_path) == before


def stopped():
  raise Killed


def test_unfinished_cache_of_another_file_size(tmp_path):
  with pytest.raises(Killed):
    tiny_cache.write(tmp_path, barrier=stopped)
  with pytest.raises(
    cached.CacheError, match="set cache.shard_size=10, or del"
  ):
    tiny_cache.write(tmp_path, shard_size=7)


def test_file_that_a_crash_of_the_machine_has_cut(tmp_path):
  """Renamed, but never all on the disk."""
  tiny_cache.write(tmp_path / "whole")
  root = tmp_path / "cut"
  with pytest.raises(Killed):
    tiny_cache.write(root, barrier=stopped)
  path = root / "00001-of-00003.arrayrecord"
  path.write_bytes(path.read_bytes()[:1000])
  tiny_cache.write(root)
  assert contents(root) == contents(tmp_path / "whole")


def test_files_that_belong_to_nothing(tmp_path):
  tiny_cache.write(tmp_path)
  (tmp_path / cached.MANIFEST_FILE).unlink()
  with pytest.raises(cached.CacheError, match="nor unfinished.json says of wh"):
    tiny_cache.write(tmp_path)
  (tmp_path / cache.UNFINISHED_FILE).write_text("{")
  with pytest.raises(cached.CacheError, match=r"unfinished.json is damaged"):
    tiny_cache.write(tmp_path)


@pytest.mark.parametrize(
  "part, value, message",
  [
    ("images", np.nan, "latents of example 17 are not finite: the encoder"),
    ("images", 1e6, "latents of example 17 .* too large for float16; set"),
    ("text", np.inf, "text features of example 17 are not finite: the enc"),
  ],
)
def test_values_that_cannot_be_stored(tmp_path, part, value, message):
  calls = []

  def images(x):
    z = tiny_cache.encode_images(x)
    calls.append(None)
    if part == "images" and len(calls) == 5:  # 10–13, 14–17, 18–19 are 4 to 6
      z[3, 0, 0, 0] = value
    return z

  def text(captions):
    tokens, mask, features = tiny_cache.encode_text(captions)
    if part == "text" and len(calls) == 5:
      features[3, 0, 0] = value
    return tokens, mask, features

  encoder = tiny_cache.encoders(images=images, text=text)
  with pytest.raises(ValueError, match=message):
    tiny_cache.write(tmp_path, encoder=encoder)
  assert len(tiny_cache.write(tmp_path)) == 23


@pytest.mark.parametrize(
  "options, message",
  [
    ({"shard_size": 0}, "must be at least 1, not 0 and 4"),
    ({"batch_size": 0}, "must be at least 1, not 10 and 0"),
    ({"encoder": tiny_cache.encoders(text_length=9)}, "text_length is 9"),
    ({"encoder": tiny_cache.encoders(text_encoder="")}, "come together or not"),
  ],
)
def test_bad_settings(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    tiny_cache.write(tmp_path, **options)


def test_disk_too_small_is_said_at_once(tmp_path):
  with small_disk.mounted(tmp_path / "disk", "1m") as disk:
    with small_disk.filled(disk, spare=1 << 15):
      with pytest.raises(
        OSError, match=r"disk is full \(the cache needs about"
      ):
        tiny_cache.write(
          disk / "cache", tiny_cache.viewed(tiny_cache.Examples(400))
        )


def test_disk_fills_up_on_the_way(tmp_path):
  source = tiny_cache.viewed(tiny_cache.Examples(400))
  options = {"shard_size": 100, "batch_size": 50}
  tiny_cache.write(tmp_path / "whole", source, **options)
  with small_disk.mounted(tmp_path / "disk", "2m") as disk:
    calls = []

    def encode(images):
      calls.append(None)
      if len(calls) == 5:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(free - 8192))
      return tiny_cache.encode_images(images)

    root = disk / "cache"
    encoder = tiny_cache.encoders(images=encode)
    with pytest.raises(OSError, match="disk is full.*the same command goes on"):
      tiny_cache.write(root, source, encoder, **options)
    assert len(list(root.glob("0*.arrayrecord"))) < 4
    assert not (root / cached.MANIFEST_FILE).exists()
    (disk / "ballast").unlink()
    tiny_cache.write(root, source, **options)
    assert contents(root) == contents(tmp_path / "whole")


def test_progress(tmp_path, capsys):
  tiny_cache.write(tmp_path, show_progress=True)
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1].startswith("cache (23 records) 7/7")
  tiny_cache.write(tmp_path, show_progress=True)
  assert not capsys.readouterr().out


def test_manifest_is_readable(tmp_path):
  tiny_cache.write(tmp_path)
  manifest = json.loads((tmp_path / cached.MANIFEST_FILE).read_text())
  assert manifest["spec"]["data"]["source"] == "Examples(23)"
  assert [shard["records"] for shard in manifest["shards"]] == [10, 10, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_statistics_stored_or_not(tmp_path, dtype):
  source = tiny_cache.viewed(
    tiny_cache.Examples(23, 11), augment="crop", views=2
  )
  found = tiny_cache.write(tmp_path, source, dtype=dtype)
  stored = latent_stats.measure(
    found, fingerprint="auto", count=found.num_examples
  )
  for batch_size in (4, 30):
    direct = cache.measure_stats(
      source, tiny_cache.encoders(), dtype=dtype, batch_size=batch_size
    )
    np.testing.assert_array_equal(stored.mean, direct.mean)
    np.testing.assert_array_equal(stored.std, direct.std)
    assert stored.count == direct.count == 23
    assert direct.fingerprint == "auto" and direct.data == source.description


def test_bad_records_do_not_count_twice(tmp_path):
  class Replaced(tiny_cache.Examples):
    def __getitem__(self, index):
      return super().__getitem__(9 if index == 5 else index)

  source = tiny_cache.viewed(Replaced(23))
  kept = [source[i]["image"] for i in range(23) if i != 5]
  expected = latent_stats.LatentMoments(6)
  expected.update(tiny_cache.encode_images(np.stack(kept)))
  direct = cache.measure_stats(source, tiny_cache.encoders(), batch_size=4)
  stored = latent_stats.measure(
    tiny_cache.write(tmp_path, source, dtype="float32"), fingerprint="auto"
  )
  for stats in (direct, stored):
    np.testing.assert_array_equal(stats.mean, expected.result("auto").mean)
    assert stats.count == 22


def test_statistics_of_some(tmp_path):
  source, found = tiny_cache.viewed(), tiny_cache.write(tmp_path)
  direct = cache.measure_stats(
    source, tiny_cache.encoders(), dtype="float16", count=9, batch_size=4
  )
  stored = latent_stats.measure(found, fingerprint="auto", count=9)
  np.testing.assert_array_equal(stored.mean, direct.mean)
  assert direct.count == 9


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  folder = tiny.save_encoder(tmp_path_factory.mktemp("encoder"))
  found = tiny_autoencoder.build(folder)
  return PSVAE(
    found.model,
    tiny.randomise(found.params),
    stage="psvae",
    fingerprint="tiny",
    batch_size=8,
  )


@pytest.mark.parametrize("edits", [False, True])
def test_cached_and_on_the_fly_give_the_same_batches(tmp_path, vae, edits):
  examples = (
    views.EditExamples(scenes.EditSource("train", 21, 40))
    if edits
    else scenes.SceneSource("train", 21, 40)
  )
  source = views.ViewedSource(examples, image_size=40)

  def tokenize(texts):
    return tiny_cache.tokenize([text[: tiny_cache.LENGTH] for text in texts])

  encoder = cache.Encoders(
    vae.encode,
    vae.latent_fingerprint,
    lambda texts: (*tokenize(texts), None),
    tokenizer="letters",
    text_length=tiny_cache.LENGTH,
  )
  found = tiny_cache.write(tmp_path, source, encoder, batch_size=8)
  options = {"batch_size": 8, "seed": 3, "num_threads": 0}
  stored = pipeline.train_iterator(found, **options)
  direct = pipeline.train_iterator(
    source, image_size=40, tokenize=tokenize, **options
  )
  pairs = {"latent": "image"} | ({"source_latent": "source"} if edits else {})
  for _ in range(4):
    batch, other = next(stored), next(direct)
    assert batch.keys() == {*pairs, "tokens", "token_mask", "index"}
    assert other.keys() == {*pairs.values(), "tokens", "token_mask", "index"}
    for name in ("tokens", "token_mask", "index"):
      np.testing.assert_array_equal(batch[name], other[name])
    for name, image in pairs.items():
      latent = vae.encode(other[image]).astype(np.float16)
      np.testing.assert_array_equal(batch[name], latent)
