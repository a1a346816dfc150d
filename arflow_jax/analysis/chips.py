"""What is published of TPU generations, and the slices that can be rented.

Peak rates and bandwidths of a chip: https://cloud.google.com/tpu/docs, pages
v5e, v5p, v6e and tpu7x. What a program may use of the memory is what libtpu
0.0.42 names when it refuses one.
"""

import dataclasses
import math
import re

from arflow_jax.config import nearest
from arflow_jax.errors import ConfigError

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
  *("8x8x8", "8x8x16", "8x16x16"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation.

  Attributes:
    peak: FLOP/s of bfloat16 products, one chip.
    hbm: bytes of one device that a program can use.
    hbm_rate: bytes/s, one chip.
    links: bytes/s over all links between chips, both directions together.
    network: bytes/s to other slices, over the data-center network, one chip.
    flops_per_cycle: of one device at its peak, by which cycles become seconds;
      the compiler's estimate of a product of 4096 x 4096 bfloat16 matrices
      reaches 83% (tpu7x) to 97% (v5e) of it.
    slices: shapes that can be rented, by number of chips.
    host: chips of the largest slice in one machine; of larger ones each
      machine has four.
    devices: of one chip.
  """

  peak: float
  hbm: int
  hbm_rate: float
  links: float
  network: float
  flops_per_cycle: int
  slices: tuple[str, ...]
  host: int
  devices: int = 1

  @property
  def clock(self) -> float:
    """Cycles a second, from the two peaks."""
    return self.peak / self.devices / self.flops_per_cycle


def _gib(size: float) -> int:
  return int(size * 2**30)


TPUS = {
  "v5e": Chip(197e12, _gib(15.75), 819e9, 400e9, 25e9 / 8, 2**17, _FLAT, 8),
  "v6e": Chip(918e12, _gib(31.25), 1638e9, 800e9, 100e9 / 8, 2**19, _FLAT, 8),
  "v5p": Chip(459e12, _gib(95.74), 2765e9, 1200e9, 50e9 / 8, 2**18, _CUBES, 4),
  "tpu7x": Chip(
    2307e12, _gib(94.75), 7380e9, 1200e9, 100e9 / 8, 2**19, _CUBES, 4, 2
  ),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """What `--topology` names.

  Attributes:
    name: as given.
    chips: of all slices.
    devices: of all slices.
    hbm: bytes that a program can use on one device.
    chip: the generation; None for a GPU, of which only the memory is known.
    slices: how many alike, joined by the data-center network.
  """

  name: str
  chips: int
  devices: int
  hbm: int
  chip: Chip | None = None
  slices: int = 1

  @property
  def topology(self) -> str:
    """The name of one slice."""
    return self.name.removeprefix(f"{self.slices}x")

  @property
  def hosts(self) -> int:
    """Machines that its chips are in."""
    each = self.chips // self.slices
    alone = self.chip is None or each <= self.chip.host
    return self.slices * (1 if alone else each // 4)


def parse(name: str) -> Slice:
  """The slice of a name such as `v5e:16x16`, `2xv5e:16x16` or `gpu:80GB`.

  Raises:
    ConfigError: an unknown generation, a shape that cannot be rented, or a
      number of slices out of 2 to 64.
  """
  several = re.fullmatch(
    r"([2-9]|[1-5]\d|6[0-4])x(?=[a-z])(.*)", name, re.ASCII
  )
  slices, topology = (int(several[1]), several[2]) if several else (1, name)
  generation, _, shape = topology.partition(":")
  if generation == "gpu" and not several:
    return _gpu(name, shape)
  if generation not in TPUS:
    hint = nearest(generation, list(TPUS))
    raise ConfigError(
      f"--topology={name} is unknown{hint}; such as v5e:16x16, v6e:4x4,"
      " v5p:4x4x8, tpu7x:4x4x4, two slices 2xv5e:16x16 (at most 64), or"
      " gpu:80GB"
    )
  chip = TPUS[generation]
  if shape not in chip.slices:
    raise ConfigError(
      f"--topology={name}: {generation} has the slices {', '.join(chip.slices)}"
    )
  chips = slices * math.prod(map(int, shape.split("x")))
  return Slice(name, chips, chips * chip.devices, chip.hbm, chip, slices)


def _gpu(name: str, size: str) -> Slice:
  number = re.fullmatch(r"(\d{1,4})GB", size, re.ASCII)
  if number is None or int(number[1]) < 1:
    raise ConfigError(
      f"--topology={name}: give the memory of one GPU, such as gpu:80GB"
    )
  return Slice(name, 1, 1, int(number[1]) * 10**9)


def slices(generation: str) -> list[Slice]:
  """All slices of a generation, smallest first."""
  return [parse(f"{generation}:{shape}") for shape in TPUS[generation].slices]
