"""Errors that mains show as a single line instead of a stack trace."""

# Exit code of a trainer that was stopped and has saved: the same command,
# started again, goes on.
STOPPED = 42


class ConfigError(ValueError):
  """A setting, file or directory the user can mend; the message says how."""


class ReplicasDiffer(RuntimeError):
  """Devices that should hold the same numbers do not; it says which."""
