"""The report's view of latent space: channels, and pictures of them."""

from collections.abc import Sequence

import numpy as np

from psvae_jax.report import figures, page
from psvae_jax.report.arrays import is_images
from psvae_jax.report.curves import is_latent, metric_panels
from psvae_jax.report.data import Run, Stage
from psvae_jax.report.images import captions, data_uri
from psvae_jax.report.metrics import (
  format_value,
  is_number,
  rank,
)
from psvae_jax.report.tables import latents_table

_TITLES = {
  "mean": "Mean of μ",
  "std": "Std of μ",
  "variance": "Variance σ²",
  "kl": "KL",
}
_MAX_IMAGES = 2
_ORIGINAL_SIDE = 96
# Levels of a channel from far below its mean over the mean to far above it.
_BELOW, _MEAN, _ABOVE = (38, 84, 150), (244, 243, 239), (186, 78, 38)


def latents_section(run: Run, colors: dict[str, int]) -> str:
  """Statistics by channel, channels as pictures, and both over training."""
  run = run.part(generator=False)
  names = sorted({n for s in run.stages for n in s.latents}, key=_order)
  limits = {
    name: figures.bar_limits(
      [s.latents[name] for s in run.stages if name in s.latents]
    )
    for name in names
  }
  channels = [_channels(stage, limits, colors) for stage in run.stages]
  parts = [latents_table(run), *channels]
  if any(channels):
    parts.insert(
      1,
      page.note(
        "By channel, on the same scale in every stage; figures are means over"
        " channels."
      ),
    )
  parts.append(_pictures(run))
  history = sorted(
    {n for s in run.stages for n in s.metric_names() if is_latent(n)},
    key=rank,
  )
  if history:
    items = metric_panels(run, history, colors)
    parts.append(page.details("Over training", items))
  return "\n".join(filter(None, parts))


def _order(name: str) -> tuple[int, str]:
  known = list(_TITLES)
  return (known.index(name) if name in known else len(known), name)


def _channels(
  stage: Stage,
  limits: dict[str, tuple[float, float]],
  colors: dict[str, int],
) -> str:
  if not stage.latents:
    return ""
  items = [
    page.panel(
      _TITLES.get(name, name),
      f"{np.nanmean(stage.latents[name]):.3g}".replace("-", "−"),
      figures.bars_svg(
        stage.latents[name].astype(np.float64),
        colors[stage.name],
        limits[name],
      ),
    )
    for name in sorted(stage.latents, key=_order)
  ]
  channels = max(map(len, stage.latents.values()))
  title = f"{stage.title}, {channels} channels"
  collapsed = stage.figures().get("eval/collapsed_channels")
  if is_number(collapsed):
    title += f", {format_value('collapsed_channels', collapsed)} collapsed"
  return f"<h3>{page.text(title)}</h3>" + page.panels(items, four=True)


def _pictures(run: Run) -> str:
  """The channels that say most on the first held-out images."""
  cards: list[str] = []
  for stage in run.stages:
    if "validation" in stage.samples:
      cards += _strips(stage, stage.samples["validation"])
  if not cards:
    return ""
  return (
    "<h3>Channels with the highest KL</h3>"
    + page.note(
      "μ at every position, from three standard deviations below the channel’s"
      " mean (blue) to three above (orange)."
    )
    + page.cards(cards, wide=True)
  )


def _strips(stage: Stage, arrays: dict[str, np.ndarray]) -> Sequence[str]:
  original, latent = arrays.get("original"), arrays.get("latent")
  numbers = arrays.get("latent_channel")
  if not is_images(original) or latent is None or numbers is None:
    return []
  if latent.ndim != 4 or latent.dtype != np.uint8 or numbers.ndim != 1:
    return []
  count = min(len(original), len(latent), _MAX_IMAGES)
  texts = captions([stage], "validation", count)
  strips = []
  for index in range(count):
    of = texts[index] or f"image {index + 1}"
    address = data_uri(original[index], _ORIGINAL_SIDE)
    columns = [page.Column([(address, f"original: {of}")], "")]
    for number, levels in zip(
      numbers, np.moveaxis(latent[index], -1, 0), strict=False
    ):
      alt = f"channel {number} of {stage.title}: {of}"
      columns.append(
        page.Column([(data_uri(_diverging(levels)), alt)], str(number))
      )
    strips.append(page.strip(columns, caption=stage.title, pixelated=True))
  return strips


def _diverging(levels: np.ndarray) -> np.ndarray:
  """uint8 (h, w) → uint8 (h, w, 3), 128 being the middle."""
  anchors = np.array([_BELOW, _MEAN, _ABOVE], float)
  channels = [
    np.interp(levels, (0, 128, 255), anchors[:, channel])
    for channel in range(3)
  ]
  return np.round(np.stack(channels, -1)).astype(np.uint8)
