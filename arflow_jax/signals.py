"""What Ctrl-C, SIGTERM and SIGHUP do to a main: one line and a code, at once.

From the first import on, and also while XLA compiles, when Python's own
handlers wait. Nothing is lost by it: `sample` writes each file as a whole and
goes on from there, and training, which has to save, has `training/stop.py`.
"""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable

from arflow_jax.errors import STOPPED

# A newline first: the console shows ^C or a progress bar.
_STOPPED = (b"\nstopped; start the same command again\n", STOPPED)
_ENDS = {
  signal.SIGINT: (b"\nerror: interrupted\n", 130),
  signal.SIGTERM: _STOPPED,
  signal.SIGHUP: _STOPPED,  # the terminal has gone
}
# What removes files that nobody else would.
cleaners: list[Callable[[], None]] = []


def watch() -> None:
  """Begins to answer them; the thread that runs Python's handlers calls it."""
  heard, wakeup = os.pipe()
  os.set_blocking(wakeup, False)
  for number in _ENDS:
    # What was told to ignore them, such as a job in the background, goes on.
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, lambda *_: None)
      # First registered, last called: then all is done, and Python would fall
      # back to dying of them while it ends.
      atexit.register(signal.signal, number, signal.SIG_IGN)
  signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
  threading.Thread(target=_wait, args=(heard,), daemon=True).start()


def _wait(heard: int) -> None:
  while (number := os.read(heard, 1)[0]) not in _ENDS:
    pass
  line, code = _ENDS[number]
  for clean in cleaners:
    with contextlib.suppress(Exception):  # or nothing would end the process
      clean()
  with contextlib.suppress(OSError):
    os.write(2, line)
  os._exit(code)
