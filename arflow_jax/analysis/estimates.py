"""Times by published peaks and stated rates: nothing of it was ever run.

A program takes the longest of its products, its memory traffic and the
compiler's cycles; exchanges run beside these at best and after them at worst.
"""

from typing import Any

from ml_collections import ConfigDict

from arflow_jax.analysis import collectives, footprint
from arflow_jax.analysis.chips import Slice

# Bytes a second of one host. Assumed: neither is published for a TPU host, and
# disks and buckets differ widely.
TO_HOST = 10e9  # from its devices to its memory
TO_DISK = 1e9  # from there to a disk or a bucket
IMAGES = 50_000  # of which FID is taken


def train(
  config: ConfigDict, found: dict[str, Any], place: Slice
) -> dict[str, Any]:
  """Seconds of a step, and what follows of them for the whole recipe.

  Args:
    config: the full config.
    found: `work`, `needed`, `exchanges` and `cycles` of its compiled step.
    place: where it would run.
  """
  # State and temporaries are read and written at least once.
  moved = 2 * found["needed"] * place.chip.devices
  parts = _parts(found, place, moved / place.chip.hbm_rate)
  return {
    "parts": parts,
    "steps": {
      name: {
        "seconds": seconds,
        "mfu": parts["products"] / seconds,
        "images_per_second": found["work"]["images"] / seconds,
        "days": config.steps * seconds / 86_400,
        "chip_hours": config.steps * seconds * place.chips / 3600,
      }
      for name, seconds in _bounds(parts).items()
    },
  }


def sample(found: dict[str, Any], place: Slice) -> dict[str, Any]:
  """Seconds of a block of images, and of as many as FID is taken from.

  Args:
    found: `work`, `needed`, `exchanges` and `cycles` of the compiled sampler.
    place: where it would run.
  """
  moved = 2 * found["needed"] * place.chip.devices
  parts = _parts(found, place, moved / place.chip.hbm_rate)
  images = found["work"]["images"]
  blocks = -(-IMAGES // images)
  return {
    "parts": parts,
    "blocks": {
      name: {
        "seconds": seconds,
        "mfu": parts["products"] / seconds,
        "images_per_second": images / seconds,
        "hours": blocks * seconds / 3600,
        "chip_hours": blocks * seconds * place.chips / 3600,
      }
      for name, seconds in _bounds(parts).items()
    },
  }


def _parts(
  found: dict[str, Any], place: Slice, memory: float
) -> dict[str, float]:
  """Seconds that each part of a program takes on its own."""
  chip = place.chip
  sent, between = 0, 0
  for row in found["exchanges"]:
    if row["axes"] == collectives.SLICES:
      between += row["bytes"]
    else:
      sent += row["bytes"]
  parts = {
    "products": found["work"]["flops"] / place.chips / chip.peak,
    "memory": memory,
    # Half of the published rate is what a chip can send.
    "exchange": sent * chip.devices / (chip.links / 2),
    "cycles": sum(found["cycles"].values()) / chip.clock,
  }
  if place.slices > 1:
    parts["network"] = between * chip.devices / chip.network
  return parts


def _bounds(parts: dict[str, float]) -> dict[str, float]:
  compute = max(parts["products"], parts["memory"], parts["cycles"])
  network = parts.get("network", 0.0)
  return {
    "hidden": max(compute, parts["exchange"], network),
    "in_turn": compute + parts["exchange"] + network,
  }


def checkpoint(config: ConfigDict, place: Slice) -> dict[str, Any]:
  """Bytes of one checkpoint and of all that stay, and the seconds of a save.

  Args:
    config: the full config.
    place: whose hosts share a save evenly.

  Returns:
    `bytes` of one, uncompressed; `hosts`; `kept`, how many there are at most
    while one more is written, and `disk`, the bytes of all of these; `waits`,
    seconds that training waits for a save, and `writes`, those that it takes
    in the background.
  """
  size, settings = footprint.checkpoint(config), config.checkpoint
  kept = settings.keep
  if settings.keep_every:
    kept += config.steps // settings.keep_every
  share = size / place.hosts
  return {
    "bytes": size,
    "hosts": place.hosts,
    "kept": kept,
    "disk": (kept + 1) * size,
    "waits": share / TO_HOST,
    "writes": share / TO_DISK,
  }
