"""What every row of every step is trained on, as hashes: `debug.rows`.

Each process writes the rows that it owns to `WORKDIR/rows/PROCESS-LAUNCH.jsonl`
before the step is started. The hash covers the images and the label as they are
on the devices, and all that the loss draws for the row: noise, times, whether
the label is dropped. So a run that was stopped and resumed, on any devices, can
be compared with an undisturbed one.
"""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Int, UInt32

from arflow_jax import paths
from arflow_jax.parallel import agreement, processes
from arflow_jax.training import checksum, listing
from arflow_jax.training import state as state_lib
from arflow_jax.training.program import Program


class RowLog:
  """Writes the hashes of one launch.

  All processes make it, at the same time.

  Args:
    workdir: the run's directory.
    program: whose steps they are.
    start: steps done before this launch.
  """

  def __init__(self, workdir: str, program: Program, start: int):
    folder = _folder(workdir)

    def launch() -> int:
      folder.mkdir(parents=True, exist_ok=True)
      return max([_launch(path) for path in folder.iterdir()], default=0) + 1

    number = agreement.by_one(launch)
    self._path = folder / f"{processes.number()}-{number}.jsonl"
    self._content = b""
    labels = program.abstract_batch["labels"]
    self._hashes = jax.jit(
      lambda step, batch: hashes(program, step, batch),
      out_shardings=labels.sharding,
    )
    agreement.together(lambda: self._write({"after": start}))

  def add(
    self, step: int, state: state_lib.TrainState, batch: state_lib.Batch
  ) -> None:
    """Writes the rows of this process.

    Args:
      step: the number of the step that is about to start.
      state: the state that it starts from.
      batch: the global batch, on the devices.
    """
    rows, found = processes.local(self._hashes(state.step, batch))
    record = {
      "step": step,
      "rows": rows.tolist(),
      "hashes": [f"{value:08x}" for value in found.tolist()],
    }
    agreement.together(lambda: self._write(record))

  def _write(self, record: dict[str, Any]) -> None:
    line = json.dumps(record).encode() + b"\n"
    if paths.is_local(self._path):
      with open(self._path, "ab") as file:
        file.write(line)
    else:  # a bucket cannot append
      self._content += line
      self._path.write_bytes(self._content)


def hashes(
  program: Program, step: Int[Array, ""], batch: state_lib.Batch
) -> UInt32[Array, "B"]:
  """A hash of what each row is trained on.

  By the same functions and keys as in the train step, but not in its program.

  Args:
    program: gives the loss and the seed.
    step: steps done.
    batch: the global batch.
  """
  config = program.config
  keys = state_lib.item_keys(config.seed, step, config.batch_size)
  total = jnp.zeros(config.batch_size, jnp.uint32)
  for leaf in jax.tree.leaves((batch, program.branch.draws(batch, keys))):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    total = total * jnp.uint32(0x01000193) ^ jax.vmap(checksum.of_array)(leaf)
  return total


def read(workdir: str) -> dict[tuple[int, int], str]:
  """The hash of every (step, row) in the history that has survived.

  A launch begins where its checkpoint was saved: what earlier launches did
  after that is lost, and was trained again.

  Raises:
    ValueError: a row stands twice in one launch, or was trained on something
      else when it was trained again.
  """
  launches: dict[int, list[epath.Path]] = {}
  for path in _folder(workdir).iterdir():
    launches.setdefault(_launch(path), []).append(path)
  history, ever = {}, {}
  for launch, files in sorted(launches.items()):
    found, after = {}, None
    for path in files:
      for record in _records(path):
        if "after" in record:
          after = record["after"]
          continue
        for row, value in zip(record["rows"], record["hashes"]):
          key = record["step"], row
          if key in found:
            raise ValueError(f"launch {launch} has trained {key} twice")
          if ever.setdefault(key, value) != value:
            raise ValueError(
              f"(step, row) {key} was trained on something else in launch"
              f" {launch} than before: {value}, was {ever[key]}"
            )
          found[key] = value
    if after is None:  # killed as it began
      continue
    history = {key: value for key, value in history.items() if key[0] <= after}
    history |= found
  return history


def _folder(workdir: str) -> epath.Path:
  return listing.folder(workdir).parent / "rows"


def _launch(path: epath.Path) -> int:
  found = re.fullmatch(r"\d+-(\d+)\.jsonl", path.name)
  return int(found[1]) if found else 0


def _records(path: epath.Path) -> list[dict[str, Any]]:
  """The records of a file, but for one that a kill has cut off."""
  lines = path.read_bytes().split(b"\n")[:-1]
  return [json.loads(line) for line in lines]
