"""Two processes train one job together, as two hosts would."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
from PIL import Image

from psvae_jax.data import quarantine

_HOST = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, base = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from pathlib import Path
from psvae_jax import sharding, train
from psvae_jax.config import MeshConfig, parser
from psvae_jax.data import sources
from psvae_jax.tasks import make_task

seen, make_source = {}, sources.make_source

def remembered(config, split, *args):
  source = make_source(config, split, *args)
  seen[split] = [source.path(i) for i in range(len(source))]
  return source

sources.make_source = remembered
config = parser.parse(json.loads((Path(base) / "config.json").read_text()))
workdir = Path(base) / "run"
task = make_task("svae", config, workdir)
mesh = sharding.make_mesh(MeshConfig())
result = train.run_stage(task, config, mesh, workdir)
print(json.dumps([jax.process_count(), seen, result.metrics]))
"""


def images(folder, count, missing=()):
  folder.mkdir()
  for i in set(range(count)) - set(missing):
    Image.new("RGB", (40, 40), (9 * i, 0, 0)).save(folder / f"{i:02d}.png")


@pytest.mark.slow
def test_both_hosts_see_one_data_set_and_agree(tmp_path):
  """A file that is gone keeps its place on both, though one writes nothing."""
  roots = {"train": tmp_path / "train", "validation": tmp_path / "validation"}
  for split, root in roots.items():
    images(root, 12, missing=[3])
    quarantine.Quarantine(
      split=split,
      source=str(root),
      num_records=12,
      max_bad_share=0.2,
      file=tmp_path / "run" / "quarantine.jsonl",
    ).add({3: ("03.png", quarantine.Fault("image", "gone"))})
  raw = tiny.config(tiny.save_encoder(tmp_path / "encoder"), steps=2)
  raw.data = {
    "source": "folder",
    "root": str(roots["train"]),
    "eval_root": str(roots["validation"]),
    "max_bad_share": 0.2,
    "augment": "center",
  }
  (tmp_path / "config.json").write_text(raw.to_json())
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  hosts = [
    subprocess.Popen(
      [sys.executable, "-c", _HOST, str(rank), str(port), str(tmp_path)],
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    outputs = [host.communicate(timeout=180) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  found = []
  for host, (output, errors) in zip(hosts, outputs, strict=True):
    assert host.returncode == 0, errors[-2000:]
    found.append(json.loads(output.splitlines()[-1]))
  assert found[0] == found[1]
  count, seen, metrics = found[0]
  assert count == 2
  whole = [f"{i:02d}.png" for i in range(12)]
  assert seen == {"train": whole, "validation": whole}
  assert metrics["train/skipped_steps"] == 0
  assert (tmp_path / "run" / "svae" / "latents.npz").is_file()
