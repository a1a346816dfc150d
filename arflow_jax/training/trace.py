"""A profiler's trace of some steps of a run, in `WORKDIR/profile`."""

import pathlib
import shutil
import tempfile
from collections.abc import Callable

import jax
from etils import epath

from arflow_jax.parallel import processes
from arflow_jax.training.program import Program
from arflow_jax.training.state import TrainState
from arflow_jax.training.telemetry import Telemetry


class Trace:
  """Traces `log.trace_steps` steps from step `log.trace_start` on.

  One process traces itself and its devices. A launch that begins in the middle
  of these steps traces the rest. JAX's profiler writes to local files: they are
  copied to the run's directory when they are whole.

  Args:
    program: of the run.
    workdir: of the run.
    start: steps done before this launch.
    log: of the launch.
  """

  def __init__(
    self, program: Program, workdir: str, start: int, log: Telemetry
  ):
    settings = program.config.log
    self._first = settings.trace_start
    total = program.config.steps
    self._last = min(self._first + settings.trace_steps - 1, total)
    self._workdir, self._log = workdir, log
    self._scratch: str | None = None  # where the trace under way is written to
    if settings.trace_steps and self._first > total:
      processes.say(
        f"no step is traced: log.trace_start={self._first} is beyond the last"
        f" step, {total}"
      )

  def between(
    self, step: int, state: TrainState, stopping: Callable[[], bool]
  ) -> None:
    """Begins before the first of the steps, ends after the last."""
    if not processes.speaks():
      return
    if self._scratch and step >= self._last:
      with self._log.paused(state):
        self._end(step)
    elif not self._scratch and self._first <= step + 1 <= self._last:
      with self._log.paused(state):
        self._scratch = tempfile.mkdtemp("arflow_jax")
        self._begun = step + 1
        jax.profiler.start_trace(self._scratch)

  def close(self) -> None:
    """Keeps what there is of a trace that the launch did not finish."""
    if self._scratch:
      self._end(None)

  def _end(self, step: int | None) -> None:
    jax.profiler.stop_trace()
    scratch, self._scratch = self._scratch, None
    folder = epath.Path(self._workdir) / "profile"
    try:
      for path in pathlib.Path(scratch).rglob("*"):
        if path.is_file():
          to = folder / path.relative_to(scratch)
          to.parent.mkdir(parents=True, exist_ok=True)
          to.write_bytes(path.read_bytes())
    except OSError as error:
      processes.say(f"the trace could not be written to {folder}: {error}")
    else:
      steps = f"steps {self._begun} to {step or 'the end'}"
      processes.say(
        f"a trace of {steps} is in {folder}: open its .trace.json.gz at"
        f" https://ui.perfetto.dev, or: pip install xprof; xprof"
        f" --logdir={folder}"
      )
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
