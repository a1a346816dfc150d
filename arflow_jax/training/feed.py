"""The batches of a run, one held ahead.

So a step begins only where every process has its rows of it, and all of them
hear in time of one that cannot read the next.
"""

from collections.abc import Iterator
from typing import Any

from arflow_jax.parallel import processes
from arflow_jax.training import listing

UNREADABLE = 1  # the world did not answer: a new start may help
BROKEN = 2  # a new start would fail again


class Feed:
  """Hands out batches, and holds the next one.

  Attributes:
    trouble: why this process has no next batch; 0 where it has one.

  Args:
    batches: of the steps to do.
    step: the first of these.
  """

  def __init__(self, batches: Iterator[dict[str, Any]], step: int):
    self._batches, self._step = batches, step
    self.trouble, self._error = 0, None
    self._read()

  def check(self, trouble: int) -> None:
    """Raises where some process has no next batch, and this one's own error.

    Args:
      trouble: the greatest of all processes.
    """
    if self._error is not None:
      raise self._error
    if trouble:
      raise OSError(
        f"another process has no data for step {self._step}, as it says itself"
      )

  def tell(self) -> None:
    """Says which process has no next batch, and why."""
    if self._error is not None:
      why = listing.reason(self._error)
      processes.complain(f"no data for step {self._step}: {why}")

  def take(self, more: bool) -> dict[str, Any]:
    """The batch of a step.

    Args:
      more: whether there is a step after it, whose batch is read now.
    """
    batch = self._batch
    self._step += 1
    if more:
      self._read()
    return batch

  def _read(self) -> None:
    try:
      self._batch = next(self._batches)
    except Exception as error:
      self._batch, self._error = None, error
      self.trouble = UNREADABLE if isinstance(error, OSError) else BROKEN
