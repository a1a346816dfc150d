"""What all processes do alike: the same outcome or an error in every one.

Where one process fails alone, the others wait for it in the next collective. So
what may fail is done `together`, or by one process for all; and what has to be
the same in all is compared before anything expensive starts.
"""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from ml_collections import ConfigDict

import arflow_jax
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes

T = TypeVar("T")
_LISTED = 8  # processes, and different values, in a message


class Elsewhere(ConfigError):
  """Another process has failed; the message says which, and why."""


class Facts(NamedTuple):
  """Something that has to be the same in all processes.

  Attributes:
    what: its name, for the message.
    values: its parts by name, as JSON can hold them.
    remedy: what to do where it differs.
  """

  what: str
  values: Mapping[str, Any]
  remedy: str


def start(*facts: Facts) -> None:
  """Joins the other processes; compares what they run, and more facts.

  Raises:
    ConfigError: the job cannot be joined, or something differs.
  """
  processes.start()
  compare(*_program(), *facts)


def settings(config: ConfigDict, **flags: Any) -> Facts:
  """A config and flags: what the command line says."""
  values = config_lib.flatten(json.loads(config_lib.dumps(config)))
  values |= {f"--{name}": value for name, value in flags.items()}
  return Facts("their settings", values, "start all with the same command")


def together(function: Callable[[], T]) -> T:
  """What `function` returns here, once it has returned in all processes.

  All processes call it. The function itself waits for no other process.

  Raises:
    Elsewhere: it has failed in another process, and not in this one.
  """
  value, error = None, None
  try:
    value = function()
  except Exception as caught:
    error = caught
  every = processes.gather(None if error is None else _line(error))
  if error is not None:
    raise error
  for number, line in enumerate(every):
    if line is not None:
      raise Elsewhere(f"process {number} has failed: {line}")
  return value


def by_one(function: Callable[[], T]) -> T:
  """What `function` returns in the process that speaks, in every process.

  All processes call it; it is JSON that can hold the value.

  Raises:
    Elsewhere: it has failed there, and this is another process.
  """
  result = together(lambda: function() if processes.speaks() else None)
  return processes.gather(result)[0]


def compare(*facts: Facts) -> None:
  """Raises ConfigError in all processes unless all have the same facts."""
  every = processes.gather([_digest(fact.values) for fact in facts])
  for fact, *digests in zip(facts, *every):
    if len(set(digests)) > 1:
      values = processes.gather(dict(fact.values))
      raise ConfigError(_difference(fact, values))


def _program() -> list[Facts]:
  """The code and the versions that a process runs."""
  versions = {
    "Python": ".".join(platform.python_version_tuple()[:2]),
    "JAX": jax.__version__,
    "jaxlib": importlib.metadata.version("jaxlib"),
  }
  return [
    Facts("versions", versions, "install the same in all"),
    Facts("the code of arflow_jax", _code(), "copy the same code to all"),
  ]


@functools.cache
def _code() -> dict[str, str]:
  """A checksum of every file of this package."""
  folder = pathlib.Path(arflow_jax.__file__).parent
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*.py"))
  }


def _digest(values: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _difference(fact: Facts, every: list[dict[str, Any]]) -> str:
  """Names the first part that differs, and who has which value of it."""

  def holders(name: str) -> dict[str, list[int]]:
    found = {}
    for number, values in enumerate(every):
      text = _short(values[name]) if name in values else "missing"
      found.setdefault(text, []).append(number)
    return found

  names = sorted(set().union(*every))
  names = [name for name in names if len(holders(name)) > 1]
  told = [
    f"{value} in {_numbers(who)}"
    for value, who in list(holders(names[0]).items())[:_LISTED]
  ]
  more = f" ({len(names) - 1} more differ)" if names[1:] else ""
  return (
    f"the processes differ in {fact.what}: {names[0]} is {', '.join(told)}"
    f"{more}; {fact.remedy}"
  )


def _short(value: Any) -> str:
  text = repr(value)
  whole = len(text) <= 100
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  # Of a long text the end may be what differs.
  return text if whole else f"{text[:80]}... (checksum {digest})"


def _numbers(numbers: Iterable[int]) -> str:
  numbers = list(numbers)
  shown = ", ".join(map(str, numbers[:_LISTED]))
  more = len(numbers) - _LISTED
  shown += f" and {more} more" if more > 0 else ""
  return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def _line(error: Exception) -> str:
  """An error as one line."""
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f"{error.filename}: {error.strerror}"
  text = (str(error).splitlines() or [""])[0]
  if isinstance(error, (ConfigError, OSError)) and text:
    return text
  return f"{type(error).__name__}: {text}"
