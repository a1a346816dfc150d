"""The one error that mains show as a single line instead of a stack trace."""


class ConfigError(ValueError):
  """A setting, file or directory the user can mend; the message says how."""
