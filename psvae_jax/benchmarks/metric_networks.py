"""LPIPS and the FID network against the PyTorch packages, in one run.

    python -m psvae_jax.benchmarks.metric_networks

Needs torch, lpips and torch-fidelity. Both sides have the same random weights
and see the same images; calls alternate. Printed are the median of the ratios
of neighbouring calls, PyTorch's seconds over ours, and the ratio of each side's
fastest call. Only the second means something on a machine that does other work
too: PyTorch's threads wait for one another, and one that lost its core holds
up the rest. Numbers that differ end the program.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax import memory, torchvision_import
from psvae_jax.pretrained import inception, lpips, mapping


def compare(
  name: str, ours: Callable, theirs: Callable, runs: int, tolerance: float
) -> float:
  """Prints and returns the median ratio of two calls without arguments.

  Args:
    name: what is printed before it.
    ours: returns a jax.Array.
    theirs: returns the same numbers as a numpy array.
    runs: pairs of calls.
    tolerance: of the difference's norm, relative to the numbers' norm.

  Raises:
    SystemExit: the numbers differ.
  """
  got, want = np.asarray(ours()), theirs()
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  if not error <= tolerance:
    raise SystemExit(f"{name}: results differ by {error:.1e}")
  seconds = [], []
  for _ in range(runs):
    for call, times in zip((ours, theirs), seconds, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call())
      times.append(time.perf_counter() - start)
  ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
  ours_best, theirs_best = map(min, seconds)
  print(
    f"{name}: ratio {ratio:.2f}; fastest calls {ours_best:.3f} s, PyTorch "
    f"{theirs_best:.3f} s, ratio {theirs_best / ours_best:.2f}",
    flush=True,
  )
  return ratio


def random_images(batch: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Pairs in [−1, 1]."""
  rng = np.random.default_rng(0)
  shape = (batch, side, side, 3)
  return tuple(rng.uniform(-1, 1, shape).astype(np.float32) for _ in range(2))


@contextlib.contextmanager
def _uninitialised(torch):
  """Spares the initialisation of parameters that are replaced anyway."""
  names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_")
  with contextlib.ExitStack() as stack:
    for name in names:
      stack.enter_context(
        mock.patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor)
      )
    yield


def _torch_images(torch, images: np.ndarray):
  """(B, H, W, 3) as torch has them: (B, 3, H, W), packed."""
  return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def measure_lpips(
  network: str, batch: int, side: int, runs: int, convolution: str
) -> None:
  """Distances, and their gradients in the images."""
  import lpips as package
  import torch

  found = lpips.load_lpips(f"random:{network}", convolution=convolution)
  with _uninitialised(torch):
    model = package.LPIPS(
      net=network, pretrained=False, pnet_rand=True, verbose=False
    )
  tensors = mapping.export_params(lpips.rules(network), found.params)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.startswith("net."):
        name = "features." + name.split(".", 2)[2]
      if name in tensors:  # the heads are there twice
        parameter.copy_(torch.from_numpy(tensors[name].copy()))
  params = jax.device_put(found.params)
  images = random_images(batch, side)
  ours = jax.device_put(images)
  first, second = (_torch_images(torch, x) for x in images)
  leaf = first.clone().requires_grad_()

  def loss(images, params, references):
    return jnp.mean(found.distance(params, images, references))

  distance, gradient = jax.jit(found.distance), jax.jit(jax.grad(loss))

  def torch_distance():
    with torch.no_grad():
      return model(first, second).numpy().reshape(-1)

  def torch_gradient():
    leaf.grad = None
    model(leaf, second).mean().backward()
    return leaf.grad.permute(0, 2, 3, 1).numpy()

  what = f"LPIPS {network}, {batch} × {side}², {convolution}"
  compare(
    f"{what}: value",
    lambda: distance(params, *ours),
    torch_distance,
    runs,
    1e-4,
  )
  compare(
    f"{what}: gradient",
    lambda: gradient(ours[0], params, ours[1]),
    torch_gradient,
    runs,
    1e-2,  # a pooling's gradient jumps where two values are nearly equal
  )


def measure_inception(batch: int, side: int, runs: int) -> None:
  """Features of uint8 images, resized the TensorFlow way."""
  import torch
  from torch_fidelity import feature_extractor_inceptionv3 as package

  found = inception.load_inception("random:inception")
  tensors = mapping.export_params(inception.rules(), found.params)
  tensors["fc.bias"] = np.zeros(1008, np.float32)
  state = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
  with (
    mock.patch.object(
      package, "load_state_dict_from_url", lambda *_, **__: state
    ),
    _uninitialised(torch),
  ):
    model = package.FeatureExtractorInceptionV3("inception", ["2048"])
  images = np.uint8(127.5 * random_images(batch, side)[0] + 127.5)
  params, ours = jax.device_put((found.params, images))
  theirs = _torch_images(torch, images)
  features = jax.jit(lambda *args: found.features(*args)["2048"])

  def torch_features():
    with torch.no_grad():
      return model(theirs)[0].numpy()

  compare(
    f"Inception, {batch} × {side}²",
    lambda: features(params, ours),
    torch_features,
    runs,
    1e-3,
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Prints every ratio."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.benchmarks.metric_networks"
  )
  parser.add_argument("--batch", type=int, default=4, help="images of a call")
  parser.add_argument("--side", type=int, default=128, help="their side")
  parser.add_argument("--runs", type=int, default=7, help="pairs of calls")
  parser.add_argument(
    "--networks",
    default="vgg,alex,inception",
    help="which, comma-separated (default: all)",
  )
  parser.add_argument(
    "--convolution", default="native", help="of LPIPS: native or matmul"
  )
  arguments = parser.parse_args(argv)
  torchvision_import.repair()  # both packages import it
  memory.keep_freed_memory()
  for network in arguments.networks.split(","):
    if network == "inception":
      measure_inception(arguments.batch, arguments.side, arguments.runs)
    else:
      measure_lpips(
        network,
        arguments.batch,
        arguments.side,
        arguments.runs,
        arguments.convolution,
      )


if __name__ == "__main__":
  main()
