"""JAX's own notice of a preemption, beside handlers of ours.

`jax.distributed.initialize` answers SIGTERM in C: it tells all processes, and
they agree on a step. That displaces what Python has set, which then hears no
SIGTERM, and what Python sets later displaces it. So we keep ours, and pass the
signal on.
"""

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None)
_WORDS = 32  # more than a `struct sigaction` has; the handler comes first
_notify: Callable[[int], None] | None = None


@contextlib.contextmanager
def beside() -> Iterator[None]:
  """Leaves our answer to SIGTERM where it is while JAX puts its own there.

  Where Python has none, JAX's stays.
  """
  global _notify
  former = _action()
  yield
  latter = _action()
  if latter[0] != former[0]:
    _notify = ctypes.CFUNCTYPE(None, ctypes.c_int)(latter[0])
    if former[0]:
      _libc.sigaction(int(signal.SIGTERM), former, None)


def notify() -> None:
  """Tells JAX that this process got SIGTERM, where it wants to know."""
  if _notify:
    _notify(signal.SIGTERM)


def _action() -> ctypes.Array:
  held = (ctypes.c_void_p * _WORDS)()
  _libc.sigaction(int(signal.SIGTERM), None, held)
  return held
