"""How well autoencoders reconstruct a data set's own images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from psvae_jax import sharding
from psvae_jax.evaluation import passes, references
from psvae_jax.evaluation.figures import Evaluation
from psvae_jax.evaluation.image_sets import ImageSet
from psvae_jax.evaluation.models import Model
from psvae_jax.evaluation.networks import Networks, kind_of, network_of
from psvae_jax.evaluation.references import Reference, Settings
from psvae_jax.evaluators import image_metrics
from psvae_jax.evaluators.frechet import frechet_distance

KIND = "reconstruction"
ITSELF = "the set's own images, as many"
PAIRED = ("psnr", "ssim", "lpips")
DISTANCES = ("rfid", "rsfid", "rfd_dinov2")

_LEAST_SIDE = 11  # SSIM's window


def evaluate(
  models: Sequence[Model],
  images: ImageSet,
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
  reference: Reference | None = None,
) -> Evaluation:
  """Figures of each model, in one table.

  Args:
    models: whose names differ.
    images: what they reconstruct, at the size of the comparison.
    networks: of metrics.
    settings: how to compute.
    mesh: batches are split over its data and fsdp.
    reference: what distances are taken to; None takes the images themselves.

  Raises:
    ValueError: images too small or too few; see `passes.run`.
  """
  if images.size < _LEAST_SIDE:
    raise ValueError(
      f"figures need images of at least {_LEAST_SIDE} × {_LEAST_SIDE} pixels, "
      f"got {images.size}"
    )
  bad, against = None, reference.protocol if reference else ITSELF
  if reference is None and networks.features:
    reference = references.of_images(images, networks, settings, mesh)
  found = Evaluation(KIND, {})
  found.left_out |= networks.missing((*PAIRED, *DISTANCES))
  for text in reference.notes if reference else ():
    found.note(text)
  for model in models:
    result = _run(model, images, networks, settings, mesh)
    bad = len(result.bad)
    row = result.statistics.means.result()
    if (finite := row.pop("finite")) < 1:
      broken = round((1 - finite) * result.count)
      found.note(f"{model.name}: {broken} reconstructions held NaN or infinity")
    if reference is not None:
      row |= _distances(result, reference, found, networks)
    found.rows[model.name] = row
    found.of_row[model.name] = {
      "model": model.description,
      "fingerprint": model.fingerprint,
      "precision": model.dtype,
      "matrix_products": jax.config.jax_default_matmul_precision
      or "the device's default",
      "resize": model.resize(images.size),
    }
  found.protocol = {
    "kind": "reconstructions of the data set's own images, from the "
    "posterior's mean",
    "set": images.describe(),
    "count": len(images) - (bad or 0),
    "unreadable_images": bad or 0,
    "rounding": f"{settings.rounding} to 8 bits",
    "metrics_precision": "float32, full products; distances float64",
  }
  _explain(found, reference, against, networks, len(images) - (bad or 0))
  return found


def _run(
  model: Model,
  images: ImageSet,
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
) -> passes.Result:
  extractor = networks.extractor(mesh)
  params = sharding.put_tree(model.params, mesh)
  split = sharding.batch_sharding(mesh)
  reconstruct = jax.jit(
    model.at(images.size, settings.rounding), out_shardings=split
  )
  lpips_params = None
  if networks.lpips is not None:
    lpips_params = sharding.put_tree(networks.lpips.params, mesh)
  compare = jax.jit(_comparison(networks), out_shardings=split)

  def step(image, index):
    del index
    made, finite = reconstruct(params, image)
    figures = compare(lpips_params, made, image)
    return extractor(made), {**figures, "finite": finite}

  identity = {
    "model": model.fingerprint,
    "resize": model.resize(images.size),
    "dtype": model.dtype,
    "products": jax.config.jax_default_matmul_precision,
    "rounding": settings.rounding,
    "networks": networks.identity(),
    "lpips": networks.lpips.fingerprint if networks.lpips else "",
  }
  work = passes.Pass(
    model.name, images, step, identity, moments=networks.moments
  )
  return references.run(work, settings, mesh)


def _comparison(networks: Networks) -> Callable[..., dict[str, jax.Array]]:
  """(LPIPS' parameters, made, originals), uint8 → figure → (B,)."""

  def compare(params: Any, made: jax.Array, images: jax.Array):
    figures = {
      "psnr": image_metrics.psnr(made, images),
      "ssim": image_metrics.ssim(made, images),
    }
    if networks.lpips is not None:
      x, y = (z.astype(jnp.float32) / 127.5 - 1.0 for z in (made, images))
      with jax.default_matmul_precision("highest"):
        figures["lpips"] = networks.lpips.distance(params, x, y)
    return figures

  return compare


def _distances(
  result: passes.Result,
  reference: Reference,
  found: Evaluation,
  networks: Networks,
) -> dict[str, float]:
  row = {}
  for key in DISTANCES:
    kind = kind_of(key)
    if network_of(networks, key) is None:
      continue
    if kind not in reference.moments:
      found.left_out[key] = (
        f"the reference has no statistics of {kind} features"
      )
      continue
    references.check_count(result.count, "the data set")
    mean, covariance, _ = references.moments_of(result.statistics.moments[kind])
    row[key] = frechet_distance(mean, covariance, *reference.moments[kind][:2])
  return row


def _explain(
  found: Evaluation,
  reference: Reference | None,
  against: Mapping[str, Any] | str,
  networks: Networks,
  count: int,
) -> None:
  """What each figure was made with."""
  for key in found.columns:
    if key in DISTANCES:
      network = network_of(networks, key)
      mean, _, available = reference.moments[kind_of(key)]
      width = len(mean)
      found.explain(
        key,
        count=count,
        dimensions=width,
        reference=against,
        **network.protocol,
      )
      note_few(found, min(count, available or count), width)
    elif key == "lpips":
      found.explain(
        key,
        count=count,
        network=networks.lpips.network,
        weights=networks.lpips.name,
        weights_fingerprint=networks.lpips.fingerprint[:16],
      )
    else:
      found.explain(key, count=count)


def note_few(found: Evaluation, count: int, width: int) -> None:
  """Warns of a Fréchet distance's bias, which depends on the count."""
  if count <= width:
    found.note(
      f"Fréchet distances of {count} images (of the smaller set), fewer than "
      "their dimensions, are biased far upwards: compare them with figures of "
      "as many images only"
    )
