"""The command's figures on photographs against the public packages'.

The same images go through torchmetrics, lpips and pytorch-fid, with the same
random networks.
"""

import json

import jax
import numpy as np
import pytest

from psvae_jax import evaluate
from psvae_jax.evaluation import models
from psvae_jax.evaluation.image_sets import open_set
from psvae_jax.evaluators import npz_files
from psvae_jax.evaluators.frechet import FeatureMoments

SIZE, COUNT = 48, 8
MODELS = ("random:stabilityai/sd-vae-ft-ema", "embedded")


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory):
  """What the command says of both autoencoders, and where it said it."""
  out = tmp_path_factory.mktemp("out")
  evaluate.main(
    [
      *("--models", *MODELS, f"--data={photos / 'validation'}"),
      *(f"--size={SIZE}", f"--num={COUNT}", f"--out={out}"),
      *("--inception=random:inception", "--inception_resize=torch"),
      *("--lpips=random:vgg", "--batch_size=8"),
    ]
  )
  return json.loads((out / "evaluation.json").read_text()), _moments(out)


def _moments(out):
  """Mean and covariance of the pool features: of each model, and originals'.

  Out of the files that the command goes on from.
  """
  found = {}
  for path in (out / "state").glob("*.npz"):
    arrays = npz_files.read_npz(path)
    model = json.loads(str(arrays["identity"])).get("model", "originals")
    prefix = "moments/pool/"
    found[model] = FeatureMoments.from_arrays(
      {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
      }
    )
  return found


@pytest.fixture(scope="module")
def images(photos):
  """Originals and both reconstructions, uint8 (COUNT, SIZE, SIZE, 3)."""
  data = open_set(str(photos / "validation"), size=SIZE, count=COUNT)
  batches = list(data.batches(COUNT))
  originals = batches[0]["image"][batches[0]["mask"]]
  made = {"originals": originals}
  fingerprints = {"originals": "originals"}
  for name in MODELS:
    model = models.load(name)
    reconstruct = jax.jit(model.at(SIZE, "round"))
    made[name] = np.asarray(reconstruct(model.params, originals)[0])
    fingerprints[name] = model.fingerprint
  return made, fingerprints


def _torch(images):
  torch = pytest.importorskip("torch")
  return torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_psnr_and_ssim_equal_torchmetrics(found, images, name):
  pytest.importorskip("torchvision_ops")
  metrics = pytest.importorskip("torchmetrics.functional.image")
  images, _ = images
  pair = _torch(images[name]), _torch(images["originals"])
  psnr = metrics.peak_signal_noise_ratio(
    *(x.double() for x in pair),
    data_range=255.0,
    reduction="none",
    dim=(1, 2, 3),
  )
  ssim = metrics.structural_similarity_index_measure(
    *(x.double() / 255 for x in pair), data_range=1.0
  )
  row = found[0]["figures"][name]
  assert row["psnr"] == pytest.approx(float(psnr.mean()), abs=1e-5)
  assert row["ssim"] == pytest.approx(float(ssim), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_lpips_equals_lpips(found, images, name):
  networks = pytest.importorskip("metric_networks")
  from psvae_jax.pretrained import lpips, mapping

  params = lpips.load_lpips("random:vgg").params
  model = networks.torch_lpips("vgg", params)
  heads = mapping.export_params(lpips.rules("vgg"), params)
  torch = networks.torch
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      if parameter_name.startswith("lin") and parameter_name in heads:
        parameter.copy_(torch.from_numpy(heads[parameter_name].copy()))
    pair = [_torch(images[0][k]) / 127.5 - 1 for k in (name, "originals")]
    want = model(*pair).mean().item()
  assert found[0]["figures"][name]["lpips"] == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fid_equals_pytorch_fid(found, images, name):
  networks = pytest.importorskip("metric_networks")
  fid_score = pytest.importorskip("pytorch_fid.fid_score")
  from psvae_jax.pretrained import inception

  network = inception.load_inception("random:inception")
  model, torch = networks.fid_inception(network.params), networks.torch
  figures, moments = found
  pixels, fingerprints = images
  ours, theirs = [], []
  for key in (name, "originals"):
    own = moments[fingerprints[key]]
    ours += [own.mean, own.covariance]
    with torch.no_grad():
      x = model(_torch(pixels[key]) / 255)[-1][:, :, 0, 0].double().numpy()
    np.testing.assert_allclose(own.mean, x.mean(0), rtol=0, atol=1e-3)
    theirs += [x.mean(0), np.cov(x, rowvar=False)]
  got = figures["figures"][name]["rfid"]
  want = fid_score.calculate_frechet_distance(*_in_their_span(*ours))
  assert got == pytest.approx(want, rel=1e-6)
  # Of features that differ by up to 1e-3 themselves.
  want = fid_score.calculate_frechet_distance(*_in_their_span(*theirs))
  assert got == pytest.approx(want, rel=1e-3)


def _in_their_span(mean, covariance, other_mean, other_covariance):
  """The same two Gaussians, without the dimensions in which both are constant.

  A matrix square root of 2048 × 2048 of rank 7 takes minutes, and is off in
  the seventh digit; no distance is changed by leaving these out.
  """
  shift = mean - other_mean
  values, vectors = np.linalg.eigh(
    covariance + other_covariance + np.outer(shift, shift)
  )
  basis = vectors[:, values > 1e-12 * values.max()]
  assert basis.shape[1] == 2 * COUNT - 1
  return (
    mean @ basis,
    basis.T @ covariance @ basis,
    other_mean @ basis,
    basis.T @ other_covariance @ basis,
  )
