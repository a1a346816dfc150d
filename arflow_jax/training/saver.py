"""Saves a run while it trains, and outlives saves that fail."""

import concurrent.futures
import contextlib
import gc
import shutil
import time
import warnings

import jax
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from arflow_jax.parallel import processes
from arflow_jax.training import checkpoint, echoes, listing
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
    self._folder = listing.folder(workdir, make=True)
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None  # the save that is being written
    self._failures, self._again = 0, False
    self._quiet = contextlib.ExitStack()
    self._quiet.enter_context(echoes.dropped())
    try:
      self._writer = self._open()
    except OSError:  # the first save tells
      self._writer = None
    checkpoint.contents(state, config, {})

  def save(
    self, step: int, state: TrainState, window: dict[str, float]
  ) -> None:
    """Starts saving; returns as soon as the arrays are copied.

    Where it fails, `failed` tells.

    Args:
      step: of the state.
      state: the whole train state.
      window: see `checkpoint.contents`.

    Raises:
      OSError: as for `failed`, of the save before.
    """
    self._report(self._wait(), "now")
    items, about = checkpoint.contents(state, self._config, window)
    self._step = step
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
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

  def failed(self) -> bool:
    """Whether the last save has failed and is to be made again at once.

    A failure is said in one line. The first one of a row is made good at once,
    the second one with the next checkpoint, and so on in turns.

    Raises:
      OSError: `checkpoint.failures` saves in a row have failed.
    """
    if self._pending is None or not self._pending.done():
      return False
    failure = self._settle()
    self._again = bool(failure) and not self._again
    self._report(
      failure, "at once" if self._again else "at the next checkpoint"
    )
    return self._again

  def finish(
    self, step: int, state: TrainState, window: dict[str, float]
  ) -> None:
    """Saves and waits until all is on disk; tries again after a failure.

    Args:
      step, state, window: as for `save`.

    Raises:
      OSError: the state could not be saved.
    """
    for pause in (*listing.PAUSES, None):
      self.save(step, state, window)
      if not (failure := self._wait()):
        return
      if step in listing.steps(self._workdir):
        return  # it is there: only removing an old one has failed
      if pause is None:
        raise OSError(f"{failure}: what was done since is lost")
      processes.say(f"{failure}: again in {pause:g} s")
      time.sleep(pause)

  def close(self) -> None:
    """Waits until everything is on disk."""
    if failure := self._wait():
      processes.say(failure)
    self._discard()
    self._thread.shutdown()
    self._quiet.close()

  def _open(self) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
      self._folder,
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

  def _wait(self) -> str:
    """Waits for the save before; what `_settle` says of it."""
    if self._pending is None:
      return ""
    concurrent.futures.wait([self._pending])
    return self._settle()

  def _report(self, failure: str, when: str) -> None:
    if failure and self._failures >= self._config.checkpoint.failures:
      raise OSError(
        f"{failure}: stopped; start the same command again when the cause is"
        " gone"
      )
    if failure:
      processes.say(f"{failure}: training goes on and saves again {when}")

  def _settle(self) -> str:
    """How the save that is done went: a text where it failed."""
    error, self._pending = self._pending.exception(), None
    if error is None:
      self._failures = 0
      return ""
    why = listing.reason(error)
    del error  # it holds on to what the failed save has left
    self._failures += 1
    self._discard()  # the next one begins anew, and removes what is left
    return (
      f"the checkpoint of step {self._step} could not be saved ({why};"
      f" {self._space()}), failure {self._failures} of checkpoint.failures="
      f"{self._config.checkpoint.failures} in a row"
    )

  def _space(self) -> str:
    size = lambda count: tqdm.format_sizeof(count, "B")
    text = f"it needs up to {size(self._bytes)}"
    if "://" not in str(self._folder):
      free = shutil.disk_usage(self._folder).free
      text += f", {size(free)} are free in {self._folder}"
    return text


def _raiser(error):
  def fail():
    raise error

  return fail
