"""Saves a run while it trains, and outlives saves that fail."""

import concurrent.futures
import contextlib
import gc
import time
import warnings

import jax
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax.parallel import processes
from arflow_jax.training import checkpoint, echoes, listing, room
from arflow_jax.training.state import TrainState

_keep = ocp.training.preservation_policies


class Saver:
  """Writes the checkpoints of one run in the background. Close it.

  What killed processes and failed saves have left is removed at the start and
  before the next save.

  Args:
    workdir: the run's directory, which nobody else writes to.
    config: the full config; `config.checkpoint` says what is kept.
    state: such a state as will be saved. What a save computes is compiled here:
      a stop does not wait for it.
  """

  def __init__(self, workdir: str, config: ConfigDict, state: TrainState):
    self._workdir, self._config = workdir, config
    policies = [_keep.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_every:
      policies.append(_keep.EveryNSteps(config.checkpoint.keep_every))
    self._policy = _keep.AnyPreservationPolicy(policies)
    self._last = time.monotonic()  # when a save began
    self._pending = None  # the save that is being written
    self._failures, self._failed_once = 0, False
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    room.announce(self._bytes, workdir, config)
    checkpoint.contents(state, config, {})
    try:
      self._writer = self._open()
    except OSError:  # the first save tells
      self._writer = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._quiet = contextlib.ExitStack()
    self._quiet.enter_context(echoes.dropped())

  def save(
    self, step: int, state: TrainState, window: dict[str, float]
  ) -> None:
    """Starts saving; returns as soon as the arrays are copied.

    Args:
      step: of the state.
      state: the whole train state.
      window: see `checkpoint.contents`.

    Raises:
      OSError: as for `mend`, of the save before.
    """
    self.mend()
    self._begin(step, state, window)

  def due(self) -> bool:
    """Whether `checkpoint.minutes` have passed since the last save began.

    One process alone looks at its clock, and tells the others.
    """
    minutes = self._config.checkpoint.minutes
    passed = time.monotonic() - self._last
    return minutes > 0 and processes.speaks() and passed >= 60 * minutes

  def failed(self) -> bool:
    """Whether the last save has failed, as far as this process knows."""
    done = self._pending is not None and self._pending.done()
    return done and self._pending.exception() is not None

  def mend(self) -> bool:
    """Waits for the last save; all processes call it.

    Returns:
      Whether to save again at once, as after the first failure in a row. After
      others the next checkpoint is soon enough.

    Raises:
      OSError: `checkpoint.failures` saves in a row have failed.
    """
    failure = self._wait()
    if not failure:
      return False
    limit = self._config.checkpoint.failures
    failure += f", failure {self._failures} of checkpoint.failures={limit}"
    if self._failures >= limit:
      raise OSError(
        f"{failure}; stopped: start the same command again when the cause is"
        " gone"
      )
    processes.say(f"{failure}; training goes on")
    return self._failures == 1

  def finish(
    self, step: int, state: TrainState, window: dict[str, float]
  ) -> None:
    """Saves and waits until all is on disk; tries again after a failure.

    Args:
      step, state, window: as for `save`.

    Raises:
      OSError: the state could not be saved.
    """
    if failure := self._wait():
      processes.say(failure)
    for pause in (*listing.PAUSES, None):
      if step in listing.agreed_steps(self._workdir):
        return
      self._begin(step, state, window)
      if not (failure := self._wait()):
        return
      if pause is None:
        raise OSError(f"{failure}: what was done since the one before is lost")
      processes.say(f"{failure}; again in {pause:g} s")
      time.sleep(pause)

  def close(self) -> None:
    """Waits until everything is on disk."""
    if self._pending is not None:  # after an error, which is told elsewhere
      concurrent.futures.wait([self._pending])
      if error := self._pending.exception():
        why = listing.reason(error)
        processes.say(f"step {self._step} could not be saved ({why})")
    self._discard()
    self._thread.shutdown()
    if not self._failed_once:  # else Orbax's threads still speak of it
      self._quiet.close()

  def _begin(
    self, step: int, state: TrainState, window: dict[str, float]
  ) -> None:
    items, about = checkpoint.contents(state, self._config, window)
    self._step, self._last = step, time.monotonic()
    try:
      self._writer = self._writer or self._open()
      written = self._writer.save_checkpointables_async(
        step,
        items,
        force=True,  # or Orbax skips a save while the one before is written
        custom_metadata=about,
      ).result
    except Exception as error:
      written = _raiser(error)
    self._pending = self._thread.submit(written)

  def _open(self) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
      listing.folder(self._workdir, make=True),
      preservation_policy=self._policy,
      cleanup_tmp_directories=True,
    )

  def _discard(self) -> None:
    with contextlib.suppress(Exception):  # what is known already
      self._writer.close()
    self._writer = None
    with warnings.catch_warnings():
      # Orbax leaves coroutines that a failure kept from running.
      warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
      gc.collect()

  def _tidy(self) -> None:
    """Removes what threads of a failed save have written after it failed."""
    if not (self._failed_once and processes.speaks()):
      return
    folder = listing.folder(self._workdir)
    with contextlib.suppress(Exception):  # a bucket raises its own kinds
      for left in folder.glob("*.orbax-checkpoint-tmp*"):
        left.rmtree()

  def _wait(self) -> str:
    """Waits for the save before: a text where it failed in any process."""
    if self._pending is None:
      return ""
    concurrent.futures.wait([self._pending])
    error, self._pending = self._pending.exception(), None
    (failed,) = processes.agree(error is not None)
    if not failed:
      self._failures = 0
      self._tidy()
      return ""
    self._failed_once = True
    why = listing.reason(error) if error else "another process says why"
    del error  # it holds on to what the failed save has left
    self._discard()  # the next one begins anew, and removes what is left
    if self._step in listing.agreed_steps(self._workdir):
      processes.say(f"step {self._step} is saved, tidying up failed ({why})")
      self._failures = 0
      return ""
    self._failures += 1
    space = room.left(self._bytes, self._workdir)
    return f"step {self._step} could not be saved ({why}; {space})"


def _raiser(error):
  def fail():
    raise error

  return fail
