"""Checksums: of every change, on every mesh; flipped bytes of a run."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax import cli, verify
from arflow_jax.errors import ConfigError
from arflow_jax.sampling import run
from arflow_jax.training import checkpoint, checksum, listing, loop
from tests import faults
from tests.tiny import stored_state, tiny_config

NAME = "a/0"


def _sum(array):
  return checksum.of({"a": [jnp.asarray(array)]})[NAME]


def _plain(array):
  """The same number by number, with Python's own integers."""
  total = 0
  bits = np.asarray(array).reshape(-1).view(np.uint32)
  for place, x in enumerate(bits.tolist()):
    x ^= place * 0x9E3779B1 % 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    total += x ^ (x >> 16)
  return total % 2**32


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 5)])
def test_it_is_the_sum_that_the_docstring_says(shape):
  array = np.random.default_rng(0).standard_normal(shape, np.float32)
  assert _sum(array) == _plain(array)
  assert _sum(np.asarray(array.size, np.int32)) == _plain(
    np.asarray(array.size, np.int32)
  )


def test_every_single_change_and_every_exchange_shows():
  array = np.zeros((4, 8), np.float32)
  sums = {_sum(array)}
  for place in range(32):
    for bit in (0, 13, 31):
      changed = array.copy().view(np.uint32)
      changed.flat[place] ^= 1 << bit
      sums.add(_sum(changed.view(np.float32)))
  assert len(sums) == 1 + 32 * 3  # also of -0.0, which equals 0.0
  rows = np.arange(32, dtype=np.float32).reshape(4, 8)
  assert _sum(rows) != _sum(rows[::-1])


def test_another_cut_into_axes_keeps_it():
  array = np.random.default_rng(0).standard_normal((4, 6), np.float32)
  assert _sum(array) == _sum(array.reshape(4, 2, 3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.uint32])
def test_other_types(dtype):
  array = jnp.arange(8).astype(dtype)
  assert _sum(array) != _sum(array.at[3].add(1))


def test_no_mesh_changes_it(tmp_path):
  program = (
    "import jax, numpy as np\n"
    "from jax.sharding import *\n"
    "from arflow_jax.training import checksum\n"
    "x = np.random.default_rng(0).standard_normal((8, 6), np.float32)\n"
    "mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ('a', 'b'))\n"
    "for spec in (P('a'), P(('a', 'b')), P('a', 'b'), P()):\n"
    "  array = jax.device_put(x, NamedSharding(mesh, spec))\n"
    "  print(checksum.of({'a': [array]})['a/0'])\n"
  ).replace("P(", "PartitionSpec(")
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
    capture_output=True,
    text=True,
    check=True,
  )
  array = np.random.default_rng(0).standard_normal((8, 6), np.float32)
  assert {int(line) for line in done.stdout.split()} == {_plain(array)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  assert loop.train(tiny_config(), str(workdir)) == 4
  return workdir


def _data(workdir) -> pathlib.Path:
  """The file of a checkpoint that holds its arrays."""
  (path,) = (workdir / "checkpoints/4/state/ocdbt.process_0/d").iterdir()
  return path


def _flip_and_go_on(undisturbed, workdir, place):
  shutil.copytree(undisturbed, workdir)
  faults.flip(_data(workdir), place)
  drawn, whole = (run.restore(str(x)) for x in (workdir, undisturbed))
  if drawn.step == 4:  # the byte was not one of the averages
    jax.tree.map(np.testing.assert_array_equal, drawn.params, whole.params)
  config = tiny_config()
  assert loop.train(config, str(workdir)) == 4
  ours, wanted = (stored_state(config, x) for x in (workdir, undisturbed))
  jax.tree.map(np.testing.assert_array_equal, ours, wanted)
  # The end of the file, 6% here, is an index that Orbax has merged into another
  # file: zeroed as a whole, it changes nothing.
  aside = (workdir / "checkpoints" / "4.unreadable").is_dir()
  assert aside or place > 0.93


def test_a_flipped_byte_goes_back_to_the_checkpoint_before(
  undisturbed, tmp_path, caplog, capfd
):
  _flip_and_go_on(undisturbed, tmp_path / "run", 0.5)
  assert "differs); trying the one before" in caplog.text
  assert capfd.readouterr().err == ""  # no dumps of libraries


@pytest.mark.slow
@pytest.mark.parametrize("place", np.linspace(0, 1, 20).round(3).tolist())
def test_flipped_bytes_at_twenty_places(undisturbed, tmp_path, place):
  _flip_and_go_on(undisturbed, tmp_path / "run", place)


def test_averages_alone_are_verified_too(undisturbed, tmp_path):
  weights = run.restore(str(undisturbed))
  checkpoint.save_weights(str(tmp_path), weights.config, weights.params)
  jax.tree.map(
    np.testing.assert_array_equal,
    run.restore(str(tmp_path)).params,
    weights.params,
  )
  (path,) = tmp_path.glob("checkpoints/0/state/ocdbt.process_0/d/*")
  faults.flip(path, 0.5)
  with pytest.raises(ConfigError, match=r"can be read \(steps \[0\]; .*check"):
    run.restore(str(tmp_path))


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "config", "state"])
def test_flipped_metadata_is_told_in_plain_lines(
  undisturbed, tmp_path, name, caplog, capfd
):
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  path = workdir / "checkpoints" / "4" / name
  faults.flip(path if path.is_file() else path / "manifest.ocdbt", 0.5)
  assert int(stored_state(tiny_config(), workdir).step) == 2
  assert "trying the one before" in caplog.text
  assert not [x for x in caplog.records if x.name != "root"]
  for text in (caplog.text, capfd.readouterr().err):
    assert "Traceback" not in text
    assert "handler" not in text
    assert "object at" not in text


def test_verify_names_what_is_damaged(undisturbed, tmp_path, capsys):
  args = [f"--workdir={undisturbed}"]
  assert cli.execute(verify, args) == 0
  assert capsys.readouterr().out.splitlines() == [
    "checkpoint 2: good (95 arrays, 0.2 MB)",
    "checkpoint 4: good (95 arrays, 0.2 MB)",
  ]
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  faults.flip(_data(workdir), 0.5)
  (workdir / "config.json").write_text("{")
  (workdir / "data.json").write_text("[]")
  before = sorted(workdir.rglob("*"))
  assert cli.execute(verify, [f"--workdir={workdir}"]) == 1
  good, bad, advice, config, data = capsys.readouterr().out.splitlines()
  assert good.startswith("checkpoint 2: good")
  assert bad.startswith("checkpoint 4: ")
  assert bad.endswith(": its checksum differs")
  assert config.startswith("config.json: ")
  assert data == "data.json: it holds no JSON object"
  assert "use the newest good one, 2" in advice
  assert sorted(workdir.rglob("*")) == before
  assert cli.execute(verify, ["--workdir=none"]) == 1
  assert "--workdir=none holds no checkpoint" in capsys.readouterr().err


def test_a_later_format_is_refused(undisturbed, monkeypatch):
  monkeypatch.setattr(listing, "FORMAT", 1)
  with pytest.raises(ConfigError, match=r"4 is of format 2, .* up to 1; use"):
    loop.train(tiny_config(), str(undisturbed))
  assert listing.steps(str(undisturbed)) == [2, 4]
