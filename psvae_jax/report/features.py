"""The report's pictures of feature space: frozen, tuned and decoded."""

from collections.abc import Sequence

import numpy as np

from psvae_jax.report import page
from psvae_jax.report.arrays import is_images
from psvae_jax.report.data import Run, Stage
from psvae_jax.report.images import (
  captions,
  data_uri,
  same_originals,
  set_names,
  set_title,
)

_MAX_IMAGES = 6  # of a sample set
_ORIGINAL_SIDE = 96  # the originals stand elsewhere in full
# Array of a sample set → symbol. The frozen features are every stage's.
_TUNED = {"features_tuned": "f′", "features_decoded": "f″"}


def features_section(run: Run) -> str:
  """Every sample set that has feature pictures."""
  parts = []
  for name in set_names(run.stages):
    for group in same_originals(run.stages, name):
      strips = _strips(group, name)
      if strips:
        title = page.text(set_title(run, name))
        parts.append(f"<h3>{title}</h3>" + page.cards(strips, wide=True))
  if not parts:
    return ""
  lead = page.note(
    "The frozen encoder’s three strongest directions (principal components over"
    " the group) as red, green and blue, the same for all pictures of a group:"
    " a colour that stays is a feature that was kept. f: frozen encoder, f′:"
    " tuned encoder, f″: decoded from the latent."
  )
  return lead + "\n".join(parts)


def _strips(stages: Sequence[Stage], name: str) -> list[str]:
  """A strip an image: it, f, and what each stage made of f."""
  samples = [stage.samples[name] for stage in stages]
  original = next(
    (s["original"] for s in samples if is_images(s.get("original"))), None
  )
  frozen = next(
    (
      s["features_frozen"]
      for s in samples
      if is_images(s.get("features_frozen"))
    ),
    None,
  )
  if original is None or frozen is None:
    return []
  series: list[tuple[str, str, np.ndarray]] = [("f", "frozen", frozen)]
  for stage, arrays in zip(stages, samples, strict=True):
    series += [
      (symbol, stage.title, arrays[key])
      for key, symbol in _TUNED.items()
      if is_images(arrays.get(key))
    ]
  count = min(len(original), *(len(array) for _, _, array in series))
  texts = captions(stages, name, count)
  strips = []
  for index in range(min(count, _MAX_IMAGES)):
    of = f": {texts[index]}" if texts[index] else f" {index + 1}"
    address = data_uri(original[index], _ORIGINAL_SIDE)
    columns = [page.Column([(address, f"original{of}")], "original")]
    for symbol, title, array in series:
      alt = f"features {symbol}, {title}{of}"
      columns.append(
        page.Column([(data_uri(array[index]), alt)], symbol, title)
      )
    strips.append(page.strip(columns, pixelated=True))
  return strips
