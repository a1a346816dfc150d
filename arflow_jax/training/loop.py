"""The training loop: restore or begin, step, report, save, stop cleanly."""

import contextlib
import math
import signal

import jax
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.data import pipeline
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import checkpoint, optimizer, state, telemetry


def train(config: ConfigDict, workdir: str) -> int:
  """Trains until `config.steps`, resuming from the newest checkpoint.

  SIGTERM or SIGINT saves after the step in progress and returns; a second
  SIGINT stops at once.

  Args:
    config: the full config; see `config.FREE` for what a relaunch may change.
    workdir: the run's directory.

  Returns:
    Steps done in all.

  Raises:
    ConfigError: settings that cannot work, or a frozen key changed.
    FloatingPointError: a loss or gradient that is not finite.
  """
  _check(config)
  if checkpoint.steps(workdir):
    stored = checkpoint.read_config(workdir)
    config_lib.check_relaunch(stored, config, workdir)
  branch = branches.build(config)
  micro_batch = config.batch_size // max(config.optimizer.accumulation, 1)
  mesh = mesh_lib.make_mesh(config.mesh, micro_batch)
  tx = optimizer.make_optimizer(config.optimizer, branch.axes)
  train_step = state.make_train_step(branch, tx, config)
  saver = checkpoint.Checkpoints(workdir, config)
  current = saver.restore(state.abstract_state(branch, tx, mesh))
  if current is None:
    current = state.init_state(branch, tx, mesh, jax.random.key(config.seed))
  start = int(current.step)
  if start >= config.steps:
    print(f"{workdir} is finished: {start} of {config.steps} steps done")
    return start
  batches = pipeline.train_batches(
    config, start, jax.process_index(), jax.process_count()
  )
  sharding = mesh_lib.batch_sharding(mesh)
  if start:
    print(f"resuming {workdir} after step {start}")
  parameters = sum(leaf.size for leaf in jax.tree.leaves(current.params))
  print(
    f"{config.branch} with {parameters:,} parameters on"
    f" {mesh.devices.size} {jax.devices()[0].platform} device(s);"
    " compiling the train step ...",
    flush=True,
  )
  images = config.batch_size * config.data.sequence_length
  metrics = _Metrics(start, workdir)
  with (
    jax.set_mesh(mesh),  # kernels split themselves over it
    _StopSignals() as stop,  # until the last checkpoint is on disk
    contextlib.closing(saver),
    telemetry.Telemetry(workdir, start, config.steps, images) as log,
  ):
    for step in range(start + 1, config.steps + 1):
      batch = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows),
        next(batches),
      )
      current, latest = train_step(current, batch)
      metrics.add(step, latest)
      done = step == config.steps or stop.requested
      save = done or step % config.checkpoint.every == 0
      first = step == start + 1
      if first or save or step % config.log.every == 0:
        log.report(step, metrics.flush())  # raises where one is not finite
      if first:
        log.start_clock(step)
      if save:
        saver.save(step, current)
        metrics.last_good = step
      if done:
        break
  if step < config.steps:
    print(f"stopped on request after step {step}, saved; relaunch to go on")
  else:
    print(f"finished {step} steps; checkpoints in {workdir}/checkpoints")
  return step


class _Metrics:
  """Metrics still on the device, fetched together and checked."""

  def __init__(self, start: int, workdir: str):
    self.last_good = start
    self._workdir = workdir
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self._pending.append((step, metrics))

  def flush(self) -> dict[str, float]:
    """Means since the last call.

    Raises:
      FloatingPointError: a value that is not finite, naming its step.
    """
    values = jax.device_get([metrics for _, metrics in self._pending])
    for (step, _), metrics in zip(self._pending, values):
      for name, value in metrics.items():
        if not math.isfinite(value):
          kept = f"the last good checkpoint is step {self.last_good}"
          if not self.last_good:
            kept = "no checkpoint was saved yet"
          raise FloatingPointError(
            f"{name} is {value} at step {step}; {kept} in {self._workdir}."
            " Lower optimizer.peak_lr or clip harder, in a new --workdir"
          )
    self._pending.clear()
    return {
      k: sum(float(v[k]) for v in values) / len(values) for k in values[0]
    }


def _check(config: ConfigDict) -> None:
  for key in ("seed", "data.workers"):
    if (value := config_lib.flatten(config.to_dict())[key]) < 0:
      raise ConfigError(f"{key}={value} must not be negative")
  config_lib.positive(
    config,
    "steps",
    "batch_size",
    "checkpoint.every",
    "checkpoint.keep",
    "log.every",
  )


class _StopSignals:
  """Turns SIGTERM and SIGINT into a request to stop after the current step."""

  def __init__(self):
    self.requested = False
    self._interrupted = False
    self._before = {}

  def _request(self, number, frame):
    if number == signal.SIGINT and self._interrupted:
      raise KeyboardInterrupt  # the second Ctrl-C means it
    self._interrupted |= number == signal.SIGINT
    self.requested = True

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
