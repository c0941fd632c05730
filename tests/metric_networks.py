"""The public packages' networks, given our random weights."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torchvision_ops  # noqa: F401  before what imports torchvision

from psvae_jax.pretrained import inception, lpips, mapping

torch = pytest.importorskip("torch")


@contextlib.contextmanager
def without_initialisation():
  """Leaves torch parameters as they are allocated: all are overwritten."""
  names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_")
  names += ("trunc_normal_", "constant_")
  with pytest.MonkeyPatch.context() as patch:
    for name in names:
      patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    yield


def published_heads(network: str) -> dict[str, np.ndarray]:
  """The heads that the lpips package ships, read as the converter does."""
  package = pytest.importorskip("lpips")
  from psvae_jax.pretrained.torch_files import read_torch_file

  folder = f"{package.__path__[0]}/weights/v0.1"
  return read_torch_file(f"{folder}/{network}.pth")


def lpips_params(network: str) -> dict[str, Any]:
  """Our parameters: a random backbone, the published heads."""
  params = lpips.load_lpips(f"random:{network}").params
  tensors = mapping.export_params(lpips.rules(network), params)
  backbone = {k: v for k, v in tensors.items() if k.startswith("features")}
  return lpips.from_published(
    network, backbone, published_heads(network), source="test"
  )


def torch_lpips(network: str, params: Any) -> Any:
  """lpips.LPIPS with its own heads and our backbone."""
  package = pytest.importorskip("lpips")
  with without_initialisation():
    model = package.LPIPS(
      net=network, pretrained=True, pnet_rand=True, verbose=False
    )
  tensors = mapping.export_params(lpips.rules(network), params)
  with torch.no_grad():
    for name, parameter in model.net.named_parameters():
      _, place, kind = name.split(".")
      tensor = tensors.pop(f"features.{place}.{kind}")
      parameter.copy_(torch.from_numpy(tensor.copy()))
  assert all(name.startswith("lin") for name in tensors)
  return model


def inception_state(params: Any, bias: bool = True) -> dict[str, Any]:
  """A published file's contents with our parameters."""
  tensors = mapping.export_params(inception.rules(), params)
  if bias:
    rng = np.random.default_rng(5)
    tensors["fc.bias"] = rng.standard_normal(1008).astype(np.float32)
  return {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}


def fidelity_inception(params: Any) -> Any:
  """torch-fidelity's extractor with our weights."""
  module = pytest.importorskip(
    "torch_fidelity.feature_extractor_inceptionv3",
    exc_type=ImportError,
  )
  state = inception_state(params)
  features = ["64", "192", "768", "2048", "logits_unbiased"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: state)
    with without_initialisation():
      return module.FeatureExtractorInceptionV3("inception", features)


def fid_inception(params: Any) -> Any:
  """pytorch-fid's network with our weights."""
  module = pytest.importorskip("pytorch_fid.inception")
  state = inception_state(params)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: state)
    with without_initialisation():
      return module.InceptionV3(output_blocks=(0, 1, 2, 3)).eval()
