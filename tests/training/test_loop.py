"""Runs: exact resume, fallbacks, refusals."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.sampling import run
from arflow_jax.training import checkpoint, listing, loop, newest
from arflow_jax.training import program as program_lib
from tests.tiny import flags, stored_state, tiny_config, trainer


def _same(a, b) -> bool:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of four steps without a break."""
  workdir = tmp_path_factory.mktemp("straight")
  assert loop.train(tiny_config(), str(workdir)) == 4
  return workdir


@pytest.fixture
def copy(straight, tmp_path):
  """A copy of it to break."""
  shutil.copytree(straight, tmp_path / "run")
  return tmp_path / "run"


def test_two_and_two_steps_are_four_bit_for_bit(straight, tmp_path):
  assert loop.train(tiny_config(steps=2), str(tmp_path)) == 2
  assert loop.train(tiny_config(), str(tmp_path)) == 4
  config = tiny_config()
  assert _same(stored_state(config, tmp_path), stored_state(config, straight))


def test_a_finished_run_says_so_and_keeps_new_settings(copy, capsys):
  config = tiny_config(sample__num_steps=9, eval__num_samples=10)
  assert loop.train(config, str(copy)) == 4
  assert "is finished: 4 steps are done, steps=4" in capsys.readouterr().out
  restored = run.restore(str(copy)).config
  assert (restored.sample.num_steps, restored.eval.num_samples) == (9, 10)


def test_data_that_cannot_be_read_fails_before_a_state_is_made(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint, "restore", None)
  config = tiny_config(data__dir="nowhere", data__source="tfds:cifar10")
  with pytest.raises(ConfigError, match=r"data\.dir='nowhere'"):
    loop.train(config, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_what_changes_rounding_alone_may_change(copy):
  """A run that moves to other hardware."""
  moved = tiny_config(
    steps=5,
    model__remat="full",
    model__attention="reference",
    optimizer__accumulation=2,
  )
  assert loop.train(moved, str(copy)) == 5


def test_other_data_is_refused(copy):
  kept = json.loads((copy / "data.json").read_text())
  assert kept["classes"] == [*"0123456789"]
  assert sum(kept["images"]) == 1400
  kept["images"][3] += 1
  (copy / "data.json").write_text(json.dumps(kept))
  with pytest.raises(ConfigError, match=r"data\.dir holds other .* \('3', 14"):
    loop.train(tiny_config(steps=5), str(copy))
  shutil.move(copy / "checkpoints", copy / "away")
  assert loop.train(tiny_config(steps=1), str(copy)) == 1  # nothing to protect
  shutil.rmtree(copy / "checkpoints")
  shutil.move(copy / "away", copy / "checkpoints")
  (copy / "data.json").unlink()  # as a run of an earlier version
  assert loop.train(tiny_config(steps=5), str(copy)) == 5
  assert (copy / "data.json").exists()


def test_a_folder_in_the_way_is_found_at_the_start(tmp_path, monkeypatch):
  monkeypatch.setattr(program_lib, "build", None)
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(ConfigError, match=r"metrics.jsonl is a folder; move it"):
    loop.train(tiny_config(), str(tmp_path))


@pytest.mark.parametrize("workdir", ["s3://bucket/run", "file:///tmp/run"])
def test_an_address_that_cannot_be_opened_is_refused(workdir):
  with pytest.raises(ConfigError, match=f"{workdir} cannot be opened"):
    loop.train(tiny_config(), workdir)


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_a_file_in_the_way_is_found_at_the_start(tmp_path, monkeypatch, name):
  monkeypatch.setattr(program_lib, "build", None)
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).touch()
  with pytest.raises(ConfigError, match=f"{name} is a file; move it away"):
    loop.train(tiny_config(), str(tmp_path / "run"))


def test_progress_and_metrics(straight):
  lines = (straight / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["step"] for record in records] == [1, 2, 4]
  assert records[0].keys() == {"step", "loss", "grad_norm", "param_norm"}
  found = records[-1].keys() - records[0].keys()
  wanted = {"images_per_second", "step_time", "input_wait", "goodput"}
  # What other devices tell, and jobs of several processes.
  assert found - {"mfu", "peak_memory"} == wanted


@pytest.mark.parametrize(
  ("run", "steps", "every", "losses"),
  [
    # Of format 1, with another layout of parameters.
    (
      "tests/sampling/tiny_run",
      203,
      1,
      [0.8231241106987, 0.6754682064056396, 0.8065956234931946],
    ),
    # Of format 2, after step 203; its first mean covers steps 201 to 204.
    (
      "tests/training/run_of_format_2",
      206,
      2,
      [0.7515822798013687, 0.8705807030200958],
    ),
  ],
)
def test_a_run_of_an_earlier_version_goes_on(
  tmp_path, run, steps, every, losses, caplog
):
  """It has the losses that it would have had with the code that made it."""
  shutil.copytree(run, tmp_path / "run")
  config = newest.read_config(str(tmp_path / "run")).unlock()
  config.steps, config.log.every = steps, every
  assert loop.train(config, str(tmp_path / "run")) == steps
  assert ("wrote no checksums" in caplog.text) == ("tiny_run" in run)
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line)["loss"] for line in lines]
  np.testing.assert_allclose(found, losses, rtol=1e-5)


@pytest.mark.parametrize(
  "change", [{"sample__method": "foo"}, {"eval__num_samples": 0}]
)
def test_what_would_fail_when_it_draws_fails_at_the_start(tmp_path, change):
  key, value = next(iter(change.items()))
  named = key.replace("__", ".")
  with pytest.raises(ConfigError, match=f"{named}={value!r}"):
    loop.train(tiny_config(**change), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_half_written_checkpoint_falls_back(straight, copy, damage, caplog):
  newest = copy / "checkpoints" / "4"
  if damage == "remove":
    shutil.rmtree(newest / "state")
  else:
    for path in newest.rglob("*"):
      if path.is_file() and path.stat().st_size > 100:
        path.write_bytes(path.read_bytes()[:50])
  assert loop.train(tiny_config(), str(copy)) == 4
  assert "cannot be read" in caplog.text
  assert (copy / "checkpoints" / "4.unreadable").is_dir()  # nothing is lost
  # And what was saved in mid-run leads to the same end.
  config = tiny_config()
  assert _same(stored_state(config, copy), stored_state(config, straight))


def test_one_failed_read_costs_nothing(straight, copy, monkeypatch, caplog):
  real, fails = checkpoint._load, [OSError(5, "Input/output error")]

  def load(*args):
    if fails:
      raise fails.pop()
    return real(*args)

  monkeypatch.setattr(checkpoint, "_load", load)
  config = tiny_config(steps=5)
  assert loop.train(config, str(copy)) == 5
  assert "again in 0 s" in caplog.text
  names = {path.name for path in (copy / "checkpoints").iterdir()}
  assert names >= {"4", "5"}
  assert not any("unreadable" in name for name in names)


def _chained(text):
  """As Orbax raises what tensorstore has raised."""
  error = KeyError("No entry for checkpointable=state")
  error.__cause__ = ValueError(text)
  return error


@pytest.mark.parametrize(
  "error",
  [
    OSError(5, "Input/output error"),
    MemoryError(),
    ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    jax.errors.JaxRuntimeError("INTERNAL: compiling failed"),
    _chained("DATA_LOSS: Error reading x [os_error_code='5']"),
    _chained("PERMISSION_DENIED: Error reading x [os_error_code='13']"),
    AssertionError("what nobody has thought of"),
  ],
  ids=repr,
)
def test_a_read_that_keeps_failing_sets_nothing_aside(copy, monkeypatch, error):
  def load(*args):
    raise error

  monkeypatch.setattr(checkpoint, "_load", load)
  before = sorted(path.name for path in (copy / "checkpoints").iterdir())
  with pytest.raises(
    ConfigError, match=r"4 could not be read in 3 tries .*aga"
  ):
    loop.train(tiny_config(steps=5), str(copy))
  after = sorted(path.name for path in (copy / "checkpoints").iterdir())
  assert after == before


def test_only_unreadable_checkpoints_are_an_error(copy):
  for path in (copy / "checkpoints").iterdir():
    shutil.rmtree(path / "state")
  with pytest.raises(ConfigError, match=r"none of the checkpoints .* \[2, 4\]"):
    loop.train(tiny_config(), str(copy))
  assert (copy / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize(
  "frozen",
  [
    {"model__width": 32},
    {"data__sequence_length": 3},
    {"optimizer__peak_lr": 1e-3},
    {"ema__decay": 0.5},
    {"seed": 1},
    {"batch_size": 8},
  ],
)
def test_a_frozen_change_is_refused_by_name(straight, frozen):
  key = next(iter(frozen)).replace("__", ".")
  with pytest.raises(ConfigError, match=f"frozen keys differ: {key} "):
    loop.train(tiny_config(**frozen), str(straight))


def test_a_free_change_goes_on(copy):
  config = tiny_config(
    steps=5,
    log__every=1,
    checkpoint__every=1,
    checkpoint__keep=1,
    sample__num_steps=9,
    eval__num_samples=10,
  )
  assert loop.train(config, str(copy)) == 5
  assert newest.read_config(str(copy)).sample.num_steps == 9


def test_retention_keeps_the_newest_and_every_kth(tmp_path):
  config = tiny_config(
    steps=7, checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3
  )
  loop.train(config, str(tmp_path))
  assert listing.steps(str(tmp_path)) == [3, 6, 7]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  # The weights grow a hundredfold a step until they overflow.
  config = tiny_config(
    steps=50,
    checkpoint__every=1,
    optimizer__peak_lr=100.0,
    optimizer__warmup_steps=0,
    optimizer__weight_decay=1.0,
  )
  with pytest.raises(FloatingPointError) as error:
    loop.train(config, str(tmp_path))
  kept = listing.steps(str(tmp_path))
  assert f"the last good checkpoint is step {kept[-1]}" in str(error.value)
  assert f"at step {kept[-1] + 1};" in str(error.value)
  for leaf in jax.tree.leaves(stored_state(config, tmp_path).params):
    assert np.isfinite(leaf).all()


def test_averaged_weights_alone_restore(straight):
  restored = run.restore(str(straight))
  assert restored.step == 4
  whole = stored_state(tiny_config(), straight)
  assert _same(restored.params, whole.ema)
  assert not _same(restored.params, whole.params)


def test_two_steps_at_most_are_under_way(monkeypatch):
  """So that a stop waits for no more of them, and NaN shows soon."""
  fetched = []
  real = jax.device_get
  monkeypatch.setattr(
    jax, "device_get", lambda x: fetched.append(x["loss"]) or real(x)
  )
  metrics = loop._Metrics({})
  for step in range(1, 5):
    metrics.add(step, {"loss": jax.numpy.float32(step)})
    assert fetched == list(range(1, step))  # all but the one just started
  metrics.add(5, {"loss": jax.numpy.float32(np.nan)})
  with pytest.raises(FloatingPointError, match="loss is nan at step 5"):
    metrics.add(6, {"loss": jax.numpy.float32(0)})


@pytest.mark.slow
def test_means_cover_the_same_steps_after_an_interruption(tmp_path):
  config = tiny_config(steps=9, log__every=4)
  assert loop.train(config, str(tmp_path / "undisturbed")) == 9
  for steps in (3, 6, 9):
    shorter = tiny_config(steps=steps, log__every=4)
    assert loop.train(shorter, str(tmp_path / "run")) == steps
  found = []
  for name in ("undisturbed", "run"):
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    found.append({r["step"]: (r["loss"], r["grad_norm"]) for r in records})
  whole, pieces = found
  assert list(whole) == [1, 4, 8, 9]
  assert {step: pieces[step] for step in whole} == whole


def _losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def test_any_mesh_trains_alike_and_resumes_anywhere(straight, tmp_path):
  """Eight CPU devices, a mesh with every axis, then one device."""
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
  args = flags(steps=3, mesh__fsdp=2, mesh__tensor=2)
  with trainer(tmp_path, *args, env=environment) as process:
    output = process.stdout.read()
  assert process.returncode == 0, output
  assert "on 8 cpu device(s)" in output
  assert loop.train(tiny_config(), str(tmp_path)) == 4
  found, steps = _losses(tmp_path), (1, 2, 4)  # 4: the mean of 3 and 4
  wanted = pytest.approx(_losses(straight), rel=1e-5)
  assert {step: found[step] for step in steps} == wanted
  config = tiny_config()
  ours, wanted = stored_state(config, tmp_path), stored_state(config, straight)
  start = program_lib.build(config).init()
  # How far four steps have moved, not where they are: a wrong gradient shows.
  trees = (ours.params, wanted.params, start.params)
  for a, b, first in zip(*map(jax.tree.leaves, trees)):
    moved = np.abs(b - first).max()
    assert moved > 0
    np.testing.assert_allclose(a, b, atol=0.02 * moved)


def test_the_form_of_the_step_is_said_before_it_is_compiled(
  monkeypatch, capsys
):
  seen = []

  def form(self, batch_size):
    seen.append(jax.sharding.get_abstract_mesh().axis_names)
    return f"the form for {batch_size} items"

  program = program_lib.build(tiny_config())
  monkeypatch.setattr(type(program.branch), "form", form)
  loop._announce(program)
  said, compiling = capsys.readouterr().out.splitlines()
  assert said == f"the form for {program.config.batch_size} items"
  assert compiling.endswith("compiling the train step ...")
  assert set(seen) == {("data", "fsdp", "tensor")}
