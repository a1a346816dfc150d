"""A signal as a request to stop; the loop lets all processes agree on it."""

import contextlib
import os
import signal
import threading

from arflow_jax.errors import STOPPED
from arflow_jax.parallel import preemption


class Stop:
  """Turns SIGTERM, SIGINT and SIGHUP into a request to stop after a step.

  Until `begin` there is nothing to lose, and a signal ends the process at once:
  a thread hears it even while XLA compiles, when Python's own handlers wait. A
  second SIGINT raises KeyboardInterrupt. What the process was told to ignore,
  as by `nohup`, it ignores. SIGTERM is passed on to JAX. As a context manager
  it puts the former handlers back.

  Attributes:
    requested: whether this process was asked to stop.
    interrupted: whether SIGINT was among the requests.
  """

  def __init__(self):
    self.requested = self.interrupted = False
    self._begun = False
    self._before = {}

  def begin(self) -> None:
    """From now on a signal waits for the end of a step."""
    self._begun = True

  def _request(self, number, frame):
    if number == signal.SIGINT and self.interrupted:
      raise KeyboardInterrupt  # the second Ctrl-C means it
    self.interrupted |= number == signal.SIGINT
    self.requested = True

  def _watch(self):
    while number := os.read(self._heard, 1)[0]:
      if number in self._before and not self._begun:
        # Not by print: the thread that was stopped may hold its lock.
        with contextlib.suppress(OSError):  # the terminal may have gone
          os.write(
            2,
            b"stopped before the first step: nothing is lost, start the same"
            b" command again\n",
          )
        os._exit(130 if number == signal.SIGINT else STOPPED)
      if number == signal.SIGTERM:
        preemption.notify()

  def __enter__(self):
    self._heard, self._wakeup = os.pipe()
    os.set_blocking(self._wakeup, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._request)
    self._former = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._former)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    os.write(self._wakeup, b"\0")  # ends the thread
    self._thread.join()
    os.close(self._wakeup)
    os.close(self._heard)
