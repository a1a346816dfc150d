"""What is summed between devices: in which type, how often, how much."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from arflow_jax import branches
from arflow_jax.analysis import tpu
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import gradients
from arflow_jax.training import program as program_lib
from tests.tiny import tiny_config


def _sums(jaxpr, times=1):
  """`(primitive, type, elements, times a step)` of sums between devices."""
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in ("psum", "psum_invariant", "reduce_scatter"):
      for variable in equation.invars:
        yield name, variable.aval.dtype, variable.aval.size, times
    inner = times * (equation.params["length"] if name == "scan" else 1)
    for value in equation.params.values():
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        yield from _sums(value, inner)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_every_gradient_is_summed_once_in_float32(family, parts):
  """As many numbers as there are, half of them after the scattering."""
  config = tiny_config(family, batch_size=8, model__dtype="bfloat16")
  branch = branches.build(config)
  params = jax.eval_shape(branch.init, jax.random.key(0))
  batch = {
    "images": jax.ShapeDtypeStruct((8, *branch.item_shape), jnp.float32),
    "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
  }
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
  compute = gradients.make(
    branch, AbstractMesh((2, 2, 1), mesh_lib.AXES), parts
  )
  sums = list(_sums(jax.make_jaxpr(compute)(params, batch, keys).jaxpr))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  # Biases of heads, of hidden features and of the last layer are not split.
  whole = {"arflow": 2 * 64 + 4, "flowar": 2 * (48 + 84) + 2 * 170 + 1}[family]
  layers, rows = {"arflow": (2, 4 * 5), "flowar": (2, 4)}[family]
  scattered = [n * times for name, _, n, times in sums if "psum" not in name]
  added = [n * times for name, _, n, times in sums if "psum" in name]
  wanted = count - whole
  if parts == 1:  # rows of 16 features instead of a layer's modulation
    wanted += layers * (rows * 16 - (16 + 1) * 6 * 16)
  assert sum(scattered) == wanted
  assert sum(added) == (count - whole) // 2 + whole + 1  # and the loss
  assert {kind for _, kind, _, _ in sums} == {jnp.dtype("float32")}
  if parts > 1:
    assert {times for *_, times in sums} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_what_a_tpu_sums(parts, dump):
  """The same of the compiled step, data 2 x fsdp 2 of a v5e."""
  config = tiny_config(
    batch_size=8,
    mesh__fsdp=2,
    optimizer__accumulation=parts,
    model__dtype="bfloat16",
    model__width=512,
    model__num_heads=8,
  )
  program = program_lib.build(config, tpu.devices("v5e:2x2"))
  compiled = tpu.compile_for(
    program.mesh, program.step, program.abstract_state, program.abstract_batch
  )
  kinds = "all-reduce|reduce-scatter"
  found = []
  for line in compiled.as_text().splitlines():
    if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
      name = re.search(r'op_name="([^"]*)"', line)
      for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
        size = math.prod(map(int, filter(None, sizes.split(","))))
        found.append((kind, size, "while" in (name[1] if name else "")))
  kinds = {kind for kind, size, _ in found if size > 1000}
  assert kinds == {"f32"}
  assert "bf16" not in {kind for kind, *_ in found}
  in_loops = any(loop for _, size, loop in found if size > 1000)
  assert in_loops == (parts == 1)  # over the layers, none over the parts
