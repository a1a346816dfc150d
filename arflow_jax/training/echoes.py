"""Drops what Orbax prints of an error that it raises as well.

One failure comes as up to eight logged stacks, a dump of its classes, and one
more stack for each read that was still under way. The error itself is caught
and said in one line by whoever called Orbax.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def dropped() -> Iterator[list[str]]:
  """Drops them while it is open, and yields the list of the logged ones."""
  heard = []

  def is_none(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if "orbax" in record.pathname:
      echo = record.exc_info or text.startswith("Failed to")
    else:
      echo = "exception was never retrieved" in text
    if echo:
      heard.append(text)
    return not echo

  def unraisable(found) -> None:
    if str(found.exc_value) != "Event loop is closed":
      former(found)

  former, sys.unraisablehook = sys.unraisablehook, unraisable
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  for logger in loggers:
    logger.filters.insert(0, is_none)  # the innermost hears it
  try:
    yield heard
  finally:
    sys.unraisablehook = former
    for logger in loggers:
      logger.removeFilter(is_none)
