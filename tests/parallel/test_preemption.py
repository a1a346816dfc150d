"""Two handlers of one signal: ours stays, and JAX's is told."""

import ctypes
import os
import signal

import pytest

from arflow_jax.parallel import preemption

_libc = ctypes.CDLL(None)


@pytest.fixture
def jaxs(monkeypatch):
  """What JAX puts in the place of Python's handler; yields what it heard."""
  monkeypatch.setattr(preemption, "_notify", None)
  heard = []
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(heard.append)
  before = preemption._action()
  former = signal.getsignal(signal.SIGTERM)

  def install():
    _libc.signal(signal.SIGTERM.value, handler)

  yield install, heard
  signal.signal(signal.SIGTERM, former)
  _libc.sigaction(signal.SIGTERM.value, before, None)


def test_ours_hears_the_signal_and_passes_it_on(jaxs):
  install, heard = jaxs
  ours = []
  signal.signal(signal.SIGTERM, lambda number, _: ours.append(number))
  with preemption.beside():
    install()
  os.kill(os.getpid(), signal.SIGTERM)
  assert (ours, heard) == ([signal.SIGTERM], [])
  preemption.notify()
  assert heard == [signal.SIGTERM]


def test_where_python_has_none_jaxs_stays(jaxs):
  install, heard = jaxs
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  with preemption.beside():
    install()
  os.kill(os.getpid(), signal.SIGTERM)
  assert heard == [signal.SIGTERM]


def test_without_jaxs_there_is_nobody_to_tell(monkeypatch):
  monkeypatch.setattr(preemption, "_notify", None)
  with preemption.beside():
    pass
  preemption.notify()
