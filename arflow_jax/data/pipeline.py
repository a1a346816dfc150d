"""Batches in an order that is a pure function of (seed, step), through grain.

The step is the whole position in the data: starting at step k gives exactly the
batches that an uninterrupted run would have seen from step k on, whatever the
number of processes or loader workers.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from arflow_jax.data import sequences, sources


def train_batches(
  config: ConfigDict,
  start: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's rows of the batches of steps start, start + 1, ...

  Rows are contiguous: process p of P holds rows `p B/P .. (p + 1) B/P` of each
  global batch of `B = config.batch_size` items.

  Raises:
    ConfigError: data that cannot be read or does not fit the model.
  """
  source = sources.open_source(config, "train")
  items = sequences.ClassSequences(
    source, config.data.sequence_length, config.seed, config.data.flip
  )
  rows = config.batch_size // process_count
  local = _LocalRows(items, config.batch_size, rows, process_index * rows)
  stop = max(config.steps, start)
  dataset = grain.MapDataset.range(start * rows, stop * rows).map(local)
  dataset = dataset.batch(rows)
  if config.data.workers == 0:
    # In batches: grain's own default would hold 500 of them.
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(dataset.to_iter_dataset(options))
  if not flags.FLAGS.is_parsed():  # loader processes want parsed flags
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=config.data.workers)
  return iter(dataset.to_iter_dataset().mp_prefetch(options))


@dataclasses.dataclass(frozen=True)
class _LocalRows:
  """Maps the count of items this process has seen to the global stream."""

  items: sequences.ClassSequences
  batch: int
  rows: int
  first: int

  def __call__(self, local: int) -> dict[str, np.ndarray]:
    step, row = divmod(local, self.rows)
    return self.items[step * self.batch + self.first + row]
