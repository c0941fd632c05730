"""Published model folders: configs and tensors, read strictly.

A model folder has Hugging Face's layout: `config.json` beside
`model.safetensors`, or beside the shards that `model.safetensors.index.json`
names. Only safetensors is read or written, never pickle.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from psvae_jax.pretrained import safetensors_file

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
# A plain file name; no separators, nothing hidden.
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_MAX_SHARDS = 1000
# An index of a hundred thousand tensors has nine million.
_MAX_JSON = 16 * 2**20


def resolve_folder(
  name_or_path: str | os.PathLike, allow_patterns: Sequence[str]
) -> pathlib.Path:
  """Finds a model folder: a local one, else one of the Hugging Face hub.

  Args:
    name_or_path: a local folder, or a hub id such as
      "facebook/dinov2-with-registers-base", downloaded once into the hub's
      cache.
    allow_patterns: file name patterns to download.

  Returns:
    The local folder.

  Raises:
    FileNotFoundError: there is no such folder and the hub has none, or cannot
      be reached.
    ValueError: the path is a file.
  """
  path = pathlib.Path(name_or_path)
  with contextlib.suppress(RuntimeError):  # no such user: no such folder
    path = path.expanduser()
  if path.is_dir():
    return path
  if path.exists():
    raise ValueError(f"{path} is a file; give the model folder that holds it")
  name = os.fspath(name_or_path)
  if not _HUB_ID.fullmatch(name):
    raise FileNotFoundError(
      f"model folder {name} does not exist; give an existing folder or a "
      'Hugging Face id such as "facebook/dinov2-with-registers-base"'
    )
  try:
    import huggingface_hub  # optional: local folders need no hub client
  except ImportError as error:
    raise FileNotFoundError(
      f"{name} is not a local folder, and huggingface_hub is not installed "
      "to download it; install it or give a local folder"
    ) from error
  try:
    folder = huggingface_hub.snapshot_download(
      name, allow_patterns=list(allow_patterns)
    )
  except (OSError, ValueError) as error:
    # Hub and connection errors are all OSError; a malformed id a ValueError.
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    raise FileNotFoundError(
      f"{name} is not a local folder, and the Hugging Face hub did not give it "
      f"({type(error).__name__}: {reason}). Check the name; without a network, "
      f"download it elsewhere with `hf download {name}` and give the folder"
    ) from error
  return pathlib.Path(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads one JSON object.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a folder, not JSON, no object, or larger than any model's;
      names the file.
  """
  if path.is_dir():
    raise ValueError(f"{path} is a folder; it must be a JSON file")
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is missing; a model folder needs {path.name}"
    )
  size = path.stat().st_size
  if size > _MAX_JSON:
    raise ValueError(
      f"{path} has {size:,} bytes, more than any model's {path.name} "
      f"({_MAX_JSON:,}); download or copy it again"
    )
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    reason = "nested too deeply"
    if isinstance(error, ValueError):
      reason = str(error)
    raise ValueError(f"{path} is not valid JSON: {reason}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object")
  return value


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads `config.json` of a model folder."""
  return read_json(pathlib.Path(folder) / "config.json")


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes one JSON object, whole or not at all."""
  text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


def read_safetensors(
  folder: pathlib.Path, stem: str = "model"
) -> dict[str, np.ndarray]:
  """Reads the tensors of a model folder, sharded or not.

  Args:
    folder: the model folder.
    stem: of the file names; "diffusion_pytorch_model" in diffusers' folders.

  Returns:
    Tensor of every key; floating point ones as float32, whatever their type
    in the file, others as they are.

  Raises:
    FileNotFoundError: no tensor file, or a shard is missing.
    ValueError: a file is truncated or malformed; names the file.
  """
  folder = pathlib.Path(folder)
  single = folder / f"{stem}.safetensors"
  index = folder / f"{stem}.safetensors.index.json"
  if os.path.lexists(single):
    return _read_file(single)
  if not os.path.lexists(index):
    raise FileNotFoundError(
      f"{folder} has neither {single.name} nor {index.name}; a .bin file "
      "beside its config.json is converted by `python -m psvae_jax.convert "
      "huggingface --weights=FILE --out=FOLDER`"
    )
  shards = _read_index(index)
  missing = [name for name in shards if not (folder / name).is_file()]
  if missing:  # before gigabytes of the others are read
    raise FileNotFoundError(
      f"{folder} has no {list_names(missing)}, which {index.name} names; "
      "download the folder again"
    )
  tensors = {}
  for name, stated in sorted(shards.items()):
    shard = _read_file(folder / name)
    if stated != set(shard):
      raise ValueError(
        f"{folder / name} does not hold the tensors that {index.name} says: "
        f"{list_names(stated ^ set(shard))}"
      )
    tensors.update(shard)
  return tensors


def _read_index(index: pathlib.Path) -> dict[str, set[str]]:
  """Shards of an index: file → the tensors that it is said to hold."""
  weight_map = read_json(index).get("weight_map")
  # Plain names: a shard lies in the folder of the index and nowhere else.
  if not isinstance(weight_map, dict) or not all(
    isinstance(name, str) and _SHARD.fullmatch(name)
    for name in weight_map.values()
  ):
    raise ValueError(
      f'{index}: "weight_map" must map tensors to file names that end in '
      ".safetensors"
    )
  shards = {}
  for key, name in weight_map.items():
    shards.setdefault(name, set()).add(key)
  if not 1 <= len(shards) <= _MAX_SHARDS:
    raise ValueError(
      f'{index}: "weight_map" names {len(shards):,} files; there are 1 to '
      f"{_MAX_SHARDS:,} in a model"
    )
  return shards


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  tensors = safetensors_file.read_tensors(path)
  return {key: _to_float32(value) for key, value in tensors.items()}


def _to_float32(tensor: np.ndarray) -> np.ndarray:
  # Kind "V" is how numpy sees bfloat16 and the float8 types.
  if tensor.dtype.kind in "fV":
    return tensor.astype(np.float32, copy=False)
  return tensor


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors to one file, whole or not at all.

  Args:
    path: the file, e.g. `folder / "model.safetensors"`.
    tensors: host arrays by key.
    metadata: strings for the file's header. `format: pt`, which transformers
      looks for, is always there.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".tmp")
  temporary.touch()
  mode = temporary.stat().st_mode  # what the user's umask asks for
  try:
    safetensors.numpy.save_file(
      # The writer copies memory as it lies: transposed views must be packed.
      {key: np.asarray(value, order="C") for key, value in tensors.items()},
      temporary,
      metadata={"format": "pt", **(metadata or {})},
    )
  except safetensors.SafetensorError as error:
    temporary.unlink(missing_ok=True)
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
      raise
    number = int(code[1])  # as any other file's trouble
    raise OSError(number, os.strerror(number), str(path)) from error
  temporary.chmod(mode)  # the writer makes files that only the owner reads
  os.replace(temporary, path)


def fingerprint_params(tree: Any) -> str:
  """Identifies a parameter tree by its content.

  Args:
    tree: nested dicts of host arrays, or device arrays that this process can
      read whole.

  Returns:
    Hex SHA-256 over path, dtype, shape and bytes of every leaf, sorted by
    path; independent of dict order, device and host.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = sorted(
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in leaves
  )
  digest = hashlib.sha256()
  for name, leaf in named:
    array = np.asarray(jax.device_get(leaf))
    header = f"{name}\n{array.dtype.name}\n{array.shape}\n"
    digest.update(header.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def list_names(names: Sequence[str] | set[str], limit: int = 20) -> str:
  """Sorted names for an error message, the tail of a long list as a count."""
  names = sorted(names)
  text = ", ".join(names[:limit])
  return text + (f" … {len(names) - limit} more" if names[limit:] else "")
