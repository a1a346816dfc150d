"""MFU: against the FLOPs and peaks that are counted elsewhere."""

import types

import pytest

from arflow_jax.analysis import chips, flops, utilization
from tests.tiny import tiny_config


def _ideal(*kinds):
  devices = [types.SimpleNamespace(device_kind=kind) for kind in kinds]
  return utilization.ideal_step(tiny_config(), devices)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v5 lite", "v5e"),
    pytest.param("TPU v6 lite", "v6e", marks=pytest.mark.slow),
    ("TPU7x", "tpu7x"),
  ],
)
def test_the_ideal_step_divides_the_work_among_chips(kind, name):
  chip = chips.TPUS[name]
  wanted = flops.train_step(tiny_config()) / (4 * chip.peak)
  assert _ideal(*[kind] * 4 * chip.devices) == pytest.approx(wanted)


def test_an_unknown_device_gives_no_figure():
  assert _ideal("TPU v5 lite", "TPU v99") is None
  assert _ideal("cpu") is None
