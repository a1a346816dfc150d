"""Where a stop is decided: on a signal, by all processes together."""

import signal

from arflow_jax.parallel import processes


class Stop:
  """Turns SIGTERM and SIGINT into a request to stop after a step.

  A second SIGINT raises KeyboardInterrupt at once. As a context manager it puts
  the former handlers back.
  """

  def __init__(self):
    self._requested = False
    self._interrupted = False
    self._before = {}

  def decided(self) -> bool:
    """Whether to stop now; all processes have to ask after the same step."""
    return processes.agree(self._requested)

  def _request(self, number, frame):
    if number == signal.SIGINT and self._interrupted:
      raise KeyboardInterrupt  # the second Ctrl-C means it
    self._interrupted |= number == signal.SIGINT
    self._requested = True

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
