"""Compiling for TPUs, for the tests of the kernels."""

import pytest

from arflow_jax.analysis import tpu


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
  """Folder of the compiler's schedules; libtpu reads its name only once."""
  pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")
  folder = tmp_path_factory.mktemp("schedules")
  tpu.prepare(folder)
  return folder
