"""The same figures by the packages that a network's weights were published for.

torch, transformers and diffusers are no requirement of this package; here, and
only here, they are run beside it, where they are installed.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from psvae_jax import autoencoders, torchvision_import
from psvae_jax.evaluators.image_metrics import to_uint8
from psvae_jax.pretrained import files
from psvae_jax.pretrained.encoder import save_encoder
from psvae_jax.pretrained.untrained import RANDOM
from psvae_jax.verification.inputs import TEXTS, TOKENS
from psvae_jax.verification.subjects import Subject, of_texts


def run(subject: Subject) -> dict[str, np.ndarray]:
  """The outputs of the same network by the package it comes from.

  Args:
    subject: what `subjects.load` returned.

  Returns:
    Output's name → array, of those outputs that the package has too.

  Raises:
    ValueError: no such package is known for this kind of network, or it is not
      installed, or the package itself refuses the files.
  """
  if subject.kind not in _REFERENCES:
    raise ValueError(
      f"--reference knows no other program for {subject.kind!r}, only for "
      f"{', '.join(_REFERENCES)}; compare with --against=FILE"
    )
  try:
    torchvision_import.repair()
    import torch
    import transformers
  except ImportError as error:
    raise ValueError(
      f"--reference needs torch and transformers ({error}): pip install torch "
      "transformers"
    ) from error
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  try:
    with torch.no_grad():
      return _REFERENCES[subject.kind](subject)
  except (ValueError, OSError):
    raise
  except Exception as error:  # of another program, about its installation
    raise ValueError(
      f"--reference: the other program failed: {type(error).__name__}: {error}"
    ) from error


def distances(
  found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """How far outputs are from the reference's.

  Returns:
    Output's name → largest difference, as a share of the largest number; of
    images in levels the mean difference, since two programs may round one
    number up and down. NaN where either has one, infinity where shapes differ.
  """
  out = {}
  for name, theirs in wanted.items():
    ours = found[name]
    if ours.shape != theirs.shape:
      out[name] = float("inf")
      continue
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    reduce = np.mean if np.issubdtype(ours.dtype, np.integer) else np.max
    largest = np.abs(theirs.astype(np.float64)).max()
    out[name] = float(reduce(difference) / largest)
  return out


@contextlib.contextmanager
def _folder(subject: Subject) -> Iterator[str]:
  """Where the reference finds the weights; random ones are written first."""
  if not subject.name.startswith(RANDOM):
    yield subject.name
    return
  with tempfile.TemporaryDirectory() as folder:
    encoder = subject.network
    save_encoder(
      folder,
      encoder.module.config,
      encoder.params,
      encoder.mean,
      encoder.std,
    )
    yield folder


def _pixels(subject: Subject, mean: Any, std: Any) -> Any:
  """The pictures as torch models take them: (N, 3, S, S) float32."""
  import torch

  unit = subject.inputs.pictures.astype(np.float64) / 255.0
  pixels = (unit - np.array(mean)) / np.array(std)
  return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)


def _encoder(subject: Subject) -> dict[str, np.ndarray]:
  import torch
  import transformers

  encoder = subject.network
  pixels = _pixels(subject, encoder.mean, encoder.std)
  with _folder(subject) as folder:
    model = transformers.AutoModel.from_pretrained(folder).eval()
  model = getattr(model, "vision_model", model)
  options = {}
  height, width = (side // encoder.patch_size for side in pixels.shape[-2:])
  if model.config.model_type == "vit_mae":
    # All patches, in their own order; see `pretrained.vit_mae`.
    model.config.mask_ratio = 0.0
    order = torch.arange(height * width, dtype=torch.float32)
    options["noise"] = order.expand(len(pixels), -1)
  elif (height, width) != (encoder.module.config.grid,) * 2:
    parameters = type(model).forward.__code__.co_varnames
    if "interpolate_pos_encoding" in parameters:
      options["interpolate_pos_encoding"] = True
  tokens = model(pixels, **options).last_hidden_state
  # Patches come last, after CLS and registers where there are any.
  tokens = tokens[:, -height * width :]
  norm = getattr(model, "post_layernorm", None)
  if model.config.model_type == "clip_vision_model" and norm is not None:
    tokens = norm(tokens)  # transformers norms the pooled token alone
  shape = len(pixels), height, width, -1
  return {"features": tokens.reshape(shape).numpy()}


def _text(subject: Subject) -> dict[str, np.ndarray]:
  import transformers

  model = transformers.T5EncoderModel.from_pretrained(subject.name).eval()
  given = _tokenize(subject, TOKENS)
  return _features_of_texts(model(**given), given)


def _tokenize(subject: Subject, length: int) -> dict[str, Any]:
  """Ids and mask of `TEXTS`, both (B, length)."""
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(subject.name)
  given = tokenizer(
    list(TEXTS),
    padding="max_length",
    truncation=True,
    max_length=length,
    return_tensors="pt",
  )
  return {name: given[name] for name in ("input_ids", "attention_mask")}


def _features_of_texts(out: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  mask = given["attention_mask"].numpy().astype(bool)
  return of_texts(out.last_hidden_state.numpy(), mask)


def _clip(subject: Subject) -> dict[str, np.ndarray]:
  import transformers

  if subject.name.startswith(RANDOM):
    raise ValueError("--reference needs a folder or an id of CLIP")
  model = transformers.CLIPModel.from_pretrained(subject.name).eval()
  processor = transformers.AutoProcessor.from_pretrained(subject.name)
  constants = processor.image_processor
  pixels = _pixels(subject, constants.image_mean, constants.image_std)
  texts = processor.tokenizer(
    list(subject.inputs.texts),
    padding=True,
    truncation=True,
    max_length=model.config.text_config.max_position_embeddings,
    return_tensors="pt",
  )
  out = model(pixel_values=pixels, **texts)
  return {
    "image_embeds": out.image_embeds.numpy(),
    "text_embeds": out.text_embeds.numpy(),
  }


def _clip_text(subject: Subject) -> dict[str, np.ndarray]:
  import torch
  import transformers

  projected = subject.network.module.config.projection_dim is not None
  kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
  model = getattr(transformers, kind).from_pretrained(
    subject.name, dtype=torch.float32
  )
  given = _tokenize(subject, subject.network.max_length)
  out = model.eval()(**given)
  embeds = out.text_embeds if projected else out.pooler_output
  return {"text_embeds": embeds.numpy(), **_features_of_texts(out, given)}


def _qwen2(subject: Subject) -> dict[str, np.ndarray]:
  import torch
  import transformers

  if subject.name.startswith(RANDOM):
    raise ValueError("--reference needs a folder or an id of Qwen2.5")
  # Published in bfloat16, in which transformers would compute.
  model = transformers.Qwen2Model.from_pretrained(
    subject.name, dtype=torch.float32
  )
  ids = torch.from_numpy(subject.inputs.tokens).long()
  return {"features": model.eval()(input_ids=ids).last_hidden_state.numpy()}


def _autoencoder(subject: Subject) -> dict[str, np.ndarray]:
  folder = None
  if not subject.name.startswith(RANDOM):
    folder = autoencoders.find_folder(subject.name)
  kind = folder and files.read_config(folder).get("_class_name")
  if kind != "AutoencoderKL":
    raise ValueError(
      f"--reference runs diffusers' AutoencoderKL alone; {subject.name} is none"
    )
  try:
    import diffusers
  except ImportError as error:
    raise ValueError(
      f"--reference needs diffusers ({error}): pip install diffusers"
    ) from error
  model = diffusers.AutoencoderKL.from_pretrained(folder).eval()
  z = model.encode(_pixels(subject, 0.5, 0.5)).latent_dist.mean
  images = model.decode(z).sample.permute(0, 2, 3, 1).numpy()
  return {
    "latents": z.permute(0, 2, 3, 1).numpy(),
    "reconstructions": np.asarray(to_uint8(images)),
  }


_REFERENCES: dict[str, Callable[[Subject], dict[str, np.ndarray]]] = {
  "encoder": _encoder,
  "text": _text,
  "clip": _clip,
  "clip_text": _clip_text,
  "qwen2": _qwen2,
  "autoencoder": _autoencoder,
}
