"""The package definition, and the scripts that install and start it."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import packaging.markers
import packaging.requirements
import packaging.utils
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "psvae_jax"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]

Requirement = packaging.requirements.Requirement


@pytest.fixture(scope="module")
def distribution():
  """setup.py, read the way an installer reads it; nothing is built."""
  pytest.importorskip("setuptools")
  from distutils.core import run_setup

  before = pathlib.Path.cwd()
  os.chdir(ROOT)
  try:
    yield run_setup("setup.py", stop_after="init")
  finally:
    os.chdir(before)


def canonical(requirement: str) -> str:
  return packaging.utils.canonicalize_name(Requirement(requirement).name)


def source_files() -> list[pathlib.Path]:
  """Files of the repository, without what tools and jobs write into it."""
  written = {"__pycache__", "runs", "build", "dist"}
  found = []
  for folder, folders, names in os.walk(ROOT):
    folders[:] = [
      name
      for name in folders
      if name not in written
      and not name.endswith(".egg-info")
      and (not name.startswith(".") or name == ".ci")
    ]
    found += [pathlib.Path(folder, name) for name in names]
  return found


# --- setup.py, constraints.txt ---


def test_metadata(distribution):
  assert distribution.get_name() == "psvae_jax"
  assert re.fullmatch(r"\d+\.\d+\.\d+", distribution.get_version())
  assert "3.11" in distribution.python_requires
  assert "3.10" not in distribution.python_requires
  assert set(distribution.extras_require) == {
    "convert",
    "cuda",
    "demo",
    "test",
    "tpu",
  }


def test_every_folder_with_code_is_a_package(distribution):
  folders = {path.parent for path in PACKAGE.rglob("*.py")}
  assert [f for f in folders if not (f / "__init__.py").is_file()] == []
  packages = {".".join(f.relative_to(ROOT).parts) for f in folders}
  assert set(distribution.packages) == packages


def test_every_asset_is_installed(distribution):
  command = distribution.get_command_obj("build_py")
  command.ensure_finalized()
  installed = {
    (ROOT / source / name).resolve()
    for _, source, _, names in command.data_files
    for name in names
  }
  assets = {path for path in (PACKAGE / "assets").rglob("*") if path.is_file()}
  assert assets == installed


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_requirements_are_pinned(distribution, python):
  """A requirement has one exact version, which meets its own floor."""
  environment = packaging.markers.default_environment()
  environment |= {
    "python_version": python,
    "python_full_version": f"{python}.0",
  }
  pins = {}
  for line in (ROOT / "constraints.txt").read_text().splitlines():
    if not line or line.startswith("#"):
      continue
    pin = Requirement(line)
    if pin.marker and not pin.marker.evaluate(environment):
      continue
    name = packaging.utils.canonicalize_name(pin.name)
    assert name not in pins, f"two versions of {name}"
    (specifier,) = pin.specifier
    assert specifier.operator == "==", line
    pins[name] = specifier.version
  extras = distribution.extras_require
  for line in [
    *distribution.install_requires,
    *extras["test"],
    *extras["demo"],
  ]:
    assert canonical(line) in pins, f"{line} is not in constraints.txt"
    assert Requirement(line).specifier.contains(pins[canonical(line)]), line


def imported_modules(path: pathlib.Path, everywhere: bool) -> set[str]:
  """Top-level names of the modules that a file imports.

  Args:
    path: a Python file.
    everywhere: whether to count imports inside functions and other blocks,
      which are not run when the file is imported.
  """
  tree = ast.parse(path.read_text())
  found = set()
  for node in ast.walk(tree) if everywhere else tree.body:
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      found.add(node.module.split(".")[0])
  return found - sys.stdlib_module_names - {"psvae_jax"}


@pytest.mark.parametrize("everywhere", [False, True])
def test_imports_are_required(distribution, everywhere):
  """What the package imports is a requirement, not a guest of another one.

  Optional requirements may be imported inside functions only.
  """
  required = {canonical(line) for line in distribution.install_requires}
  if everywhere:
    for lines in distribution.extras_require.values():
      required |= {canonical(line) for line in lines}
    required.add("libtpu")  # What jax[tpu] stands for.
  providers = importlib.metadata.packages_distributions()
  missing = {}
  for path in PACKAGE.rglob("*.py"):
    for module in imported_modules(path, everywhere):
      names = {
        packaging.utils.canonicalize_name(name)
        for name in providers.get(module, [module])
      }
      if not names & required:
        missing.setdefault(module, []).append(str(path.relative_to(ROOT)))
  assert missing == {}


def test_imports_without_optional_packages():
  """Every module imports without the extras, and leaves the devices alone.

  A multi-host job has to call jax.distributed before the first use of a
  device; jax refuses to change the number of CPU devices after it.
  """
  code = """
import importlib, pkgutil, sys
for name in ("torch", "torchvision", "torchmetrics", "diffusers", "gradio",
             "pytest", "hypothesis", "libtpu"):
  sys.modules[name] = None
import psvae_jax
for module in pkgutil.walk_packages(psvae_jax.__path__, "psvae_jax."):
  importlib.import_module(module.name)
import jax
jax.config.update("jax_num_cpu_devices", 3)
"""
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


def test_no_path_of_one_machine():
  folders = "|".join(["work", "farm", "root", "tmp"])
  pattern = re.compile(rf"(?<![\w.$}}-])/({folders})/".encode())
  found = []
  for path in source_files():
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
      if pattern.search(line) and b"\0" not in line:
        found.append(f"{path.relative_to(ROOT)}:{number}")
  assert found == []


# --- launch/, .ci/run ---


def bash(*arguments, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
  names = ("PYTHON", "PSVAE_EXTRA")
  inherited = {k: v for k, v in os.environ.items() if k not in names}
  return subprocess.run(
    ["bash", *map(str, arguments)],
    cwd=cwd,
    env=inherited | environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_clean(script):
  result = bash("-n", script)
  assert result.returncode == 0, result.stderr
  if shutil.which("shellcheck"):
    result = subprocess.run(
      ["shellcheck", script], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda path: path.name)
def test_script_help(script, tmp_path):
  result = bash(script, "--help", cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert "Usage" in result.stdout and script.name in result.stdout


def make_executable(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def clone(tmp_path):
  """A copy of the scripts and of what setup.sh installs from."""
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  for name in ("setup.py", "pyproject.toml", "constraints.txt"):
    shutil.copy(ROOT / name, tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ([], "--config=configs/psvae.py --workdir=runs/psvae"),
    (
      ["--config.svae.train.steps=9"],
      "--config=configs/psvae.py --config.svae.train.steps=9 "
      "--workdir=runs/psvae",
    ),
    (
      ["--config=configs/psvae.py:base,channels=32"],
      "--config=configs/psvae.py:base,channels=32 "
      "--workdir=runs/psvae-base-channels=32",
    ),
    (
      ["--config", "configs/t2i.py"],
      "--config configs/t2i.py --workdir=runs/t2i",
    ),
    (["--workdir=x"], "--config=configs/psvae.py --workdir=x"),
    (["--workdir", "a b"], "--config=configs/psvae.py --workdir a b"),
  ],
  ids=[
    "none",
    "field",
    "config",
    "config-value",
    "workdir",
    "space",
  ],
)
def test_local_flags(clone, flags, expected):
  make_executable(clone / "launch" / "setup.sh", "")
  make_executable(
    clone / ".venv" / "bin" / "python", '#!/bin/sh\necho "$PWD: $*"\n'
  )
  result = bash(clone / "launch" / "local.sh", *flags, cwd="/")
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"{clone}: -m psvae_jax.main {expected}\n"


@pytest.fixture
def installer(clone):
  """Runs setup.sh in the copy with a Python that only notes what pip does.

  Returns:
    A function of setup.sh's arguments and environment that returns the
    completed process and the pip commands it ran. STUB_FAILS makes pip fail.
  """
  log = clone / "pip.log"
  environment = clone / "environment_python"
  make_executable(
    environment,
    f"""#!/usr/bin/env bash
case "$*" in
  "-m pip "*) echo "$*" >>"{log}"; [[ -z "${{STUB_FAILS:-}}" ]] ;;
  *) exec "{sys.executable}" "$@" ;;
esac
""",
  )
  base = clone / "base_python"
  make_executable(
    base,
    f"""#!/usr/bin/env bash
case "$*" in
  "-m venv "*)
    mkdir -p "${{@: -1}}/bin"
    cp "{environment}" "${{@: -1}}/bin/python"
    ;;
  *) exec "{sys.executable}" "$@" ;;
esac
""",
  )

  def run(*arguments, **variables):
    log.unlink(missing_ok=True)
    variables = {"PYTHON": str(base)} | variables
    result = bash(clone / "launch" / "setup.sh", *arguments, **variables)
    return result, log.read_text().splitlines() if log.exists() else []

  return run


def test_setup_installs_once(installer, clone):
  result, commands = installer("test")
  assert result.returncode == 0, result.stderr
  (command,) = commands
  assert "--constraint constraints.txt" in command
  assert command.endswith("--editable .[test]")
  assert installer("test")[1] == []
  # The core has come with the extra; another extra has not.
  assert installer("none")[1] == []
  assert installer(PSVAE_EXTRA="demo")[1] != []
  with open(clone / "constraints.txt", "a") as file:
    file.write("# changed\n")
  (command,) = installer("none")[1]
  assert command.endswith("--editable .")


def test_setup_takes_up_a_failed_installation(installer):
  result, commands = installer("none", STUB_FAILS="1")
  assert result.returncode != 0 and len(commands) == 1
  assert "installation failed" in result.stderr
  result, commands = installer("none")
  assert result.returncode == 0 and len(commands) == 1


def test_setup_makes_a_broken_environment_again(installer, clone):
  make_executable(clone / ".venv" / "bin" / "python", "#!/bin/false\n")
  result, commands = installer("none")
  assert result.returncode == 0, result.stderr
  assert "making .venv" in result.stderr and len(commands) == 1


def test_setup_errors(installer, clone):
  result, commands = installer("tset")
  assert result.returncode != 0 and commands == []
  assert "unknown extra 'tset'" in result.stderr
  result, commands = installer("none", PYTHON="no-such-python")
  assert result.returncode != 0 and commands == []
  assert "PYTHON=no-such-python is not a Python >= 3.11" in result.stderr
  old = '#!/bin/sh\n[ -z "$1" ] && exit; [ "$2" = \'\' ]\n'
  make_executable(clone / ".venv" / "bin" / "python", old)
  result, commands = installer("none")
  assert result.returncode != 0 and commands == []
  assert "Delete that folder" in result.stderr
