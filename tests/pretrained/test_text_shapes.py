"""Text encoders as shapes are the loaded ones without their weights."""

import jax
import pytest

from psvae_jax.pretrained.text import load_text_encoder
from psvae_jax.pretrained.text_shapes import abstract_text_encoder
from psvae_jax.tasks.generator import EMBEDDED_TEXT_ENCODER


def test_shapes_are_those_of_the_loaded_encoder():
  loaded = load_text_encoder(EMBEDDED_TEXT_ENCODER, max_length=8)
  module, params = abstract_text_encoder(EMBEDDED_TEXT_ENCODER)
  assert module == loaded.module
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), loaded.params)


@pytest.mark.parametrize(
  "name, millions",
  [("base", 109.6), ("xl", 1223.5), ("xxl", 4762.3)],
)
def test_published_sizes(name, millions):
  """Parameters of the published encoders."""
  _, params = abstract_text_encoder(f"google/t5-v1_1-{name}")
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_unknown_names(tmp_path):
  with pytest.raises(ValueError, match="did you mean 'google/t5-v1_1-large'"):
    abstract_text_encoder("google/t5-v1_1-larg")
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    abstract_text_encoder(tmp_path)
