"""The training loop: restore or begin, step, report, save, stop cleanly."""

import contextlib
import math

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import paths
from arflow_jax.data import pipeline, sequences, sources
from arflow_jax.parallel import lanes, processes
from arflow_jax.training import (
  checkpoint,
  listing,
  lock,
  run_files,
  telemetry,
)
from arflow_jax.training import program as program_lib
from arflow_jax.training import saver as saver_lib
from arflow_jax.training import stop as stop_lib
from arflow_jax.training.state import TrainState


def train(config: ConfigDict, workdir: str) -> int:
  """Trains until `config.steps`, resuming from the newest checkpoint.

  SIGTERM saves after the step in progress and returns, and so does data that
  can no longer be read. SIGINT saves too, and then raises KeyboardInterrupt; a
  second one raises it at once. Before the first step there is nothing to save:
  a signal ends the process there.

  Args:
    config: the full config; see `config.FREE` for what a relaunch may change.
    workdir: the run's directory.

  Returns:
    Steps done in all.

  Raises:
    ConfigError: settings that cannot work, or a frozen key changed.
    FloatingPointError: a loss or gradient that is not finite.
  """
  processes.start()
  paths.check_workdir(workdir)
  with stop_lib.Stop() as stop:
    step = _train(config, workdir, stop)
  if stop.interrupted and step < config.steps:
    raise KeyboardInterrupt
  return step


def _train(config: ConfigDict, workdir: str, stop: stop_lib.Stop) -> int:
  if listing.steps(workdir):
    stored = listing.read_config(workdir)
    config_lib.check_relaunch(stored, config, workdir)
  program = program_lib.build(config)
  items = pipeline.open_items(config)  # a wrong data.dir fails before the rest
  with lock.held(workdir):
    run_files.check_data(workdir, sources.fingerprint(items.source))
    found = checkpoint.restore(workdir, program.abstract_state, program.init)
    run_files.keep_config(workdir, config)
    state, window = found or (program.init(), {})
    start = int(state.step)
    if start >= config.steps:
      processes.say(
        f"{workdir} is finished: {start} steps are done, steps={config.steps}"
      )
      return start
    if start:
      processes.say(f"resuming {workdir} after step {start}")
    _announce(program)
    with jax.set_mesh(program.mesh):  # kernels split themselves over it
      try:
        return _steps(program, items, workdir, state, window, stop)
      except FloatingPointError as error:  # by now what could be saved is saved
        steps = listing.steps(workdir)
        kept = "no checkpoint was saved yet"
        if steps:
          kept = f"the last good checkpoint is step {steps[-1]}"
        raise FloatingPointError(
          f"{error}; {kept} in {workdir}. Lower optimizer.peak_lr or clip"
          " harder, in a new --workdir"
        ) from None


def _steps(
  program: program_lib.Program,
  items: sequences.ClassSequences,
  workdir: str,
  state: TrainState,
  window: dict[str, float],
  stop: stop_lib.Stop,
) -> int:
  """From a state to the last step, or to the one after which to stop."""
  config, start = program.config, int(state.step)
  images = config.batch_size * config.data.sequence_length
  metrics = _Metrics(window)
  with (
    contextlib.closing(
      pipeline.batches(items, config, start, program.rows)
    ) as batches,
    contextlib.closing(saver_lib.Saver(workdir, config, state)) as saver,
    contextlib.closing(
      telemetry.Telemetry(workdir, start, config.steps, images)
    ) as log,
  ):
    for step in range(start + 1, config.steps + 1):
      try:
        batch = next(batches)
      except Exception as error:
        if step - 1 == start:
          raise
        # What the data did is no fault of the steps before.
        processes.say(f"no data for step {step}: {listing.reason(error)}")
        metrics.means()
        saver.finish(step - 1, state, metrics.window)
        if not isinstance(error, OSError):  # a new start would fail again
          raise
        step -= 1
        break
      state, latest = program.step(state, program.place(batch))
      metrics.add(step, latest)
      asked, failed = processes.agree(stop.requested, saver.failed())
      done = asked or step == config.steps
      again = failed and not done and saver.mend()
      save = done or again or step % config.checkpoint.every == 0
      first = step == start + 1
      # A mean covers fixed steps, whatever the launch that made them.
      whole = step % config.log.every == 0
      record = whole or step in (1, config.steps)
      if not (first or save or record):
        continue
      means = metrics.means()  # raises where one is not finite
      if whole:
        metrics.window = {}
      stop.begin()  # there is something to save from here on
      try:  # first: a kill after the save would leave a step without a record
        log.report(step, means, record=record)
      finally:
        if done:
          saver.finish(step, state, metrics.window)
        elif save:
          saver.save(step, state, metrics.window)
      if first:
        log.start_clock(step)
      if done:
        break
  if step < config.steps:
    processes.say(
      f"stopped after step {step}, saved; start the same command again to go on"
    )
  else:
    processes.say(
      f"finished {step} steps; checkpoints in {workdir}/checkpoints"
    )
  return step


def _announce(program: program_lib.Program) -> None:
  count = parameter_overview.count_parameters(program.abstract_state.params)
  devices = program.mesh.devices
  if line := lanes.note(program.abstract_state, devices.flat[0].platform):
    processes.say(line)
  if form := program.form:
    processes.say(form)
  processes.say(
    f"{program.config.branch} with {count:,}"
    f" parameters on {devices.size} {devices.flat[0].platform} device(s);"
    " compiling the train step ..."
  )


class _Metrics:
  """Metrics of the steps, checked and added up as the devices give them.

  Attributes:
    window: sums since the last record; `steps` counts them. Stored with every
      checkpoint: an interruption changes no mean.
  """

  def __init__(self, window: dict[str, float]):
    self.window = dict(window)
    self._pending: tuple[int, dict[str, jax.Array]] | None = None

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes those of a step that has been started.

    Waits for the step before: two at most are under way, a stop comes soon.

    Raises:
      FloatingPointError: a value that is not finite, naming its step.
    """
    self._fetch()
    self._pending = step, metrics

  def means(self) -> dict[str, float]:
    """Means over the window, up to the last step.

    Raises:
      FloatingPointError: a value that is not finite, naming its step.
    """
    self._fetch()
    sums = dict(self.window)
    steps = sums.pop("steps", 1)
    return {name: total / steps for name, total in sums.items()}

  def _fetch(self):
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    for name, value in ({"steps": 1} | jax.device_get(metrics)).items():
      if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value} at step {step}")
      self.window[name] = self.window.get(name, 0) + float(value)
