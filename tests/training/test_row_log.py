"""Every row of every step once, on the same numbers, whatever the devices."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.training import loop, row_log
from arflow_jax.training import program as program_lib
from tests.job import started
from tests.tiny import batches, flags, stored_state, tiny_config, trainer

SMALL = {
  "arflow": {},
  "flowar": {
    "model__patch_size": 4,
    "model__scales": (1, 2),
    "model__head_width": 256,  # four heads, which can be split
  },
}


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path, lines):
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.slow
def test_what_a_kill_has_lost_is_trained_again_alike(tmp_path):
  """The short form of the test of all devices below."""
  config = tiny_config(debug__rows=True)
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  assert loop.train(config, str(whole)) == 4
  wanted = row_log.read(str(whole))
  assert wanted.keys() == {
    (step, row) for step in range(1, 5) for row in range(4)
  }
  assert len(set(wanted.values())) == 16
  loop.train(tiny_config(debug__rows=True, steps=3), str(broken))
  shutil.rmtree(broken / "checkpoints" / "3")
  first = broken / "rows" / "0-1.jsonl"
  first.write_text(first.read_text() + '{"step": 4, "ro')
  assert loop.train(config, str(broken)) == 4
  (broken / "rows" / "0-3.jsonl").write_text("")  # killed as it began
  assert row_log.read(str(broken)) == wanted
  second = _lines(broken / "rows" / "0-2.jsonl")
  assert second[0] == {"after": 2}
  assert [record["step"] for record in second[1:]] == [3, 4]

  # And what is not alike is found.
  other = _lines(whole / "rows" / "0-1.jsonl")
  other[3]["hashes"][2] = "00000000"
  _write(first, other)
  with pytest.raises(ValueError, match=r"row\) \(3, 2\) was trained on someth"):
    row_log.read(str(broken))
  _write(first, [*second, second[1]])
  with pytest.raises(ValueError, match=r"launch 1 has trained \(3, 0\) twice"):
    row_log.read(str(broken))


@pytest.mark.parametrize(
  "family", ["arflow", pytest.param("flowar", marks=pytest.mark.slow)]
)
def test_a_hash_covers_all_that_a_row_is_trained_on(family):
  program = program_lib.build(tiny_config(family))
  batch = next(batches(program.config))
  found = lambda program, step, **change: np.asarray(
    jax.jit(lambda step, batch: row_log.hashes(program, step, batch))(
      jnp.int32(step), batch | change
    )
  )
  first = found(program, 0)
  assert len(set(first.tolist())) == 4
  images, labels = batch["images"].copy(), batch["labels"].copy()
  images[1, 0, 3, 5, 0] = np.nextafter(images[1, 0, 3, 5, 0], 2)
  labels[3] = (labels[3] + 1) % 10
  changed = found(program, 0, images=images, labels=labels) != first
  assert changed.tolist() == [False, True, False, True]
  assert (found(program, 1) != first).all()  # noise and times
  dropped = program_lib.build(tiny_config(family, model__label_dropout=0.9))
  assert (found(dropped, 0) != first).any()


# A trainer whose mesh is not in the order of the devices.
TRAIN = """
import sys
from jax.experimental import mesh_utils
from arflow_jax import cli, train
real = mesh_utils.create_device_mesh
def create(shape, devices, **settings):
  n = len(devices)
  order = [i // 2 + i % 2 * (n // 2) for i in range(n)]  # 0, 4, 1, 5, ...
  return real(shape, [devices[i] for i in order], **settings)
if {permuted}:
  mesh_utils.create_device_mesh = create
sys.modules["train"], sys.argv = train, ["train", *{argv!r}]
cli.run("train")
"""


def _alone(devices, argv):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
  with trainer(*argv, env=environment) as process:
    output = process.stdout.read()
  assert process.returncode == 0, output


def _two(argv, permuted):
  workdir, *argv = argv
  argv = [*argv, f"--workdir={workdir}"]
  program = TRAIN.format(argv=argv, permuted=permuted)
  with started(program, devices=4) as both:
    said = [process.communicate(timeout=250) for process in both]
  assert [process.returncode for process in both] == [0, 0], said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_a_run_that_moves_is_the_run_that_stays(family, tmp_path):
  """On 8 devices, 2 processes of 4, one device, and a permuted mesh."""
  whole, moved = tmp_path / "whole", tmp_path / "moved"
  same = {
    "batch_size": 8,
    "debug__rows": True,
    "debug__replicas": 2,
    "log__every": 1,
    "checkpoint__every": 3,
    "optimizer__warmup_steps": 2,
    **SMALL[family],
  }

  def argv(workdir, steps, **mesh):
    return [workdir, *flags(family, steps=steps, **same, **mesh)]

  _alone(1, argv(whole, 13))
  _alone(8, argv(moved, 4, mesh__fsdp=2, mesh__tensor=2))
  shutil.rmtree(moved / "checkpoints" / "4")  # as a kill after step 4
  _two(argv(moved, 7, mesh__fsdp=2), permuted=False)
  _alone(1, argv(moved, 10))
  _two(argv(moved, 13, mesh__fsdp=4), permuted=True)
  # In the permuted mesh a process has every second row.
  mixed = _lines(moved / "rows" / "0-4.jsonl")
  assert mixed[0] == {"after": 10}
  assert np.ptp(mixed[1]["rows"]) > 3
  wanted = row_log.read(str(whole))
  assert wanted.keys() == {(s, r) for s in range(1, 14) for r in range(8)}
  assert row_log.read(str(moved)) == wanted
  losses = [
    {record["step"]: record["loss"] for record in _lines(run / "metrics.jsonl")}
    for run in (whole, moved)
  ]
  apart = {s: abs(losses[1][s] / loss - 1) for s, loss in losses[0].items()}
  print("losses apart", {s: f"{x:.1e}" for s, x in apart.items()})
  assert losses[0].keys() == losses[1].keys()
  assert max(apart.values()) < 1e-5
  config = tiny_config(family, steps=13, **same)
  states = [stored_state(config, run) for run in (whole, moved)]
  start = program_lib.build(config).init()
  far = []
  for a, b, first in zip(
    *(jax.tree.leaves(s.params) for s in (*states, start))
  ):
    movement = np.abs(a - first).max()
    far.append(float(np.abs(a - b).max() / movement))
  print("parameters apart", f"{max(far):.1e} of their movement")
  assert max(far) < 0.02
