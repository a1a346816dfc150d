"""Estimates: plain arithmetic on what was compiled, of round numbers."""

import pytest

from arflow_jax.analysis import chips, estimates, footprint
from tests.tiny import tiny_config

COMPILED = {
  "work": {"images": 40, "flops": 4 * 197e12},  # a second of four v5e chips
  "needed": 819e9,  # a second to read and one to write
  "exchanges": [  # a second at 200 GB/s
    {"bytes": 150e9, "axes": "data"},
    {"bytes": 50e9, "axes": "fsdp"},
  ],
  "cycles": {"xla": 2.5 * 197e12 / 2**17, "kernels": 0.5 * 197e12 / 2**17},
}


def test_a_step_takes_its_longest_part_and_the_exchanges():
  config = tiny_config(steps=86_400)
  found = estimates.train(config, COMPILED, chips.parse("v5e:2x2"))
  parts = {"products": 1, "memory": 2, "exchange": 1, "cycles": 3}
  assert found["parts"] == pytest.approx(parts)
  hidden, in_turn = found["steps"]["hidden"], found["steps"]["in_turn"]
  assert hidden["seconds"] == pytest.approx(3)
  assert in_turn["seconds"] == pytest.approx(4)
  assert in_turn["mfu"] == pytest.approx(1 / 4)
  assert in_turn["images_per_second"] == pytest.approx(10)
  assert in_turn["days"] == pytest.approx(4)
  assert in_turn["chip_hours"] == pytest.approx(4 * 24 * 4)


def test_between_slices_the_network_counts():
  handed = {"bytes": 5 * 25e9 / 8, "axes": "slices"}  # 5 s at 25 Gbit/s
  found = COMPILED | {"exchanges": [*COMPILED["exchanges"], handed]}
  config = tiny_config()
  steps = estimates.train(config, found, chips.parse("2xv5e:2x2"))["steps"]
  assert steps["hidden"]["seconds"] == pytest.approx(5)
  assert steps["in_turn"]["seconds"] == pytest.approx(3 + 1 + 5)


def test_a_block_of_images():
  found = estimates.sample(COMPILED, chips.parse("v5e:2x2"))
  hidden, in_turn = found["blocks"]["hidden"], found["blocks"]["in_turn"]
  assert hidden["images_per_second"] == pytest.approx(40 / 3)
  assert hidden["hours"] == pytest.approx(1250 * 3 / 3600)
  assert in_turn["chip_hours"] == pytest.approx(1250 * 4 / 3600 * 4)


def test_all_hosts_share_a_save():
  config = tiny_config(steps=1000, checkpoint__keep=2)
  one = estimates.checkpoint(config, chips.parse("v5e:2x4"))
  many = estimates.checkpoint(config, chips.parse("v5e:4x4"))
  assert one["bytes"] == many["bytes"] == footprint.checkpoint(config)
  assert (one["hosts"], many["hosts"]) == (1, 4)
  assert one["writes"] == 4 * many["writes"] == one["bytes"] / 1e9
  assert one["waits"] == 4 * many["waits"] == one["bytes"] / 1e10
  # One more is there while it is written.
  assert (one["kept"], one["disk"]) == (2, 3 * one["bytes"])
  config.checkpoint.keep_every = 100
  kept = estimates.checkpoint(config, chips.parse("v5e:2x4"))["kept"]
  assert kept == 2 + 10
