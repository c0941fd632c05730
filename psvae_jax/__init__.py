"""PS-VAE (arXiv 2512.17909) in JAX: the public API, and nothing else.

Names load on first use, so that a config file can import `psvae_jax` without
importing JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
  "Encoder": "psvae_jax.pretrained.encoder",
  "PSVAE": "psvae_jax.psvae",
  "TextToImage": "psvae_jax.text_to_image",
  "load_autoencoder": "psvae_jax.autoencoders",
  "load_encoder": "psvae_jax.pretrained.encoder",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
  if name in _PUBLIC:
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  raise AttributeError(f"module 'psvae_jax' has no attribute {name!r}")
