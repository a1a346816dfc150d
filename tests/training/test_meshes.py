"""Three steps on eight devices against the same three steps on one."""

import json
import os
import subprocess
import sys

import pytest

# Prints the losses and gradient norms of each run, by its family and mesh, and
# whether all of the state came out in the shardings it went in with.
ON_EIGHT = """
import json, sys
import jax
from arflow_jax.training import program as program_lib
from tests.tiny import batches, random_params, tiny_config

jax.config.update("jax_default_matmul_precision", "highest")
MESHES = ((8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2))
SCALE = {"arflow": 0.15, "flowar": 0.05}
small = {
  "arflow": {},
  "flowar": dict(
    model__patch_size=4, model__scales=(1, 2), model__head_width=256,
    model__cross_attention=True),
}

def run(family, parts, shape):
  data, fsdp, tensor = shape
  config = tiny_config(
    family, batch_size=8, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor,
    optimizer__accumulation=parts, optimizer__warmup_steps=2, **small[family])
  count = data * fsdp * tensor
  program = program_lib.build(config, jax.devices()[:count])
  abstract = program.abstract_state
  # A fresh network answers zero, whatever its inner layers do.
  state = program.init(random_params(abstract.params, SCALE[family]))
  found, given = [], batches(config)
  with jax.set_mesh(program.mesh):
    for _ in range(3):
      state, metrics = program.step(state, program.place(next(given)))
      found.append([float(metrics[k]) for k in ("loss", "grad_norm")])
  same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, abstract)
  return found, all(jax.tree.leaves(same))

for family in small:
  runs = [(1, shape) for shape in ((1, 1, 1), *MESHES)]
  runs += [(2, (2, 2, 2)), (2, (1, 4, 1))]
  for parts, shape in runs:
    print(json.dumps([family, parts, shape, *run(family, parts, shape)]))
"""


@pytest.mark.slow
def test_sharded_equals_single():
  """Losses to 1e-5 relative, on data, fsdp, tensor and mixed meshes."""
  done = subprocess.run(
    [sys.executable, "-c", ON_EIGHT],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == 2 * 8
  single = {
    family: found for family, _, shape, found, _ in lines if shape == [1, 1, 1]
  }
  for family, parts, shape, found, pinned in lines:
    run = f"{family} {parts} {shape}"
    assert pinned, run
    for (loss, norm), (wanted, wanted_norm) in zip(found, single[family]):
      assert loss == pytest.approx(wanted, rel=1e-5), run
      assert norm == pytest.approx(wanted_norm, rel=1e-4), run
