"""Images from a generator: text-to-image, instruction edits, variations.

Image i is a function of its prompt (and source) and its own seed: the batch it
is computed in, the number of devices and the images beside it change nothing
but rounding. Seeds, scales, shift, strength and the interval of guidance are
arguments of the compiled programs; what needs another program is another batch
shape, solver or number of steps, and turning guidance on or off.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psvae_jax import flow, guided_flow, samplers, sharding
from psvae_jax.config import SampleConfig
from psvae_jax.evaluators.image_metrics import to_uint8
from psvae_jax.models.generator import Condition, Generator, Params
from psvae_jax.pretrained.tokenizer import Tokenizer
from psvae_jax.row_batches import RowBatches
from psvae_jax.sharding import constrain

_MAX_SEED = 2**32


class ImageSampler:
  """Samples a generator in batches of few shapes.

  Args:
    generator: the modules.
    batch_size: most images at once; changes memory and speed, not results
      beyond rounding. Fewer images run in the next power of two.
    mesh: what parameters live on; the batch is split over data and fsdp. None
      is the default device.
    tokenizer: the text encoder's; None for a class-conditional generator.
  """

  def __init__(
    self,
    generator: Generator,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> None:
    if (tokenizer is None) != (generator.text_encoder is None):
      raise ValueError(
        "a generator with a text encoder needs its tokenizer, one of classes "
        "has none"
      )
    self.generator = generator
    self._batches = RowBatches(batch_size, mesh)
    self._tokenizer = tokenizer
    self._condition_fn = jax.jit(self._trace_condition)
    self._noise_fn = jax.jit(self._trace_noise)
    self._encode_fn = jax.jit(self._trace_encode)
    self._mix_fn = jax.jit(flow.interpolate)
    self._decode_fn = jax.jit(self._trace_decode)
    self._image_features_fn = jax.jit(self._trace_image_features)
    self._text_features_fn = jax.jit(self._trace_text_features)
    self._solve_fn = jax.jit(
      self._trace_solve,
      static_argnames=("solver", "branches", "keep"),
    )
    self._gather_fn = jax.jit(constrain)  # whole on every device and host

  def generate(
    self,
    params: Params,
    frozen: Params,
    prompts: Sequence[str] | np.ndarray,
    seeds: Sequence[int],
    settings: SampleConfig,
    *,
    latents: bool = False,
  ) -> np.ndarray:
    """Samples one image a prompt.

    Args:
      params: the DiT's.
      frozen: see `models.generator`.
      prompts: N strings; of a class-conditional generator, N labels.
      seeds: N integers in [0, 2³²); they alone decide the noise.
      settings: solver, grid and guidance.
      latents: return the normalised latents (N, h, w, C) float32 instead.

    Returns:
      uint8 (N, S, S, 3).

    Raises:
      ValueError: numbers that differ, a bad seed, label or prompt.
    """

    def one(rows):
      noise = self._noise_fn(rows["seeds"])
      z, _ = self._solve(params, frozen, noise, rows, settings)
      return self._gather_fn(z) if latents else self._decode_fn(frozen, z)

    return self._in_batches(one, self._rows(prompts, seeds), latents)

  def denoise(
    self,
    params: Params,
    frozen: Params,
    prompts: Sequence[str] | np.ndarray,
    seeds: Sequence[int],
    settings: SampleConfig,
    points: int,
  ) -> tuple[np.ndarray, np.ndarray]:
    """What the sampler takes for the finished image, along the way.

    Args:
      params, frozen, prompts, seeds, settings: as for `generate`.
      points: how many, evenly from the first time to the last.

    Returns:
      uint8 (N, points, S, S, 3): decoded x₀-estimates, the last of which is
      the image itself; and their times, float64 (points,).

    Raises:
      ValueError: as `generate`; or more points than the grid has.
    """
    grid = _grid(settings)
    if not 1 <= points <= len(grid):
      raise ValueError(
        f"points must lie in [1, {len(grid)}], the points of the time grid, "
        f"got {points}"
      )
    last = len(grid) - 1
    keep = np.round(np.linspace(0 if points > 1 else last, last, points))
    keep = tuple(int(index) for index in keep)

    def one(rows):
      noise = self._noise_fn(rows["seeds"])
      _, kept = self._solve(params, frozen, noise, rows, settings, keep=keep)
      images = [
        jax.device_get(self._decode_fn(frozen, kept[i])) for i in range(points)
      ]
      return np.stack(images, axis=1)

    rows = self._rows(prompts, seeds)
    return self._in_batches(one, rows, extra=(points,)), grid[list(keep)]

  def edit(
    self,
    params: Params,
    frozen: Params,
    images: np.ndarray,
    instructions: Sequence[str] | np.ndarray,
    seeds: Sequence[int],
    settings: SampleConfig,
  ) -> np.ndarray:
    """Edits in context: the source's latents stand beside the noisy ones.

    Args:
      params: the DiT's, after an edit stage.
      frozen, seeds, settings: as for `generate`.
      images: uint8 (N, S, S, 3) at the product's size.
      instructions: N strings.

    Returns:
      uint8 (N, S, S, 3).
    """
    rows = self._rows(instructions, seeds, images)

    def one(rows):
      source = self._encode_fn(frozen, rows["images"])
      noise = self._noise_fn(rows["seeds"])
      z, _ = self._solve(params, frozen, noise, rows, settings, source=source)
      return self._decode_fn(frozen, z)

    return self._in_batches(one, rows)

  def vary(
    self,
    params: Params,
    frozen: Params,
    images: np.ndarray,
    prompts: Sequence[str] | np.ndarray,
    strength: float,
    seeds: Sequence[int],
    settings: SampleConfig,
  ) -> np.ndarray:
    """Adds noise to images up to a time, and denoises them under a prompt.

    Args:
      params, frozen, prompts, seeds, settings: as for `generate`.
      images: uint8 (N, S, S, 3) at the product's size.
      strength: the time, in [0, 1]: the grid runs from it to 0 (DESIGN section
        4). 0 is the autoencoder's reconstruction, 1 forgets the image.

    Returns:
      uint8 (N, S, S, 3).
    """
    rows = self._rows(prompts, seeds, images)
    grid = _grid(settings, strength)

    def one(rows):
      z = self._encode_fn(frozen, rows["images"])
      if strength > 0:
        noise = self._noise_fn(rows["seeds"])
        z = self._mix_fn(
          z, noise, self._batches.put_whole(np.float32(strength))
        )
        z, _ = self._solve(params, frozen, z, rows, settings, grid=grid)
      return self._decode_fn(frozen, z)

    return self._in_batches(one, rows)

  def encode(self, frozen: Params, images: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3) → normalised latents, float32 (N, h, w, C)."""

    def one(rows):
      return self._gather_fn(self._encode_fn(frozen, rows["images"]))

    return self._in_batches(one, {"images": np.asarray(images)}, latents=True)

  def decode(self, frozen: Params, latents: np.ndarray) -> np.ndarray:
    """Normalised latents (N, h, w, C) → uint8 (N, S, S, 3)."""
    rows = {"latents": np.asarray(latents, np.float32)}
    return self._in_batches(
      lambda rows: self._decode_fn(frozen, rows["latents"]), rows
    )

  def image_features(self, frozen: Params, images: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3) → `Generator.image_features`, float32 (N, D)."""
    rows = {"images": np.asarray(images)}
    return self._in_batches(
      lambda rows: self._image_features_fn(frozen, rows["images"]), rows
    )

  def text_features(self, frozen: Params, texts: Sequence[str]) -> np.ndarray:
    """N texts → `Generator.text_features`, float32 (N, T)."""
    tokens, mask = self._tokenizer(texts)
    return self._in_batches(
      lambda rows: self._text_features_fn(frozen, rows["tokens"], rows["mask"]),
      {"tokens": tokens, "mask": mask},
    )

  # --- traced ---

  def _trace_image_features(
    self, frozen: Params, images: jax.Array
  ) -> jax.Array:
    return constrain(self.generator.image_features(frozen, images))

  def _trace_text_features(
    self, frozen: Params, tokens: jax.Array, mask: jax.Array
  ) -> jax.Array:
    return constrain(self.generator.text_features(frozen, tokens, mask))

  def _trace_condition(
    self, frozen: Params, rows: dict[str, jax.Array]
  ) -> Condition:
    if "labels" in rows:
      return {"labels": rows["labels"]}
    mask = rows["mask"]
    text = self.generator.encode_text(frozen, rows["tokens"], mask)
    text = jnp.where(mask[..., None], text, 0).astype(jnp.float32)
    return {"text": text, "text_mask": mask}

  def _trace_noise(self, seeds: jax.Array, draw: jax.Array | int = 0):
    """Each seed's own noise: draw 0 to start from, 1 + i for step i."""
    shape = self.generator.latent_shape

    def one(seed):
      rng = jax.random.fold_in(jax.random.key(seed), draw)
      return jax.random.normal(rng, shape, jnp.float32)

    return constrain(jax.vmap(one)(seeds), sharding.BATCH_AXES)

  def _trace_solve(
    self,
    params: Params,
    frozen: Params,
    x: jax.Array,
    seeds: jax.Array,
    *arguments: Any,
    solver: str,
    **static: Any,
  ) -> tuple[jax.Array, jax.Array | None]:
    def noise_fn(step):
      return self._trace_noise(seeds, 1 + step)

    stochastic = solver in samplers.STOCHASTIC
    return guided_flow.solve(
      self.generator,
      params,
      frozen,
      x,
      *arguments,
      solver=solver,
      noise_fn=noise_fn if stochastic else None,
      **static,
    )

  def _trace_encode(self, frozen: Params, images: jax.Array) -> jax.Array:
    return self.generator.encode(frozen, images).astype(jnp.float32)

  def _trace_decode(self, frozen: Params, z: jax.Array) -> jax.Array:
    pixels = self.generator.decode(frozen, z)
    return constrain(to_uint8(pixels.astype(jnp.float32)))

  # --- host side ---

  def _solve(
    self,
    params: Params,
    frozen: Params,
    x: jax.Array,
    rows: dict[str, jax.Array],
    settings: SampleConfig,
    *,
    grid: np.ndarray | None = None,
    source: jax.Array | None = None,
    keep: tuple[int, ...] = (),
  ) -> tuple[jax.Array, jax.Array | None]:
    grid = _grid(settings) if grid is None else grid
    conditions = ("tokens", "mask", "labels")
    given = {name: rows[name] for name in conditions if name in rows}
    return self._solve_fn(
      params,
      frozen,
      x,
      rows["seeds"],
      self._condition_fn(frozen, given),
      source,
      self._batches.put_whole(grid.astype(np.float32)),
      self._batches.put_whole(guided_flow.scales(settings)),
      solver=settings.solver,
      branches=guided_flow.branches(settings, edit=source is not None),
      keep=keep,
    )

  def _rows(
    self,
    prompts: Sequence[str] | np.ndarray,
    seeds: Sequence[int],
    images: np.ndarray | None = None,
  ) -> dict[str, np.ndarray]:
    """Everything with a row an image, as host arrays."""
    seeds = check_seeds(seeds)
    counts = [len(prompts), len(seeds)]
    rows = {"seeds": seeds}
    if images is not None:
      rows["images"] = np.asarray(images)
      counts.append(len(images))
    if len(set(counts)) > 1:
      raise ValueError(
        f"there are {counts[0]} prompts and {counts[1]} seeds"
        + (f" for {counts[2]} images" if images is not None else "")
        + "; each image takes one"
      )
    if self._tokenizer is None:
      rows["labels"] = self._check_labels(prompts)
    else:
      rows["tokens"], rows["mask"] = self._tokenizer(prompts)
    return rows

  def _check_labels(self, labels: Any) -> np.ndarray:
    labels, count = np.asarray(labels), self.generator.config.num_classes
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f"this generator takes class labels, integers in [0, {count}), got "
        f"{labels.ravel().tolist()[0]!r}"
      )
    wrong = labels[(labels < 0) | (labels >= count)] if labels.size else labels
    if wrong.size:
      raise ValueError(f"class labels lie in [0, {count}), got {wrong[0]}")
    return labels.astype(np.int32)

  def _in_batches(
    self,
    function: Callable[[dict[str, jax.Array]], Any],
    rows: dict[str, np.ndarray],
    latents: bool = False,
    extra: tuple[int, ...] = (),
  ) -> np.ndarray:
    """`RowBatches.apply`, also to no rows at all.

    Args:
      function: named device arrays (size, …) → array (size, …).
      rows: named host arrays (N, …).
      latents: whether latents come out, and not images (for N = 0).
      extra: axes of the result between the first and the image's.
    """
    if len(next(iter(rows.values()))):
      return self._batches.apply(function, rows)
    side = self.generator.autoencoder.config.output_size
    shape = self.generator.latent_shape if latents else (side, side, 3)
    return np.zeros((0, *extra, *shape), np.float32 if latents else np.uint8)


def _grid(settings: SampleConfig, start: float = 1.0) -> np.ndarray:
  return samplers.time_grid(
    settings.grid, settings.steps, settings.shift, start
  )


def check_seeds(seeds: Sequence[int]) -> np.ndarray:
  """Seeds as uint32 (N,).

  Raises:
    ValueError: not integers in [0, 2³²).
  """
  seeds = np.asarray(seeds)
  if not seeds.size:
    return np.zeros((0,), np.uint32)
  if seeds.ndim != 1 or not np.issubdtype(seeds.dtype, np.integer):
    raise ValueError(f"seeds must be a list of integers, got {seeds!r}")
  if seeds.min() < 0 or seeds.max() >= _MAX_SEED:
    wrong = seeds[(seeds < 0) | (seeds >= _MAX_SEED)][0]
    raise ValueError(f"a seed lies in [0, 2^32), got {wrong}")
  return seeds.astype(np.uint32)
