"""Tensors out of files that `torch.save` wrote (.pth, .pt, .ckpt).

Such a file is a pickle, which can run any program when it is loaded. Here it
is read twice without that: the names it refers to are listed first, from the
pickle's opcodes, and a file that needs more than tensors is refused; what is
left goes through `torch.load(weights_only=True)`, which refuses the same again.

Only `psvae_jax.convert` reads such files, once: everything else of the project
reads safetensors. torch is needed for it: `pip install psvae_jax[convert]`.
"""

import os
import pathlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

# What holds the tensors where a file has more than them.
CONTAINERS = ("state_dict", "model", "model_ema", "ema")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch < 1.6's files
_LEGACY_PICKLES = 5  # magic number, version, machine, contents, storage keys
_MAX_PICKLE_BYTES = 64 * 2**20  # tensors' values are not inside of it
# Tied tensors are counted each time that they are named.
_MAX_EXPANSION = 4

# What a file of tensors refers to. torch's own list is longer: with
# `bytearray`, say, a file of 100 bytes can ask for any amount of memory.
_KNOWN_NAMES = re.compile(
  r"collections\.OrderedDict"
  r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
  r"|torch\.nn\.parameter\.Parameter"
  r"|torch\.(Size|device)"
  r"|torch(\.storage)?\.\w+Storage"
  r"|torch\.(bool|b?float\d+|float8_\w+|u?int\d+)"
)
# What damaged bytes raise while they are parsed.
_PARSING = (
  ValueError,
  OverflowError,
  MemoryError,
  EOFError,
  IndexError,
  RuntimeError,
  struct.error,
)
# Opcodes that name or call something in another way than torch.save does.
_UNKNOWN_OPCODES = {
  "STACK_GLOBAL",
  "INST",
  "OBJ",
  "NEWOBJ_EX",
  "EXT1",
  "EXT2",
  "EXT4",
}


def read_torch_file(
  path: str | os.PathLike, container: str | None = None
) -> dict[str, np.ndarray]:
  """Reads the tensors of one file; nothing in it is executed.

  Args:
    path: what `torch.save` wrote: a dict of tensors, or a dict that holds one
      under a key of `CONTAINERS`.
    container: the key to take, where there are several, or another one.

  Returns:
    Tensor of every key; floating point ones as float32, whatever their type
    in the file, others as they are. Entries that are no tensors are left out.

  Raises:
    ImportError: torch is not installed.
    FileNotFoundError: there is no such file.
    ValueError: it is malformed, refers to more than tensors, or holds none;
      the message names the file and what to do.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    what = "is a folder" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"{path} {what}; give a .pth, .pt or .ckpt file")
  is_zip = zipfile.is_zipfile(path)
  try:
    names = _zip_names(path) if is_zip else _legacy_names(path)
  except (zipfile.BadZipFile, KeyError, *_PARSING) as error:
    raise ValueError(
      f"{path} is truncated or no file of torch.save ({_first_line(error)}); "
      "download or copy it again"
    ) from error
  unknown = sorted(name for name in names if not _KNOWN_NAMES.fullmatch(name))
  if unknown:
    raise ValueError(
      f"{path} refers to {', '.join(unknown[:5])}, which is more than tensors: "
      "nothing of it is loaded. If you trust where it comes from, save its "
      "tensors alone with torch (torch.load, then torch.save of its state "
      "dict) and give that file"
    )
  loaded = _load(path, mapped=is_zip)
  tensors = _state_dict(loaded, path, container)
  return _to_numpy(tensors, path)


def _zip_names(path: pathlib.Path) -> set[str]:
  """Names that the pickle in a file of today's format refers to."""
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
      raise ValueError("its members are compressed, torch.save's never are")
    if sum(member.file_size for member in members) > path.stat().st_size:
      raise ValueError("its members are larger than the file")
    pickles = [m for m in members if m.filename.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
      raise ValueError(f"it holds {len(pickles)} members data.pkl, not one")
    with archive.open(pickles[0]) as file:
      return _referred_names(file, pickles[0].file_size)


def _legacy_names(path: pathlib.Path) -> set[str]:
  """Names that the pickles at the start of an older file refer to."""
  names = set()
  with open(path, "rb") as file:
    first = [argument for _, argument, _ in pickletools.genops(file)]
    if _LEGACY_MAGIC not in first:
      raise ValueError("it does not start with torch's number")
    for _ in range(_LEGACY_PICKLES - 1):
      names |= _referred_names(file, path.stat().st_size - file.tell())
  return names


def _referred_names(file: BinaryIO, size: int) -> set[str]:
  """Names of one pickle's globals, found without loading it."""
  names, start = set(), file.tell()
  for opcode, argument, place in pickletools.genops(file):
    if opcode.name == "GLOBAL":
      names.add(".".join(str(argument).split(" ")))
    elif opcode.name in _UNKNOWN_OPCODES:
      names.add(f"a name by {opcode.name}")
    if place is not None and place - start > min(size, _MAX_PICKLE_BYTES):
      raise ValueError("its pickle is too long")
  return names


def _load(path: pathlib.Path, mapped: bool) -> Any:
  try:
    import torch  # optional: only the converter needs it
  except ImportError as error:
    raise ImportError(
      f"reading {path} takes torch: pip install psvae_jax[convert]"
    ) from error
  try:
    # Mapped: a tensor cannot reach outside of the file, whatever size it
    # states, and only what is used takes memory. The older format has its
    # sizes checked while it is read.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
  except Exception as error:  # torch has no common error class
    raise ValueError(
      f"{path} is truncated or malformed ({_first_line(error)}); download or "
      "copy it again"
    ) from error


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def _state_dict(
  loaded: Any, path: pathlib.Path, container: str | None
) -> Mapping[str, Any]:
  """The dict of tensors, out of the dict that holds it."""
  if not isinstance(loaded, Mapping):
    raise ValueError(
      f"{path} holds a {type(loaded).__name__}, not a dict of tensors"
    )
  if container is not None:
    if not isinstance(loaded.get(container), Mapping):
      keys = ", ".join(str(key) for key in list(loaded)[:20])
      raise ValueError(f"{path} has no dict {container!r}; it has {keys}")
    return loaded[container]
  found = [key for key in CONTAINERS if isinstance(loaded.get(key), Mapping)]
  if len(found) > 1:
    raise ValueError(
      f"{path} holds {' and '.join(repr(key) for key in found)}; say which "
      "with --container"
    )
  return loaded[found[0]] if found else loaded


def _to_numpy(
  tensors: Mapping[str, Any], path: pathlib.Path
) -> dict[str, np.ndarray]:
  import torch

  tensors = {
    str(key): value.detach()
    for key, value in tensors.items()
    if isinstance(value, torch.Tensor)
  }
  if not tensors:
    raise ValueError(f"{path} holds no tensors")
  total = 0
  for key, tensor in tensors.items():
    if tensor.layout != torch.strided or tensor.is_quantized:
      raise ValueError(f"{path}: tensor {key} is sparse or quantised")
    total += tensor.numel() * tensor.element_size()
    if total > _MAX_EXPANSION * path.stat().st_size:
      raise ValueError(f"{path}: tensor {key} is larger than the file holds")
  return {
    key: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    for key, tensor in tensors.items()
  }
