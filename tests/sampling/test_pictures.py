"""Pictures drawn on the way: which, when, and that they change no result."""

import signal

import jax
import numpy as np
import pytest
from PIL import Image

from arflow_jax.errors import STOPPED
from arflow_jax.sampling import draw, images, pictures
from arflow_jax.training import checkpoint, listing, loop, telemetry
from arflow_jax.training import program as program_lib
from tests import faults, job
from tests.tiny import flags, random_params, stored_state, tiny_config

CONFIG = {"log__pictures": 2, "sample__num_steps": 2}


def _pixels(path):
  return np.asarray(Image.open(path))


def _state(program):
  """One whose weights draw something: fresh ones leave the noise as it is."""
  return program.init(random_params(program.abstract_state.params))


@pytest.fixture
def make(tmp_path):
  """The observer of a run that has not begun, with a state."""

  def make(**changes):
    config = tiny_config(**CONFIG | changes)
    program = program_lib.build(config)
    log = telemetry.Telemetry(str(tmp_path), 0, config.steps, 20)
    made = pictures.Pictures(program, str(tmp_path), 0, log)
    return made, _state(program)

  return make


def _train(workdir, makes):
  config = tiny_config(**CONFIG)
  assert loop.train(config, str(workdir), makes=makes) == 4
  return config


def test_a_run_draws_them_on_the_way(tmp_path):
  _train(tmp_path, [pictures.Pictures])
  found = sorted(path.name for path in (tmp_path / "pictures").iterdir())
  assert found == ["2.png", "4.png"]
  (events,) = tmp_path.glob("events.*")
  assert events.read_bytes().count(b"\x89PNG") == 2


@pytest.mark.slow
def test_pictures_change_no_result(tmp_path):
  with_them, without = tmp_path / "with", tmp_path / "without"
  config = _train(with_them, [pictures.Pictures])
  _train(without, [])
  assert not (without / "pictures").exists()
  ours, theirs = (stored_state(config, x) for x in (with_them, without))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_picture_is_what_sample_draws(make, tmp_path):
  """Of the averaged weights, two of each class, and the same noise."""
  made, state = make()
  made.between(4, state, bool)
  run, out = str(tmp_path / "run"), str(tmp_path / "x.png")
  checkpoint.save_weights(run, tiny_config(**CONFIG), state.ema)
  draw.sample_to_file(run, out, labels="0-9", per_label=2, overrides={})
  drawn = _pixels(tmp_path / "pictures" / "4.png")
  np.testing.assert_array_equal(drawn, _pixels(out))
  other = state.replace(
    params=None, ema=jax.tree.map(lambda x: 2 * x, state.ema)
  )
  made.between(2, other, bool)
  assert not np.array_equal(drawn, _pixels(tmp_path / "pictures" / "2.png"))


def test_what_is_there_is_kept_and_a_stop_cuts_off(make, tmp_path, capsys):
  made, state = make()
  path = tmp_path / "pictures" / "2.png"
  for step in (0, 1, 3):
    made.between(step, state, bool)
  made.between(2, state, lambda: True)  # before the second of three blocks
  assert not path.parent.exists()
  path.parent.mkdir()
  path.write_text("kept")
  made.between(2, state, bool)
  assert path.read_text() == "kept"
  path.unlink()
  made.between(2, state, bool)
  assert _pixels(path).ndim == 3
  assert [path.name for path in path.parent.iterdir()] == ["2.png"]
  path.unlink()
  capsys.readouterr()
  broken = state.replace(ema=jax.tree.map(lambda x: x * np.nan, state.ema))
  made.between(2, broken, bool)
  assert "no picture of step 2: samples among" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_said_once(make, tmp_path, capsys, monkeypatch):
  made, state = make(model__channels=4, data__source="random")
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("no pictures are drawn on the way: this run draws 8 x")
  made.between(2, state, bool)

  def full(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(images.Generator, "compile", full)
  made, state = make()
  (line,) = capsys.readouterr().out.splitlines()
  assert line.endswith("lower sample.block_size=8")
  made.between(2, state, bool)
  assert not (tmp_path / "pictures").exists()


def test_a_launch_that_gets_to_no_picture_compiles_none(make, monkeypatch):
  monkeypatch.setattr(images.Generator, "compile", None)
  make(steps=1)
  make(log__pictures=0)


TWO = """
from arflow_jax.parallel import processes
processes.start()
import jax
from arflow_jax.sampling import pictures
from arflow_jax.training import program, telemetry
from tests.sampling import test_pictures
from tests.tiny import tiny_config
config = tiny_config(mesh__fsdp=2, mesh__tensor=2, **test_pictures.CONFIG)
program = program.build(config)
log = telemetry.Telemetry({folder!r}, 0, 4, 20)
made = pictures.Pictures(program, {folder!r}, 0, log)
state = test_pictures._state(program)
made.between(2, state, lambda: processes.agree(False)[0])
whole = jax.tree.map(lambda x: x.is_fully_replicated, state.ema)
print(program.mesh.size, all(jax.tree.leaves(whole)))
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_draw_the_same(make, tmp_path):
  """The weights are split over all of them."""
  made, state = make()
  made.between(4, state, bool)
  said = job.two_processes(TWO.format(folder=str(tmp_path)), 4)
  assert [lines[-1] for lines in said] == ["8 False"] * 2
  one, two = (_pixels(tmp_path / f"pictures/{step}.png") for step in (4, 2))
  assert np.abs(one.astype(int) - two).max() <= 1


@pytest.mark.slow
def test_a_signal_while_drawing_stops_a_run_that_is_saved(tmp_path):
  command = ["arflow_jax.train", *flags(**CONFIG), f"--workdir={tmp_path}"]
  struck = faults.run_struck("drawing on the way", signal.SIGTERM, *command)
  assert struck.returncode == STOPPED, struck.stderr
  assert not (tmp_path / "pictures").exists()  # cut off
  assert "stopped after step 3, saved" in struck.stdout
  assert listing.steps(str(tmp_path)) == [2, 3]
  made = [pictures.Pictures]
  assert loop.train(tiny_config(**CONFIG), str(tmp_path), makes=made) == 4
  assert (tmp_path / "pictures" / "4.png").exists()
