"""CLIP score: torchmetrics, streams, and pairs that disagree."""

import clip_reference
import numpy as np
import pytest

from psvae_jax.evaluators import clip_score
from psvae_jax.pretrained import clip as clip_lib

torch = clip_reference.torch

CAPTIONS = ["a cat", "", "12 Dogs", "x y z", "a dog?"]


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


def images(count=5, height=30, width=41):
  rng = np.random.default_rng(3)
  return rng.integers(0, 256, (count, height, width, 3), np.uint8)


def unit(*shape, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape)
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_torchmetrics_has_the_same_figures(networks):
  multimodal = pytest.importorskip("torchmetrics.multimodal.clip_score")
  ours, model = networks
  metric = multimodal.CLIPScore(lambda: (model, clip_reference.processor()))
  score = clip_score.ClipScore()
  singles = []
  for image, text in zip(images(), CAPTIONS, strict=True):
    with torch.no_grad():
      value = metric(torch.tensor(image).permute(2, 0, 1), text)
    singles.append(float(value))
    score.update(ours.image_embeds([image]), ours.text_embeds([text]))
  assert score.torchmetrics_score == pytest.approx(
    float(metric.compute()), abs=1e-3
  )
  # One pair at a time there is no mean to be taken before the cut.
  assert score.score == pytest.approx(np.mean(singles), abs=1e-3)
  assert min(singles) == 0 < max(singles)  # some pairs do disagree
  assert score.score > score.torchmetrics_score + 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_one_call_is_the_stream(networks, batch_size):
  ours, _ = networks
  pictures = images()
  score = clip_score.ClipScore().update(
    ours.image_embeds(pictures), ours.text_embeds(CAPTIONS)
  )
  got = clip_score.clip_score(ours, pictures, CAPTIONS, batch_size=batch_size)
  assert got == pytest.approx(score.score, abs=1e-4)


def test_parts_of_any_size_merge_to_the_whole():
  texts, pictures = unit(50, 8), unit(50, 8, seed=1)
  whole = clip_score.ClipScore().update(pictures, texts)
  total = clip_score.ClipScore()
  for start, stop in ((0, 1), (1, 34), (34, 50)):
    part = slice(start, stop)
    total.merge(clip_score.ClipScore().update(pictures[part], texts[part]))
  assert total.count == whole.count == 50
  assert total.score == pytest.approx(whole.score, abs=1e-10)
  cosines = np.sum(texts.astype(np.float64) * pictures, axis=1)
  assert whole.score == pytest.approx(100 * np.maximum(cosines, 0).mean())
  assert total.over_hosts().score == total.score


def test_extremes():
  x = unit(3, 4)
  assert clip_score.ClipScore().update(x, x).score == pytest.approx(100)
  opposite = clip_score.ClipScore().update(x, -x)
  assert opposite.score == opposite.torchmetrics_score == 0


def test_errors(networks):
  ours, _ = networks
  with pytest.raises(ValueError, match="no pair was added"):
    _ = clip_score.ClipScore().score
  with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
    clip_score.ClipScore().update(unit(3, 4), unit(2, 4))
  with pytest.raises(ValueError, match="NaN or infinity"):
    clip_score.ClipScore().update(unit(3, 4) * np.nan, unit(3, 4))
  with pytest.raises(ValueError, match="5 images and 4 captions"):
    clip_score.clip_score(ours, images(), CAPTIONS[:4])
  with pytest.raises(ValueError, match="no pair was added"):
    clip_score.clip_score(ours, images(0), [])
  with pytest.raises(ValueError, match="batch_size"):
    clip_score.clip_score(ours, images(), CAPTIONS, batch_size=0)
