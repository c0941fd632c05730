"""How made images compare with a reference set."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding
from psvae_jax.evaluation import image_sets, passes, references
from psvae_jax.evaluation.figures import Evaluation
from psvae_jax.evaluation.image_sets import ImageSet
from psvae_jax.evaluation.networks import Networks, kind_of, network_of
from psvae_jax.evaluation.reconstruction import note_few
from psvae_jax.evaluation.references import Reference, Settings
from psvae_jax.evaluators import inception_score
from psvae_jax.evaluators.clip_score import clip_score
from psvae_jax.evaluators.frechet import frechet_distance
from psvae_jax.evaluators.kernel_distance import kernel_distance
from psvae_jax.evaluators.precision_recall import precision_recall
from psvae_jax.evaluators.reference_npz import POOL

KIND = "generation"
DISTANCES = ("gfid", "gsfid", "gfd_dinov2")
BY_ROWS = ("kid", "precision", "recall")
FIGURES = (*DISTANCES, "inception_score", *BY_ROWS, "clip_score")

_TEXTS = 256  # embedded at once


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """What the images were made of.

  Attributes:
    source: where they are from, for the protocol.
    texts: one an image.
  """

  source: str
  texts: Sequence[str]

  @property
  def fingerprint(self) -> str:
    text = json.dumps(list(self.texts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: str, images: ImageSet) -> Prompts:
  """The prompt of each image of a set.

  Args:
    path: a text file with a prompt a line, in the order of the images' names;
      or "captions", those of the set's metadata.jsonl.
    images: the set.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: their number is another, or the images' names sort in another
      order than they are numbered in.
  """
  if path == "captions":
    texts = [images.caption(i) for i in range(len(images))]
    if not all(texts):
      raise ValueError(
        f"{texts.count('')} of the {len(texts)} images of {images.name} have "
        "no caption; give them in a metadata.jsonl with file_name and text"
      )
    return Prompts(f"captions of {images.name}", texts)
  file = Path(path).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"the prompt file {path!r} does not exist")
  try:
    # Universal newlines; splitlines would also cut at others, U+2028 say.
    texts = file.read_text(encoding="utf-8").split("\n")
  except UnicodeDecodeError as error:
    raise ValueError(f"the prompt file {path!r} is not UTF-8 text") from error
  while texts and not texts[-1].strip():
    texts.pop()
  if len(texts) != len(images):
    raise ValueError(
      f"{path} has {len(texts)} prompts, {images.name} {len(images)} images: "
      "one line an image, in the order of their names"
    )
  paths = [images.path(i) for i in range(len(images))]
  if pair := image_sets.numbered_out_of_order(paths):
    raise ValueError(
      f"{pair[0]} sorts before {pair[1]}, so lines of {path} would not belong "
      "to the images they are meant for; number the files with leading zeros, "
      "or list them in a metadata.jsonl and give --prompts=captions"
    )
  return Prompts(path, [text.strip() for text in texts])


def evaluate(
  sets: Sequence[ImageSet],
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
  reference: Reference | None,
  prompts: Mapping[str, Prompts] | None = None,
) -> Evaluation:
  """Figures of each set, in one table.

  Args:
    sets: made images; their names differ.
    networks: of metrics.
    settings: how to compute.
    mesh: batches are split over its data and fsdp.
    reference: what they are compared with; None leaves out what needs one.
    prompts: set → its prompts.

  Raises:
    ValueError: too few images; see `passes.run`.
  """
  prompts = prompts or {}
  found = Evaluation(KIND, {})
  found.left_out |= networks.missing(FIGURES)
  for text in reference.notes if reference else ():
    found.note(text)
  results = {}
  for images in sets:
    result = _run(images, networks, settings, mesh, prompts.get(images.name))
    results[images.name] = result
    found.rows[images.name] = _row(
      images.name, result, networks, settings, mesh, reference, found
    )
    found.of_row[images.name] = _describe(
      images, result, settings, prompts.get(images.name)
    )
  if networks.clip is not None and not prompts:
    found.left_out["clip_score"] = "--prompts was not given"
  found.protocol = {
    "kind": "made images against a reference set",
    "reference": dict(reference.protocol) if reference else "none",
    "unreadable_reference_images": reference.bad if reference else 0,
    "metrics_precision": "float32, full products; distances float64",
  }
  _explain(found, results, reference, networks, settings)
  return found


def _describe(
  images: ImageSet,
  result: passes.Result,
  settings: Settings,
  prompts: Prompts | None,
) -> dict[str, Any]:
  labels = settings.label_sampling or image_sets.describe_labels(images.labels)
  return {
    **images.describe(),
    "count": result.count,
    "unreadable_images": len(result.bad),
    "label_sampling": labels or "not stated",
    "prompts": prompts.source if prompts else "",
  }


def _run(
  images: ImageSet,
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
  prompts: Prompts | None,
) -> passes.Result:
  extractor = networks.extractor(mesh)
  has_pool = networks.inception is not None
  identity: dict[str, Any] = {"networks": networks.identity()}
  similarity = None
  if networks.clip is not None and prompts is not None:
    similarity = _ClipStep(networks.clip, prompts, mesh)
    identity |= {
      "clip": networks.clip.fingerprint,
      "prompts": prompts.fingerprint,
    }

  def step(image, index):
    figures = similarity(image, index) if similarity else {}
    return extractor(image), figures

  work = passes.Pass(
    images.name,
    images,
    step,
    identity,
    moments=networks.moments,
    rows=[POOL] if has_pool else [],
    score=has_pool and len(images) >= inception_score.SPLITS,
  )
  return references.run(work, settings, mesh)


class _ClipStep:
  """CLIP scores of images and their prompts."""

  def __init__(self, clip: Any, prompts: Prompts, mesh: Mesh) -> None:
    self._clip, self._mesh = clip, mesh
    self._params = sharding.put_tree(clip.params, mesh)
    texts = list(prompts.texts)
    # Every prompt once, however many images are made of it.
    unique = sorted(set(texts))
    places = {text: row for row, text in enumerate(unique)}
    self._row = np.array([places[text] for text in texts])
    self._embeds = self._embed(unique)
    split = sharding.batch_sharding(mesh)
    self._score = jax.jit(self._trace, out_shardings=split)

  def __call__(
    self, image: jax.Array, index: np.ndarray
  ) -> dict[str, jax.Array]:
    # Pillow resizes, on the host, as it did for those who defined the score.
    pixels = self._clip.images(np.asarray(jax.device_get(image)))
    texts = self._embeds[self._row[np.maximum(index, 0)]]
    batch = sharding.put_batch({"pixels": pixels, "texts": texts}, self._mesh)
    return {"clip_score": self._score(self._params, **batch)}

  def _trace(self, params: Any, pixels: jax.Array, texts: jax.Array):
    with jax.default_matmul_precision("highest"):
      embeds = self._clip.embed_pixels(params, pixels)
    return clip_score(embeds, texts)

  def _embed(self, texts: Sequence[str]) -> np.ndarray:
    size = min(_TEXTS, len(texts))
    parts = []
    for start in range(0, len(texts), size):
      part = list(texts[start : start + size])
      filled = part + [part[-1]] * (size - len(part))  # one compiled shape
      with jax.default_matmul_precision("highest"):
        embeds = self._clip.text_embeds(filled)
      parts.append(np.asarray(jax.device_get(embeds))[: len(part)])
    return np.concatenate(parts)


def _row(
  name: str,
  result: passes.Result,
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
  reference: Reference | None,
  found: Evaluation,
) -> dict[str, float]:
  """All figures of one set that can be had."""
  row: dict[str, float] = {}
  if "clip_score" in result.statistics.means.totals():
    row |= result.statistics.means.result()
  if networks.inception is not None:
    score = result.statistics.score
    if score is None:
      found.left_out["inception_score"] = (
        f"{name} has {result.count} images, fewer than the "
        f"{inception_score.SPLITS} splits"
      )
    else:
      try:
        row["inception_score"], row["inception_score_std"] = score.result()
      except ValueError as error:  # a split without a readable image
        found.left_out["inception_score"] = f"{name}: {error}"
  if reference is None:
    found.left_out |= {
      key: "--reference was not given"
      for key in (*DISTANCES, *BY_ROWS)
      if key not in found.left_out
    }
    return row
  for key in DISTANCES:
    if network_of(networks, key) is None:
      continue
    kind = kind_of(key)
    if kind not in reference.moments:
      found.left_out[key] = (
        f"the reference has no statistics of {kind} features"
      )
      continue
    references.check_count(result.count, name)
    mean, covariance, _ = references.moments_of(result.statistics.moments[kind])
    row[key] = frechet_distance(mean, covariance, *reference.moments[kind][:2])
  if networks.inception is not None:
    row |= _by_rows(name, result, reference, settings, mesh, found)
  return row


def _by_rows(
  name: str,
  result: passes.Result,
  reference: Reference,
  settings: Settings,
  mesh: Mesh,
  found: Evaluation,
) -> dict[str, float]:
  """KID, precision and recall: they need features of single images."""
  if POOL not in reference.rows:
    why = "the reference has statistics only, no images"
    found.left_out |= dict.fromkeys(BY_ROWS, why)
    return {}
  made, real = result.rows[POOL], reference.rows[POOL]
  fewest = min(len(made), len(real))
  row = {}
  if fewest < 2:
    found.left_out["kid"] = f"{name} or the reference has {fewest} image"
  else:
    row["kid"], row["kid_std"] = kernel_distance(
      made,
      real,
      num_subsets=settings.kid_subsets,
      subset_size=settings.kid_subset_size,
      seed=settings.seed,
    )
  if fewest <= settings.neighbours:
    why = (
      f"{name} or the reference has {fewest} images, "
      f"{settings.neighbours} neighbours need more"
    )
    found.left_out |= {"precision": why, "recall": why}
  else:
    row["precision"], row["recall"] = precision_recall(
      made, real, neighbours=settings.neighbours, mesh=mesh
    )
  return row


def _explain(
  found: Evaluation,
  results: Mapping[str, passes.Result],
  reference: Reference | None,
  networks: Networks,
  settings: Settings,
) -> None:
  """What each figure was made with."""
  counts = {name: result.count for name, result in results.items()}
  if len(set(counts.values())) > 1:
    found.note(
      "the sets have different numbers of images; Fréchet distances and "
      "inception scores depend on the number and do not compare"
    )
  fewest = min(counts.values())
  details: dict[str, Any] = {}
  if reference is not None:
    rows = reference.rows.get(POOL, ())
    sizes = {
      name: min(settings.kid_subset_size, count, len(rows))
      for name, count in counts.items()
    }
    details["kid"] = {
      "subsets": settings.kid_subsets,
      "subset_size": sizes,
      "seed": settings.seed,
    }
    ball = {"neighbours": settings.neighbours, "reference_images": len(rows)}
    details |= {"precision": ball, "recall": ball}
  details["inception_score"] = {
    "splits": inception_score.SPLITS,
    "order": "permuted with torch-fidelity's seed "
    f"{inception_score.SHUFFLE_SEED}",
  }
  for key in found.columns:
    extra = dict(details.get(key, {}))
    if key in DISTANCES:
      mean, _, count = reference.moments[kind_of(key)]
      extra |= {
        "dimensions": len(mean),
        "reference_count": count or "not stated",
      }
      note_few(found, min(fewest, count or fewest), len(mean))
    if key == "clip_score":
      extra |= {
        "clip": networks.clip.name,
        "clip_fingerprint": networks.clip.fingerprint[:16],
      }
    else:
      dinov2 = key == "gfd_dinov2"
      network = networks.dinov2 if dinov2 else networks.inception
      extra |= network.protocol
    found.explain(key, count=counts, **extra)
