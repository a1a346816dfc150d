"""The processes of a job: start-up, rows that each holds, agreement, output.

One process is the case of one of the same code. Nothing else in this package
asks JAX for a process index or a process count.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from arflow_jax import console
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import preemption, rendezvous

# Seconds without a sign of life after which a process counts as lost; JAX then
# ends the others, whatever they wait for. By itself JAX waits for 100 s.
HEARTBEAT = 20
_PARTING = 5.0  # seconds that the others have to fail as well
_CUT_OFF = ("Gloo", "Connection reset by peer", "Connection closed by peer")
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


def start() -> None:
  """Joins the other processes of the job, if there are any.

  They are found by `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID` where these are set, and otherwise by JAX itself: on TPU VMs,
  in GKE, and in steps of SLURM. Call it before anything uses a device.

  Raises:
    ConfigError: the variables do not name a job, or not all processes come.
  """
  if jax.distributed.is_initialized():
    return
  given = {name: os.environ.get(name) for name in _EXPLICIT}
  if any(given.values()):
    if given["JAX_NUM_PROCESSES"] != "1":
      _join(given)
  elif known_to_jax(os.environ, jax.config.jax_platforms):
    try:
      with preemption.beside():
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except (OSError, RuntimeError, ValueError) as error:
      used = "must be called before" in str(error)  # a device, by the caller
      if not (used and jax.process_count() == 1):
        raise ConfigError(
          f"the other processes of the job cannot be found: {error}; set"
          f" {', '.join(_EXPLICIT)} in each, JAX_NUM_PROCESSES=1 if it is alone"
        ) from error


def known_to_jax(environment: Mapping[str, str], platforms: str | None) -> bool:
  """Whether JAX can find out by itself which processes make up the job.

  Args:
    environment: the variables of this process.
    platforms: JAX's setting; it begins with `tpu` where JAX has found a TPU.
  """
  if all(name in environment for name in _SLURM):
    # A shell that was asked of SLURM counts its job's tasks, but is a single
    # step.
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
    return tasks != "1"
  if not (platforms or "").startswith("tpu"):
    return False
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # GKE
    if name in environment:
      slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
      return "," in environment[name] or slices != "1"
  # JAX asks the machine's metadata unless it has been told that there are none.
  return "TPU_SKIP_MDS_QUERY" not in environment


def _join(given: dict[str, str | None]) -> None:
  """Meets the others where the environment says, and then lets JAX do so."""
  address, count, number = given.values()
  host, _, port = (address or "").rpartition(":")
  numbers = (port, count or "", number or "")
  if not (host and all(text.isdecimal() for text in numbers)):
    raise ConfigError(
      ", ".join(f"{name}={value}" for name, value in given.items())
      + " do not name a job; set all three, the first one to HOST:PORT of"
      " process 0, or none"
    )
  count, number = int(count), int(number)
  if not number < count:
    raise ConfigError(
      f"JAX_PROCESS_ID={number}: JAX_NUM_PROCESSES={count} processes are"
      f" numbered from 0 to {count - 1}"
    )
  rendezvous.meet(address, count, number)
  with preemption.beside():
    jax.distributed.initialize(
      address, count, number, heartbeat_timeout_seconds=HEARTBEAT
    )


def leave(error: BaseException | None) -> bool:
  """Parts from the other processes before this one ends with an error.

  Where it fails alone they wait for it in vain, and as it ends it would wait
  for them: so it goes without them, and JAX ends them within `HEARTBEAT`. Most
  errors may come of another process that is lost: time is given to JAX to find
  out, which then ends this one as well.

  Args:
    error: why it ends.

  Returns:
    Whether it has to end without the others.
  """
  if not jax.distributed.is_initialized():
    return False
  own = isinstance(error, ConfigError) and error.__cause__ is None
  thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  thread.start()
  thread.join(_PARTING if own else HEARTBEAT + _PARTING)
  return thread.is_alive()


def cut_off(error: BaseException) -> bool:
  """Whether an error is that of a connection to another process that broke."""
  return (
    jax.distributed.is_initialized()
    and not isinstance(error, ConfigError)  # JAX raises several kinds
    and any(sign in str(error) for sign in _CUT_OFF)
  )


def part() -> None:
  """Parts from the other processes, all of which end without an error."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def speaks() -> bool:
  """Whether this process prints, logs and writes what one process writes."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line, from one process alone."""
  if speaks():
    console.say(text)


def complain(text: str) -> None:
  """Prints a line from this process, whichever it is, and says which."""
  alone = jax.process_count() == 1
  console.say(text if alone else f"process {jax.process_index()}: {text}")


def number() -> int:
  """Of this process, from 0."""
  return jax.process_index()


def owner(device: jax.Device) -> int:
  """The number of the process that has a device."""
  return device.process_index


def gather(value: Any) -> list[Any]:
  """A small value of each process, by its number, in all; all call it.

  Args:
    value: what JSON can hold.
  """
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = 1024  # few sizes, for a program is compiled for each
  while True:
    sent = np.zeros(size, np.uint8)
    sent[: len(text)] = text[:size]
    every = multihost_utils.process_allgather((np.int32(len(text)), sent))
    if max(every[0]) <= size:
      return [json.loads(row[:n].tobytes()) for n, row in zip(*every)]
    size = 1 << int(max(every[0])).bit_length()


def agree(*flags: bool) -> tuple[bool, ...]:
  """Each flag is True in every process where any of them says True.

  All processes have to call it.
  """
  return tuple(map(bool, ask(lambda: flags)()))


def ask(values: Callable[[], Sequence[int]]) -> Callable[[], tuple[int, ...]]:
  """Begins to find the largest of each number over all processes.

  Returns at once: it takes its turn on the devices, and its answer is there
  when what was dispatched before is done. All processes have to call it, at the
  same place among their programs.

  Args:
    values: gives the numbers of this process, as many in each. Of several
      processes it is called now, in a process alone with the answer.

  Returns:
    What waits for the answer, the same in every process.
  """
  if jax.process_count() == 1:
    return lambda: tuple(map(int, values()))
  mine = np.asarray([values()], np.int32)
  mesh = Mesh(np.asarray(jax.devices()), ("devices",))
  every = jax.make_array_from_callback(
    (mesh.size, mine.size), NamedSharding(mesh, P("devices")), lambda _: mine
  )
  with jax.set_mesh(mesh):
    largest = jax.jit(_largest, out_shardings=P())(every)
  return lambda: tuple(np.asarray(largest).tolist())


def _largest(numbers: jax.Array) -> jax.Array:
  return numbers.max(0)


def preempted(step: int) -> bool:
  """Whether JAX was told of a preemption, and this is the step to stop after.

  All processes call it for each step, and are told so for the same one.
  """
  return (
    jax.distributed.is_initialized()
    and jax.config.jax_enable_preemption_service
    and multihost_utils.reached_preemption_sync_point(step)
  )


def meet() -> None:
  """Waits until all processes have come this far."""
  agree(False)


def common(array: np.ndarray) -> np.ndarray:
  """The array of the process that speaks, in every process; all call it.

  Args:
    array: of the same shape and type in every process.
  """
  return multihost_utils.broadcast_one_to_all(array)


def count() -> int:
  """Processes of the job."""
  return jax.process_count()


def rows(sharding: Sharding, count: int) -> Int[np.ndarray, "n"]:
  """Rows of a leading axis that this process's own devices hold, ascending.

  They come from the sharding, not from a division by the number of processes: a
  mesh in the order of the hardware need not give a process contiguous rows.

  Args:
    sharding: of an array whose leading axis alone is split.
    count: size of that axis, over all processes.
  """
  held = sharding.addressable_devices_indices_map((count,))
  return np.unique([np.arange(count)[i] for i in held.values()]).astype(int)


def place(sharding: Sharding, local: Any, count: int) -> Any:
  """The rows that each process holds, as global arrays on the devices.

  Args:
    sharding: of the leading axis.
    local: tree of NumPy arrays, the rows `rows(sharding, count)` in order.
    count: rows over all processes.
  """
  held = rows(sharding, count)

  def array(mine: np.ndarray) -> jax.Array:
    def shard(index):
      start, stop, _ = index[0].indices(count)
      # Its rows are consecutive among ours, even where the global ones are not.
      first = int(np.searchsorted(held, start))
      return mine[first : first + stop - start]

    shape = (count, *mine.shape[1:])
    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(array, local)


def local(array: jax.Array) -> tuple[Int[np.ndarray, "n"], np.ndarray]:
  """The rows that this process has to write, and their numbers, ascending.

  Over all processes, each row of the leading axis comes exactly once, also
  where several devices hold a copy.
  """
  count = array.shape[0]
  shards = [
    (*shard.index[0].indices(count)[:2], shard.data)
    for shard in array.addressable_shards
    if shard.replica_id == 0
  ]
  shards.sort(key=lambda shard: shard[0])
  numbers = [np.arange(start, stop) for start, stop, _ in shards]
  pieces = [np.asarray(data) for _, _, data in shards]
  if not pieces:
    return np.arange(0), np.zeros((0, *array.shape[1:]), array.dtype)
  return np.concatenate(numbers), np.concatenate(pieces)


def whole(array: jax.Array) -> np.ndarray:
  """All rows, in every process; all have to call it."""
  return multihost_utils.process_allgather(array, tiled=True)
