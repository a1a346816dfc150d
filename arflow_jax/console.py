"""Printing that ends no run: a console may close, the disk of a log fill up."""

import contextlib
import os
import sys


def say(text: str) -> None:
  """Prints a line at once, or nothing more once nobody reads.

  Where a file that takes the output cannot grow, it waits for the next line.
  """
  try:
    print(text, flush=True)
  except BrokenPipeError:
    silence()
  except OSError:
    with contextlib.suppress(OSError):  # standard error may go elsewhere
      print(text, file=sys.stderr, flush=True)


def hold() -> None:
  """Opens the standard files that the caller has closed, to nowhere.

  Else the next file that is opened gets their numbers, and what is printed.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:  # as Python begins where it is closed
      opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
      if opened == number:
        os.set_inheritable(opened, True)  # for what this process starts
        setattr(sys, name, os.fdopen(opened, "w" if number else "r"))


def silence() -> None:
  """Sends what is still printed nowhere, also what Python prints at its end."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)
