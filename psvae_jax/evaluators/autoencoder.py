"""Figures of an autoencoder on held-out data.

Reconstructions are made from μ and rounded to uint8 before they are compared.
Padding is masked, so no figure depends on the batch size or the host count.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding, writers
from psvae_jax.config import Config
from psvae_jax.data import pipeline, sources
from psvae_jax.data.scenes import SceneSource
from psvae_jax.evaluators import image_metrics, photographs, scenes
from psvae_jax.evaluators.latents import LatentMoments
from psvae_jax.evaluators.pictures import Pictures, Samples
from psvae_jax.models.autoencoder import Autoencoder


class AutoencoderEvaluator:
  """Scores parameters of one `Autoencoder`; each jitted function compiles once.

  Args:
    model: the modules.
    config: the job; `eval`, `data` and `seed` are read.
  """

  def __init__(self, model: Autoencoder, config: Config) -> None:
    self._model = model
    self._config = config
    self._reconstruct = jax.jit(self._reconstruct_fn)
    self._tokens = jax.jit(self._tokens_fn)
    self._features = jax.jit(self._features_fn)
    self._pictures = Pictures(model)
    self._scene_probe = None
    if config.eval.probe == "scenes":
      self._scene_probe = scenes.SceneProbe(
        model.config.output_size, config.eval
      )

  def _reconstruct_fn(self, params: Any, batch: Any) -> dict[str, Any]:
    model = self._model
    x = _to_float(batch["image"])
    features = model.features(params["encoder"], x)
    posterior = model.posterior(params["semantic_encoder"], features)
    pixels = model.decode_pixels(params["pixel_decoder"], posterior.mode())
    pixels = image_metrics.to_uint8(pixels.astype(jnp.float32))
    figures = {
      "psnr": image_metrics.psnr(pixels, batch["image"]),
      "ssim": image_metrics.ssim(pixels, batch["image"]),
      "sharpness": image_metrics.gradient_sharpness(pixels, batch["image"]),
    }
    return _replicate(
      {
        **batch,
        "figures": figures,
        "reconstruction": pixels,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
      }
    )

  def _tokens_fn(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Mean-pooled f′, μ and f″ of a batch."""
    model = self._model
    features = model.features(params["encoder"], _to_float(images))
    z = model.posterior(params["semantic_encoder"], features).mode()
    decoded = model.decode_features(params["semantic_decoder"], z)
    pooled = {"features": features, "latent": z, "decoded": decoded}
    return _replicate({k: v.mean(axis=(1, 2)) for k, v in pooled.items()})

  def _features_fn(
    self, params: Any, images: jax.Array
  ) -> dict[str, jax.Array]:
    features = self._model.features(params, _to_float(images))
    return _replicate({"features": features.mean(axis=(1, 2))})

  def evaluate(
    self,
    params: dict[str, Any],
    mesh: Mesh,
    folder: Path | None,
    teacher: Any = None,
    *,
    quarantine: Path | None = None,
  ) -> dict[str, float]:
    """All figures of `params` (module → parameters, E included).

    Args:
      params: parameters on `mesh`.
      mesh: the mesh.
      folder: where samples and channel statistics are written; None nowhere,
        as on every host but one.
      teacher: the frozen encoder's parameters, for pictures of its features;
        the same object as `params["encoder"]` where E does not train.
      quarantine: list of the records that cannot be used, the same on every
        host: a record that is named there keeps its place when its file is
        gone. None keeps no list.

    Returns:
      Metric name → value.
    """
    config = self._config.eval
    source = sources.make_source(
      self._config.data,
      "validation",
      self._model.config.output_size,
      quarantine,
    )
    means, moments = image_metrics.MeanAccumulator(), LatentMoments()
    checker = scenes.CheckerScore(source) if self._checks(source) else None
    originals, indices = [], []
    batches = pipeline.eval_batches(
      source,
      image_size=self._model.config.output_size,
      batch_size=config.batch_size,
      num_examples=min(config.num_images, len(source)),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    for batch in batches:
      out = self._reconstruct(params, sharding.put_batch(batch, mesh))
      out = jax.device_get(out)
      mask = out["mask"]
      means.update(out["figures"], mask)
      moments.update(out["mean"], out["logvar"], mask)
      if checker is not None:
        checker.update(out["index"][mask], out["reconstruction"][mask])
      if sum(map(len, originals)) < config.num_samples:
        originals.append(out["image"][mask])
        indices.append(out["index"][mask])
    latents = moments.result()
    metrics = {f"eval/{k}": v for k, v in means.result().items()}
    metrics |= {
      "eval/kl": latents["kl_mean"],
      "eval/collapsed_channels": latents["collapsed"],
      "eval/latent_mean": float(np.abs(latents["mean"]).mean()),
      "eval/latent_std": float(latents["std"].mean()),
      "eval/latent_variance": float(latents["variance"].mean()),
    }
    if checker is not None:
      metrics |= checker.result()
    if self._scene_probe is not None:
      metrics |= self._probe(params, mesh)
    # Other hosts write nothing, but take part in what is computed.
    if originals and (folder is not None or jax.process_count() > 1):
      count = config.num_samples
      samples = Samples(
        np.concatenate(originals)[:count],
        _captions(source, np.concatenate(indices)[:count]),
      )
      for name, arrays in self._sample_sets(
        params, teacher, samples, latents, mesh
      ):
        _write_arrays(folder, f"samples/{name}.npz", arrays)
    statistics = ("mean", "std", "variance", "kl")
    _write_arrays(folder, "latents.npz", {k: latents[k] for k in statistics})
    return metrics

  def encoder_floor(self, params: Any, mesh: Mesh) -> dict[str, float]:
    """Probe of E as loaded, of E with random weights, and of chance.

    Args:
      params: E's parameters on `mesh`.
      mesh: the mesh.

    Returns:
      Metric name → value; empty without a probe.
    """
    if self._scene_probe is None:
      return {}
    model = self._model
    side = model.config.image_size
    image = jnp.zeros((1, side, side, 3), jnp.float32)
    rng = jax.random.key(self._config.seed)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    random = jax.jit(model.encoder.init, out_shardings={"params": shardings})(
      rng, image
    )["params"]

    def accuracy(params):
      scores = self._scene_probe.scores(
        lambda images: self._features(params, images), mesh
      )
      return scores["features"]

    trained = accuracy(params)
    metrics = {
      "eval/probe_accuracy": trained["accuracy"],
      "eval/probe_accuracy_random_encoder": accuracy(random)["accuracy"],
      "eval/probe_accuracy_chance": self._scene_probe.chance(),
    }
    for name, value in trained.items():
      if name.startswith("accuracy_"):
        metrics[f"eval/probe_{name}"] = value
    return metrics

  def _sample_sets(
    self,
    params: Any,
    teacher: Any,
    held_out: Samples,
    latents: dict[str, np.ndarray],
    mesh: Mesh,
  ) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name and arrays of the held-out images and of real photographs."""
    yield (
      "validation",
      self._pictures(params, teacher, held_out, latents, mesh),
    )
    if self._config.data.source == "bundled":
      return  # they are the held-out images
    try:
      # As many as of the others: one shape is compiled once.
      samples = photographs.load(
        self._model.config.output_size, len(held_out.images)
      )
    except FileNotFoundError as error:
      yield "photographs", {"note": np.array(str(error))}
      return
    arrays = self._pictures(params, teacher, samples, latents, mesh)
    yield "photographs", arrays

  def _checks(self, source: Any) -> bool:
    return self._scene_probe is not None and isinstance(source, SceneSource)

  def _probe(self, params: Any, mesh: Mesh) -> dict[str, float]:
    scores = self._scene_probe.scores(
      lambda images: self._tokens(params, images), mesh
    )
    names = {"features": "", "latent": "_latent", "decoded": "_decoded"}
    return {
      f"eval/probe_accuracy{names[k]}": v["accuracy"] for k, v in scores.items()
    }


def _to_float(images: jax.Array) -> jax.Array:
  return images.astype(jnp.float32) / 127.5 - 1.0


def _replicate(tree: Any) -> Any:
  """Every host gets the whole batch's outputs."""
  return jax.tree.map(sharding.constrain, tree)


def _captions(source: Any, indices: np.ndarray) -> list[str]:
  """Captions of scenes; other sources would have to read their files again."""
  if not isinstance(source, SceneSource):
    return [""] * len(indices)
  return [source[int(index)]["caption"] for index in indices]


def _write_arrays(
  folder: Path | None, name: str, arrays: dict[str, np.ndarray]
) -> None:
  """Writes an .npz; on a full disk the figures are had without it."""
  if folder is None:
    return
  path = folder / name
  with writers.skipped_when_full(str(path)):
    writers.write_arrays_atomic(path, arrays)
