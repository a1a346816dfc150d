"""Waits until all processes of a job are there, before JAX looks for them.

Where some do not come, JAX ends the process in C++ after five minutes, and says
neither how many are missing nor which. So process 0 first listens at the
coordinator's address itself, and the others report there. Once all have, it
lets go of the port, and JAX takes it.
"""

import contextlib
import selectors
import socket
import time

from arflow_jax import console
from arflow_jax.errors import ConfigError

NOTICE = 30.0  # seconds after which those that are missing are named, and again
PATIENCE = 300.0  # seconds that they have, as JAX gives them
_GREETING = "arflow_jax"
_LISTED = 16  # numbers in a message


def meet(address: str, count: int, number: int) -> None:
  """Returns once all processes of the job have called it.

  Args:
    address: HOST:PORT of process 0; nothing else may listen there.
    count: of processes; more than one.
    number: of this one, from 0.

  Raises:
    ConfigError: some did not come within `PATIENCE`, two have one number, or
      they do not agree on the count.
  """
  if number == 0:
    _Host(address, count).wait()
  else:
    _report(address, count, number)


class _Host:
  """Process 0: counts the others, and tells them when all are there."""

  def __init__(self, address: str, count: int):
    self._address, self._count = address, count
    self._guests: dict[int, socket.socket] = {}

  def wait(self) -> None:
    begun = time.monotonic()
    notice = begun + NOTICE
    with contextlib.ExitStack() as stack:
      events = stack.enter_context(selectors.DefaultSelector())
      server = stack.enter_context(self._listen())
      events.register(server, selectors.EVENT_READ)
      stack.callback(self._close)
      while missing := self._missing():
        now = time.monotonic()
        if now >= begun + PATIENCE:
          self._refuse(
            f"{self._list(missing)} did not come within {PATIENCE:.0f} s; look"
            f" at their logs, and whether they reach process 0 at"
            f" {self._address}"
          )
        if now >= notice:
          text = f"{self._list(missing)} have not come in {now - begun:.0f} s"
          console.say(f"{text}; waiting until {PATIENCE:.0f} s")
          notice = now + NOTICE
        for key, _ in events.select(min(notice, begun + PATIENCE) - now):
          if key.fileobj is server:
            self._admit(server, events)
          else:  # it has nothing to say, so it has gone
            events.unregister(key.fileobj)
            key.fileobj.close()
            self._guests.pop(key.data)
      self._tell("go")

  def _listen(self) -> socket.socket:
    port = _split(self._address)[1]
    kind: dict = {}
    if socket.has_dualstack_ipv6():
      kind = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
      return socket.create_server(("", port), **kind)
    except OSError as error:
      raise ConfigError(
        f"JAX_COORDINATOR_ADDRESS={self._address}: process 0 cannot listen at"
        f" port {port} ({error.strerror}); choose a free one"
      ) from None

  def _admit(self, server: socket.socket, events) -> None:
    """Takes what one that has come says of itself; strangers are sent away."""
    guest, _ = server.accept()
    guest.settimeout(1.0)
    try:
      name, number, count = guest.makefile("r").readline().split()
      number, count = int(number), int(count)
    except (OSError, ValueError):
      name = ""
    if name != _GREETING:
      guest.close()
      return
    taken = number == 0 or number in self._guests
    if count == self._count and not taken:
      self._guests[number] = guest
      events.register(guest, selectors.EVENT_READ, number)
      return
    self._guests[-1] = guest  # so that it is told as well
    if count != self._count:
      self._refuse(
        f"JAX_NUM_PROCESSES is {self._count} in process 0 and {count} in"
        f" process {number}; set the same everywhere"
      )
    self._refuse(
      f"two processes have JAX_PROCESS_ID={number}; number them from 0 to"
      f" {self._count - 1}"
    )

  def _missing(self) -> list[int]:
    return [i for i in range(1, self._count) if i not in self._guests]

  def _list(self, missing: list[int]) -> str:
    more = len(missing) - _LISTED
    numbers = ", ".join(map(str, missing[:_LISTED]))
    numbers += f" and {more} more" if more > 0 else ""
    return f"{len(missing)} of {self._count} processes ({numbers})"

  def _tell(self, text: str) -> None:
    for guest in self._guests.values():
      with contextlib.suppress(OSError):
        guest.sendall(f"{text}\n".encode())

  def _refuse(self, text: str) -> None:
    self._tell(text)
    raise ConfigError(text)

  def _close(self) -> None:
    for guest in self._guests.values():
      guest.close()


def _report(address: str, count: int, number: int) -> None:
  """Every other process: reports to process 0 and waits for its word."""
  begun = time.monotonic()
  notice = begun + NOTICE
  reason = ""
  while True:
    try:
      # Once heard, process 0 decides how long to wait.
      with socket.create_connection(_split(address), timeout=5) as host:
        host.settimeout(2 * PATIENCE)
        host.sendall(f"{_GREETING} {number} {count}\n".encode())
        if answer := host.makefile("r").readline().strip():
          if answer == "go":
            return
          raise ConfigError(answer)
      reason = "it closed the connection"
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, "strerror", None) or str(error)
    now = time.monotonic()
    text = f"process {number}: process 0 has not answered at {address}"
    if now >= begun + PATIENCE:
      raise ConfigError(
        f"{text} within {PATIENCE:.0f} s ({reason}); look at its log, and"
        " whether this is the address of its machine"
      )
    if now >= notice:
      console.say(f"{text} in {now - begun:.0f} s ({reason})")
      notice = now + NOTICE
    time.sleep(0.2)


def _split(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)
