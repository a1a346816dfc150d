"""How much room checkpoints need, and how much there is."""

import contextlib
import shutil

from ml_collections import ConfigDict
from tqdm import tqdm

from arflow_jax.parallel import processes
from arflow_jax.training import listing


def announce(size: int, workdir: str, config: ConfigDict) -> None:
  """Says what the checkpoints of a run will need, and warns of too little.

  Args:
    size: bytes of one checkpoint, before it is compressed.
    workdir: the run's directory.
    config: the full config.
  """
  kept = config.checkpoint
  count = kept.keep + 1  # one is written before one is removed
  text = f"checkpoints of up to {_text(size)}, {count} at a time"
  if kept.keep_every:
    text += f" and one for good every {kept.keep_every:,} steps"
    count += config.steps // kept.keep_every
  text += f", need {_text(count * size)}"
  free = _free(workdir)
  if free is None:
    processes.say(text)
    return
  processes.say(f"{text}; {_text(free)} are free in {workdir}")
  there = len(listing.steps(workdir))
  missing = max(count - there, 1) * size - free
  if missing > 0:
    processes.say(
      f"warning: {workdir} lacks {_text(missing)} for them; make room there, or"
      " lower checkpoint.keep"
    )


def left(size: int, workdir: str) -> str:
  """What a checkpoint needs and what is free, in words."""
  text, free = f"it needs up to {_text(size)}", _free(workdir)
  if free is None:
    return text
  return f"{text}, {_text(free)} are free in {workdir}"


def _free(workdir: str) -> int | None:
  """Bytes; None of a bucket, or a folder that is gone."""
  with contextlib.suppress(OSError):
    return shutil.disk_usage(workdir).free
  return None


def _text(size: int) -> str:
  return tqdm.format_sizeof(size, "B")
