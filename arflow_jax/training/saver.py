"""Saves a run while it trains, and outlives saves that fail."""

import concurrent.futures
import contextlib
import gc
import time
import warnings
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import paths
from arflow_jax.parallel import agreement, processes
from arflow_jax.training import checkpoint, echoes, listing, room
from arflow_jax.training.state import TrainState

_REMOVED = ".orbax-checkpoint-tmp-removed"  # which Orbax takes for a leftover
_POLL = 0.2  # seconds after which processes ask whether a save has failed
_PATIENCE = 5.0  # seconds for the others where one has failed


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
    self._last = time.monotonic()  # when a save began
    self._pending = None  # the save that is being written
    self._failures, self._failed_once = 0, False
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    room.announce(self._bytes, workdir, config)
    checkpoint.contents(state, config, {})
    self._clean = False  # whether what failed saves have left is removed
    # The first save tells.
    with contextlib.suppress(OSError, agreement.Elsewhere):
      self._open()
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
      if not self._clean:
        self._open()
      # Not by Orbax's manager, which hides the failure of a process that has
      # failed alone until the others have waited for it in vain.
      path = listing.folder(self._workdir) / str(step)
      written = ocp.save_checkpointables_async(
        path, items, custom_metadata=about
      ).result
    except Exception as error:
      self._pending = concurrent.futures.Future()
      self._pending.set_exception(error)
      return
    self._pending = self._thread.submit(self._complete, written)

  def _complete(self, written: Callable[[], None]) -> None:
    """Waits until a save is on disk; then one process removes old ones."""
    written()
    if not processes.speaks():
      return
    kept, steps = self._config.checkpoint, listing.steps(self._workdir)
    for step in steps[: -kept.keep]:
      if not (kept.keep_every and step % kept.keep_every == 0):
        self._remove(listing.folder(self._workdir) / str(step))

  def _remove(self, path: epath.Path) -> None:
    if paths.is_local(path):  # a kill must leave nothing that looks whole
      path = path.rename(path.with_name(f"{path.name}{_REMOVED}"))
    path.rmtree()

  def _open(self) -> None:
    """Removes what killed processes and failed saves have left; all call it."""
    agreement.together(lambda: self._sweep() if processes.speaks() else None)
    self._clean = True

  def _sweep(self) -> None:
    folder = listing.folder(self._workdir, make=True)
    whole = set(map(str, listing.steps(self._workdir)))
    for path in folder.iterdir():
      # Where folders cannot be renamed an unfinished one has the final name.
      unfinished = path.name.isdecimal() and path.name not in whole
      if unfinished or "orbax-checkpoint-tmp" in path.name:
        path.rmtree()

  def _discard(self) -> None:
    pending, self._pending = self._pending, None
    if pending is not None and not pending.done():
      # Its thread waits for a process that will not come.
      self._thread.shutdown(wait=False)
      self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._clean = False
    del pending
    with warnings.catch_warnings():
      # Orbax leaves coroutines that a failure kept from running.
      warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
      gc.collect()

  def _wait(self) -> str:
    """Waits for the save before: a text where it failed in any process."""
    if self._pending is None:
      return ""
    failed, error = self._outcome()
    if not failed:
      self._pending = None
      self._failures = 0
      if self._failed_once and processes.speaks():
        # Threads of the failed save may have written after it had failed.
        with contextlib.suppress(Exception):  # a bucket raises its own kinds
          self._sweep()
      return ""
    self._failed_once = True
    whose = processes.gather(listing.reason(error) if error else None)
    number, why = next((n, text) for n, text in enumerate(whose) if text)
    if None in whose:
      why = f"process {number}: {why}"
    del error  # it holds on to what the failed save has left
    self._discard()  # the next one removes what is left
    if self._step in listing.agreed_steps(self._workdir):
      processes.say(f"step {self._step} is saved, tidying up failed ({why})")
      self._failures = 0
      return ""
    self._failures += 1
    space = room.left(self._bytes, self._workdir)
    return f"step {self._step} could not be saved ({why}; {space})"

  def _outcome(self) -> tuple[bool, Exception | None]:
    """Waits for the last save: whether it failed anywhere, and its error here.

    Where one process has failed, Orbax lets the others wait for it for 20
    minutes; they are given some seconds to write what they can.
    """
    patience = _POLL if processes.count() > 1 else None
    while True:
      concurrent.futures.wait([self._pending], patience)
      done = self._pending.done()
      error = self._pending.exception() if done else None
      failed, busy = processes.agree(error is not None, not done)
      if not busy or (failed and patience == _PATIENCE):
        return failed, error
      if failed:
        patience = _PATIENCE
