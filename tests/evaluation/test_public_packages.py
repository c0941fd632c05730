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
from psvae_jax.evaluators.frechet import FeatureMoments

SIZE, COUNT = 48, 12
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
  return json.loads((out / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def images(photos):
  """Originals and both reconstructions, uint8 (COUNT, SIZE, SIZE, 3)."""
  data = open_set(str(photos / "validation"), size=SIZE, count=COUNT)
  batches = list(data.batches(COUNT))
  originals = batches[0]["image"][batches[0]["mask"]]
  made = {"originals": originals}
  for name in MODELS:
    model = models.load(name)
    reconstruct = jax.jit(model.at(SIZE, "round"))
    # In parts of the command's size: sums depend on it in the last bits.
    padded = np.concatenate([originals, np.zeros_like(originals[:4])])
    parts = [
      np.asarray(reconstruct(model.params, padded[i : i + 8])[0])
      for i in (0, 8)
    ]
    made[name] = np.concatenate(parts)[:COUNT]
  return made


def _torch(images):
  torch = pytest.importorskip("torch")
  return torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_psnr_and_ssim_equal_torchmetrics(found, images, name):
  pytest.importorskip("torchvision_ops")
  metrics = pytest.importorskip("torchmetrics.functional.image")
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
  row = found["figures"][name]
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
    pair = [_torch(images[k]) / 127.5 - 1 for k in (name, "originals")]
    want = model(*pair).mean().item()
  assert found["figures"][name]["lpips"] == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fid_equals_pytorch_fid(found, images, name):
  networks = pytest.importorskip("metric_networks")
  fid_score = pytest.importorskip("pytorch_fid.fid_score")
  from psvae_jax.pretrained import inception

  network = inception.load_inception("random:inception")
  model, torch = networks.fid_inception(network.params), networks.torch
  statistics, ours = [], []
  ours_of = jax.jit(
    lambda params, x: network.features(params, x, resize="torch")["2048"]
  )
  for key in (name, "originals"):
    with torch.no_grad():
      theirs = model(_torch(images[key]) / 255)[-1][:, :, 0, 0].numpy()
    features = np.asarray(ours_of(network.params, images[key]))
    np.testing.assert_allclose(features, theirs, rtol=0, atol=1e-3)
    theirs = theirs.astype(np.float64)
    statistics += [theirs.mean(0), np.cov(theirs, rowvar=False)]
    moments = FeatureMoments().update(features)
    ours += [moments.mean, moments.covariance]
  got = found["figures"][name]["rfid"]
  # Of the same statistics to 1e-6; of features that differ by 1e-3, near it.
  want = fid_score.calculate_frechet_distance(*ours)
  assert got == pytest.approx(want, rel=1e-6)
  want = fid_score.calculate_frechet_distance(*statistics)
  assert got == pytest.approx(want, rel=1e-3)
