"""PS-VAE (arXiv 2512.17909) in JAX: the public API, and nothing else."""

from psvae_jax.pretrained.encoder import Encoder as Encoder
from psvae_jax.pretrained.encoder import load_encoder as load_encoder

__version__ = "0.1.0"
