"""All come, or one clear error names those that have not."""

import concurrent.futures
import socket

import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import rendezvous


@pytest.fixture
def address(monkeypatch):
  monkeypatch.setattr(rendezvous, "PATIENCE", 1.0)
  monkeypatch.setattr(rendezvous, "NOTICE", 0.4)
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return f"localhost:{probe.getsockname()[1]}"


def _meet(address, *pairs):
  """What each (count, number) gets to hear: None where all is well."""
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    asked = [pool.submit(rendezvous.meet, address, *pair) for pair in pairs]
    errors = [future.exception() for future in asked]
  assert all(isinstance(e, ConfigError | None) for e in errors), errors
  return [str(error) if error else None for error in errors]


def test_all_come(address, capsys):
  assert _meet(address, (4, 2), (4, 0), (4, 3), (4, 1)) == [None] * 4
  assert capsys.readouterr().out == ""
  assert _meet(address, (2, 1), (2, 0)) == [None] * 2  # the port is free again


def test_those_that_are_missing_are_named(address, capsys):
  told = _meet(address, (4, 0), (4, 2))
  assert told[0] == told[1]
  assert told[0].startswith("2 of 4 processes (1, 3) did not come within 1 s;")
  assert address in told[0]
  said = capsys.readouterr().out
  assert "2 of 4 processes (1, 3) have not come in 0 s; waiting until 1" in said


def test_a_long_list_is_cut(address):
  (told,) = _meet(address, (64, 0))
  assert told.startswith("63 of 64 processes (1, 2, 3,")
  assert "16 and 47 more) did not come" in told


def test_process_0_is_missing(address, capsys):
  (told,) = _meet(address, (2, 1))
  assert f"process 0 has not answered at {address} within 1 s" in told
  assert "Connection refused" in told
  assert "process 1: process 0 has not answered" in capsys.readouterr().out


def test_one_that_leaves_is_missing_again(address):
  host, port = address.split(":")
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(rendezvous.meet, address, 3, 0)
    while True:
      try:
        guest = socket.create_connection((host, int(port)))
        break
      except OSError:
        assert not first.done()
    guest.sendall(b"arflow_jax 1 3\n")
    guest.close()
    with socket.create_connection((host, int(port))) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    error = first.exception()
  assert "2 of 3 processes (1, 2) did not come" in str(error)


def test_a_number_given_twice(address):
  told = _meet(address, (3, 0), (3, 1), (3, 1))
  assert (
    told[0] == "two processes have JAX_PROCESS_ID=1; number them from 0 to 2"
  )
  assert told.count(told[0]) == 3


def test_counts_that_differ(address):
  told = _meet(address, (3, 0), (2, 1))
  assert (
    told
    == [
      "JAX_NUM_PROCESSES is 3 in process 0 and 2 in process 1; set the same"
      " everywhere"
    ]
    * 2
  )


def test_a_port_that_is_taken(address):
  with socket.create_server(("", int(address.split(":")[1]))):
    (told,) = _meet(address, (2, 0))
  assert "process 0 cannot listen at port" in told
