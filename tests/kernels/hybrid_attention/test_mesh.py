"""The operator on a mesh: the same numbers, and nothing gathered."""

import json
import math
import os
import re
import subprocess
import sys
import warnings

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  AxisType,
  NamedSharding,
  PartitionSpec,
)

from arflow_jax.analysis import tpu
from arflow_jax.errors import ConfigError
from arflow_jax.kernels.hybrid_attention import api, form, misfit
from arflow_jax.kernels.hybrid_attention.cases import published
from tests.kernels.hybrid_attention.test_pallas_tpu import BFLOAT16, problem

AXES = ("data", "tensor")

# Runs on eight CPU devices; prints the largest differences from one device.
_ON_EIGHT = """
import json, warnings
import jax, jax.numpy as jnp, numpy as np
from arflow_jax.kernels.hybrid_attention import hybrid_attention
from arflow_jax.kernels.hybrid_attention.cases import Case
from tests.kernels.hybrid_attention import float64

jax.config.update("jax_default_matmul_precision", "highest")
case = Case(batch=4, images=2, tokens=16, heads=4, head=64)  # two lane groups
given = {k: jnp.asarray(x) for k, x in float64.inputs(case).items()}
w, w_state = given.pop("w"), given.pop("w_state")

def run(implementation):
  def loss(given):
    out, state = hybrid_attention(
      **given, num_chunks=case.images, normalize=True,
      implementation=implementation)
    return jnp.sum(out * w) + jnp.sum(state * w_state), (out, state)
  return jax.jit(jax.grad(loss, has_aux=True))(given)

wanted = jax.tree.leaves(run("reference"))
found = {}
for sizes, axes in (
  ((2, 2, 2), ("data", "fsdp", "tensor")),
  ((8,), ("data",)),  # more devices than sequences
  ((2, 4), ("data", "tensor")),  # more shards than lane groups
):
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(sizes), axes)
  for name in ("xla", "pallas_tpu_interpret"):
    with jax.set_mesh(mesh):
      try:
        ours = jax.tree.leaves(run(name))
      except ValueError as error:
        found[f"{name} {sizes}"] = str(error)
        continue
    found[f"{name} {sizes}"] = max(
      float(jnp.abs(a - b).max() / jnp.abs(b).max())
      for a, b in zip(ours, wanted)
    )
print(json.dumps(found))
"""


def test_shards_give_what_one_device_gives():
  done = subprocess.run(
    [sys.executable, "-c", _ON_EIGHT],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert len(found) == 6
  # An explicit name never falls back.
  for name, reason in (
    ("pallas_tpu_interpret (8,)", "batch of 4 does not divide over the 8"),
    ("pallas_tpu_interpret (2, 4)", "tensor=4 does not divide the 2 groups"),
  ):
    assert reason in found.pop(name)
  assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("tensor", [1, 2])
def test_nothing_is_gathered(dump, tensor):
  """Data-parallel shards exchange nothing, heads only sums over features."""
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  )
  mesh = topologies.make_mesh(topology, (4 // tensor, tensor), AXES)
  case = published("B", 64, 5, batch=8)
  _, _, both, args = problem(case, BFLOAT16)
  specs = {3: ("data", None, "tensor"), 4: ("data", "tensor")}

  def place(x):
    spec = PartitionSpec(*specs[len(x.shape)])
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )

  compiled = tpu.compile_for(mesh, both, *jax.tree.map(place, args))
  text = compiled.as_text()
  assert text.count("tpu_custom_call") == 2
  moves = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
  moving = re.findall(rf"= (.*?) ({moves})(?:-start)?\(", text)
  assert {kind for _, kind in moving} == (
    set() if tensor == 1 else {"all-reduce"}
  )
  for shapes, _ in moving:  # numbers per token, not per feature
    for shape in re.findall(r"\[([\d,]*)\]", shapes):
      elements = math.prod(map(int, shape.split(",")))
      assert elements <= 3 * case.batch * case.images * case.tokens


def test_what_does_not_divide_is_said_once(dump):
  """Three lane groups over two shards: the XLA form, and a warning."""
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  )
  mesh = topologies.make_mesh(topology, (2, 2), AXES)
  _, _, both, args = problem(published("S", 16, 2, batch=4), BFLOAT16)
  said = "tensor=2 does not divide the 3 groups"

  def twice(args, d_out, d_state):
    return both(args, d_out, d_state), both(args, d_state=d_state, d_out=d_out)

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    api._say_once.cache_clear()
    compiled = tpu.compile_for(mesh, twice, *args)
  assert [said in str(warning.message) for warning in caught] == [True]
  assert "tpu_custom_call" not in compiled.as_text()


def test_explicit_axes_are_refused_by_name():
  mesh = AbstractMesh((2,), ("data",), (AxisType.Explicit,))
  with jax.sharding.use_abstract_mesh(mesh):
    reason = misfit(
      "pallas_tpu_interpret",
      tokens=16,
      heads=2,
      head=64,
      dtype="float32",
      batch=2,
    )
  assert "mesh axes ('data',) are explicit" in reason


def _form(tensor, **changes):
  device = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
  mesh = AbstractMesh((2, tensor), AXES, abstract_device=device)
  size = dict(batch=4, tokens=256, heads=18, head=64, dtype="bfloat16")
  with jax.sharding.use_abstract_mesh(mesh):
    return form(**size | changes)


def test_one_line_tells_which_form_it_takes():
  """XL/2 has 18 heads, 9 pairs that share registers."""
  kernel = "hybrid attention takes the form pallas_tpu"
  assert _form(1) == _form(3) == kernel
  instead = "hybrid attention takes the XLA form, not pallas_tpu: "
  assert _form(2) == (
    f"{instead}mesh axis tensor=2 does not divide the 9 groups of 2 heads"
  )
  assert _form(1, heads=16, head=72).startswith(
    f"{instead}the head size is 72; "
  )
  with pytest.raises(ConfigError, match=r"'pallas_tpu': .* tensor=2"):
    _form(2, implementation="pallas_tpu")
  # Where there is no TPU there is nothing to miss.
  size = dict(batch=4, tokens=256, heads=18, head=64, dtype="bfloat16")
  assert form(**size) is None
