"""Replicas that were made to differ, on eight devices."""

import json
import os
import re
import subprocess
import sys

from arflow_jax import cli, train
from arflow_jax.errors import ReplicasDiffer
from arflow_jax.training import replicas
from tests.tiny import flags

# Changes one number on one device, and prints what is said of it.
ON_EIGHT = """
import json
import jax, numpy as np
from arflow_jax.errors import ReplicasDiffer
from arflow_jax.training import program as program_lib
from arflow_jax.training import replicas
from tests.tiny import tiny_config

config = tiny_config(batch_size=8, mesh__fsdp=2, mesh__tensor=2)
params = program_lib.build(config).abstract_state.params
leaves, tree = jax.tree.flatten(params)
paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]

def made(changed=None, device=None):
  arrays = []
  for i, leaf in enumerate(leaves):
    whole = np.arange(np.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape)
    pieces = []
    for d, index in leaf.sharding.devices_indices_map(leaf.shape).items():
      piece = whole[index].copy()
      if (i, d.id) == (changed, device):
        piece.flat[-1] = np.nextafter(piece.flat[-1], 1e9)
      pieces.append(jax.device_put(piece, d))
    arrays.append(jax.make_array_from_single_device_arrays(
      leaf.shape, leaf.sharding, pieces))
  return jax.tree.unflatten(tree, arrays)

check = replicas.Replicas(params).check
check(1, made())
for i in range(len(leaves)):
  try:
    check(7, made(i, 5))
  except ReplicasDiffer as error:
    print(json.dumps([
      jax.tree_util.keystr(paths[i], simple=True, separator="/"),
      str(error)]))
print(len(leaves))
"""


def test_one_number_of_one_replica_is_found():
  done = subprocess.run(
    [sys.executable, "-c", ON_EIGHT],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  *lines, count = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == count > 10
  who = "devices? (.*) held other numbers than devices? (.*). Checkpoints"
  sizes = set()
  for name, said in lines:
    assert said.startswith(f"replicas of {name} differ after step 7: device")
    few, rest = re.search(who, said).groups()
    sizes.add(len(rest.split(", ")))
    if "," in rest:  # else either of two may be the one
      assert few == "5 (process 0)"
    assert "5 (process 0)" in (few, rest)
  assert sizes == {1, 3, 7}  # split by both axes, by one, by none


def test_the_loop_compares_every_n_steps(tmp_path, monkeypatch):
  """And what it finds ends the run, with code 1 and nothing saved."""
  seen = []

  def check(self, step, params):
    seen.append(step)
    if step == 4:
      raise ReplicasDiffer("replicas of x differ")

  monkeypatch.setattr(replicas.Replicas, "check", check)
  argv = [*flags(debug__replicas=2), f"--workdir={tmp_path}"]
  assert cli.execute(train, argv) == 1
  assert seen == [2, 4]
  assert not (tmp_path / "checkpoints" / "4").exists()
