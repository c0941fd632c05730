"""Captions to CLIP's tokens: cut to what the model takes, with a warning."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from psvae_jax.models import clip_text
from psvae_jax.pretrained import files
from psvae_jax.pretrained.tokenizer import TOKENIZER_FILES, Tokenizer


def load_tokenizer(
  name_or_path: str | os.PathLike | None,
  folder: pathlib.Path | None,
  config: clip_text.ClipTextConfig,
) -> Tokenizer | None:
  """The tokenizer of a text encoder, with room to see what is too long.

  Args:
    name_or_path: its folder or hub id; None is `folder`.
    folder: the model's; None where there is none.
    config: the model's.

  Returns:
    A tokenizer of one token more than the model takes; None without a folder.

  Raises:
    FileNotFoundError: there is no tokenizer.
    ValueError: it does not belong to the model.
  """
  if name_or_path is not None:
    folder = files.resolve_folder(name_or_path, TOKENIZER_FILES)
  if folder is None:
    return None
  where = os.fspath(folder.resolve())
  tokenizer = Tokenizer(where, config.max_position_embeddings + 1)
  if len(tokenizer) > config.vocab_size:
    raise ValueError(
      f"the tokenizer in {folder} has {len(tokenizer)} token ids, but the "
      f"model's vocab_size is {config.vocab_size}; they belong to different "
      "models"
    )
  tokens, _ = tokenizer([""])
  end = config.eos_token_id
  if end != clip_text.LEGACY_END and end not in tokens:
    raise ValueError(
      f"the tokenizer in {folder} does not end a caption with the model's "
      f"eos_token_id {end}; they belong to different models"
    )
  return tokenizer


def tokenize(
  tokenizer: Tokenizer | None, captions: Sequence[str], name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Captions to token ids; those too long are cut, with a warning.

  What is cut keeps its end-of-text token, as transformers and OpenAI's own
  code do when asked to truncate.

  Args:
    tokenizer: as `load_tokenizer` gives it.
    captions: B strings.
    name: the model's, for the error without a tokenizer.

  Returns:
    tokens (B, L) int32 and mask (B, L) bool, True where not padding.

  Raises:
    ValueError: there is no tokenizer, or a caption is not valid text.
  """
  if tokenizer is None:
    raise ValueError(
      f"{name} has no tokenizer; load it with tokenizer=FOLDER to embed "
      "captions"
    )
  tokens, mask = tokenizer(captions)
  long = mask.all(axis=1)
  if long.any():
    logging.warning(
      "%d of %d captions are longer than %d tokens and were cut; the first: %r",
      long.sum(),
      len(long),
      tokenizer.max_length - 1,
      captions[int(long.argmax())],
    )
    tokens[long, -2] = tokens[long, -1]
  return tokens[:, :-1], mask[:, :-1]
