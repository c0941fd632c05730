"""Exported folders: a trained autoencoder or generator in plain files.

    config.json                      kind, sizes, identity, where it comes from
    encoder/model.safetensors        one folder a module; keys are the paths of
    pixel_decoder/model.safetensors  its parameters, "/"-separated
    …
    autoencoder/, text_encoder/      of a generator that brings its own

A folder appears when it is complete. Loading is strict: a missing, extra or
mis-shaped tensor is an error that names it. The miniature that comes with the
package is two such folders, known by the name "embedded".
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from psvae_jax.config import (
  STAGES,
  AutoencoderModel,
  ComputeConfig,
  ConfigError,
)
from psvae_jax.config import parser as config_parser
from psvae_jax.models import autoencoder as model_lib
from psvae_jax.models.vit import ViT
from psvae_jax.pretrained import architectures, files
from psvae_jax.writers import encode_json

FORMAT = "psvae_jax"
VERSION = 1
EMBEDDED = "embedded"
DTYPES = ("float32", "bfloat16")

_ASSETS = Path(__file__).parent / "assets"
_KINDS = ("autoencoder", "generator")
_CONFIG = "config.json"


def resolve(path: str | os.PathLike, kind: str) -> Path:
  """A user's path as a folder; "embedded" is the package's own.

  Args:
    path: what the user gave.
    kind: "autoencoder" or "generator".

  Raises:
    FileNotFoundError: this installation has no embedded one.
  """
  if os.fspath(path) != EMBEDDED:
    return Path(path).expanduser()
  folder = _ASSETS / kind
  if not (folder / _CONFIG).is_file():
    raise FileNotFoundError(
      f"this installation has no embedded {kind}: {folder} is missing; give "
      "the --workdir of a training job, or an exported folder"
    )
  return folder


def is_exported(folder: str | os.PathLike) -> bool:
  """Whether a folder's config.json says that it was exported."""
  try:
    return "format" in files.read_json(Path(folder) / _CONFIG)
  except (OSError, ValueError):
    return False


def read_config(folder: Path) -> dict[str, Any]:
  """The config.json of an exported folder, its frame checked.

  Raises:
    FileNotFoundError: there is none.
    ValueError: of another format, version or kind, or damaged.
  """
  path = Path(folder) / _CONFIG
  raw = files.read_json(path)
  if raw.get("format") != FORMAT:
    raise ValueError(f"{path}: format is {raw.get('format')!r}, not {FORMAT!r}")
  if raw.get("format_version") != VERSION:
    raise ValueError(
      f"{path}: format_version is {raw.get('format_version')!r}, this "
      f"psvae_jax reads {VERSION}; install the version that wrote it"
    )
  if raw.get("kind") not in _KINDS:
    raise ValueError(
      f"{path}: kind is {raw.get('kind')!r}, not " + " or ".join(_KINDS)
    )
  description = field(raw, "description", dict, path)
  if fingerprint_of(description) != field(
    raw, "fingerprint", str, path
  ) or description.get("model") != raw.get("model"):
    raise ValueError(
      f"{path}: fingerprint, description and model section do not belong "
      "together; the file was changed by hand: export the folder again"
    )
  return raw


def field(raw: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
  """A required entry of a config; a ValueError names one that is not there."""
  if not isinstance(raw.get(name), kind):
    raise ValueError(
      f"{path}: {name!r} is missing or not of the right type; export the "
      "folder again"
    )
  return raw[name]


def fingerprint_of(description: Mapping[str, Any]) -> str:
  """Identity of a description, as `tasks.autoencoder.fingerprint`."""
  content = json.dumps(description, sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def parse_sections(
  raw: Mapping[str, Any], path: Path, kinds: Mapping[str, type]
) -> dict[str, Any]:
  """The typed view of sections of an exported config.

  Args:
    raw: the config.
    path: its file, for messages.
    kinds: section → its dataclass; "model" decides which stages there are.

  Raises:
    ValueError: a field that does not exist or has a bad value, or a stage that
      makes no such model.
  """
  stage = field(raw, "stage", str, path)
  stages = [
    name for name, (kind, _) in STAGES.items() if kind is kinds["model"]
  ]
  if stage not in stages:
    raise ValueError(
      f"{path}: stage is {stage!r}, not one of {', '.join(stages)}"
    )
  try:
    return {
      name: config_parser.parse_section(
        kind, field(raw, name, dict, path), name
      )
      for name, kind in kinds.items()
    }
  except ConfigError as error:
    raise ValueError(f"{path}: {error}") from error


def read_part(folder: Path, name: str, expected: Any) -> dict[str, Any]:
  """One module's parameters.

  Args:
    folder: the exported folder.
    name: the module.
    expected: tree of the parameters' shapes, e.g. from `jax.eval_shape`.

  Returns:
    Nested dict of float32 host arrays.

  Raises:
    FileNotFoundError: the module has no file.
    ValueError: naming every missing, unexpected and mis-shaped tensor.
  """
  source = Path(folder) / name
  tensors = files.read_safetensors(source)
  wanted = traverse_util.flatten_dict(expected, sep="/")
  problems = {
    "missing": wanted.keys() - tensors.keys(),
    "unexpected": tensors.keys() - wanted.keys(),
    "wrong shape": {
      f"{key} (file {tensors[key].shape}, model {leaf.shape})"
      for key, leaf in wanted.items()
      if key in tensors and tensors[key].shape != leaf.shape
    },
    "not floating point": {
      key for key, tensor in tensors.items() if tensor.dtype != np.float32
    },
  }
  if any(problems.values()):
    said = "; ".join(
      f"{problem}: {files.list_names(names)}"
      for problem, names in problems.items()
      if names
    )
    raise ValueError(f"{source} does not fit its config.json. {said}")
  return traverse_util.unflatten_dict(tensors, sep="/")


def write_part(folder: Path, name: str, params: Any, dtype: str) -> None:
  """Writes one module's parameters, rounded to `dtype`."""
  flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
  tensors = {
    key: np.asarray(value).astype(jnp.dtype(dtype))
    for key, value in flat.items()
  }
  (folder / name).mkdir(parents=True, exist_ok=True)
  files.write_safetensors(folder / name / "model.safetensors", tensors)


def write_config(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
  """Writes config.json, the last file of a folder."""
  frame = {"format": FORMAT, "format_version": VERSION, "kind": kind}
  files.write_json(folder / _CONFIG, encode_json({**config, **frame}))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A folder to write to, which becomes `out` if the block ends well.

  Raises:
    FileExistsError: `out` is there and is neither empty nor an export.
  """
  out = Path(out)
  if out.exists() and not is_exported(out):
    if not out.is_dir() or any(out.iterdir()):
      raise FileExistsError(
        f"{out} exists and is not an exported folder, so it is not replaced; "
        "give another --out"
      )
  partial = out.with_name(out.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
      out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def autoencoder_folder(folder: Path) -> Path:
  """The autoencoder's folder: `folder` itself, or the one a generator names.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: see `read_config`.
  """
  raw = read_config(folder)
  if raw["kind"] == "autoencoder":
    return folder
  name = field(raw, "autoencoder", str, folder / _CONFIG)
  if name == EMBEDDED:
    return resolve(EMBEDDED, "autoencoder")
  return folder / name


def load_autoencoder(
  folder: Path, stage: str | None = None
) -> tuple[model_lib.Autoencoder, dict[str, Any], dict[str, Any]]:
  """Loads an exported autoencoder, or that of an exported generator.

  Args:
    folder: the exported folder.
    stage: what it must have been exported from; None takes any.

  Returns:
    Modules; module → host parameters; "stage", "fingerprint", "description"
    and "latent_fingerprint".

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a malformed or ill-fitting file, or another stage.
  """
  folder = autoencoder_folder(folder)
  raw, path = read_config(folder), folder / _CONFIG
  if raw["kind"] != "autoencoder":
    raise ValueError(f"{folder} is a {raw['kind']}, not an autoencoder")
  if stage not in (None, raw.get("stage")):
    raise ValueError(
      f"{folder} was exported from stage {raw.get('stage')!r}; it has no stage "
      f"{stage!r}"
    )
  field(raw, "latent_fingerprint", str, path)
  kinds = {"model": AutoencoderModel, "compute": ComputeConfig}
  config, compute = parse_sections(raw, path, kinds).values()
  architecture = field(raw, "encoder", dict, path)
  encoder = ViT(
    architectures.parse_config(architecture, path),
    final_norm=config.final_norm,
    unroll=compute.unroll,
    dtype=jnp.dtype(compute.dtype),
  )
  preprocessing = field(raw, "preprocessing", dict, path)
  mean, std = (
    tuple(field(preprocessing, name, list, path)) for name in ("mean", "std")
  )
  model = model_lib.build(config, compute, encoder, mean, std)
  shapes = _abstract_params(model)
  params = {
    name: read_part(folder, name, shapes[name]) for name in model_lib.MODULES
  }
  names = ("stage", "fingerprint", "description", "latent_fingerprint")
  return model, params, {name: raw[name] for name in names}


def save_autoencoder(
  folder: Path,
  model: model_lib.Autoencoder,
  params: Mapping[str, Any],
  identity: Mapping[str, Any],
  *,
  dtype: str = "float32",
  provenance: Mapping[str, Any] | None = None,
) -> None:
  """Writes what `load_autoencoder` reads.

  Args:
    folder: an existing folder; see `new_folder`.
    model, params: modules and module → parameters.
    identity: "stage", "fingerprint", "description", "latent_fingerprint".
    dtype: "float32" or "bfloat16" of the files.
    provenance: where it comes from, for people.
  """
  for name in model_lib.MODULES:
    write_part(folder, name, params[name], dtype)
  section = dataclasses.asdict(model.config)
  section.pop("encoder")  # a path of another machine; it is in the folder
  write_config(
    folder,
    "autoencoder",
    {
      **identity,
      "model": section,
      "compute": compute_section(model),
      "encoder": architectures.format_config(model.encoder.config),
      "preprocessing": {"mean": model.mean, "std": model.std},
      "dtype": dtype,
      "provenance": dict(provenance or {}),
    },
  )


def compute_section(model: model_lib.Autoencoder) -> dict[str, Any]:
  """How the modules compute; what is for training alone is left out."""
  compute = ComputeConfig(
    dtype=jnp.dtype(model.encoder.dtype).name,
    unroll=model.encoder.unroll,
    convolution=model.pixel_decoder.convolution,
  )
  return dataclasses.asdict(compute)


def _abstract_params(model: model_lib.Autoencoder) -> dict[str, Any]:
  """Shapes of all modules' parameters."""
  side = model.config.image_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  rng = jax.random.key(0)
  encoder = jax.eval_shape(model.encoder.init, rng, image)["params"]
  return {"encoder": encoder, **jax.eval_shape(model.init, rng, encoder)}
