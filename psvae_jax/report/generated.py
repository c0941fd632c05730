"""The report's generated pictures and edits, with what is right and wrong.

A mark is a sign and a word (or the alternative text), never colour alone.
Pictures stand in the order in which they were made: nothing is chosen.
"""

from collections.abc import Sequence

import numpy as np

from psvae_jax.report import page
from psvae_jax.report.data import Run, Stage
from psvae_jax.report.images import PIXELATED_BELOW, data_uri
from psvae_jax.report.pictures import Arrays, captions_of, marks_of
from psvae_jax.report.settings import mapping

_IN_VIEW = 24  # of a gallery; the others unfold
_MAX_IMAGES = 64
_MAX_ROWS = 6  # captions shown over training, and on the way from noise
_MAX_COLUMNS = 8
_FEW = 4  # columns that need no more room than half a page
_MAX_GRIDS = 4
_MAX_EDITS = 24
_EDITS_IN_VIEW = 12
_SMALL_SIDE = 128  # of a large picture among many


def generated_section(run: Run) -> str:
  """Every generator stage's samples, from the newest evaluation and before."""
  parts = []
  for stage in run.stages:
    if pieces := _stage(stage):
      html = "\n".join(pieces)
      title = f"{stage.title}: the same captions after this stage"
      parts.append(page.details(title, html) if parts else html)
  return "\n".join(parts)


def _stage(stage: Stage) -> list[str]:
  found = stage.pictures
  pieces = [
    _gallery(stage, found.generated),
    _history(stage, _with_last(stage)),
    _guidance(stage, found.guidance_grid),
    _denoising(stage, found.denoising),
  ]
  return list(filter(None, pieces))


def edits_section(run: Run) -> str:
  """Source, result and target under the instruction."""
  return "\n".join(
    _edits(stage, stage.pictures.edits)
    for stage in run.stages
    if stage.pictures.edits
  )


def _captions(stage: Stage, arrays: Arrays, count: int) -> list[str]:
  """Captions; a class is called one, and not only by its number."""
  texts = captions_of(arrays, count)
  if mapping(stage.job, "model").get("condition") == "class":
    return [f"class {text}" if text else "" for text in texts]
  return texts


def _titled(title: str, note: str, html: str) -> str:
  return f"<h3>{page.text(title)}</h3>{page.note(note)}{html}"


def _gallery(stage: Stage, arrays: Arrays) -> str:
  if not arrays:
    return ""
  images, marks = arrays["images"], marks_of(arrays)
  texts = _captions(stage, arrays, len(images))
  shots = [
    page.shot(
      data_uri(images[index]),
      _alt("generated", texts[index] or f"image {index + 1}", marks[index]),
      texts[index],
      marks[index],
      pixelated=is_small(images),
    )
    for index in range(min(len(images), _MAX_IMAGES))
  ]
  html = page.gallery(shots[:_IN_VIEW])
  if rest := shots[_IN_VIEW:]:
    html += page.details(f"{len(rest)} more", page.gallery(rest))
  note = _share(marks, "right: all that the caption says is in the picture")
  if len(shots) < len(images):
    note += f" The first {len(shots)} of {len(images)} are shown."
  step = f", step {stage.evaluated_step:,}" if stage.evaluated_step else ""
  return _titled(f"{stage.title}{step}", note.strip(), html)


def _history(stage: Stage, history: dict[int, Arrays]) -> str:
  """A strip a caption, a column an evaluated step."""
  if not history:
    return ""
  steps = _evenly(list(history))
  last = history[steps[-1]]
  count = min(len(arrays["images"]) for arrays in history.values())
  texts = _captions(stage, last, count)
  cards = []
  for index in range(min(count, _MAX_ROWS)):
    columns = []
    for step in steps:
      image = history[step]["images"][index]
      mark = marks_of(history[step])[index]
      alt = _alt(f"step {step:,}", texts[index] or f"image {index + 1}", mark)
      address = data_uri(image, _SMALL_SIDE)
      columns.append(
        page.Column(
          [(address, alt)], short(step), page.sign(mark), bad=mark is False
        )
      )
    small = is_small(last["images"])
    cards.append(page.strip(columns, caption=texts[index], pixelated=small))
  note = "The same captions and seeds; below each picture the training step."
  if shares := _shares_by_step(history, steps):
    note += f" Right: {shares}."
  return _titled(
    f"{stage.title} over training",
    note,
    page.cards(cards, wide=len(steps) > _FEW),
  )


def _with_last(stage: Stage) -> dict[int, Arrays]:
  """Pictures over training, and the last evaluation's of the same captions."""
  history, last = dict(stage.pictures.history), stage.pictures.generated
  if not history or not last or stage.evaluated_step <= max(history):
    return history
  newest = history[max(history)]
  count = len(newest["images"])
  part = {name: array[:count] for name, array in last.items()}
  texts = [captions_of(arrays, count) for arrays in (newest, part)]
  if newest["images"].shape == part["images"].shape and texts[0] == texts[1]:
    history[stage.evaluated_step] = part
  return history


def _shares_by_step(history: dict[int, Arrays], steps: Sequence[int]) -> str:
  parts = []
  for step in steps:
    marks = marks_of(history[step])
    if marks.size and marks[0] is not None:
      at = "at" if parts else "at step"
      parts.append(f"{marks.sum()} of {marks.size} {at} {step:,}")
  return ", ".join(parts)


def _guidance(stage: Stage, arrays: Arrays) -> str:
  """A table a caption: a row a guidance scale, a column a number of steps."""
  if not arrays:
    return ""
  images, marks = arrays["images"], marks_of(arrays)
  texts = _captions(stage, arrays, images.shape[2])
  head = [f"{steps:g}" for steps in arrays["steps"]]
  cards = []
  for index in range(min(images.shape[2], _MAX_GRIDS)):
    text = texts[index] or f"image {index + 1}"
    rows = []
    for g, scale in enumerate(arrays["guidance"]):
      cells = []
      for s, steps in enumerate(head):
        mark = marks[g, s, index]
        alt = _alt(f"guidance {scale:g}, {steps} steps", text, mark)
        address = data_uri(images[g, s, index], _SMALL_SIDE)
        cells.append((address, alt, mark))
      rows.append((f"{scale:g}", cells))
    titles = [f"{head[0]} steps", *head[1:]]
    small = is_small(images)
    cards.append(
      page.picture_table(text, "guidance", titles, rows, pixelated=small)
    )
  note = (
    "The same seed in every field of a table. A row is a guidance scale, 1 is"
    " none; a column a number of sampler steps."
  )
  return _titled(
    f"{stage.title}, guidance × steps",
    f"{note} {_share(marks, 'right')}".strip(),
    page.cards(cards),
  )


def _denoising(stage: Stage, arrays: Arrays) -> str:
  if not arrays:
    return ""
  images = arrays["images"]
  texts = _captions(stage, arrays, len(images))
  points = _evenly(range(images.shape[1]))
  cards = []
  for index in range(min(len(images), _MAX_ROWS)):
    columns = []
    for point in points:
      time = f"{arrays['times'][point]:.2f}"
      alt = _alt(f"estimate at t = {time}", texts[index] or f"{index + 1}")
      address = data_uri(images[index, point], _SMALL_SIDE)
      columns.append(page.Column([(address, alt)], time))
    small = is_small(images)
    cards.append(page.strip(columns, caption=texts[index], pixelated=small))
  return _titled(
    f"{stage.title}, from noise to picture",
    "The end as the model estimates it on the way; below each picture the time"
    " t, from 1 (noise) to 0.",
    page.cards(cards, wide=True),
  )


def _edits(stage: Stage, arrays: Arrays) -> str:
  marks = marks_of(arrays)
  texts = captions_of(arrays, len(marks), "instructions")
  cards = []
  for index in range(min(len(marks), _MAX_EDITS)):
    of = texts[index] or f"edit {index + 1}"
    columns = [
      page.Column([(_uri(arrays, "source", index), f"source: {of}")], "source"),
      page.Column(
        [(_uri(arrays, "result", index), _alt("result", of, marks[index]))],
        "result",
        _MARKED[marks[index]],
        bad=marks[index] is False,
      ),
      page.Column([(_uri(arrays, "target", index), f"target: {of}")], "target"),
    ]
    small = is_small(arrays["result"])
    cards.append(page.strip(columns, caption=texts[index], pixelated=small))
  html = page.cards(cards[:_EDITS_IN_VIEW])
  if rest := cards[_EDITS_IN_VIEW:]:
    html += page.details(f"{len(rest)} more", page.cards(rest))
  note = "The target is one way to follow the instruction; the model has not"
  note += " seen it."
  share = _share(marks, "right: the instruction is done and nothing else")
  if len(cards) < len(marks):
    share += f" The first {len(cards)} of {len(marks)} are shown."
  step = f", step {stage.evaluated_step:,}" if stage.evaluated_step else ""
  return _titled(f"{stage.title}{step}", f"{share} {note}".strip(), html)


_MARKED = {True: "✓ right", False: "✗ wrong", None: ""}


def _uri(arrays: Arrays, name: str, index: int) -> str:
  return data_uri(arrays[name][index])


def _alt(what: str, of: str, mark: bool | None = None) -> str:
  words = {True: ", right", False: ", wrong", None: ""}[mark]
  return f"{what}{words}: {of}"


def _share(marks: np.ndarray, words: str) -> str:
  """A sentence on how many are right; "" where nobody has looked."""
  flat = marks.reshape(-1)
  if not flat.size or flat[0] is None:
    return ""
  right = int(flat.sum())
  percent = 100 * right / flat.size
  return f"{right} of {flat.size} ({percent:.0f} %) are {words} (✓)."


def _evenly(items: Sequence[int]) -> list[int]:
  """At most `_MAX_COLUMNS` of them, evenly spaced, the ends among them."""
  count = min(len(items), _MAX_COLUMNS)
  places = np.linspace(0, len(items) - 1, count)
  return [items[int(round(place))] for place in places]


def short(step: int) -> str:
  """1500 → 1.5k: room for eight on a phone."""
  return f"{step / 1000:.3g}k" if step >= 1000 else str(step)


def is_small(images: np.ndarray) -> bool:
  """Whether pictures are so small that enlarging should keep their pixels."""
  return images.shape[-2] < PIXELATED_BELOW
