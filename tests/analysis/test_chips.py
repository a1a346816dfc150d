"""Names of slices: what they hold, and what is refused."""

import pytest

from arflow_jax.analysis import chips
from arflow_jax.errors import ConfigError


@pytest.mark.parametrize(
  ("name", "count", "devices", "hosts", "gib"),
  [
    ("v5e:16x16", 256, 256, 64, 15.75),
    ("v6e:2x4", 8, 8, 1, 31.25),
    ("v5p:2x2x2", 8, 8, 2, 95.74),
    ("v5p:4x4x8", 128, 128, 32, 95.74),
    ("tpu7x:4x4x4", 64, 128, 16, 94.75),  # two devices a chip
    ("2xv5e:2x4", 16, 16, 2, 15.75),  # two slices
    ("12xtpu7x:2x2x2", 96, 192, 24, 94.75),
  ],
)
def test_a_slice_of_tpus(name, count, devices, hosts, gib):
  place = chips.parse(name)
  assert (place.chips, place.devices) == (count, devices)
  assert place.hosts == hosts
  assert place.hbm == pytest.approx(gib * 2**30)


def test_several_slices_are_of_one_kind():
  place = chips.parse("2xv5e:16x16")
  assert (place.slices, place.topology) == (2, "v5e:16x16")
  one = chips.parse("v5e:16x16")
  assert (one.slices, one.topology) == (1, one.name)


def test_a_gpu_is_known_by_its_memory():
  place = chips.parse("gpu:24GB")
  assert place == chips.Slice("gpu:24GB", 1, 1, 24 * 10**9)
  assert place.hosts == 1


@pytest.mark.parametrize(
  "name",
  [
    *(
      "",
      "v5e",
      "v5e:",
      "v5e:32x32",
      "v5p:2x2",
      "v4:2x2x1",
      "gpu:",
      "gpu:-1GB",
    ),
    *("1xv5e:4x4", "65xv5e:4x4", "xv5e:4x4", "2x2xv5e:4x4", "2xgpu:80GB"),
  ],
)
def test_what_cannot_be_rented_is_refused(name):
  with pytest.raises(ConfigError, match=f"--topology={name}"):
    chips.parse(name)


def test_slices_come_smallest_first():
  for generation in chips.TPUS:
    counts = [place.chips for place in chips.slices(generation)]
    assert counts == sorted(set(counts))


def test_clocks_follow_from_peaks():
  clocks = {name: chip.clock / 1e9 for name, chip in chips.TPUS.items()}
  expected = {"v5e": 1.5, "v6e": 1.75, "v5p": 1.75, "tpu7x": 2.2}
  assert clocks == pytest.approx(expected, rel=0.01)
