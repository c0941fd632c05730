"""From a random-access source to batches, for training and for evaluation.

The order contract, the same for any number of hosts:

* Training: source → shuffle → repeat → augment gives one stream of examples,
  fixed by (source, seed). Global batch k is elements [k·B, (k+1)·B) of the
  stream, and host h of H holds the h-th of H equal blocks of it. So the hosts'
  batches, concatenated in host order, are the same arrays for every H.
* Evaluation: the same with the source's own order in place of the stream, and
  padding after the last example.

The cut into hosts comes after the augmentation, whose randomness depends on
the place in the stream: a host cannot change what an example looks like. It
follows that a training iterator's state is one number, batches taken, which
holds for any number of hosts (not for another batch size or seed).

Examples may also come with latents in place of images (`cached.CachedSource`),
and a batch may have several parts, each with its own source.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from psvae_jax.data import transforms, views

Batch = dict[str, Any]
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]

PADDING_INDEX = -1


class Source(Protocol):
  """Random access to elements with "image" and, if there are any, "caption".

  "image" is uint8 (H, W, 3), and so is the "source" of an edit.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Part:
  """One source of the batches of `joint_train_iterator`.

  Attributes:
    source: the examples.
    batch_size: of them in a global batch, over all hosts.
    image_size, augment, min_scale, transform: see `train_iterator`.
  """

  source: Source
  batch_size: int
  image_size: int | None = None
  augment: str = "none"
  min_scale: float = 0.5
  transform: transforms.Transform | None = None


def train_iterator(
  source: Source,
  *,
  image_size: int | None = None,
  batch_size: int,
  seed: int,
  augment: str = "none",
  min_scale: float = 0.5,
  num_threads: int = 2,
  prefetch: int = 4,
  process_index: int = 0,
  process_count: int = 1,
  tokenize: Tokenize | None = None,
  transform: transforms.Transform | None = None,
) -> grain.DatasetIterator:
  """Endless shuffled batches; every epoch is a new permutation.

  The iterator has `get_state` and `set_state`, and goes into Orbax through
  `grain.checkpoint.CheckpointSave` and `CheckpointRestore`. Epochs run into
  each other: a batch may hold the end of one and the start of the next, so a
  source may also be smaller than a batch.

  Args:
    source: the examples.
    image_size: height and width of the batch's images, pixels; None takes the
      elements as they are, for a source without images.
    batch_size: examples per global batch, over all hosts.
    seed: decides order and augmentation; 0 ≤ seed < 2**32.
    augment: see `transforms.make_augment`. An edit's "source" gets the same
      crop as its "image".
    min_scale: see `transforms.random_crop`.
    num_threads: threads that prepare whole batches; 0 does it in the caller.
    prefetch: batches prepared ahead.
    process_index: this host's number.
    process_count: number of hosts; divides `batch_size`.
    tokenize: n captions → int32 tokens (n, L) and bool mask (n, L). Elements
      that hold "tokens" already keep them.
    transform: further per-example (element, rng) → element, run after the
      augmentation with randomness of its own. Number and array entries that
      it adds are batched.

  Returns:
    Iterator over this host's batches: "image" uint8 (b, S, S, 3), "index"
    int64 (b,), for edits "source" as "image", with `tokenize` "tokens" int32
    and "token_mask" bool (b, L), further numbers and arrays of the elements,
    and what `transform` added; b = batch_size / process_count. Text is
    dropped.

  Raises:
    ValueError: a bad setting; at `next`, an image of another size with
      augment="none", a broken one in a source that is not guarded, or more
      broken ones than a guarded source may have.
  """
  part = Part(source, batch_size, image_size, augment, min_scale, transform)
  batches = _train_batches(part, seed, process_index, process_count, tokenize)
  return _iterate(batches, num_threads, prefetch)


def joint_train_iterator(
  parts: Mapping[str, Part],
  *,
  seed: int,
  num_threads: int = 2,
  prefetch: int = 4,
  process_index: int = 0,
  process_count: int = 1,
  tokenize: Tokenize | None = None,
) -> grain.DatasetIterator:
  """Batches of several parts: {name: a batch of `train_iterator`}.

  Each part is, by itself, what `train_iterator` gives for its source with the
  same settings: its size is fixed, and it has its own epochs. The arguments
  and the iterator's state are `train_iterator`'s too.

  Raises:
    ValueError: no parts, or as `train_iterator`; names the part.
  """
  if not parts:
    raise ValueError("A joint batch needs at least one part.")
  batches = {}
  for name, part in parts.items():
    try:
      batches[name] = _train_batches(
        part, seed, process_index, process_count, tokenize
      )
    except ValueError as error:
      raise ValueError(f"Part {name!r}: {error}") from error
  return _iterate(
    grain.MapDataset.source(_JointBatches(batches)), num_threads, prefetch
  )


def _train_batches(
  part: Part,
  seed: int,
  process_index: int,
  process_count: int,
  tokenize: Tokenize | None,
) -> grain.MapDataset:
  """This host's training batches, by number."""
  local_size = _local_batch_size(part.batch_size, process_index, process_count)
  if not len(part.source):
    raise ValueError(f"{part.source!r} has no examples to train on.")
  if not 0 <= seed < 2**32:
    raise ValueError(f"The data seed must lie in [0, 2**32), not {seed}.")
  if part.image_size is None and part.transform is None:
    read_batch = getattr(part.source, "read_batch", None)
  else:
    read_batch = None
  # The order depends on the length alone, so indices have the elements'.
  stream = (
    grain.MapDataset.source(part.source)
    if read_batch is None
    else grain.MapDataset.range(len(part.source))
  )
  stream = stream.seed(seed).shuffle().repeat()
  if part.image_size is not None:
    augment = transforms.make_augment(
      part.augment, size=part.image_size, min_scale=part.min_scale
    )
    stream = stream.random_map(views.paired(augment))
  elif part.augment != "none":
    raise ValueError(
      f'augment="{part.augment}" needs images of a size; elements that are '
      "taken as they are cannot be augmented."
    )
  if part.transform is not None:
    stream = stream.random_map(part.transform)
  return grain.MapDataset.source(
    _HostBatches(
      stream,
      local_size,
      process_index,
      process_count,
      read_batch or (lambda elements: _stack(elements, tokenize)),
    )
  )


def _iterate(
  batches: grain.MapDataset, num_threads: int, prefetch: int
) -> grain.DatasetIterator:
  """Batches in order, prepared ahead by threads."""
  if num_threads < 0 or prefetch < 1:
    raise ValueError(
      "num_threads must be at least 0 and prefetch at least 1, not "
      f"{num_threads} and {prefetch}."
    )
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=prefetch
  )
  return iter(batches.to_iter_dataset(options))


def eval_batches(
  source: Source,
  *,
  image_size: int,
  batch_size: int,
  num_examples: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  prefetch: int = 4,
  captions: bool = False,
) -> Iterator[Batch]:
  """One pass over the first `num_examples` examples, centre-cropped.

  Every host yields the same number of batches of the same shape; the rows
  after the last example are padding, and so is the row of a bad record of a
  `guarded.GuardedSource`: no image counts twice.

  Args:
    source: the examples.
    image_size: height and width of the batch's images, pixels.
    batch_size: rows per global batch, over all hosts.
    num_examples: how many; all of the source by default.
    process_index: this host's number.
    process_count: number of hosts; divides `batch_size`.
    num_threads: threads that prepare whole batches; 0 does it in the caller.
    prefetch: batches prepared ahead.
    captions: also give "caption", a list of b strings ("" in padding).

  Returns:
    Iterator over this host's batches: "image" uint8 (b, S, S, 3), "index"
    int64 (b,), "mask" bool (b,), False in padding, where the image is black
    and the index −1; b = batch_size / process_count.

  Raises:
    ValueError: a bad setting, or `num_examples` beyond the source.
  """
  local_size = _local_batch_size(batch_size, process_index, process_count)
  if num_examples is None:
    num_examples = len(source)
  if not 0 < num_examples <= len(source):
    raise ValueError(
      f"Cannot evaluate {num_examples} examples of {source!r}, which has "
      f"{len(source)}."
    )
  if image_size < 1:
    raise ValueError(f"The image size must be at least 1, not {image_size}.")
  crop = transforms.center_crop(image_size)
  padding = {
    "image": np.zeros((image_size, image_size, 3), np.uint8),
    "index": np.int64(PADDING_INDEX),
    "mask": np.bool_(False),
    "caption": "",
  }
  padded = _PaddedSource(source, crop, num_examples, batch_size, padding)
  batches = _HostBatches(
    padded,
    local_size,
    process_index,
    process_count,
    lambda elements: _stack_eval(elements, captions),
  )
  return _iterate(grain.MapDataset.source(batches), num_threads, prefetch)


class _JointBatches:
  """Batch k of every part, under the parts' names."""

  def __init__(self, parts: Mapping[str, grain.MapDataset]):
    self._parts = dict(parts)

  def __len__(self) -> int:
    return min(len(part) for part in self._parts.values())

  def __getitem__(self, index: int) -> dict[str, Batch]:
    return {name: part[index] for name, part in self._parts.items()}

  def __repr__(self) -> str:
    return f"_JointBatches({self._parts!r})"


class _HostBatches:
  """One host's batches of a global stream: its block of every global batch.

  A strided slice, stream[h::H], would give each host a share of the same
  batches, but their concatenation would depend on H.
  """

  def __init__(
    self,
    stream: Source,
    local_size: int,
    process_index: int,
    process_count: int,
    stack: Callable[[Sequence[Any]], Batch],
  ):
    self._stream, self._stack = stream, stack
    self._local_size = local_size
    self._process_index, self._process_count = process_index, process_count

  def __len__(self) -> int:
    return len(self._stream) // (self._local_size * self._process_count)

  def __getitem__(self, index: int) -> Batch:
    block = index * self._process_count + self._process_index
    start = block * self._local_size
    return self._stack(
      [self._stream[i] for i in range(start, start + self._local_size)]
    )

  def __repr__(self) -> str:
    return (
      f"_HostBatches({self._stream!r}, {self._local_size}, "
      f"{self._process_index}, {self._process_count})"
    )


class _PaddedSource:
  """The first examples of a source, cropped, then padding to whole batches."""

  def __init__(
    self,
    source: Source,
    crop: transforms.Transform,
    num_examples: int,
    batch_size: int,
    padding: dict[str, Any],
  ):
    # None in place of a bad record, where the source can tell.
    self._read = getattr(source, "read", source.__getitem__)
    self._source, self._crop = source, crop
    self._num_examples, self._padding = num_examples, padding
    self._length = -(-num_examples // batch_size) * batch_size

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    if index >= self._num_examples:
      return self._padding
    element = self._read(index)
    if element is None:
      return self._padding
    element = self._crop(element, None)
    return {
      "image": element["image"],
      "index": np.int64(index),
      "mask": np.bool_(True),
      "caption": element.get("caption", ""),
    }

  def __repr__(self) -> str:
    return f"_PaddedSource({self._source!r}, {self._num_examples})"


def _local_batch_size(
  batch_size: int, process_index: int, process_count: int
) -> int:
  """Checks the split over hosts; returns the examples per host."""
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index {process_index} is not below process_count "
      f"{process_count}."
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"The global batch size {batch_size} does not divide over "
      f"{process_count} hosts; choose a multiple of {process_count}."
    )
  return batch_size // process_count


def _stack(
  elements: Sequence[dict[str, Any]], tokenize: Tokenize | None
) -> Batch:
  """Elements → batch: numbers and arrays stacked, captions tokenized."""
  batch = {
    name: np.stack([element[name] for element in elements])
    for name, value in elements[0].items()
    if not isinstance(value, str)
  }
  if tokenize is not None and "tokens" not in batch:
    captions = [element["caption"] for element in elements]
    batch["tokens"], batch["token_mask"] = tokenize(captions)
  return batch


def _stack_eval(elements: Sequence[dict[str, Any]], captions: bool) -> Batch:
  batch = _stack(elements, None)
  if captions:
    batch["caption"] = [element["caption"] for element in elements]
  return batch
