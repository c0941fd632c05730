"""Checkpoints under damage, mismatch and a full disk, all injected for real."""

import errno
import logging
import os
import pathlib
import shutil
import time

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from small_disk import filled, mounted

from psvae_jax import checkpoint as ckpt
from psvae_jax.checkpoint import files as checkpoint_files
from psvae_jax.checkpoint import newest, read
from psvae_jax.config import CheckpointConfig
from psvae_jax.data import pipeline
from psvae_jax.data.scenes import SceneSource


def make_state(step, rows=250):
  """Deterministic by `step`; noise, which no compression makes smaller."""
  rng = np.random.default_rng(step)

  def module():
    return {
      "kernel": jnp.asarray(rng.standard_normal((rows, 100), np.float32)),
      "bias": jnp.asarray(rng.standard_normal(7, np.float32)),
    }

  params = {"encoder": module(), "decoder": module()}
  return {
    "step": jnp.int32(step),
    "params": {**params, "discriminator": module()},
    "opt_state": {"encoder": (jnp.int32(step), {"mu": module()})},
    "ema_params": params,
    "model_state": {},
  }


def abstract(tree):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def make_iterator():
  return iter(grain.MapDataset.range(999).shuffle(0).to_iter_dataset())


def open_checkpointer(folder, keep=2, fingerprint="ours", description=None):
  config = CheckpointConfig(every_steps=1, keep=keep)
  return ckpt.Checkpointer(folder, config, fingerprint, description)


def write_steps(folder, steps, **kwargs):
  """Saves `steps`; the batch after step n is the n-th of the data."""
  checkpointer, data = open_checkpointer(folder, **kwargs), make_iterator()
  for step in range(1, max(steps) + 1):
    next(data)
    if step in steps:
      assert checkpointer.save(step, make_state(step), data, {"seconds": step})
  checkpointer.close()


def check_restored(folder, step, **kwargs):
  """Restores `folder`, which must hold `step`, bit for bit."""
  data, expected = make_iterator(), make_iterator()
  checkpointer = open_checkpointer(folder, **kwargs)
  state, metadata = checkpointer.restore(abstract(make_state(1)), data)
  chex.assert_trees_all_equal(
    jax.device_get(state), jax.device_get(make_state(step))
  )
  for _ in range(step):
    next(expected)
  assert next(data) == next(expected)
  assert (metadata["step"], metadata["seconds"]) == (step, step)
  return checkpointer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  folder = tmp_path_factory.mktemp("original") / "checkpoints"
  write_steps(folder, (2, 4))
  return folder


@pytest.fixture
def folder(original, tmp_path):
  shutil.copytree(original, tmp_path / "checkpoints")
  return tmp_path / "checkpoints"


def array_file(checkpoint):
  """The file that holds the arrays: the largest."""
  files = (p for p in checkpoint.rglob("*") if p.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b"")


def remove(path):
  path.unlink()


FILES = {
  "arrays": array_file,
  "manifest": lambda c: c / "state" / "manifest.ocdbt",
  "list of arrays": lambda c: c / "state" / "_METADATA",
  "metadata": lambda c: c / "metadata" / "metadata",
  "checksums": lambda c: c / "checksums.json",
}
# Every file once and every damage at least once with checksums; a flipped bit
# of array data is the one that only checksums show.
DAMAGE = [
  ("arrays", flip_a_bit),
  ("arrays", truncate),
  ("arrays", remove),
  ("manifest", flip_a_bit),
  ("list of arrays", truncate),
  ("metadata", flip_a_bit),
  ("metadata", empty),
  ("checksums", empty),
]
DAMAGE_WITHOUT_CHECKSUMS = [
  ("arrays", truncate),
  ("manifest", remove),
  ("list of arrays", empty),
  ("metadata", truncate),
]


def test_what_is_saved_comes_back(folder):
  checkpointer = check_restored(folder, 4)
  assert checkpointer.latest_step() == 4
  checkpointer.close()
  assert open_checkpointer(folder.parent / "new").restore({}, None) is None


@pytest.mark.parametrize(
  "checksums, name, damage",
  [(True, *case) for case in DAMAGE]
  + [(False, *case) for case in DAMAGE_WITHOUT_CHECKSUMS],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
  folder, capfd, checksums, name, damage
):
  damage(FILES[name](folder / "4"))
  if not checksums:  # as written before there were any
    for path in folder.glob("*/checksums.json"):
      path.unlink()
  checkpointer = check_restored(folder, 2)
  (line,) = capfd.readouterr().out.splitlines()
  assert "step 4: " in line
  assert "Resuming from step 2" in line
  assert (folder / "4.damaged").is_dir()
  # The run goes on and saves that step again.
  data = make_iterator()
  for _ in range(4):
    next(data)
  assert checkpointer.save(4, make_state(4), data, {"seconds": 4})
  checkpointer.close()
  check_restored(folder, 4).close()
  assert capfd.readouterr().out == ""
  assert (folder / "4.damaged").is_dir()


@pytest.mark.parametrize(
  "checksums, name, damage",
  [(True, *case) for case in DAMAGE] + [(False, "manifest", remove)],
)
def test_readers_pass_over_a_damaged_checkpoint_and_leave_it(
  folder, capfd, checksums, name, damage
):
  damage(FILES[name](folder / "4"))
  if checksums:
    # Reads no arrays: a changed byte in them is found when they are.
    seen = damage is not flip_a_bit or name == "metadata"
    assert ckpt.checked_latest_step(folder, "ours") == (2 if seen else 4)
  else:
    for path in folder.glob("*/checksums.json"):
      path.unlink()
  capfd.readouterr()
  ema = ckpt.restore_ema(
    folder, abstract(make_state(1)["ema_params"]), ("encoder",), "ours"
  )
  (line,) = capfd.readouterr().out.splitlines()
  assert "step 4: " in line
  assert "Taking step 2" in line
  expected = jax.device_get(make_state(2)["ema_params"]["encoder"])
  chex.assert_trees_all_equal(jax.device_get(ema), {"encoder": expected})
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_a_step_damaged_twice_is_kept_twice(folder):
  for name in ("4.damaged", "4.damaged-2"):
    truncate(array_file(folder / "4"))
    checkpointer = check_restored(folder, 2)
    assert (folder / name).is_dir()
    data = make_iterator()
    for _ in range(4):
      next(data)
    checkpointer.save(4, make_state(4), data, {"seconds": 4})
    checkpointer.close()


def test_an_empty_folder_is_a_damaged_checkpoint(folder):
  shutil.rmtree(folder / "4")
  (folder / "4").mkdir()
  check_restored(folder, 2).close()


def test_none_usable_names_each_and_moves_nothing(folder):
  truncate(array_file(folder / "4"))
  empty(FILES["metadata"](folder / "2"))
  checkpointer = open_checkpointer(folder)
  with pytest.raises(ckpt.CheckpointError) as error:
    checkpointer.restore(abstract(make_state(1)), make_iterator())
  for part in ("step 4: state/", "step 2: metadata/metadata", "move this"):
    assert part in str(error.value)
  with pytest.raises(ckpt.CheckpointError, match="no other"):
    ckpt.checked_latest_step(folder, "ours")
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_checkpoints_without_checksums_load(folder):
  for path in folder.glob("*/checksums.json"):
    path.unlink()
  check_restored(folder, 4).close()


def test_checksums_cover_all_items(folder):
  assert checkpoint_files.check_files(folder / "4")
  names = (folder / "4" / "checksums.json").read_text()
  for part in ("state/manifest.ocdbt", "metadata/metadata"):
    assert part in names


@pytest.fixture
def failing_reads(monkeypatch):
  """Reads of array files fail so many times, with an error number."""
  crc, calls = checkpoint_files._crc32, {}

  def fail(number, times):
    def failing(file):
      calls[file] = calls.get(file, 0) + 1
      if file.parent.name == "d" and calls[file] <= times:
        raise OSError(number, os.strerror(number))
      return crc(file)

    monkeypatch.setattr(checkpoint_files, "_crc32", failing)

  monkeypatch.setattr(checkpoint_files, "_WAITS", (0.01, 0.01))
  return fail


def test_a_passing_read_error_costs_no_checkpoint(folder, failing_reads, capfd):
  failing_reads(errno.EIO, 2)
  check_restored(folder, 4).close()
  assert capfd.readouterr().out == ""


def test_a_file_that_stays_unreadable_is_damaged(folder, monkeypatch, capfd):
  broken = array_file(folder / "4")
  crc = checkpoint_files._crc32
  monkeypatch.setattr(checkpoint_files, "_WAITS", (0.01, 0.01))

  def failing(file):
    if file == broken:
      raise OSError(errno.EIO, "Input/output error")
    return crc(file)

  monkeypatch.setattr(checkpoint_files, "_crc32", failing)
  check_restored(folder, 2).close()
  assert "Input/output error" in capfd.readouterr().out


@pytest.mark.parametrize("checksums", [True, False])
def test_a_disk_that_refuses_is_no_damage(folder, monkeypatch, checksums):
  """Such as a mount whose rights have expired: it may be back tomorrow."""
  if not checksums:
    for path in folder.glob("*/checksums.json"):
      path.unlink()

  def refuse(path, *_):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))

  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  with pytest.raises(ckpt.CheckpointError, match="denied.*the disk's trouble"):
    open_checkpointer(folder).restore(abstract(make_state(1)), make_iterator())
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_a_step_that_vanishes_while_it_is_read_gives_way_to_a_newer_one(
  folder, monkeypatch, capfd
):
  """Another process trains there, and keeps one checkpoint."""
  read_metadata = newest.read_metadata

  def rotating(where, step, verified):
    if step == 4:
      shutil.copytree(folder / "2", folder / "6")
      path = folder / "6" / "metadata" / "metadata"
      path.write_text(path.read_text().replace('"step": 2', '"step": 6'))
      (folder / "6" / "checksums.json").unlink()
      shutil.rmtree(folder / "4")
    return read_metadata(where, step, verified)

  monkeypatch.setattr(newest, "read_metadata", rotating)
  monkeypatch.setattr(read, "read_metadata", rotating)
  state = make_state(2)
  modules = bridge(folder, state["params"])
  chex.assert_trees_all_equal(
    jax.device_get(modules["encoder"]),
    jax.device_get(state["ema_params"]["encoder"]),
  )
  assert capfd.readouterr().out == ""


def two_processes(monkeypatch, index, said):
  """This process as one of two; `said` is what process 0 broadcasts."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: index)

  def broadcast(message):
    if index == 0:
      said[:] = [np.array(message)]
    return said[0].astype(np.int32)  # whatever a sum over hosts makes of it

  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)


def test_the_first_process_decides_for_all(folder, monkeypatch):
  flip_a_bit(array_file(folder / "4"))
  said = []
  with monkeypatch.context() as patch:
    two_processes(patch, 0, said)
    first = newest.newest_usable(folder, lambda *given: given)
  with monkeypatch.context() as patch:
    two_processes(patch, 1, said)
    # Looks at no file: its view of the folder may be older.
    patch.setattr(checkpoint_files, "all_steps", None)
    patch.setattr(checkpoint_files, "check_files", None)
    second = newest.newest_usable(folder, lambda *given: given)
    assert second[:2] == first[:2] == (2, (2, True))
    ((step, why),) = second[2]
    assert step == 4
    assert "has changed" in why

    def cannot(step, verified):
      raise checkpoint_files.DamagedCheckpointError("the state cannot be read")

    with pytest.raises(ckpt.CheckpointError, match="process 1 cannot read"):
      newest.newest_usable(folder, cannot)


def test_no_process_waits_for_one_that_has_failed(folder, monkeypatch):
  said = []

  def fail():
    raise ckpt.CheckpointError("all are damaged")

  for index, message in ((0, "all are damaged"), (1, "process 0 has stopped")):
    with monkeypatch.context() as patch:
      two_processes(patch, index, said)
      with pytest.raises(ckpt.CheckpointError, match=message):
        ckpt.agree(fail)


def test_leftovers_of_killed_saves_go_and_nothing_else(folder):
  partial = folder / "6.orbax-checkpoint-tmp" / "state"
  partial.mkdir(parents=True)
  (partial / "x").write_text("x")
  (folder / "2.damaged").mkdir()
  check_restored(folder, 4).close()
  assert sorted(p.name for p in folder.iterdir()) == ["2", "2.damaged", "4"]


def test_another_model_is_no_damage_and_its_fields_are_named(tmp_path):
  ours = {"model": {"channels": 24, "depth": (1, 2)}, "encoder": "a"}
  theirs = {"model": {"channels": 96, "depth": [1, 2]}, "encoder": "a"}
  folder = tmp_path / "checkpoints"
  write_steps(folder, (2, 4), description=ours)
  parts = "model.channels: saved 24, this job 96"
  checkpointer = open_checkpointer(folder, 2, "other", theirs)
  for call in (
    lambda: checkpointer.restore(abstract(make_state(1)), make_iterator()),
    lambda: ckpt.checked_latest_step(folder, "other", theirs),
    lambda: ckpt.restore_ema(folder, {}, (), "other", description=theirs),
  ):
    with pytest.raises(ckpt.CheckpointError, match="another model") as error:
      call()
    assert parts in str(error.value)
    assert "depth" not in str(error.value)
  with pytest.raises(ckpt.CheckpointError, match="preprocessing"):
    ckpt.checked_latest_step(folder, "other")
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
  check_restored(folder, 4, description=ours).close()


def test_switching_the_adversary_is_named_as_such(folder):
  """In either direction, and not as hundreds of arrays."""
  wanted = make_state(1)
  del wanted["params"]["discriminator"]
  stage = folder.parent.name
  with pytest.raises(ckpt.CheckpointError) as error:
    open_checkpointer(folder).restore(abstract(wanted), make_iterator())
  assert str(error.value) == (
    f"{folder}: the checkpoint of step 4 trains `discriminator`, this job not. "
    f"Was config.{stage}.loss.gan changed? Use the old value, or another "
    "--workdir."
  )
  wanted = make_state(1)
  wanted["params"]["other"] = {"scale": jnp.zeros(3)}
  with pytest.raises(ckpt.CheckpointError) as error:
    open_checkpointer(folder).restore(abstract(wanted), make_iterator())
  assert "this job trains `other`, the checkpoint of step 4 not" in str(
    error.value
  )
  assert "gan" not in str(error.value)


def test_another_number_of_hosts_goes_on_with_the_same_data(tmp_path):
  """Two hosts resume what one has saved: the same global batches follow."""

  def batches(hosts, index=0):
    return pipeline.train_iterator(
      SceneSource("train", 64, 16),
      image_size=16,
      batch_size=8,
      seed=3,
      num_threads=0,
      process_index=index,
      process_count=hosts,
    )

  state, data = make_state(1), batches(1)
  next(data)
  next(data)
  checkpointer = open_checkpointer(tmp_path / "checkpoints")
  assert checkpointer.save(2, state, data, {})
  checkpointer.close()
  items = [p.name for p in (tmp_path / "checkpoints" / "2").iterdir()]
  assert {"state", "metadata"} <= set(items)
  assert "data" not in items  # grain's handler keeps a file for every host
  found = []
  for index in range(2):
    resumed = batches(2, index)
    checkpointer = open_checkpointer(tmp_path / "checkpoints")
    checkpointer.restore(abstract(state), resumed)
    checkpointer.close()
    found.append(next(resumed))
  expected = next(data)
  for name in ("index", "image"):
    np.testing.assert_array_equal(
      np.concatenate([batch[name] for batch in found]), expected[name]
    )


def test_another_optimizer_is_named_by_its_first_arrays(folder):
  wanted = make_state(1)
  wanted["opt_state"] = {"encoder": (jnp.zeros((3,)), {"nu": jnp.zeros((2,))})}
  with pytest.raises(ckpt.CheckpointError, match=r"optim\.name") as error:
    open_checkpointer(folder).restore(abstract(wanted), make_iterator())
  for line in (
    "opt_state/encoder/0: saved int32 (), expected float32 (3,)",
    "opt_state/encoder/1/nu: missing, expected float32 (2,)",
    "opt_state/encoder/1/mu/bias: saved float32 (7,), not expected",
  ):
    assert line in str(error.value)
  assert len(str(error.value)) < 1000
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_other_data_than_the_position_belongs_to_is_no_damage(folder):
  data = [grain.MapDataset.range(9).to_iter_dataset()] * 2
  other = iter(grain.IterDataset.mix(data))
  with pytest.raises(ckpt.CheckpointError, match="data position") as error:
    open_checkpointer(folder).restore(abstract(make_state(1)), other)
  assert "config" in str(error.value)
  assert (folder / "4").is_dir()


def bridge(folder, wanted, modules=("encoder",), raw=()):
  return ckpt.restore_ema(folder, abstract(wanted), modules, "ours", raw)


def test_the_bridge_takes_the_ema_and_raw_modules(folder):
  state = make_state(4)
  modules = bridge(
    folder, state["params"], ("encoder", "decoder"), ("discriminator", "new")
  )
  chex.assert_trees_all_equal(
    jax.device_get(modules),
    jax.device_get(
      {
        **state["ema_params"],
        "discriminator": state["params"]["discriminator"],
      }
    ),
  )


@pytest.mark.parametrize(
  "change, lines",
  [
    (
      {"kernel": jnp.zeros((3, 5))},
      ["kernel: saved (250, 100), expected (3, 5)"],
    ),
    ({"scale": jnp.zeros((4,))}, ["scale: missing, expected (4,)"]),
    ({"kernel": None}, ["kernel: saved (250, 100), not expected"]),
  ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_the_bridge_names_parameters_and_both_shapes(
  folder, change, lines, raw
):
  name = "discriminator" if raw else "encoder"
  wanted = make_state(4)["params"]
  wanted[name] = {**wanted[name], **change}
  asked = ((), (name,)) if raw else ((name,), ())
  with pytest.raises(ckpt.CheckpointError) as error:
    bridge(folder, wanted, *asked)
  group = "params" if raw else "ema_params"
  for line in lines:
    assert f"{group}/{name}/{line}" in str(error.value)


def test_the_bridge_names_a_module_that_was_never_saved(folder):
  wanted = {"upscaler": {"kernel": jnp.zeros((3, 5))}}
  with pytest.raises(ckpt.CheckpointError, match="upscaler/kernel: missing"):
    bridge(folder, wanted, ("upscaler",))


@pytest.fixture
def small_disk(tmp_path):
  with mounted(tmp_path / "disk") as disk:
    yield disk


# A state is 2.8 MiB. Nothing at all can be created; folders and small files
# can; most of the arrays can.
@pytest.mark.parametrize("spare", [0, 100_000, 2_000_000])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_costs_one_save_and_not_the_run(
  small_disk, capfd, caplog, spare, keep
):
  folder, data = small_disk / "checkpoints", make_iterator()
  checkpointer = open_checkpointer(folder, keep)

  def save(step):
    next(data)
    return checkpointer.save(
      step, make_state(step, 1400), data, {"seconds": step}
    )

  assert save(1)
  assert save(2)
  assert save(3)  # waits for 2; 3 is complete before the disk is filled
  checkpointer._settle()
  with filled(small_disk, spare):
    save(4)
    save(5)
    checkpointer._settle()
    out = capfd.readouterr().out.splitlines()
    assert len(out) == 2
    for step, line in zip((4, 5), out, strict=True):
      assert f"step {step} could not be saved" in line
      assert "No space left on device" in line
      assert "last good one: step 3" in line
    # Not a traceback from each thread on top.
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert (folder / "3").is_dir()
  assert save(6)
  checkpointer.close()
  assert capfd.readouterr().out == ""
  kept = sorted(p.name for p in folder.iterdir())
  assert kept == (["6"] if keep == 1 else ["3", "6"])
  checkpointer = open_checkpointer(folder)
  state, _ = checkpointer.restore(
    abstract(make_state(1, 1400)), make_iterator()
  )
  chex.assert_trees_all_equal(
    jax.device_get(state), jax.device_get(make_state(6, 1400))
  )


def test_a_full_disk_at_the_end_is_an_error_that_says_what_to_do(small_disk):
  folder, data = small_disk / "checkpoints", make_iterator()
  checkpointer = open_checkpointer(folder)
  checkpointer.save(1, make_state(1, 1400), data, {})
  checkpointer._settle()
  with filled(small_disk, 1_000_000):
    checkpointer.save(2, make_state(2, 1400), data, {})
    with pytest.raises(ckpt.CheckpointError) as error:
      checkpointer.close()
  assert [p.name for p in folder.iterdir()] == ["1"]
  assert "step 2 could not be saved" in str(error.value)
  assert "resumes at step 1" in str(error.value)


def test_poll_tells_of_a_failed_save_without_another_save(small_disk, capfd):
  data = make_iterator()
  checkpointer = open_checkpointer(small_disk / "checkpoints")
  with filled(small_disk, 1_000_000):
    checkpointer.save(1, make_state(1, 1400), data, {})
    deadline = time.monotonic() + 60
    while "step 1 could not be saved" not in capfd.readouterr().out:
      assert time.monotonic() < deadline
      time.sleep(0.05)
      checkpointer.poll()
  with pytest.raises(ckpt.CheckpointError, match="starts over"):
    checkpointer.close()


def test_an_error_of_the_program_is_not_taken_for_a_full_disk(tmp_path):
  checkpointer = open_checkpointer(tmp_path)
  with pytest.raises(TypeError, match="object"):
    checkpointer.save(1, make_state(1), make_iterator(), {"a": object()})
  checkpointer.close()
