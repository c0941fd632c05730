"""Workdirs as the generator's jobs leave them, beside the autoencoder's."""

from pathlib import Path
from typing import Any

import numpy as np

from psvae_jax import writers
from psvae_jax.data import scenes

NUM_IMAGES = 6
STEPS = {"t2i": 40, "edit": 20}

_MODEL = {
  "condition": "text",
  "text_encoder": "",
  "text_length": 16,
  "dit": {
    "width": 192,
    "depth": 8,
    "num_heads": 6,
    "head_width": 384,
    "head_depth": 2,
    "head_num_heads": 6,
  },
}
_SAMPLE = {
  "solver": "euler",
  "steps": 50,
  "grid": "uniform",
  "shift": 1.0,
  "guidance": 4.0,
  "image_guidance": 1.5,
  "guidance_low": 0.0,
  "guidance_high": 0.9,
}
_LOSS = {
  "time_mean": 0.0,
  "time_std": 1.0,
  "shift": 0.0,
  "text_dropout": 0.1,
  "source_dropout": 0.2,
  "edit_share": 0.75,
}
_QUICK = {
  "eval/loss": 0.5,
  "eval/loss_t0.1": 0.75,
  "eval/loss_t0.9": 0.25,
  "eval/joint_accuracy": 0.74,
  "eval/joint_accuracy_one_object": 0.88,
  "eval/joint_accuracy_two_object": 0.58,
  "eval/joint_colour": 0.97,
  "eval/joint_relation": 0.93,
}
_EVALUATION = _QUICK | {
  "eval/joint_accuracy_ceiling": 0.96,
  "eval/joint_accuracy_one_object_ceiling": 0.98,
  "eval/joint_accuracy_two_object_ceiling": 0.94,
  "eval/joint_accuracy_heldout": 0.61,
  "eval/joint_accuracy_heldout_ceiling": 0.95,
  "eval/joint_colour_ceiling": 0.995,
  "eval/joint_colour_heldout": 0.945,
  "eval/joint_relation_ceiling": 0.975,
  "eval/frechet_distance": 12.5,
  "eval/frechet_distance_ceiling": 7.5,
  "eval/frechet_distance_floor": 6.25,
  "eval/kernel_distance": 0.0125,
  "eval/kernel_distance_ceiling": 0.003,
  "eval/kernel_distance_floor": 0.0001,
  "eval/kernel_distance_std": 0.0015,
  "eval/caption_similarity": 0.81,
  "eval/caption_similarity_ceiling": 0.92,
  "eval/caption_similarity_floor": 0.015,
  "eval/manifold_distance": 0.55,
  "eval/manifold_distance_real": 0.625,
  "eval/manifold_distance_tail": 0.78,
  "eval/manifold_distance_tail_real": 0.75,
  "eval/off_manifold_share": 0.08,
}
_EDITS = {
  "eval/edit_success": 0.66,
  "eval/edit_success_copy": 0.0,
  "eval/edit_success_regenerate": 0.125,
  "eval/edit_success_ceiling": 0.94,
  "eval/edit_success_recolour": 0.85,
  "eval/edit_success_move": 0.45,
  "eval/edit_instruction": 0.75,
  "eval/edit_instruction_copy": 0.01,
  "eval/edit_kept": 0.875,
  "eval/edit_kept_copy": 1.0,
  "eval/preservation_psnr": 29.5,
  "eval/preservation_psnr_copy": 100.0,
  "eval/preservation_psnr_regenerate": 14.25,
}


def add_generator(workdir: Path, *, side: int = 48, count: int = 0) -> None:
  """Stages "t2i" and "edit", finished, in a workdir that has an autoencoder.

  Args:
    workdir: the folder.
    side: of the pictures, in pixels.
    count: pictures of a set; 0 takes `NUM_IMAGES`.
  """
  for stage, steps in STEPS.items():
    _add_stage(workdir, stage, steps)
    add_pictures(workdir / stage, steps, side, count or NUM_IMAGES)
  add_edits(workdir / "edit", side, count or NUM_IMAGES)
  stats = {"fingerprint": "0123456789abcdef", "count": 48_000}
  writers.write_json_atomic(workdir / "latent_stats.json", stats)


def _add_stage(workdir: Path, stage: str, steps: int) -> None:
  final = dict(_EVALUATION)
  if stage == "edit":
    final |= {**_EDITS, "eval/joint_accuracy": 0.72}
  with writers.MetricWriter(workdir / stage) as writer:
    for step in range(1, steps + 1):
      writer.write(step, {"train/loss": 0.5 + 1.0 / step})
      writer.write(step, {"perf/images_per_second": 100.0})
    if stage == "edit":
      final |= {"eval/edit_loss": 0.375, "eval/edit_loss_t0.9": 0.125}
    half = {name: value / 2 for name, value in _QUICK.items()}
    writer.write(steps // 2, half)
    writer.write(steps, final)
  config = {
    "stages": [stage],
    "data": {"source": "scenes"},
    "model": _MODEL,
    "autoencoder": {"path": "", "stage": ""},
    "cache": {"enabled": True, "dtype": "float16"},
    "sample": _SAMPLE,
    stage: {
      "train": {"steps": steps, "batch_size": 64, "ema": 0.999},
      "optim": {"name": "muon", "learning_rate": 0.01},
      "loss": _LOSS,
    },
  }
  for folder in (workdir, workdir / stage):
    writers.write_json_atomic(folder / "config.json", config)
  writers.update_summary(
    workdir,
    {
      stage: final,
      "wall_seconds": {**_walls(workdir), stage: 90.0},
    },
  )


def _walls(workdir: Path) -> dict[str, Any]:
  walls = writers.read_summary(workdir).get("wall_seconds", {})
  return {k: v for k, v in walls.items() if k != "total"}


def add_pictures(folder: Path, steps: int, side: int, count: int) -> None:
  """All that a text-to-image evaluation leaves; every third one is wrong."""
  images, captions = _scenes(count, side)
  correct = np.arange(count) % 3 != 1
  shown = np.where(correct[:, None, None, None], images, images[::-1])
  arrays = {"images": shown, "captions": captions, "correct": correct}
  np.savez(folder / "generated.npz", **arrays)
  for share in (0.25, 0.5, 0.75):
    few = {name: array[:4] for name, array in arrays.items()}
    few["images"] = _noisy(few["images"], 1 - share)
    few["correct"] = few["correct"] & (share > 0.3)
    np.savez(folder / f"generated_{int(share * steps)}.npz", **few)
  guidance, points = np.array([1.0, 2.5, 4.0, 7.0]), np.array([10, 25, 50])
  grid = [
    [_noisy(images[:2], 2 / (g * n)) for n in points / 10] for g in guidance
  ]
  np.savez(
    folder / "guidance_grid.npz",
    images=np.array(grid),
    guidance=guidance,
    steps=points,
    captions=captions[:2],
    correct=np.array(grid).std((3, 4, 5)) < 60,
  )
  times = np.linspace(1, 0, 6)
  np.savez(
    folder / "denoising.npz",
    images=np.stack([_noisy(images[:3], t) for t in times], 1),
    times=times,
    captions=captions[:3],
  )


def add_edits(folder: Path, side: int, count: int) -> None:
  """Triplets whose every second result is the source."""
  triples = [scenes.edit_triple("validation", i, side) for i in range(count)]
  source = np.stack([triple["source"] for triple in triples])
  target = np.stack([triple["target"] for triple in triples])
  correct = np.arange(count) % 2 == 0
  np.savez(
    folder / "edits.npz",
    source=source,
    result=np.where(correct[:, None, None, None], target, source),
    target=target,
    instructions=np.array([triple["instruction"] for triple in triples]),
    correct=correct,
  )


def _scenes(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  source = scenes.SceneSource("validation", count, side)
  items = [source[index] for index in range(count)]
  captions = np.array([str(item["caption"]) for item in items])
  return np.stack([item["image"] for item in items]), captions


def _noisy(images: np.ndarray, share: float) -> np.ndarray:
  share = min(1.0, share)
  noise = np.random.default_rng(0).integers(0, 256, images.shape)
  mixed = (1 - share) * images + share * noise
  return mixed.astype(np.uint8)
