"""Vision encoders of transformers with random parameters, as references.

torch is imported, or the test skipped, by the functions that need it.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import vit
from psvae_jax.pretrained import files


def build(kind: str, **fields: Any) -> Any:
  """transformers' model `kind` of `fields`, every parameter random."""
  transformers = import_transformers()
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  cls = getattr(transformers, kind)
  return randomise(cls(cls.config_class(**fields)).eval())


def randomise(model: Any) -> Any:
  """Noise on every parameter: zeros and ones hide wrong wiring."""
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      matrix = parameter.ndim > 1 and not re.search("position|token", name)
      scale = parameter[0].numel() ** -0.5 if matrix else 0.5
      gain = parameter.ndim == 1 and name.endswith(".weight")
      parameter.copy_(scale * torch.randn_like(parameter) + float(gain))
  return model


def images(*shape: int) -> np.ndarray:
  """Random uint8 images."""
  return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def run(model: Any, pictures: np.ndarray, encoder: Any, **options: Any) -> Any:
  """The model's output for uint8 images, normalised as the encoder does it."""
  torch = pytest.importorskip("torch")
  pixels = (pictures / 255.0 - np.array(encoder.mean)) / np.array(encoder.std)
  pixels = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    return model(pixels, **options)


def grid(tokens: Any, pictures: np.ndarray, encoder: Any) -> np.ndarray:
  """The last tokens (B, N, D) of a sequence as a grid (B, h, w, D)."""
  patch = encoder.patch_size
  rows, columns = pictures.shape[1] // patch, pictures.shape[2] // patch
  tokens = tokens[:, tokens.shape[1] - rows * columns :]
  return tokens.reshape(len(tokens), rows, columns, -1).numpy()


def features(model: Any, pictures: np.ndarray, encoder: Any) -> np.ndarray:
  """Patch features (B, h, w, D) as `load_encoder` means them.

  SigLIP, CLIP and ViT-MAE resize positions where they are told to; CLIP norms
  its patch tokens here; ViT-MAE masks nothing and keeps the order.
  """
  torch = pytest.importorskip("torch")
  kind, options = type(model).__name__, {}
  if kind in ("SiglipVisionModel", "CLIPVisionModel", "ViTMAEModel"):
    options["interpolate_pos_encoding"] = True
  if kind == "ViTMAEModel":
    model.config.mask_ratio = 0.0
    rows, columns = (s // encoder.patch_size for s in pictures.shape[1:3])
    order = torch.arange(rows * columns, dtype=torch.float32)
    options["noise"] = order.expand(len(pictures), -1)
  tokens = run(model, pictures, encoder, **options).last_hidden_state
  if kind == "CLIPVisionModel":
    with torch.no_grad():
      tokens = model.post_layernorm(tokens)
  return grid(tokens, pictures, encoder)


def relative_error(got: Any, want: np.ndarray) -> float:
  """Largest difference over the largest value."""
  assert got.shape == want.shape
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def import_transformers() -> Any:
  """transformers, which imports torchvision where it is installed."""
  pytest.importorskip("torch")
  if importlib.util.find_spec("torchvision") is not None:
    import torchvision_ops  # noqa: F401
  return pytest.importorskip("transformers")


def rewrite(folder: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
  """Applies `change` to the tensors of a saved folder; what it returns."""
  tensors = files.read_safetensors(folder)
  result = change(tensors)
  files.write_safetensors(folder / "model.safetensors", tensors)
  return result


def set_config(folder: Any, **fields: Any) -> None:
  """Replaces fields of a saved config.json."""
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def count(config: dict[str, Any]) -> int:
  """Parameters that transformers gives a config.json; nothing is allocated."""
  transformers = import_transformers()
  torch = pytest.importorskip("torch")
  config = transformers.AutoConfig.for_model(**config)
  with torch.device("meta"):
    model = transformers.AutoModel.from_config(config)
  unused = ("mask_token",)
  return sum(
    parameter.numel()
    for name, parameter in model.named_parameters()
    if not name.endswith(unused)
  )


def reopen(folder: Any) -> Any:
  """A saved folder in transformers, which must miss and ignore nothing."""
  transformers = import_transformers()
  model, info = transformers.AutoModel.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  return model.eval()


def random_params(config: Any, final_norm: str = "affine") -> Any:
  """Random parameters of our network; nothing is compiled."""
  module = vit.ViT(config, final_norm=final_norm)
  side = config.grid * config.patch_size
  pictures = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), pictures)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes
  )
