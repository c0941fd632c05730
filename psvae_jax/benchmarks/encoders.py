"""An encoder's forward pass: ours against transformers', the same weights.

    python -m psvae_jax.benchmarks.encoders
    python -m psvae_jax.benchmarks.encoders google/siglip2-base-patch16-224 \\
      --batches=1,8 --runs=9

Builds the published architecture with random weights, writes it in the Hugging
Face layout and lets torch read it. Prints, for each batch size, how far the two
features are apart, the median seconds of each and the median of torch's seconds
over ours: above 1 ours is faster. Calls alternate, so that whatever else the
machine does meets both; before each that is timed is one that is not, since
torch's threads spin for a while after a call, on the cores that ours would use.
Threads are as many as the process has cores; on a GPU both use it.

Needs torch and transformers, which nothing else of the package does.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from psvae_jax import memory, torchvision_import
from psvae_jax.pretrained.encoder import Encoder, load_encoder, save_encoder

_RANDOM = "random:"


def cores() -> int:
  """Cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def torch_model(encoder: Encoder) -> Any:
  """The same network in transformers, by way of a folder."""
  import torch
  import transformers

  torchvision_import.repair()  # transformers' models import it
  torch.set_num_threads(cores())
  config, params = encoder.module.config, encoder.params
  with tempfile.TemporaryDirectory() as folder:
    save_encoder(folder, config, params, encoder.mean, encoder.std)
    model = transformers.AutoModel.from_pretrained(folder).eval()
  return model.to("cuda" if jax.default_backend() == "gpu" else "cpu")


def pairs(
  encoder: Encoder, model: Any, images: np.ndarray, runs: int
) -> tuple[float, list[tuple[float, float]]]:
  """Seconds of (torch, ours) by turns, and how far features are apart.

  Args:
    encoder: ours.
    model: torch's.
    images: (B, H, W, 3) uint8 of the encoder's own size.
    runs: of each.

  Returns:
    The largest difference over the largest feature, and a pair for each run.
  """
  import torch

  unit = np.transpose(images / 255.0, (0, 3, 1, 2))
  mean, std = (np.reshape(x, (3, 1, 1)) for x in (encoder.mean, encoder.std))
  pixels = torch.from_numpy(((unit - mean) / std).astype(np.float32))
  pixels = pixels.to(model.device)
  images = jax.device_put(images)

  def theirs():
    with torch.inference_mode():
      out = model(pixels).last_hidden_state
    if model.device.type == "cuda":
      torch.cuda.synchronize()
    return out

  def ours():
    return jax.block_until_ready(encoder(images))

  want, got = theirs().cpu().numpy(), np.asarray(ours())
  got = got.reshape(len(got), -1, got.shape[-1])
  want = want[:, want.shape[1] - got.shape[1] :]
  apart = float(np.abs(got - want).max() / np.abs(want).max())
  return apart, [(_seconds(theirs), _seconds(ours)) for _ in range(runs)]


def _seconds(function: Callable[[], Any]) -> float:
  function()
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def main() -> None:
  """Prints a line for each batch size."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "name", nargs="?", default="facebook/dinov2-with-registers-base"
  )
  parser.add_argument("--batches", default="1,8", help="batch sizes")
  parser.add_argument("--runs", type=int, default=9, help="calls of each")
  parser.add_argument("--size", type=int, default=224, help="side of images")
  parser.add_argument(
    "--unroll", type=int, default=1, help="blocks a loop turn"
  )
  arguments = parser.parse_args()

  memory.keep_freed_memory()
  name = _RANDOM + arguments.name.removeprefix(_RANDOM)
  encoder = load_encoder(name, unroll=arguments.unroll)
  model = torch_model(encoder)
  rng = np.random.default_rng(0)
  for batch in map(int, arguments.batches.split(",")):
    shape = (batch, arguments.size, arguments.size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    apart, times = pairs(encoder, model, images, arguments.runs)
    theirs, ours = (
      statistics.median(column) for column in zip(*times, strict=True)
    )
    ratio = statistics.median(pair[0] / pair[1] for pair in times)
    print(
      f"{arguments.name} at {arguments.size}, batch {batch}, {cores()} cores: "
      f"torch {theirs:.3f} s, ours {ours:.3f} s, ratio {ratio:.2f}; features "
      f"{apart:.1e} apart"
    )


if __name__ == "__main__":
  main()
