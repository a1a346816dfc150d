"""A run that is killed again and again is the run that nobody disturbed."""

import json
import math
import random
import re
import signal
import threading
import time
from typing import NamedTuple

import pytest
from etils import epath

from arflow_jax.errors import STOPPED
from arflow_jax.training import listing, loop, row_log
from tests import faults
from tests.job import mains
from tests.tiny import flags, tiny_config

STEPS, KILLS = 60, 10
RUN = {
  "steps": STEPS,
  "batch_size": 8,
  "checkpoint__every": 5,
  "log__every": 1,
  "debug__rows": True,
  "optimizer__warmup_steps": 2,
}
# Before the first step there is nothing to save.
EARLY = ("start-up", "restoring", "compiling")
# Steps take 0.05 s at least, and a process that strikes itself notes when.
BEFORE = """
import pathlib, time
from arflow_jax.training import program
place = program.Program.place
def placed(self, batch):
  time.sleep(0.05)
  return place(self, batch)
program.Program.place = placed
kill = os.kill
def noted(*args):
  pathlib.Path({noted!r}).write_text(str(time.time()))
  kill(*args)
os.kill = noted
if process in {hit!r} and {point!r}:
  import signal
  from tests import faults
  faults._strike({point!r}, signal.{name})
"""


class Kill(NamedTuple):
  """One of them.

  Attributes:
    number: of the signal.
    everybody: whether it comes to all processes, or else to one.
    point: of `faults`, at which a process sends it to itself; empty: it comes
      from outside, so many seconds after so many steps of the launch.
    steps, seconds: see there.
  """

  number: signal.Signals
  everybody: bool
  point: str
  steps: int
  seconds: float


def _kills(dice: random.Random) -> list[Kill]:
  """Half of them with either signal, of each one or two in a save."""
  # Of these points there is one at the end alone.
  known = ["" if "last" in point else point for point in faults.TRAINING]
  found = []
  for number in (signal.SIGKILL, signal.SIGTERM):
    points = ["in a save", "", "", ""]
    points.append(dice.choice([*known, ""]))
    for point in points:
      everybody = dice.random() < 0.3
      moment = dice.randint(2, 6), dice.uniform(0, 0.4)
      found.append(Kill(number, everybody, point, *moment))
  dice.shuffle(found)
  return found


def _places(dice: random.Random) -> list[tuple[int, int, dict[str, int]]]:
  """Processes, devices of each, and the mesh, of each launch."""
  counts = [1, 1, 1, 2, 2, 2, 2, 2, 4, 4]
  dice.shuffle(counts)
  found = []
  for count in (2, *counts):
    devices = dice.choice([1, 2, 4, 8][: 4 - count // 2])
    tensor = dice.choice([1, 2]) if count * devices > 2 else 1
    fsdp = dice.choice([1, 2, count * devices // tensor])
    fsdp = math.gcd(fsdp, count * devices // tensor)
    mesh = {"mesh__fsdp": fsdp, "mesh__tensor": tensor}
    found.append((count, devices, mesh))
  return found


def _launch(workdir, place, kill, dice):
  """Trains until a kill, or to the end.

  Returns:
    Exit codes, which processes the signal came to, when it did, how many
    seconds later all had ended, when the first step was done, and all output.
  """
  count, devices, mesh = place
  hit, point, name = (), "", "SIGTERM"
  if kill:
    hit = tuple(range(count)) if kill.everybody else (dice.randrange(count),)
    point, name = kill.point, kill.number.name
  noted = workdir.parent / "noted"
  noted.unlink(missing_ok=True)
  before = BEFORE.format(noted=str(noted), hit=hit, point=point, name=name)
  command = [*flags(**RUN, **mesh)]
  command.append(f"--workdir={workdir}")  # last: a strike in a save looks there
  first, at, lines = None, 0.0, []
  with mains(
    "arflow_jax.train", *command, before=before, count=count, devices=devices
  ) as every:
    stuck = threading.Timer(240, lambda: [each.kill() for each in every])
    stuck.start()
    done = 0
    for line in every[0].stdout:
      lines.append(line)
      if re.match(r"step +\d", line):
        first = first or time.time()
        done += 1
        if kill and not point and done == kill.steps:
          time.sleep(kill.seconds)
          at = time.time()
          for i in hit:
            every[i].send_signal(kill.number)
    said = [each.communicate() for each in every]
    ended = time.time()
    stuck.cancel()
  at = at or float(noted.read_text() if noted.exists() else "nan")
  said[0] = ("".join(lines) + said[0][0], said[0][1])
  codes = [each.returncode for each in every]
  return codes, hit, at, ended - at, first, said


def _wanted(kill, hit, count):
  """The exit codes that each process may have."""
  killed = kill.number == signal.SIGKILL
  lost = {-signal.SIGABRT}
  if killed:
    # One of several that strike themselves may be late, and is ended by JAX.
    own = {-signal.SIGKILL} | (lost if kill.point and len(hit) > 1 else set())
    return [own if i in hit else lost for i in range(count)]
  if kill.point in EARLY:
    own = {STOPPED} | (lost if len(hit) > 1 else set())
    return [own if i in hit else lost for i in range(count)]
  return [{STOPPED}] * count


def _reached(workdir):
  """The last step that the newest launch has started, and where it began."""
  found = {}
  for path in (epath.Path(workdir) / "rows").iterdir():
    launch = int(path.stem.split("-")[1])
    found.setdefault(launch, []).append(path)
  files = found[max(found)]
  records = [record for file in files for record in row_log._records(file)]
  (after,) = {record["after"] for record in records if "after" in record}
  steps = [record["step"] for record in records if "step" in record]
  return max(found), max(steps, default=after), after


def _losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["step"] for record in records] == list(range(1, STEPS + 1))
  return [record["loss"] for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3])
def test_a_run_that_is_killed_ten_times(seed, tmp_path):
  """Every row of every step once, on 1, 2 and 4 processes."""
  dice = random.Random(seed)
  whole, run = tmp_path / "whole", tmp_path / "run"
  loop.train(tiny_config(**RUN), str(whole))
  lost, seconds, starts = [], [], []
  kills, places = _kills(dice), _places(dice)
  launch, reached, blow = 0, 0, None
  for kill, place in zip([*kills, None], places, strict=True):
    codes, hit, at, took, first, said = _launch(run, place, kill, dice)
    about = f"{kill}, processes {hit} of {place}: codes {codes}"
    if kill:
      wanted = _wanted(kill, hit, place[0])
      assert all(c in w for c, w in zip(codes, wanted)), (about, wanted, said)
      assert took < 30, (about, said)
    else:
      assert codes == [0] * place[0], (about, said)
    began = None
    if (run / "rows").exists():
      number, step, after = _reached(run)
      if number > launch:
        launch, began = number, after
        starts.append(after)
        if blow:
          lost.append(max(0, reached - after))
          reached = 0
        reached = max(reached, step)
    if first and blow:
      seconds.append(first - blow)
      blow = None
    print(
      f"{about}; began after {began}, reached {reached}, ended {took:.1f} s"
      f" after it; checkpoints {listing.steps(str(run))}",
      flush=True,
    )
    blow = blow or at
  print(f"steps lost {lost}, seconds lost {[round(x, 1) for x in seconds]}")
  assert len(lost) + 1 == len(starts) > KILLS // 2
  # The interval in progress, and the save in flight.
  assert max(lost) <= 2 * RUN["checkpoint__every"]
  wanted = row_log.read(str(whole))
  assert wanted.keys() == {
    (s, r) for s in range(1, STEPS + 1) for r in range(8)
  }
  assert row_log.read(str(run)) == wanted
  apart = [abs(a / b - 1) for a, b in zip(_losses(run), _losses(whole))]
  soon = max(x for start in starts for x in apart[start : start + 3])
  print(f"losses apart: {soon:.1e} soon after a start, {max(apart):.1e} ever")
  assert soon < 1e-5
  assert max(apart) < 1e-5
  names = {path.name for path in run.rglob("*")}
  assert not [n for n in names if re.search(r"tmp|\.part$|unreadable", n)]
