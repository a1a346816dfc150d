"""What the TPU compiler says of a program, on a machine without a TPU.

libtpu (`pip install "jax[tpu]"`) compiles for any topology. Its figures are
static: bundles of a kernel are close to its cycles, `estimated_cycles` are the
compiler's own model of XLA's fusions. Compare with them; they are no speed.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arflow_jax import signals
from arflow_jax.errors import ConfigError

# One chip of each generation. A v5p host has four.
CHIPS = {
  "v5e": ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
  "v6e": ("v6e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
  "v5p": ("v5p:2x2x1", {}),
}


def prepare(dump: str | os.PathLike) -> None:
  """Sets the environment for libtpu; call it before anything uses JAX.

  Args:
    dump: empty folder for the compiler's schedules, read by `kernels`.

  Raises:
    ConfigError: libtpu is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "compiling for a TPU needs libtpu, which is not installed; run: pip"
      f' install "jax[tpu]=={jax.__version__}"'
    )
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else JAX looks for a TPU
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_WORKER_ID", "0")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump}"
    " --xla_jf_dump_llo_text=true"
    " --xla_jf_dump_llo_pass_label_regex=.*final.*"
  )


@contextlib.contextmanager
def schedules() -> Iterator[str]:
  """A folder for the compiler's schedules, `prepare`d, removed at the end."""
  with tempfile.TemporaryDirectory() as dump:
    clean = functools.partial(shutil.rmtree, dump, ignore_errors=True)
    signals.cleaners.append(clean)
    prepare(dump)
    yield dump


def version() -> str:
  """The compiler, as tables should name it."""
  return f"libtpu {importlib.metadata.version('libtpu')}"


def chip(name: str) -> Mesh:
  """A mesh of one chip of a generation, a key of `CHIPS`."""
  topology, options = CHIPS[name]
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=topology, **options
  )
  return Mesh(np.array(described.devices[:1]), ("chip",))


def devices(name: str) -> list[jax.Device]:
  """The devices of a whole topology, such as `v5e:16x16`."""
  described = topologies.get_topology_desc(platform="tpu", topology_name=name)
  return described.devices


def compile_for(mesh: Mesh, function: Callable, *args: Any) -> Any:
  """Compiles; arguments without a sharding are whole on every chip."""
  whole = NamedSharding(mesh, PartitionSpec())

  def place(x):
    sharding = getattr(x, "sharding", None) or whole
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  jitted = function if hasattr(function, "lower") else jax.jit(function)
  with jax.set_mesh(mesh):
    return jitted.lower(*jax.tree.map(place, args)).compile()


@dataclasses.dataclass(frozen=True)
class Call:
  """One Pallas kernel of a traced function.

  Attributes:
    name: of the kernel.
    programs: of its grid.
    moved: bytes between HBM and VMEM, from blocks and grid: a block is moved
      whenever its index changes from one program to the next.
  """

  name: str
  programs: int
  moved: int


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The same kernel in a compiled program.

  Attributes:
    call: what was traced.
    bundles: instruction bundles of one program.
    vmem: bytes.
  """

  call: Call
  bundles: int
  vmem: int


def kernels(
  compiled: Any, calls: list[Call], dump: str | os.PathLike
) -> list[Kernel]:
  """The Pallas kernels of a compiled program, those of `calls`.

  Raises:
    ValueError: a kernel that the program holds twice or not at all.
  """
  found = {}
  for line in compiled.as_text().splitlines():
    if "tpu_custom_call" not in line:
      continue
    name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) =", line)[1]
    used = line[line.index('"used_scoped_memory_configs"') :]
    vmem = max(map(int, re.findall(r'"size":"(\d+)"', used)), default=0)
    found[name] = (bundles(name, dump), vmem)
  matched = []
  for call in calls:
    names = [name for name in found if call.name in name]
    if len(names) != 1:
      raise ValueError(f"{call.name} is {names} in the program, not one kernel")
    matched.append(Kernel(call, *found[names[0]]))
  return matched


def bundles(name: str, dump: str | os.PathLike) -> int | None:
  """Bundles of one program of a kernel, by the name of its instruction.

  None where it was not scheduled: another call of the same kernel was.
  """
  found = pathlib.Path(dump).glob(
    f"*-{name}-*schedule-analysis_final_bundles.txt"
  )
  newest = max(found, key=lambda p: p.stat().st_mtime, default=None)
  return newest and int(
    re.search(r"total scheduled bundles:\s*(\d+)", newest.read_text())[1]
  )


def estimated_cycles(compiled: Any) -> tuple[int, dict[str, int]]:
  """XLA's estimate of a program, loops by their length.

  Returns:
    The sum of what XLA estimates for its own instructions, and how often each
    Pallas kernel runs, for which it estimates nothing.
  """
  total, runs = 0, collections.Counter()
  for times, _, line in instructions(compiled.as_text()):
    for cycles in re.findall(r'"estimated_cycles":"(\d+)"', line):
      total += times * int(cycles)
    if "tpu_custom_call" in line:
      name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) =", line)[1]
      runs[name] += times
  return total, dict(runs)


def instructions(
  text: str, *, fusions: bool = False
) -> Iterator[tuple[int, str, str]]:
  """How often, in which computation, and what: lines of a compiled program.

  Args:
    text: of the program.
    fusions: also those inside fusions, once for every fusion that calls them.
  """
  bodies, entry = _computations(text)
  yield from _walk(bodies, entry, 1, fusions)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  entry = ""
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
      lines = bodies[match[2]] = []
      entry = match[2] if match[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _walk(bodies, name, times, fusions) -> Iterator[tuple[int, str, str]]:
  for line in bodies[name]:
    yield times, name, line
    for often, inner in _inner(bodies, line, fusions):
      yield from _walk(bodies, inner, times * often, fusions)


def _inner(bodies, line, fusions) -> Iterator[tuple[int, str]]:
  """Computations that an instruction runs, and how often."""
  loop = re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line)
  if loop:
    limits = re.findall(r"constant\((\d+)\)", "\n".join(bodies[loop[1]]))
    yield max(map(int, limits)), loop[2]
  call = re.search(r" call\(.*to_apply=%([\w.\-]+)", line)
  if not call and fusions:
    call = re.search(r" calls=%([\w.\-]+)", line)
  if call:
    yield 1, call[1]


def calls(function: Callable, *args: Any) -> list[Call]:
  """The Pallas kernels that a call of `function` runs, in order."""
  return [
    _call(equation.params)
    for equation in _pallas_calls(jax.make_jaxpr(function)(*args).jaxpr)
  ]


def _call(params) -> Call:
  mapping = params["grid_mapping"]
  programs = np.array(
    list(itertools.product(*map(range, mapping.grid))), np.int32
  )
  moved = 0
  for block in mapping.block_mappings:
    indices = _indices(block.index_map_jaxpr, programs)
    changes = 1 + int((indices[1:] != indices[:-1]).any(axis=1).sum())
    aval = block.transformed_block_aval
    moved += changes * math.prod(aval.shape) * aval.dtype.itemsize
  return Call(params["name"], len(programs), moved)


def _indices(index_map, programs) -> np.ndarray:
  """What an index map says of each program."""
  where = jax.extend.core.jaxpr_as_fun(index_map)
  found = jax.vmap(lambda program: where(*program))(programs)
  return np.stack([np.asarray(axis) for axis in found], axis=1)


def _pallas_calls(jaxpr) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for value in equation.params.values():
      value = getattr(value, "jaxpr", value)  # closed jaxprs hold an open one
      if hasattr(value, "eqns"):
        yield from _pallas_calls(value)
