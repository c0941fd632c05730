"""T5 encoders as shapes: for tables of parameters, FLOPs and memory."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models import text
from psvae_jax.pretrained import files
from psvae_jax.pretrained.text import parse_config


def _published() -> dict[str, text.T5Config]:
  """Id → shape: T5 1.1 as Hugging Face publishes it."""
  sizes = {  # d_model, d_ff, layers, heads; all heads are 64 wide
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
  }
  return {
    f"google/t5-v1_1-{name}": text.T5Config(
      d_model=width,
      d_ff=hidden,
      num_layers=depth,
      num_heads=heads,
      feed_forward_proj="gated-gelu",
    )
    for name, (width, hidden, depth, heads) in sizes.items()
  }


PUBLISHED = _published()


def abstract_text_encoder(
  name_or_path: str | os.PathLike, dtype: Any = jnp.float32
) -> tuple[text.T5Encoder, Any]:
  """A text encoder of shapes; nothing is downloaded or allocated.

  Args:
    name_or_path: folder with a config.json (tensors are not looked for), or a
      key of `PUBLISHED`.
    dtype: compute dtype.

  Returns:
    The module, and `jax.ShapeDtypeStruct`s in place of its parameters.

  Raises:
    FileNotFoundError: the folder has no config.json.
    ValueError: an unknown id, or a malformed file.
  """
  name = os.fspath(name_or_path)
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    config = parse_config(files.read_config(folder), folder / "config.json")
  elif name in PUBLISHED:
    config = PUBLISHED[name]
  else:
    raise ValueError(
      f"text encoder {name!r} is no folder and no published architecture; "
      f"{nearest(name, PUBLISHED)}"
    )
  module = text.T5Encoder(config, dtype=dtype)
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  mask = jax.ShapeDtypeStruct((1, 1), np.bool_)
  variables = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)
  return module, variables["params"]
