"""Shared fixtures: reference values by environment variable, tiny configs."""

import atexit
import json
import os
import pathlib
import shutil
import tempfile

# Many tests compile the same programs: compile each once, for all workers and
# for the mains they start. Set before JAX reads its environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp("arflow_jax")
  atexit.register(
    shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
  )
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# A test compiles for TPUs through libtpu; where that is installed, JAX would
# otherwise look for one. JAX_PLATFORMS=cuda runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# On a CPU, compiling takes most of the time: with less of LLVM's optimization
# and the older code for fused loops it takes a quarter of the CPU time.
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    + os.environ.get("XLA_FLAGS", "")
  )

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


_STEPS = {}
_SHAPELESS = ("data", "checkpoint", "log", "eval", "sample", "mesh", "debug")


@pytest.fixture(autouse=True)
def _steps_traced_once(monkeypatch):
  """Programs of like configs share their jitted step: tracing takes seconds."""
  from arflow_jax.training import state

  real = state.make_train_step

  def make(branch, tx, config, abstract):
    shape = {k: v for k, v in config.to_dict().items() if k not in _SHAPELESS}
    shape["items"] = branch.item_shape
    key = json.dumps(shape, sort_keys=True), abstract.step.sharding
    if key not in _STEPS:
      _STEPS[key] = real(branch, tx, config, abstract)
    return _STEPS[key]

  monkeypatch.setattr(state, "make_train_step", make)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
  """A failed read is tried again at once."""
  from arflow_jax.training import listing

  monkeypatch.setattr(listing, "PAUSES", (0.0, 0.0))


def _folder(variable: str) -> pathlib.Path:
  value = os.environ.get(variable)
  if not value:
    pytest.skip(f"{variable} is not set: no data to read")
  return pathlib.Path(value)


class Parity:
  """One reference file: `param`, `input`, `output` and its `meta`."""

  def __init__(self, path: pathlib.Path):
    with np.load(path) as file:
      self._arrays = dict(file)
    self.meta = json.loads(str(self._arrays["meta"]))
    self.names = list(self._arrays)

  def __getitem__(self, name: str):
    """Inputs as JAX arrays, everything else as numpy arrays."""
    array = self._arrays[name]
    return jnp.asarray(array) if name.startswith("in/") else array

  def under(self, prefix: str) -> dict:
    """The arrays whose names begin so, by the rest of their names.

    There must be one: a loop over none would pass without a test.
    """
    names = [name for name in self.names if name.startswith(prefix)]
    assert names, f"the file holds no {prefix}*"
    return {name.removeprefix(prefix): self[name] for name in names}

  def cases(self, key: str = "runs") -> list[dict]:
    """The cases that `meta` lists under a key; there must be one."""
    assert self.meta[key], f"the file lists no {key}"
    return self.meta[key]

  def params(self) -> dict[str, np.ndarray]:
    return self.under("param/")


def parity_files(pattern: str) -> list:
  """Test parameters, one a file; ids hold `parity` and the file's stem."""
  value = os.environ.get("ARFLOW_PARITY_DIR")
  if not value:
    return [pytest.param(None, id=f"parity-{pattern}-unset")]
  paths = sorted(pathlib.Path(value).glob(pattern + ".npz"))
  if not paths:
    return [pytest.param(pattern, id=f"parity-{pattern}-missing")]
  return [pytest.param(path, id=f"parity-{path.stem}") for path in paths]


@pytest.fixture
def load_parity():
  """Loads what `parity_files` parametrised; skips or fails without it."""

  def load(path):
    if path is None:
      pytest.skip("ARFLOW_PARITY_DIR is not set: no reference values")
    if isinstance(path, str):
      pytest.fail(f"ARFLOW_PARITY_DIR is set but holds no {path}.npz")
    return Parity(path)

  return load


@pytest.fixture
def data_dir() -> pathlib.Path:
  """The folder of real data named by ARFLOW_DATA_DIR."""
  folder = _folder("ARFLOW_DATA_DIR")
  if not folder.is_dir() or not any(folder.iterdir()):
    pytest.fail(f"ARFLOW_DATA_DIR={folder} holds nothing")
  return folder


def relative_error(ours, reference) -> float:
  """max|a - b| / max|b|, the measure of the reference values' tolerances.

  Where the reference is zero throughout, the error itself.
  """
  ours, reference = np.asarray(ours), np.asarray(reference)
  assert ours.shape == reference.shape, (ours.shape, reference.shape)
  assert np.isfinite(ours).all()
  return np.abs(ours - reference).max() / (np.abs(reference).max() or 1.0)


def channels_last(x) -> jax.Array:
  return jnp.moveaxis(jnp.asarray(x), -3, -1)


def channels_first(x) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
  """Folder of the TPU compiler's schedules; libtpu reads its name only once.

  So every test that compiles for TPUs in this process takes it.
  """
  pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")
  from arflow_jax.analysis import tpu

  folder = tmp_path_factory.mktemp("schedules")
  tpu.prepare(folder)
  return folder
