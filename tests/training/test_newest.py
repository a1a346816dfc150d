"""Checkpoints that one process of several cannot read."""

import pytest
from etils import epath

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.training import listing, lock, newest
from tests.faults import flip
from tests.job import started
from tests.tiny import flags

DAMAGED = {"there": True, "kind": "damage", "why": "a part is missing"}
WORLD = {"there": True, "kind": "world", "why": "Input/output error"}
WRONG = {"there": True, "kind": "config", "why": "another network"}


@pytest.fixture
def job(monkeypatch, tmp_path):
  """A run of steps 1 and 2 in a job whose second process says what it is told.

  Returns:
    What it says of each try of a step, and the tries of this process.
  """
  for step in (1, 2):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  other, tries = {}, []

  def gather(value):
    if not isinstance(value, dict):  # not of a try
      return [value, value]
    told = other.get(tries[-1], [])
    return [value, told.pop(0) if told else {}]

  def load(path: epath.Path):
    tries.append(int(path.name))
    return f"loaded {path.name}"

  monkeypatch.setattr(processes, "gather", gather)
  monkeypatch.setattr(listing, "about", lambda path: {})
  return other, tries, lambda: newest.newest_good(str(tmp_path), load)


def test_damage_that_another_process_sees_counts_here(job, caplog):
  other, tries, find = job
  other[2] = [DAMAGED] * 3
  assert find() == ("loaded 1", 1, [2])
  assert tries == [2, 2, 2, 1]
  assert "2 cannot be read (process 1: a part is missing); tr" in caplog.text


def test_one_failed_read_elsewhere_is_tried_again_by_all(job):
  other, tries, find = job
  other[2] = [WORLD]
  assert find() == ("loaded 2", 2, [])
  assert tries == [2, 2]


@pytest.mark.parametrize(
  ("told", "said"),
  [
    (WORLD, r"2 could not be read in 3 tries \(process 1: Input/output error"),
    (WRONG, "process 1: another network"),
    (DAMAGED | {"there": False}, "there for process 0, but process 1: a part"),
  ],
)
def test_what_is_no_damage_elsewhere_is_an_error_here(job, told, said):
  other, _, find = job
  other[2] = [told] * 3
  with pytest.raises(ConfigError, match=said):
    find()


TRAIN = """
import sys
from arflow_jax import cli, train
from arflow_jax.training import listing
listing.PAUSES = (0.1, 0.1)
sys.modules["train"], sys.argv = train, ["train", *{argv!r}]
cli.run("train")
"""


def _train(workdir, **changes):
  """Trains on two processes of one device, each with half of the weights."""
  argv = [*flags(mesh__fsdp=2, checkpoint__every=1, **changes)]
  argv.append(f"--workdir={workdir}")
  with started(TRAIN.format(argv=argv)) as both:
    said = [process.communicate(timeout=120) for process in both]
  assert "Traceback" not in str(said)
  return [process.returncode for process in both], said


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path):
  codes, said = _train(tmp_path)
  assert codes == [0, 0], said
  for step, broken in ((4, False), (3, True)):  # what process 1 alone reads
    folder = tmp_path / "checkpoints" / str(step) / "state/ocdbt.process_1/d"
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    if broken:
      largest.write_bytes(largest.read_bytes()[:50])
    else:
      flip(largest, 0.5)
  codes, said = _train(tmp_path, steps=5)
  assert codes == [0, 0], said
  assert f"resuming {tmp_path} after step 2" in said[0][0]
  assert "3 cannot be read (process 1: " in said[0][1]
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"3", "4", "5", "3.unreadable", "4.unreadable"}

  codes, said = _train(tmp_path, steps=6, seed=1)
  assert codes == [1, 1], said
  assert all("frozen keys differ: seed (stored 0" in err for _, err in said)

  with lock.held(str(tmp_path)):
    codes, said = _train(tmp_path, steps=6)
  assert codes == [1, 1], said
  assert all("in use by another trainer (process" in err for _, err in said)
  assert "error: process 0 has failed: --workdir=" in said[1][1]
