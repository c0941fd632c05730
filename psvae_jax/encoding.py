"""Examples → latents and text, batch by batch, outside of training."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.data import views

EncodeImages = Callable[[np.ndarray], Any]
EncodeText = Callable[[Sequence[str]], tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Encoders:
  """What turns examples into latents and text, and what it is called.

  The functions get whole batches of one size, padded with black images and
  empty texts. On several hosts each calls them by itself, not equally often:
  they must not communicate.

  Attributes:
    images: uint8 (B, S, S, 3) → (B, h, w, C), the posterior mean; a JAX array
      may still be under way.
    autoencoder: `latent_fingerprint` of what `images` uses.
    text: B strings → int32 tokens (B, L), bool mask (B, L), and features
      (B, L, D) or None; None leaves text out.
    tokenizer: fingerprint of what makes the tokens; "" without `text`.
    text_length: L; 0 without `text`.
    text_encoder: fingerprint of what makes the features; "" if `text` gives
      none.
  """

  images: EncodeImages
  autoencoder: str
  text: EncodeText | None = None
  tokenizer: str = ""
  text_length: int = 0
  text_encoder: str = ""


def encoded_batches(
  source: views.ViewedSource,
  places: Sequence[range],
  encoders: Encoders,
  batch_size: int,
  *,
  dtype: str,
  only_images: bool = False,
  num_threads: int = 2,
  prefetch: int = 4,
) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
  """Encodes some of a source's elements.

  A batch is fetched from the device after the next one has been started.

  Args:
    source: the examples.
    places: which elements make a batch; at most `batch_size`.
    encoders: what to encode them with.
    batch_size: what batches are padded to.
    dtype: what latents and text features are rounded to.
    only_images: leave out text and the images that edits are made from.
    num_threads: threads that prepare batches; 0 does it in the caller.
    prefetch: batches prepared ahead.

  Yields:
    The places, and "latent" (n, h, w, C), for edits "source_latent"; "tokens",
    "token_mask" (n, L) and "text" (n, L, D), 0 at padding, as far as the
    encoders give them; "index", and other numbers that the examples have.

  Raises:
    ValueError: latents or text features that are not finite or too large for
      `dtype`; text that is not what `encoders` says, or is missing.
  """
  if not places:
    return
  batches = _Batches(source, places, batch_size, only_images)
  if only_images:
    encoders = dataclasses.replace(encoders, text=None)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=prefetch
  )
  previous = None
  loaded = grain.MapDataset.source(batches).to_iter_dataset(options)
  for which, batch in zip(places, loaded, strict=True):
    started = which, _start(batch, encoders)
    if previous is not None:
      yield _finish(*previous, dtype)
    previous = started
  yield _finish(*previous, dtype)


class _Batches:
  """Padded batches of examples: a grain source."""

  def __init__(
    self,
    source: views.ViewedSource,
    places: Sequence[range],
    batch_size: int,
    only_images: bool,
  ) -> None:
    self._source, self._places, self._batch_size = source, places, batch_size
    self._drop = ("caption", "source") if only_images else ()

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> dict[str, Any]:
    elements = [self._source[i] for i in self._places[index]]
    spare = self._batch_size - len(elements)
    batch: dict[str, Any] = {}
    for name, value in elements[0].items():
      values = [element[name] for element in elements]
      if name in self._drop:
        continue
      if name == "caption":
        batch[name] = values + [""] * spare
      elif name in views.IMAGES:
        padding = [(0, spare)] + [(0, 0)] * 3
        batch[name] = np.pad(np.stack(values), padding)
      elif not isinstance(value, str):
        batch[name] = np.stack(values)
    return batch

  def __repr__(self) -> str:
    return f"_Batches({self._source!r})"


def _start(batch: dict[str, Any], encoders: Encoders) -> dict[str, Any]:
  """Latents and text in place of images and captions, perhaps under way."""
  captions = batch.pop("caption", None)
  batch["latent"] = encoders.images(batch.pop("image"))
  if "source" in batch:
    batch["source_latent"] = encoders.images(batch.pop("source"))
  if encoders.text is None:
    return batch
  if captions is None:
    raise ValueError("the examples have no captions to encode as text")
  tokens, mask, features = encoders.text(captions)
  if tokens.shape[1] != encoders.text_length:
    raise ValueError(
      f"texts have {tokens.shape[1]} tokens, text_length is "
      f"{encoders.text_length}"
    )
  if (features is not None) != bool(encoders.text_encoder):
    raise ValueError(
      "text features and the name of their encoder come together or not at all"
    )
  batch |= {"tokens": tokens, "token_mask": mask}
  return batch if features is None else {**batch, "text": features}


def _finish(
  places: range, batch: dict[str, Any], dtype: str
) -> tuple[range, dict[str, np.ndarray]]:
  """On the host, rounded, without the rows that were padding."""
  batch = {
    name: np.asarray(jax.device_get(value))[: len(places)]
    for name, value in batch.items()
  }
  index = batch["index"]
  for name in ("latent", "source_latent"):
    if name in batch:
      batch[name] = _rounded(batch[name], dtype, index, "latents")
  if "text" in batch:
    # Whatever the encoder gives for padding must not matter.
    text = np.where(batch["token_mask"][..., None], batch["text"], 0)
    batch["text"] = _rounded(text, dtype, index, "text features")
  return places, batch


def _rounded(
  values: np.ndarray, dtype: str, index: np.ndarray, what: str
) -> np.ndarray:
  """`values` (n, …) in `dtype`; an error names the first bad example."""
  values = np.asarray(values, np.float32)
  with np.errstate(over="ignore"):
    rounded = values.astype(jnp.dtype(dtype))
  for array, why in (
    (values, "the encoder gives NaN or infinity for it"),
    (rounded, f'too large for {dtype}; set cache.dtype to "bfloat16"'),
  ):
    axes = tuple(range(1, array.ndim))
    bad = ~np.isfinite(array.astype(np.float32)).all(axis=axes)
    if bad.any():
      raise ValueError(
        f"the {what} of example {int(index[bad.argmax()])} are not finite: "
        + why
      )
  return rounded
