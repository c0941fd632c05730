"""What the commands share: config files, and errors in one line.

A config file is Python with a function `get_config(variant)`, or JSON: what
`--print_config` prints and a workdir's `config.json` hold.
"""

import io
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from psvae_jax.config import ConfigError

_FLAG = "config"


def one_line(error: BaseException) -> str:
  """An error's message without line breaks; its type where it has none."""
  return " ".join(str(error).split()) or type(error).__name__


def load_config(argument: str) -> Mapping[str, Any]:
  """Reads `FILE` or `FILE:VARIANT`.

  Args:
    argument: e.g. "configs/psvae.py:base,channels=32".

  Returns:
    What the file's `get_config` returns, or what a JSON file holds.

  Raises:
    ConfigError: the file is missing, broken, or raises; file and line are
      named.
  """
  path, colon, variant = argument.partition(":")
  if not os.path.isfile(path):
    what = "is a folder" if os.path.isdir(path) else "does not exist"
    raise ConfigError(
      f"the config file {path!r} {what}; give e.g. --config=configs/psvae.py"
    )
  if path.endswith(".json"):
    if colon:
      raise ConfigError(f"{path} is JSON and has no variant {variant!r}")
    return _load_json(path)
  try:
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
      raise ConfigError(f"{path} has no function get_config")
    return get_config(*([variant] if colon else []))
  except ConfigError:
    raise
  except SyntaxError as error:
    where = f"{error.filename or path}:{error.lineno or 1}"
    raise ConfigError(f"{where}: {error.msg}") from error
  except Exception as error:
    raise ConfigError(f"{_place(path, error)}: {_said(error)}") from error


def _load_json(path: str) -> Mapping[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      config = json.load(file)
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
  except (OSError, UnicodeDecodeError, RecursionError) as error:
    raise ConfigError(f"{path}: {_said(error)}") from error
  if not isinstance(config, dict):
    raise ConfigError(f"{path} holds no JSON object")
  return config


def _place(path: str, error: Exception) -> str:
  """file:line of the config file where `error` came from."""
  frames = traceback.extract_tb(error.__traceback__)
  package = os.path.dirname(os.path.realpath(__file__))
  if type(error) is ValueError and frames[-1].filename.startswith(package):
    return path  # about the argument or a value, not about a line of the file
  own = [
    f.lineno
    for f in frames
    if os.path.realpath(f.filename) == os.path.realpath(path)
  ]
  return f"{path}:{own[-1]}" if own else path


def _said(error: Exception) -> str:
  """A ValueError is addressed to the user; others need their type."""
  message = one_line(error)
  if type(error) is ValueError or message == type(error).__name__:
    return message
  return f"{type(error).__name__}: {message}"


def split_overrides(
  arguments: Sequence[str],
) -> tuple[list[str], dict[str, str]]:
  """Takes `--config.FIELD=VALUE` out of a command line.

  `--config.FIELD VALUE`, one dash, and for booleans `--config.FIELD` and
  `--noconfig.FIELD` are understood too.

  Returns:
    The other arguments, and dotted path → text; the last one counts.
  """
  rest, overrides = [], {}
  queue = list(arguments)
  while queue:
    argument = queue.pop(0)
    if argument == "--":
      return [*rest, argument, *queue], overrides
    name, equals, value = argument.partition("=")
    bare = name.lstrip("-")
    negated = bare.startswith(f"no{_FLAG}.")
    bare = bare.removeprefix("no") if negated else bare
    if not name.startswith("-") or not bare.startswith(f"{_FLAG}."):
      rest.append(argument)
      continue
    if not equals:
      value = "false" if negated else "true"
      if not negated and queue and not _is_flag(queue[0]):
        value = queue.pop(0)
    overrides.pop(bare.removeprefix(f"{_FLAG}."), None)
    overrides[bare.removeprefix(f"{_FLAG}.")] = value
  return rest, overrides


def _is_flag(argument: str) -> bool:
  return argument.startswith("-") and not argument[1:2].isdigit()


def wants_help(arguments: Sequence[str]) -> bool:
  """Whether --help is among the flags (absl's own page is --helpfull)."""
  flags = list(arguments)
  flags = flags[: flags.index("--")] if "--" in flags else flags
  return any(
    flag in ("-h", "-help", "--help", "-?", "--helpshort") for flag in flags
  )


def fail(message: str) -> NoReturn:
  """Ends the command with one line on stderr and exit code 1."""
  sys.exit(f"error: {message}")


def print_any_name() -> None:
  """Lets stdout and stderr take file names that are not UTF-8, escaped.

  Otherwise the first such name would end a command that has more to do.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def guard(command: Callable[[], Any], *, interrupted: str) -> Any:
  """Runs a command; Ctrl-C is one line and exit code 130."""
  print_any_name()
  _keep_interrupts()
  try:
    return command()
  except KeyboardInterrupt:
    print(f"\ninterrupted; {interrupted}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads that read data or save a checkpoint still run, and
    # crash where the interpreter is taken down under them. A save that is cut
    # off leaves the checkpoint before it.
    os._exit(130)


def _keep_interrupts() -> None:
  """Has Ctrl-C raised again where Python drops it.

  That is in finalizers and in callbacks of the garbage collector, of which JAX
  has one that runs often.
  """
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
      # Not from here, where it would be dropped once more.
      again = (os.getpid(), signal.SIGINT)
      threading.Timer(0.05, os.kill, again).start()
    else:
      before(unraisable)

  sys.unraisablehook = hook
