"""Printing that outlives the console: a closed pipe ends no run."""

import os
import sys


def say(text: str) -> None:
  """Prints a line at once, or nothing more once nobody reads."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    silence()


def silence() -> None:
  """Sends what is still printed nowhere, also what Python prints at its end."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)
