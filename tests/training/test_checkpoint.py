"""Stored runs: weights alone, earlier layouts and keys, any file system."""

import contextlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.sampling import run
from arflow_jax.training import checkpoint, listing, loop, relayout
from arflow_jax.training import program as program_lib
from arflow_jax.training.saver import Saver
from tests.bucket import Bucket
from tests.tiny import stored_state, tiny_config

TINY_RUN = pathlib.Path("tests/sampling/tiny_run")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A place to run from, and the bucket's contents elsewhere."""
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setattr(Bucket, "ROOT", str(tmp_path / "there"))
  return tmp_path


def test_a_run_can_live_in_a_bucket(bucket):
  """Trained, resumed, told to be finished and sampled; nothing lands here."""
  workdir = "bucket://name/run"
  assert loop.train(tiny_config(steps=2), workdir) == 2
  assert loop.train(tiny_config(), workdir) == 4
  assert run.restore(workdir).step == 4
  assert listing.steps(workdir) == [2, 4]
  there = bucket / "there" / "name" / "run"
  assert {path.name for path in there.iterdir()} >= {
    "checkpoints",
    "config.json",
    "metrics.jsonl",
  }
  shutil.rmtree(there / "checkpoints" / "4" / "state")
  assert loop.train(tiny_config(), workdir) == 4
  assert (there / "checkpoints" / "4.unreadable").is_dir()
  assert list((bucket / "here").iterdir()) == []


@pytest.mark.parametrize("workdir", ["run", "bucket://name/run"])
def test_a_reader_of_the_metrics_sees_each_step_once(bucket, workdir):
  loop.train(tiny_config(log__every=1, steps=3), workdir)
  # As after a crash in step 4: the checkpoint that is left is that of step 2.
  (epath.Path(workdir) / "checkpoints" / "3").rmtree()
  path = epath.Path(workdir) / "metrics.jsonl"
  before = path.read_text().splitlines()
  path.write_text("\n".join([*before, '{"step": 4, "lo']))
  loop.train(tiny_config(log__every=1), workdir)
  records = [json.loads(line) for line in path.read_text().splitlines()]
  assert [record["step"] for record in records] == [1, 2, 3, 4]
  assert records[2]["loss"] == json.loads(before[2])["loss"]


def test_a_bucket_is_never_a_local_folder():
  folder = listing.folder("gs://name/run")
  assert str(folder) == "gs://name/run/checkpoints"


def test_only_what_orbax_calls_complete_is_a_checkpoint(tmp_path, monkeypatch):
  folder = tmp_path / "checkpoints"
  for name in ("7", "9.orbax-checkpoint-tmp-1", "11", "x"):
    (folder / name).mkdir(parents=True)
  assert listing.steps(str(tmp_path)) == [7, 11]
  # On object stores a folder has its final name before it is complete.
  from orbax.checkpoint.path import step

  monkeypatch.setattr(
    step, "is_path_finalized", lambda path, **_: path.name != "11"
  )
  assert listing.steps(str(tmp_path)) == [7]


@pytest.fixture(scope="module")
def weights():
  config = tiny_config()
  return config, program_lib.build(config).init().params


def test_weights_alone_make_a_run(weights, tmp_path):
  config, params = weights
  workdir = str(tmp_path / "new" / "run")
  checkpoint.save_weights(workdir, config, params)
  restored = run.restore(workdir)
  assert restored.step == 0
  jax.tree.map(np.testing.assert_array_equal, restored.params, params)
  # Weights that no draw from the seed would give.
  moved, elsewhere = jax.tree.map(lambda x: x + 1, params), tmp_path / "moved"
  checkpoint.save_weights(str(elsewhere), config, moved)
  begun = stored_state(config, elsewhere)
  assert int(begun.step) == 0
  jax.tree.map(np.testing.assert_array_equal, begun.params, moved)
  jax.tree.map(np.testing.assert_array_equal, begun.ema, moved)
  assert loop.train(config, workdir) == 4
  # And it is the run that the same weights would have made from the seed.
  assert loop.train(config, str(tmp_path / "seed")) == 4
  ours, wanted = (
    stored_state(config, workdir),
    stored_state(config, tmp_path / "seed"),
  )
  jax.tree.map(np.testing.assert_array_equal, ours, wanted)
  with pytest.raises(ConfigError, match=r"holds a run already .*\[0, 2, 4\]"):
    checkpoint.save_weights(workdir, config, params)


def test_parameters_of_another_cut_come_back(weights, tmp_path, monkeypatch):
  """A whole train state, its moments and averages too."""
  config, _ = weights
  program = program_lib.build(config)
  state = program.init()
  cut = lambda leaf: leaf.ndim == 3 and leaf.shape[1:] == (16, 16)
  store = checkpoint._stored

  def earlier(state):  # as if heads had an axis of their own in the run
    split = lambda x: x.reshape(*x.shape[:2], 2, 8) if cut(x) else x
    return jax.tree.map(split, store(state))

  monkeypatch.setattr(checkpoint, "_stored", earlier)
  with contextlib.closing(Saver(str(tmp_path), config, state)) as saver:
    saver.finish(3, state, {})
  monkeypatch.setattr(checkpoint, "_stored", store)
  stored = listing.arrays(epath.Path(tmp_path) / "checkpoints" / "3")
  attention = stored["params"]["blocks"]["attention"]
  assert attention["q_proj"]["kernel"].shape == (2, 16, 2, 8)
  back = stored_state(config, tmp_path)
  describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
  wanted = program.abstract_state
  assert jax.tree.map(describe, back) == jax.tree.map(describe, wanted)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  alone = run.restore(str(tmp_path)).params
  jax.tree.map(np.testing.assert_array_equal, alone, state.ema)


@pytest.mark.parametrize(
  ("shape", "spec", "stored", "wanted"),
  [
    # L, E, H, D from L, E, HD and from L, H, D, E likewise.
    ((3, 8, 2, 4), (None, "f"), (3, 8, 8), (None, "f", None)),
    ((3, 2, 4, 8), (None, None, None, "f"), (3, 8, 8), (None, None, "f")),
    ((8, 8), ("f", None), (64,), (None,)),
    ((4, 4, 4), ("f",), (4, 2, 2, 4), ("f", None, None, None)),
  ],
)
def test_what_is_read_stays_split(shape, spec, stored, wanted):
  mesh = AbstractMesh((2,), ("f",))
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  metadata = {"x": jax.ShapeDtypeStruct(stored, jnp.float32)}
  read = relayout.as_stored({"x": leaf}, metadata)["x"]
  assert read.shape == stored
  assert read.sharding.spec == PartitionSpec(*wanted)


def test_another_size_is_refused_by_name():
  leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  metadata = {"x": jax.ShapeDtypeStruct((4, 5), jnp.float32)}
  with pytest.raises(ConfigError, match=r"\['x'\] as \(4, 5\)"):
    relayout.as_stored({"x": leaf}, metadata)


def test_keys_younger_than_a_run_have_the_values_it_had():
  plain = json.loads(config_lib.dumps(tiny_config()))
  del plain["optimizer"]["final_fraction"]
  stored = config_lib.complete(plain, {"model.mlp_ratio": 4.0})
  assert stored.model.mlp_ratio == 4.0
  assert config_lib.complete(plain, {}).optimizer.final_fraction == 0.01
  kept = config_lib.complete(
    plain | {"model": plain["model"] | {"mlp_ratio": 3.0}},
    {"model.mlp_ratio": 4.0},
  )
  assert kept.model.mlp_ratio == 3.0
  stored = config_lib.complete(plain, {})
  config_lib.check_relaunch(stored, tiny_config(), "run")
  changed = tiny_config(optimizer__final_fraction=0.5)
  with pytest.raises(ConfigError, match=r"stored 0\.01, now 0\.5"):
    config_lib.check_relaunch(stored, changed, "run")


def test_a_damaged_config_file_is_not_used(tmp_path, caplog):
  shutil.copytree(TINY_RUN, tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text("{")
  assert run.restore(str(tmp_path / "run")).config.sample.num_steps == 3
  assert "config.json is not used" in caplog.text
