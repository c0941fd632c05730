"""CLIP score: `evaluate`'s against torchmetrics', and pairs that disagree."""

import clip_reference
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.evaluation import generation, references
from psvae_jax.evaluation.image_sets import open_set
from psvae_jax.evaluation.networks import Networks
from psvae_jax.evaluators.clip_score import clip_score
from psvae_jax.pretrained import clip as clip_lib

torch = clip_reference.torch

CAPTIONS = ["a cat", "", "12 Dogs", "x y z", "a dog?"]
COUNT = 11  # more than a batch of 8, and no multiple of it


class Adapter(torch.nn.Module):
  """transformers 5 wraps features in an object torchmetrics does not know."""

  def __init__(self, model):
    super().__init__()
    self.model = model
    self.config = model.config

  def get_image_features(self, *args):
    return self.model.get_image_features(*args).pooler_output

  def get_text_features(self, *args):
    return self.model.get_text_features(*args).pooler_output


@pytest.fixture(scope="module", name="networks")
def _networks(tmp_path_factory):
  """The same network in JAX and in torch."""
  folder = tmp_path_factory.mktemp("clip")
  model = clip_reference.clip()
  model.save_pretrained(folder)
  clip_reference.processor().save_pretrained(folder)
  return clip_lib.load_clip(folder), Adapter(model)


def test_torchmetrics_has_the_same_figures(networks, tmp_path):
  multimodal = pytest.importorskip("torchmetrics.multimodal.clip_score")
  ours, model = networks
  metric = multimodal.CLIPScore(lambda: (model, clip_reference.processor()))
  rng = np.random.default_rng(3)
  pixels = rng.integers(0, 256, (COUNT, 40, 40, 3), np.uint8)
  # Captions come more than once, and in no order.
  texts = [CAPTIONS[i] for i in rng.integers(0, len(CAPTIONS), COUNT)]
  (tmp_path / "made").mkdir()
  singles = []
  for i, (image, text) in enumerate(zip(pixels, texts, strict=True)):
    Image.fromarray(image).save(tmp_path / "made" / f"{i:02}.png")
    with torch.no_grad():
      value = metric(torch.tensor(image).permute(2, 0, 1), text)
    singles.append(float(value))
  images = open_set(str(tmp_path / "made"))
  found = generation.evaluate(
    [images],
    Networks(clip=ours),
    references.Settings(tmp_path / "state", batch_size=8),
    sharding.make_mesh(MeshConfig()),
    None,
    {images.name: generation.Prompts("test", texts)},
  )
  score = found.rows[images.name]["clip_score"]
  # One pair at a time there is no mean to be taken before the cut.
  assert score == pytest.approx(np.mean(singles), abs=1e-3)
  assert min(singles) == 0 < max(singles)  # some pairs do disagree
  assert np.ptp(singles) > 1
  assert score > float(metric.compute()) + 0.1


def test_extremes():
  x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  np.testing.assert_allclose(clip_score(x, x), 100, rtol=1e-6)
  assert clip_score(x, -x).tolist() == [0, 0, 0]
  assert np.isnan(clip_score(x * np.nan, x)).all()


def test_pairs_must_be_pairs():
  with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
    clip_score(jnp.zeros((3, 4)), jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match=r"\(4,\) and \(4,\)"):
    clip_score(jnp.zeros(4), jnp.zeros(4))
