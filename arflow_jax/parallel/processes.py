"""The processes of a job: start-up, rows that each holds, agreement, output.

One process is the case of one of the same code. Nothing else in this package
asks JAX for a process index or a process count.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Int

from arflow_jax import console
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import rendezvous

# Seconds without a sign of life after which a process counts as lost; JAX then
# ends the others, whatever they wait for. By itself JAX waits for 100 s.
HEARTBEAT = 20
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
  jax.distributed.initialize(
    address, count, number, heartbeat_timeout_seconds=HEARTBEAT
  )


def speaks() -> bool:
  """Whether this process prints, logs and writes what one process writes."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line, from one process alone."""
  if speaks():
    console.say(text)


def agree(*flags: bool) -> tuple[bool, ...]:
  """Each flag is True in every process where any of them says True.

  All processes have to call it.
  """
  every = multihost_utils.process_allgather(np.asarray(flags))
  return tuple(every.reshape(-1, len(flags)).any(0).tolist())


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


def gather(array: np.ndarray) -> np.ndarray:
  """The arrays of all processes, stacked in their order; all call it.

  Args:
    array: of the same shape and type in every process.
  """
  return multihost_utils.process_allgather(array).reshape(-1, *array.shape)


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
