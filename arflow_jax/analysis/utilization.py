"""How long a train step would take if every product ran at the peak rate."""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from arflow_jax.analysis import chips, flops

# What JAX calls the devices of a generation.
_TPUS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
}
# FLOP/s of bfloat16 products without sparsity, from NVIDIA's data sheets.
_GPUS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak(kind: str) -> float | None:
  """FLOP/s of bfloat16 products of one device; None where it is not known.

  Args:
    kind: what JAX calls the device.
  """
  if kind in _TPUS:
    chip = chips.TPUS[_TPUS[kind]]
    return chip.peak / chip.devices
  return _GPUS.get(kind)


def ideal_step(config: ConfigDict, devices: Iterable[Any]) -> float | None:
  """Seconds of a train step at the peak rate of all devices.

  Over the time that a step takes it is the model FLOPs utilization. None where
  the peak of a device is not known.
  """
  rates = [peak(device.device_kind) for device in devices]
  if None in rates:
    return None
  return flops.train_step(config) / sum(rates)
