"""What the data pipeline gives, and the memory of all its processes."""

import subprocess
import sys
import types

import pytest

from arflow_jax import bench
from arflow_jax.analysis import bench_report, loading
from arflow_jax.cli import execute
from tests.tiny import flags, tiny_config


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
  monkeypatch.setattr(loading, "_SECONDS", 0.05)


def test_images_are_counted_not_sequences(monkeypatch):
  moments = iter([10.0])
  clock = types.SimpleNamespace(monotonic=lambda: next(moments, 12.0))
  monkeypatch.setattr(loading, "time", clock)  # two seconds for all of them
  found = loading.measure(tiny_config(data__source="latents"), repeats=6)
  assert (found.batches, found.workers) == (6, 0)
  assert found.images_per_second == 6 * 4 * 5 / 2


def test_memory_of_what_a_process_has_started_is_counted():
  alone = loading.held()
  if alone is None:
    pytest.skip("this system does not tell")
  program = (
    "x = bytes(64 * 2**20); y = bytearray(x); print(flush=True); input()"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as child:
    child.stdout.readline()
    assert 64 * 2**20 < loading.held() - alone < 200 * 2**20
    child.communicate(b"\n")


def test_the_benchmark_tells_and_keeps_it(tmp_path, capsys):
  out = tmp_path / "x.json"
  args = [*flags(), "--what=input", f"--out={out}"]
  assert execute(bench, args) == 0
  said = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in said[:1]] == ["images/s loaded"]
  assert said[-1] == str(out)
  kept = bench_report.read(str(out))
  assert kept["input"]["images_per_second"] > 0
  assert kept["programs"] == {}
