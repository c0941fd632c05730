"""Workdirs as jobs leave them, and the pages made of them."""

import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax import writers
from psvae_jax.data import quarantine
from psvae_jax.report import write_report

CHANNELS = 5
NUM_IMAGES = 3

_VOID = {"meta", "img", "use", "br"}


def add_stage(
  workdir: Path,
  stage: str,
  steps: int,
  *,
  psnr: float = 20.0,
  final: bool = True,
  full: bool = False,
) -> None:
  """What a finished (or killed) stage leaves; `full` with all kinds of it."""
  rng = np.random.default_rng(len(stage))
  with writers.MetricWriter(workdir / stage) as writer:
    for step in range(1, steps + 1):
      writer.write(step, {"train/loss": 1.0 / step})
      if full:
        norms = {"train/grad_norm/pixel_decoder": 0.5}
        writer.write(step, {"perf/images_per_second": 100.0, **norms})
    writer.write(steps, {"eval/psnr": psnr})
    if full:
      writer.write(steps, {"eval/latent_std": 0.9})
  folder = workdir / stage / "samples"
  folder.mkdir()
  np.savez(folder / "validation.npz", **reconstructions(rng))
  np.savez(workdir / stage / "latents.npz", std=rng.random(CHANNELS))
  if final:
    writers.update_summary(
      workdir,
      {
        stage: {"eval/psnr": psnr, "eval/probe_accuracy": 0.912},
        "wall_seconds": {stage: 75.0},
      },
    )


def reconstructions(
  rng: np.random.Generator, side: int = 8
) -> dict[str, np.ndarray]:
  """The same originals for every generator, and noise on them."""
  shape = (NUM_IMAGES, side, side, 3)
  original = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  noise = rng.integers(-9, 9, original.shape)
  made = np.clip(original + noise, 0, 255).astype(np.uint8)
  return {"original": original, "reconstruction": made}


def make_run(workdir: Path, full: bool = False) -> Path:
  """A finished run of both stages."""
  workdir.mkdir()
  add_stage(workdir, "svae", 40, psnr=16.5, full=full)
  add_stage(workdir, "psvae", 60, psnr=27.25, full=full)
  writers.update_summary(
    workdir,
    {
      "encoder": {
        "eval/probe_accuracy": 0.934,
        "eval/probe_accuracy_random_encoder": 0.222,
        "eval/probe_accuracy_chance": 0.071,
      },
      "wall_seconds": {"total": 150.0},
      "device": "TPU v5e × 4",
      "versions": {"jax": "0.10.2"},
    },
  )
  config = {
    "stages": ["svae", "psvae"],
    "svae": {"train": {"steps": 40, "batch_size": 64}},
    "psvae": {"train": {"steps": 60, "batch_size": 32}},
  }
  writers.write_json_atomic(workdir / "config.json", config)
  return workdir


def make_adversarial_run(workdir: Path) -> Path:
  """A run with all there is: pictures, features, faults, an adversary."""
  make_run(workdir, full=True)
  for number, stage in enumerate(("svae", "psvae")):
    add_pictures(workdir / stage, number)
  with writers.MetricWriter(workdir / "psvae", start_step=60) as writer:
    for step in range(40, 61):
      writer.write(step, _adversarial_metrics(step))
    for step, sharpness in ((30, 0.625), (60, 0.875)):
      writer.write(step, {"eval/sharpness": sharpness, "eval/psnr": 27.0})
  change_config(
    workdir,
    data={"source": "scenes"},
    model={"encoder": "", "channels": CHANNELS, "output_size": 48},
    psvae={
      "train": {"steps": 60, "batch_size": 32},
      "optim": {"name": "muon", "learning_rate": 0.006},
      "loss": {"semantic": 0.1, "kl": 1e-4, "pixel": 1.0, "l1": 1.0}
      | {"gan": 0.25, "gan_start": 40, "gan_warmup": 5},
    },
  )
  faults = {
    7: ("a/broken.jpg", quarantine.Fault("image", "truncated")),
    9: ("a/empty.png", quarantine.Fault("image", "the file is empty.")),
  }
  file = workdir / "quarantine.jsonl"
  ledger = quarantine.Quarantine(
    split="train", source="a", num_records=100, max_bad_share=0.1, file=file
  )
  ledger.add(faults)
  with file.open("a") as lines:
    lines.write('{"split": "tr')
  writers.update_summary(
    workdir,
    {
      "command": "python -m psvae_jax.main --config=configs/psvae.py",
      "timings": {"psvae": {"compile": 15.0, "evaluation": 30.0}},
    },
  )
  return workdir


def add_pictures(folder: Path, seed: int) -> None:
  """Sample sets with features and latents, as an evaluation writes them."""
  rng = np.random.default_rng(seed + 1)

  def levels(channels):
    return rng.integers(0, 256, (NUM_IMAGES, 6, 6, channels), np.uint8)

  for name, side in (("validation", 48), ("photographs", 256)):
    arrays = reconstructions(rng, side)
    arrays |= {
      "caption": np.array([f"picture {i}" for i in range(NUM_IMAGES)]),
      "features_frozen": levels(3),
      "features_decoded": levels(3),
      "latent": levels(2),
      "latent_channel": np.array([1, 4]),
    }
    if seed:
      arrays["features_tuned"] = levels(3)
    np.savez(folder / "samples" / f"{name}.npz", **arrays)
  names = ("mean", "std", "variance", "kl")
  arrays = {name: rng.standard_normal(CHANNELS) for name in names}
  np.savez(folder / "latents.npz", **arrays)


def change_config(workdir: Path, **sections: Any) -> None:
  path = workdir / "config.json"
  config = json.loads(path.read_text(encoding="utf-8"))
  writers.write_json_atomic(path, config | sections)


def _adversarial_metrics(step: int) -> dict[str, float]:
  return {
    "train/loss_generator": 0.1,
    "train/loss_discriminator": 0.9,
    "train/logits_real": 0.5,
    "train/logits_fake": -0.5 - step / 100,
    "train/gan_weight": 0.0125,
    "train/skipped_steps": 2.0,
  }


class Page(html.parser.HTMLParser):
  """Parses strictly: what is opened is closed, in order."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.tags, self.attributes = [], [], []
    self.words, self.ids = [], []
    self.feed(text)
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag == "section":
      self.ids.append(dict(attrs)["id"])
    if tag not in _VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    if tag not in _VOID:
      assert self.stack.pop() == tag

  def handle_data(self, data):
    if self.stack and self.stack[-1] != "style":
      self.words.append(data)

  @property
  def text(self):
    return " ".join(self.words)


def page_of(workdir):
  return Page(write_report(workdir).read_text(encoding="utf-8"))
