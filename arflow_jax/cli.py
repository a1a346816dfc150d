"""What all mains share: flags, one-line errors, a light start.

Nothing heavy is imported before the flags are parsed, so `--help` and usage
errors answer at once.
"""

import re
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from arflow_jax.config import flatten, nearest
from arflow_jax.errors import ConfigError

_required: list[str] = []


def require(name: str) -> None:
  """Makes a flag one that must be given."""
  _required.append(name)


def define_config(default: str | None = None) -> None:
  """Defines `--config=FILE.py:VARIANT` with `--config.key=value` overrides."""
  config_flags.DEFINE_config_file(
    "config", default, "Config file and variant, e.g. configs/arflow.py:digits."
  )
  if default is None:
    require("config")


def define_workdir() -> None:
  """Defines the required `--workdir`."""
  flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, metrics, samples."
  )
  require("workdir")


def run(main: Callable[[], None]) -> None:
  """Parses the flags, runs `main` and exits; errors a user can mend are a line.

  Exit codes: 0 done, 1 an error, 2 a usage error.
  """
  if {"--help", "-help", "-h", "--helpshort"} & set(sys.argv[1:]):
    print(_help())
    sys.exit(0)
  try:
    _parse(sys.argv)
  except (flags.Error, ConfigError) as error:
    _fail(error, 2)
  try:
    main()
  except (ConfigError, FloatingPointError, OSError) as error:
    _fail(error, 1)
  except KeyboardInterrupt:
    _fail("interrupted", 130)


def _help() -> str:
  lines = [sys.modules["__main__"].__doc__.strip(), "", "flags:"]
  modules = flags.FLAGS.flags_by_module_dict()
  for module in (__name__, sys.argv[0]):
    for flag in modules.get(module, []):
      note = (
        "required"
        if flag.name in _required
        else f"default {flag.default_as_str}"
      )
      lines.append(f"  --{flag.name:12} {flag.help} ({note})")
  return "\n".join(lines)


def _parse(argv: list[str]) -> None:
  try:
    unexpected = flags.FLAGS(argv)[1:]
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.get("branch")  # raises where the file did not load
  except flags.UnrecognizedFlagError as error:
    name = error.flagname
    known = [f"--{flag}" for flag in flags.FLAGS]
    hint = nearest(f"--{name}", known)
    raise ConfigError(f"unknown flag --{name}{hint}") from None
  except (AttributeError, KeyError) as error:
    raise _unknown_key(argv, str(error)) from None
  except OSError as error:
    reason = str(error).strip().splitlines()[-1].strip()
    raise ConfigError(f"--config cannot be loaded: {reason}") from None
  except flags.IllegalFlagValueError as error:
    # An error inside the config file arrives with its whole stack trace.
    reason = str(error).strip().splitlines()[-1]
    raise ConfigError(re.sub(r"^[\w.]+Error: ", "", reason)) from None
  if unexpected:
    raise ConfigError(
      f"unexpected argument {unexpected[0]!r}; flags look like --name=value"
    )
  for name in _required:
    if flags.FLAGS[name].value in (None, ""):
      raise ConfigError(f"--{name} is required; see --help")


def _unknown_key(argv: list[str], message: str) -> ConfigError:
  """Finds the override of no known key and names the nearest one."""
  words = " ".join(argv[1:]).replace("--config ", "--config=").split()
  overrides = dict(w.lstrip("-").partition("=")[::2] for w in words)
  config = flags.FLAGS["config"].parser.parse(overrides.get("config", ""))
  known = list(flatten(config.to_dict()))
  for name in overrides:
    key = name.removeprefix("config.")
    if key != name and key not in known:
      return ConfigError(f"unknown config key --{name}{nearest(key, known)}")
  return ConfigError(" ".join(message.split()))


def _fail(error: object, code: int) -> None:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(code)
