"""Package definition of psvae_jax.

    pip install -e . -c constraints.txt            # CPU
    pip install -e ".[tpu]" -c constraints.txt     # Cloud TPU
    pip install -e ".[cuda]" -c constraints.txt    # NVIDIA GPU, CUDA 13

Requirements name the oldest version the code is written for; constraints.txt
pins the versions it was tested with. `launch/setup.sh` applies both.
"""

import setuptools

REQUIREMENTS = [
  "absl-py",
  "array_record>=0.8.1",
  "chex",
  "flax>=0.12.8",
  "grain>=0.2.16",
  "huggingface_hub",
  "jax>=0.10",
  "matplotlib",
  "ml_collections",
  "numpy",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.4",
  "pillow",
  "rich",
  "safetensors",
  "scikit-image",
  "scipy",
  "tensorboardX",
  "tensorflow-datasets",
  "tokenizers",
  "transformers>=5",
]

EXTRAS = {
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
  "demo": ["gradio>=6"],
  # Published .pth files are read once, by `python -m psvae_jax.convert`.
  "convert": ["torch"],
  "test": [
    "diffusers",
    "hypothesis",
    "lpips",
    "pytest",
    "pytest-xdist",
    "pytorch-fid",
    "ruff",
    "setuptools",
    # Only the parity tests use torch, and they skip without it. The exact
    # version keeps a ready CPU build (2.13.0+cpu) from being replaced by the
    # CUDA build of a newer release.
    "torch==2.13.0",
    "torch-fidelity",
    "torchmetrics",
    "torchvision==0.28.0",  # the one that is built for that torch
  ],
}

setuptools.setup(
  name="psvae_jax",
  version="0.1.0",
  description=(
    "PS-VAE: generative latents from representation encoders, in JAX and Flax"
  ),
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["psvae_jax", "psvae_jax.*"]),
  package_data={
    "psvae_jax": [
      f"assets/**/*.{suffix}" for suffix in ("json", "safetensors", "md", "txt")
    ]
  },
  install_requires=REQUIREMENTS,
  extras_require=EXTRAS,
)
