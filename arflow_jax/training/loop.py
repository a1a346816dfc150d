"""The training loop: restore or begin, step, report, save, stop cleanly."""

import contextlib
import math
from collections.abc import Callable, Sequence

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import paths
from arflow_jax.data import pipeline, sequences, sources
from arflow_jax.parallel import agreement, lanes, processes
from arflow_jax.training import (
  checkpoint,
  listing,
  lock,
  newest,
  observers,
  replicas,
  row_log,
  run_files,
  telemetry,
)
from arflow_jax.training import feed as feed_lib
from arflow_jax.training import program as program_lib
from arflow_jax.training import saver as saver_lib
from arflow_jax.training import stop as stop_lib
from arflow_jax.training.state import TrainState

# So many steps in a row without an update are an error: by then it is no
# unlucky batch.
_SKIPPED = 10


def train(
  config: ConfigDict,
  workdir: str,
  *,
  ideal_step: Callable[..., float | None] | None = None,
  makes: Sequence[observers.Makes] = (),
) -> int:
  """Trains until `config.steps`, resuming from the newest checkpoint.

  SIGTERM saves after the step in progress and returns, and so does data that
  can no longer be read. SIGINT saves too, and then raises KeyboardInterrupt; a
  second one raises it at once. Before the first step there is nothing to save:
  a signal ends the process there. All processes of a job stop after the same
  step, also where only one of them is asked to or lacks data, or JAX has notice
  of a preemption.

  Args:
    config: the full config; see `config.FREE` for what a relaunch may change.
    workdir: the run's directory.
    ideal_step: see `analysis.utilization`; without it no MFU is told.
    makes: what makes observers of the run, such as `sampling.pictures`.

  Returns:
    Steps done in all.

  Raises:
    ConfigError: settings that cannot work, or a frozen key changed.
    FloatingPointError: a loss or gradient that is not finite; with
      `optimizer.skip_nonfinite` ten in a row.
    ReplicasDiffer: devices hold different numbers; see `debug.replicas`.
  """
  agreement.start(agreement.settings(config, workdir=workdir))
  agreement.together(lambda: paths.check_workdir(workdir))
  with stop_lib.Stop() as stop:
    step = _train(config, workdir, stop, ideal_step, makes)
  if stop.interrupted and step < config.steps:
    raise KeyboardInterrupt
  return step


def _train(config, workdir, stop, ideal_step, makes) -> int:
  if listing.agreed_steps(workdir):
    stored = newest.read_config(workdir)
    config_lib.check_relaunch(stored, config, workdir)
  program, items, data = agreement.together(lambda: _open(config))
  agreement.compare(data)
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
        ideal = None
        if ideal_step:
          ideal = ideal_step(config, program.mesh.devices.flat)
        return _steps(
          program, items, workdir, state, window, stop, ideal, makes
        )
      except FloatingPointError as error:  # by now what could be saved is saved
        steps = listing.steps(workdir)
        kept = "no checkpoint was saved yet"
        if steps:
          kept = f"the last good checkpoint is step {steps[-1]}"
        raise FloatingPointError(
          f"{error}; {kept} in {workdir}. Lower optimizer.peak_lr or clip"
          " harder, in a new --workdir"
        ) from None


def _open(
  config: ConfigDict,
) -> tuple[program_lib.Program, sequences.ClassSequences, agreement.Facts]:
  """What fails before anything is compiled or written; and which data."""
  program = program_lib.build(config)
  items = pipeline.open_items(config)
  found = sources.fingerprint(items.source)
  values = {
    f"class {i}": f"{name} with {count} images"
    for i, (name, count) in enumerate(zip(found["classes"], found["images"]))
  }
  remedy = f"give all the same data, data.dir={config.data.dir} in this one"
  return program, items, agreement.Facts("their data", values, remedy)


def _steps(
  program: program_lib.Program,
  items: sequences.ClassSequences,
  workdir: str,
  state: TrainState,
  window: dict[str, float],
  stop: stop_lib.Stop,
  ideal: float | None,
  makes: Sequence[observers.Makes],
) -> int:
  """From a state to the last step, or to the one after which to stop."""
  config, start = program.config, int(state.step)
  images = config.batch_size * config.data.sequence_length
  metrics = _Metrics(window)
  rows = None
  if config.debug.rows:
    rows = row_log.RowLog(workdir, program, start)
  same = None
  if config.debug.replicas:
    same = replicas.Replicas(program.abstract_state.params)
  with (
    contextlib.closing(
      pipeline.batches(items, config, start, program.rows)
    ) as batches,
    contextlib.closing(saver_lib.Saver(workdir, config, state)) as saver,
    contextlib.closing(
      telemetry.Telemetry(workdir, start, config.steps, images, ideal)
    ) as log,
    contextlib.closing(
      observers.Observers(makes, program, workdir, start, log)
    ) as watching,
  ):
    feed = feed_lib.Feed(log.timed(batches), start + 1)
    feed.check(*processes.ask(lambda: [feed.trouble])())
    stopping = lambda: processes.agree(stop.requested)[0]
    for step in range(start + 1, config.steps + 1):
      watching.between(step - 1, state, stopping)
      log.begin()
      batch = feed.take(step < config.steps)
      # Asked before the step is dispatched, answered when the one before is
      # done: the devices wait for no host.
      answers = processes.ask(
        lambda step=step: (
          stop.requested or processes.preempted(step),
          saver.failed(),
          saver.due(),
          feed.trouble,
        )
      )
      batch = program.place(batch)
      if rows:
        rows.add(step, state, batch)
      state, latest = program.step(state, batch)
      log.started()
      if same and step % config.debug.replicas == 0:
        same.check(step, state.params)
      metrics.add(step, latest)
      asked, failed, due, trouble = answers()
      done = asked or trouble or step == config.steps
      again = failed and not done and saver.mend()
      save = done or again or due or step % config.checkpoint.every == 0
      first = step == start + 1
      # A mean covers fixed steps, whatever the launch that made them.
      whole = step % config.log.every == 0
      record = whole or step in (1, config.steps)
      if not (first or save or record):
        continue
      means = metrics.means()  # raises where one is not finite
      if whole:
        metrics.window = {}
      if trouble:  # what the data did is no fault of the steps before
        feed.tell()
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
    if trouble == feed_lib.BROKEN:
      feed.check(trouble)
    if step == config.steps:
      watching.between(step, state, stopping)
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
    window: sums since the last record; `steps` counts them, and `skipped` those
      without an update, of which there is nothing else in it. Stored with every
      checkpoint: an interruption changes no mean.
  """

  def __init__(self, window: dict[str, float]):
    self.window = dict(window)
    self._skipped = 0  # in a row
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
    """Means over the window, up to the last step, and how many were `skipped`.

    The loss is not a number where all of them were.

    Raises:
      FloatingPointError: a value that is not finite, naming its step.
    """
    self._fetch()
    sums = dict(self.window)
    counted = {k: sums.pop(k) for k in ("skipped",) if k in sums}
    steps = sums.pop("steps", 1) - counted.get("skipped", 0)
    means = {name: total / steps for name, total in sums.items()}
    return {"loss": math.nan} | means | counted

  def _fetch(self):
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    found = {"steps": 1} | jax.device_get(metrics)
    skipped = bool(found.get("skipped", 0))
    self._skipped = self._skipped + 1 if skipped else 0
    wrong = [f"{k} is {v}" for k, v in found.items() if not math.isfinite(v)]
    if wrong:
      text = f"{wrong[0]} at step {step}"
      if not skipped:
        raise FloatingPointError(text)
      if self._skipped == _SKIPPED:
        raise FloatingPointError(f"{text}, the {_SKIPPED}th such step in a row")
      processes.say(f"{text}: its update is skipped")
      found = {"steps": 1, "skipped": 1}
    for name, value in found.items():
      self.window[name] = self.window.get(name, 0) + float(value)
