"""What looks at a run between two of its steps: a profiler, pictures."""

from collections.abc import Callable, Sequence
from typing import Protocol

from arflow_jax.training.program import Program
from arflow_jax.training.state import TrainState
from arflow_jax.training.telemetry import Telemetry
from arflow_jax.training.trace import Trace


class Observer(Protocol):
  """It changes nothing of the run. All processes call the same of it."""

  def between(
    self, step: int, state: TrainState, stopping: Callable[[], bool]
  ) -> None:
    """Called before the next step is started, and after the very last one.

    Args:
      step: steps done; those of the launch's start at its first call.
      state: after them, saved where they were to be.
      stopping: whether the run was asked to stop, in all processes alike.
    """

  def close(self) -> None:
    """Called when the launch ends, for whatever reason."""


Makes = Callable[[Program, str, int, Telemetry], Observer]


class Observers:
  """All observers of a launch, one of which is the profiler. Close it.

  Args:
    makes: what makes the others, out of the other arguments.
    program: of the run.
    workdir: of the run.
    start: steps done before this launch.
    log: of the launch.
  """

  def __init__(
    self,
    makes: Sequence[Makes],
    program: Program,
    workdir: str,
    start: int,
    log: Telemetry,
  ):
    self._all = [make(program, workdir, start, log) for make in (Trace, *makes)]

  def between(
    self, step: int, state: TrainState, stopping: Callable[[], bool]
  ) -> None:
    """Calls that of each."""
    for each in self._all:
      each.between(step, state, stopping)

  def close(self) -> None:
    for each in self._all:
      each.close()
