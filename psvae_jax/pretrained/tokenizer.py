"""Captions to token ids: published tokenizers, and one trained here."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from psvae_jax.pretrained import files

# What a tokenizer is read from. One of the first three holds a vocabulary.
TOKENIZER_FILES = (
  "tokenizer.json",
  "spiece.model",
  "vocab.json",
  "merges.txt",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
)
# T5's own ids, so that its conventions hold for tokenizers trained here.
PAD, END, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Captions to token ids of one fixed length.

  Small and picklable: the vocabulary is read on first use, in whichever
  process that happens, so data workers can be handed one.

  Attributes:
    folder: local folder with the tokenizer's files.
    max_length: tokens per caption, padding and end-of-sequence included.
  """

  folder: str
  max_length: int

  def __post_init__(self):
    if self.max_length < 1:
      raise ValueError(f"max_length must be positive, got {self.max_length}")
    paths = [pathlib.Path(self.folder, name) for name in TOKENIZER_FILES[:3]]
    if not any(path.is_file() for path in paths):
      raise FileNotFoundError(
        f"{self.folder} has neither tokenizer.json nor spiece.model nor "
        "vocab.json; give a folder that holds a tokenizer"
      )

  def __reduce__(self):
    return Tokenizer, (self.folder, self.max_length)

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes captions; longer ones are cut, end-of-sequence kept.

    Args:
      captions: B strings.

    Returns:
      tokens (B, max_length) int32 and mask (B, max_length) bool, True where a
      token is not padding.

    Raises:
      ValueError: `captions` is one string, or an element is not valid text.
    """
    captions = _check_captions(captions)
    if not captions:
      shape = (0, self.max_length)
      return np.zeros(shape, np.int32), np.zeros(shape, bool)
    return self._encode(self._backend, captions)

  def __len__(self) -> int:
    """Number of token ids, special ones included."""
    return len(self._backend)

  def decode(self, tokens: np.ndarray) -> list[str]:
    """(B, L) token ids → B strings, without special tokens."""
    return self._backend.batch_decode(
      np.asarray(tokens).tolist(),
      skip_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )

  @property
  def fingerprint(self) -> str:
    """Hex SHA-256 over the tokenizer's files."""
    digest = hashlib.sha256()
    for path in self.paths():
      content = path.read_bytes()
      digest.update(f"{path.name}\n{len(content)}\n".encode())
      digest.update(content)
    return digest.hexdigest()

  def paths(self) -> list[pathlib.Path]:
    """The tokenizer's files."""
    paths = [pathlib.Path(self.folder, name) for name in TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]

  def _encode(self, backend: Any, captions: list[str]):
    batch = backend(
      captions,
      padding="max_length",
      truncation=True,
      max_length=self.max_length,
      return_tensors="np",
    )
    mask = batch["attention_mask"].astype(bool)
    return batch["input_ids"].astype(np.int32), mask

  @functools.cached_property
  def _backend(self) -> Any:
    import transformers  # slow, and not needed by those who bring tokens

    try:
      backend = transformers.AutoTokenizer.from_pretrained(
        self.folder, local_files_only=True
      )
    except Exception as error:  # the library has no common error class
      said = " ".join(str(error).split())[:500]
      raise ValueError(
        f"the tokenizer in {self.folder} cannot be read ({said})"
      ) from error
    if backend.pad_token_id is None:
      raise ValueError(f"the tokenizer in {self.folder} has no padding token")
    # This first call also fixes the backend's padding and truncation, which
    # must not change while other threads use it.
    _, mask = self._encode(backend, [""])
    if not mask.any():
      raise ValueError(
        f"the tokenizer in {self.folder} encodes the empty caption as nothing; "
        "it must append an end-of-sequence token"
      )
    return backend


def _check_captions(captions: Sequence[str]) -> list[str]:
  if isinstance(captions, str):
    raise ValueError("captions must be a list of strings, not one string")
  captions = list(captions)
  for index, caption in enumerate(captions):
    if not isinstance(caption, str):
      raise ValueError(f"caption {index} is not a string: {caption!r}")
    try:
      caption.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"caption {index} is not valid Unicode ({error}): {caption!r}"
      ) from error
  return captions


def train_tokenizer(
  texts: Iterable[str], folder: str | os.PathLike, vocab_size: int = 1024
) -> int:
  """Trains a byte-level BPE that `Tokenizer` and `AutoTokenizer` read.

  Any text can be encoded, and decodes to exactly itself. Ids 0, 1 and 2 are
  padding, end of sequence (always appended) and unknown (never produced).

  Args:
    texts: the text to learn merges from.
    folder: created if need be; tokenizer files in it are replaced.
    vocab_size: largest number of token ids; little text yields fewer.

  Returns:
    The number of token ids, which `T5Config.vocab_size` must reach.

  Raises:
    ValueError: `vocab_size` has no room for 256 bytes and 3 special tokens,
      or `texts` is one string.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  if vocab_size < _BYTES + len(SPECIAL_TOKENS):
    raise ValueError(
      f"vocab_size {vocab_size} is too small: {_BYTES} bytes and "
      f"{len(SPECIAL_TOKENS)} special tokens are always there"
    )
  texts = _check_captions(texts)
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {END}",
    pair=f"$A {END} $B {END}",
    special_tokens=[(END, tokenizer.token_to_id(END))],
  )

  names = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(
    folder / "tokenizer.json", json.loads(tokenizer.to_str(pretty=False))
  )
  files.write_json(folder / "special_tokens_map.json", names)
  files.write_json(
    folder / "tokenizer_config.json",
    {
      **names,
      "clean_up_tokenization_spaces": False,
      "model_input_names": ["input_ids", "attention_mask"],
      # A caption that happens to contain "</s>" is text like any other.
      "split_special_tokens": True,
      "tokenizer_class": "PreTrainedTokenizerFast",
    },
  )
  return tokenizer.get_vocab_size()


# eq=False: arrays have no plain equality; compare fingerprints.
