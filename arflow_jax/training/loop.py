"""The training loop: restore or begin, step, report, save, stop cleanly."""

import contextlib
import math

import jax
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import paths
from arflow_jax.data import pipeline, sources
from arflow_jax.parallel import processes
from arflow_jax.training import checkpoint, listing, telemetry
from arflow_jax.training import program as program_lib
from arflow_jax.training import stop as stop_lib


def train(config: ConfigDict, workdir: str) -> int:
  """Trains until `config.steps`, resuming from the newest checkpoint.

  SIGTERM saves after the step in progress and returns. SIGINT saves too, and
  then raises KeyboardInterrupt; a second one raises it at once. Before the
  first step there is nothing to save: a signal ends the process there.

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
  program.branch.settings(config.sample)  # else found when it draws
  items = pipeline.open_items(config)  # a wrong data.dir fails before the rest
  checkpoint.check_data(workdir, sources.fingerprint(items.source))
  saver = checkpoint.Checkpoints(workdir, config)
  state = saver.restore(program.abstract_state, program.init)
  start = int(state.step) if state else 0
  checkpoint.keep_config(workdir, config)
  if start >= config.steps:
    processes.say(
      f"{workdir} is finished: {start} steps are done, steps={config.steps}"
    )
    return start
  if start:
    processes.say(f"resuming {workdir} after step {start}")
  state = state or program.init()
  _announce(program)
  images = config.batch_size * config.data.sequence_length
  metrics = _Metrics(workdir, listing.steps(workdir))
  saved = start
  with (
    jax.set_mesh(program.mesh),  # kernels split themselves over it
    contextlib.closing(
      pipeline.batches(items, config, start, program.rows)
    ) as batches,
    contextlib.closing(saver),
    telemetry.Telemetry(workdir, start, config.steps, images) as log,
  ):
    for step in range(start + 1, config.steps + 1):
      try:
        batch = next(batches)
      except Exception:
        if step - 1 > saved:  # what the data did is no fault of these steps
          metrics.flush()
          saver.save(step - 1, state)
        raise
      state, latest = program.step(state, program.place(batch))
      metrics.add(step, latest)
      done = step == config.steps or stop.decided()
      save = done or step % config.checkpoint.every == 0
      first = step == start + 1
      if first or save or step % config.log.every == 0:
        means = metrics.flush()  # raises where one is not finite
        stop.begin()  # there is something to save from here on
        if save:  # first of all: a disk that takes no report may take this
          saver.save(step, state)
          saved = metrics.last_good = step
        log.report(step, means)
      if first:
        log.start_clock(step)
      if done:
        break
  if step < config.steps:
    processes.say(
      f"stopped on request after step {step}, saved; start the same command"
      " again to go on"
    )
  else:
    processes.say(
      f"finished {step} steps; checkpoints in {workdir}/checkpoints"
    )
  return step


def _announce(program: program_lib.Program) -> None:
  leaves = jax.tree.leaves(program.abstract_state.params)
  devices = program.mesh.devices
  processes.say(
    f"{program.config.branch} with {sum(leaf.size for leaf in leaves):,}"
    f" parameters on {devices.size} {devices.flat[0].platform} device(s);"
    " compiling the train step ..."
  )


class _Metrics:
  """Metrics still on the device, fetched together and checked."""

  def __init__(self, workdir: str, steps: list[int]):
    self.last_good = steps[-1] if steps else None
    self._workdir = workdir
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self._pending.append((step, metrics))
    # The host runs two steps ahead of the devices, no more: a stop comes soon.
    if len(self._pending) > 2:
      jax.block_until_ready(self._pending[-3])

  def flush(self) -> dict[str, float]:
    """Means since the last call.

    Raises:
      FloatingPointError: a value that is not finite, naming its step.
    """
    if not self._pending:
      return {}
    values = jax.device_get([metrics for _, metrics in self._pending])
    for (step, _), metrics in zip(self._pending, values):
      for name, value in metrics.items():
        if not math.isfinite(value):
          kept = f"the last good checkpoint is step {self.last_good}"
          if self.last_good is None:
            kept = "no checkpoint was saved yet"
          raise FloatingPointError(
            f"{name} is {value} at step {step}; {kept} in {self._workdir}."
            " Lower optimizer.peak_lr or clip harder, in a new --workdir"
          )
    self._pending.clear()
    return {
      k: sum(float(v[k]) for v in values) / len(values) for k in values[0]
    }
