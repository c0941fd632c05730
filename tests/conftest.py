"""What every test relies on; pytest reads it before any test imports jax.

* The CPU with eight virtual devices, the first being the default one, so that
  sharding is tested anywhere. JAX_PLATFORMS in the environment overrides.
* Exact float32 matrix products.
* No network: Hugging Face libraries use local files only.
* Compiled programs are kept in .pytest_cache between runs, and are compiled
  with few of LLVM's optimisations: tests compile much and compute little.

Commands that tests start inherit the platform, the cache and the offline
switch, but see one CPU device and the default precision, as a user's would.
"""

import gc
import importlib.util
import os
import pathlib

_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Set in the environment, so that commands find what tests have compiled.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
# Read by torch when a parity test imports it: beside other test processes its
# threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1" if _XDIST_WORKER else "2")

import jax  # noqa: E402
import pytest  # noqa: E402

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PHOTOS = _ROOT.parent / "shared" / "photos"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


def _set_compilation_cache(config: pytest.Config) -> None:
  """Keeps compiled programs for this process and the commands it starts."""
  folder = os.environ.get("PSVAE_TEST_CACHE")
  if folder == "off" or (folder is None and not hasattr(config, "cache")):
    return
  folder = folder or str(config.cache.mkdir("jax"))
  seconds = 0.2  # Programs that compile faster are not worth a file.
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(seconds)
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
  """Collects with the garbage collector off.

  Python 3.11 loses count when a collection's callback (jax has one) interrupts
  the parsing of a test file: "AST constructor recursion depth mismatch".
  """
  gc.disable()
  try:
    return (yield)
  finally:
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
  _set_compilation_cache(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips what needs the TPU compiler where it is not installed."""
  if importlib.util.find_spec("libtpu") is not None:
    return
  skip = pytest.mark.skip(reason="libtpu is missing: pip install jax[tpu]")
  for item in items:
    if "tpu_compile" in item.keywords:
      item.add_marker(skip)


@pytest.fixture(scope="session")
def photos() -> pathlib.Path:
  """Folder with `train` and `validation` folders of real photographs."""
  if not _PHOTOS.is_dir():
    pytest.skip("no folder shared/photos beside the repository")
  return _PHOTOS


@pytest.fixture
def rng() -> jax.Array:
  """The same random key for every test."""
  return jax.random.key(0)
