"""What all mains share: flags, one-line errors, a light start.

A main is a module with a docstring, `define(flags)` and `main(args)`. `execute`
calls it with any arguments, as often as wanted: flags are made anew each time.
Nothing heavy is imported before they are parsed, so `--help` and usage errors
answer at once.
"""

import ast
import contextlib
import os
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import console, paths
from arflow_jax.errors import ConfigError, ReplicasDiffer

Args = types.SimpleNamespace  # the value of every flag, by its name
_PATIENCE = 5.0  # seconds that other threads have to end, when all is done


class Flags:
  """The flags of one call of a main."""

  def __init__(self):
    self._values = flags.FlagValues()
    self._values.set_gnu_getopt()  # keeps parsing after an unknown argument
    self._required: list[str] = []
    self._paths: list[str] = []
    flags.DEFINE_bool(
      "help", False, "", short_name="h", flag_values=self._values
    )

  def define(
    self,
    kind: str,
    name: str,
    default: Any,
    text: str,
    *,
    required: bool = False,
    **limits: Any,
  ) -> None:
    """Defines a flag.

    Args:
      kind: what follows `DEFINE_` in absl's names, such as "integer"; or
        "path", a text that may begin with `~`.
      name: of the flag.
      default: its value where it is not given.
      text: what `--help` says of it.
      required: whether it must be given, and not be empty.
      **limits: what else absl takes, such as `lower_bound`.
    """
    if kind == "path":
      self._paths.append(name)
      kind = "string"
    make = getattr(flags, f"DEFINE_{kind}")
    make(
      name=name,
      default=default,
      help=text,
      flag_values=self._values,
      **limits,
    )
    if required:
      self._required.append(name)

  def config(self, default: str | None = None) -> None:
    """Defines `--config=FILE.py:VARIANT`, its keys `--config.key=value`."""
    text = "Config file and variant, e.g. configs/arflow.py:digits."
    self.define("path", "config", default, text, required=default is None)

  def workdir(self) -> None:
    """Defines the required `--workdir`."""
    text = "Directory of the run: checkpoints, metrics, samples."
    self.define("path", "workdir", None, text, required=True)

  def seed(self) -> None:
    """Defines `--seed`, the numbers that random keys tell from one another."""
    bounds = {"lower_bound": 0, "upper_bound": 2**32 - 1}
    self.define("integer", "seed", 0, "Seed of the noise.", **bounds)

  def help(self) -> str:
    """One line a flag."""
    lines = ["flags:"]
    for name in self._values:
      flag = self._values[name]
      note = f"default {flag.default_as_str}"
      if name in self._required:
        note = "required"
      if name not in ("help", "h"):
        lines.append(f"  --{name:12} {flag.help} ({note})")
    return "\n".join(lines)

  def parse(self, argv: Sequence[str]) -> Args | None:
    """The value of every flag; `config` as a ConfigDict. None: help is wanted.

    Raises:
      absl.flags.Error, ValueError: arguments that cannot be used.
    """
    rest = self._values(["", *argv], known_only=True)
    args = Args(**self._values.flag_values_dict())
    for name in self._paths:
      setattr(args, name, paths.expand(getattr(args, name) or "") or None)
    if args.help:
      return None
    config = None
    if "config" in self._values:
      if not args.config:
        raise ConfigError("--config is required; see --help")
      args.config = config = config_lib.from_file(args.config)
    self._override(config, rest)
    for name in self._required:
      if getattr(args, name) in (None, ""):
        raise ConfigError(f"--{name} is required; see --help")
    return args

  def _override(self, config: ConfigDict | None, argv: list[str]) -> None:
    """Sets keys of the config from the arguments that are no flags."""
    keys = list(config_lib.flatten(config.to_dict())) if config else []
    overrides = flags.FlagValues()
    for key in keys:
      _define_key(config, key, overrides)
    try:
      unexpected = overrides(argv)[1:]
    except flags.UnrecognizedFlagError as error:
      hint = self._hint(error.flagname, keys)
      raise ConfigError(f"unknown flag --{error.flagname}{hint}") from None
    if unexpected:
      raise ConfigError(
        f"unexpected argument {unexpected[0]!r}; flags look like --name=value"
      )
    for key in keys:
      if (flag := overrides[f"config.{key}"]).present:
        config.update_from_flattened_dict({key: flag.value})

  def _hint(self, name: str, keys: list[str]) -> str:
    """What may have been meant by an unknown flag, after its name."""
    key = name.removeprefix("config.")
    if any(known.startswith(f"{key}.") for known in keys):
      return ": it is a group; set one of its keys"
    if key != name and keys:
      return config_lib.nearest(key, keys, "--config.")
    if key != name and "set" in self._values:
      return ": a run has its own config; --set=KEY=VALUE changes how it draws"
    known = [*self._values, *(f"config.{key}" for key in keys)]
    return config_lib.nearest(name, known, "--")


class _TupleParser(flags.ArgumentParser):
  """Reads `(1, 2)`, `1,2` and a single value."""

  def parse(self, argument: str) -> tuple:
    try:
      value = ast.literal_eval(argument)
    except (ValueError, SyntaxError):
      value = argument  # a bare word is text
    return value if isinstance(value, tuple) else (value,)


class _BooleanParser(flags.BooleanParser):
  """Reads `true` and `false`, with a message for all else."""

  def parse(self, argument: str) -> bool:
    try:
      return super().parse(argument)
    except ValueError:
      raise ValueError(f"{argument!r} is neither true nor false") from None


class _OrNone(flags.ArgumentParser):
  """Reads `None`, and all that another parser reads."""

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, argument: str) -> Any:
    return None if argument == "None" else self._parser.parse(argument)


def _define_key(
  config: ConfigDict, key: str, overrides: flags.FlagValues
) -> None:
  kind = config_lib.key_type(config, key)
  parser = {
    int: flags.IntegerParser,
    float: flags.FloatParser,
    bool: _BooleanParser,
    str: flags.ArgumentParser,
    tuple: _TupleParser,
  }[kind]()
  if config_lib.takes_none(config, key):
    parser = _OrNone(parser)
  flag = flags.Flag(
    parser, None, f"config.{key}", None, "", boolean=kind is bool
  )
  flags.DEFINE_flag(flag, overrides)


def execute(module: types.ModuleType, argv: Sequence[str]) -> int:
  """Calls a main; errors that a user can mend are one line.

  Args:
    module: the main.
    argv: its arguments, without a program's name before them.

  Returns:
    The exit code: 0 finished; STOPPED (42) stopped with the state saved, where
    the same command goes on; 1 an error that a restart will not mend; 2 a usage
    error; 130 interrupted.
  """
  return _execute(module, argv)[0]


def _execute(
  module: types.ModuleType, argv: Sequence[str]
) -> tuple[int, BaseException | None]:
  """The exit code, and the error that is its reason."""
  own = Flags()
  module.define(own)
  try:
    args = own.parse(argv)
  except (flags.Error, ValueError) as error:
    return _fail(error, 2), error
  if args is None:
    console.say(f"{module.__doc__.strip()}\n\n{own.help()}")
    return 0, None
  try:
    code = module.main(args)
  except (ConfigError, FloatingPointError, OSError, ReplicasDiffer) as error:
    return _fail(error, 1), error
  except (MemoryError, RuntimeError) as error:
    reason = str(error).partition("\n")[0]
    if "out of memory" not in reason.lower() and not isinstance(
      error, MemoryError
    ):
      raise  # as JAX says it of a device
    text = f"a batch or block is too large for the memory: {reason}"
    return _fail(text, 1), error
  except KeyboardInterrupt as error:
    return _fail("interrupted", 130), error
  return code or 0, None


def run(name: str) -> None:
  """Executes the main of this name with the program's arguments and exits."""
  try:
    code, error = _execute(sys.modules[name], sys.argv[1:])
  except Exception as found:
    code, error, unknown = 1, found, True
  else:
    unknown = False
  # Where there may be several: nothing heavy is imported for it.
  processes = sys.modules.get("arflow_jax.parallel.processes")
  if unknown and processes and processes.cut_off(error):
    reason = str(error).partition("\n")[0]
    _fail(f"another process is lost, its log may say why ({reason})", 1)
  elif unknown:
    sys.excepthook(type(error), error, error.__traceback__)
  left = bool(code == 1 and processes and processes.leave(error))
  others = [
    thread
    for thread in threading.enumerate()
    if not thread.daemon or thread.name.startswith("arflow_jax.")
    if thread is not threading.main_thread()
  ]
  end = time.monotonic() + _PATIENCE
  for thread in others if code != 130 and not left else ():
    with contextlib.suppress(Exception):  # Orbax's raise what they failed with
      thread.join(max(0.0, end - time.monotonic()))
  # Programs may still run on threads that an exit would crash. Those of a save
  # that has failed may wait for minutes, and the reader of loaders for ever.
  alive = any(thread.is_alive() for thread in others)
  if code == 130 or left or alive:
    if processes and alive and code not in (130, 1):
      processes.part()
    with contextlib.suppress(OSError, AttributeError):  # closed by the caller
      sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _fail(error: object, code: int) -> int:
  if isinstance(error, OSError) and error.strerror and error.filename:
    error = f"{error.filename}: {error.strerror}"
  with contextlib.suppress(OSError):  # the terminal may have gone
    print(f"error: {error}", file=sys.stderr)
  return code
