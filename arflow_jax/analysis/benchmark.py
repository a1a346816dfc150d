"""Times the train step of a config beside the machine's matrix-product rate.

Both are measured in turn in the same run, because the speed of a shared machine
drifts: the share is the median of the pairs.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax.analysis import flops
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import optimizer, state

_SIDE = 2048  # of the matrix product that sets the scale


class TrainSpeed(NamedTuple):
  """What `train_step_speed` measured; times in seconds, rates in FLOP/s."""

  compile_time: float
  step_times: list[float]
  images: int  # per step
  flops: int  # model FLOPs per step: 3x the forward pass, no recomputation
  product_rates: list[float]

  @property
  def share(self) -> float:
    """Median, over the pairs, of step rate over matrix-product rate."""
    pairs = zip(self.step_times, self.product_rates)
    return statistics.median(self.flops / t / rate for t, rate in pairs)


def train_step_speed(config: ConfigDict, repeats: int = 10) -> TrainSpeed:
  """Measures the whole train step, update included, on random images.

  Raises:
    ConfigError: a config that cannot be trained on this machine.
  """
  branch = branches.build(config)
  mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
  tx = optimizer.make_optimizer(config.optimizer, branch.axes)
  step = state.make_train_step(branch, tx, config)
  current = state.init_state(branch, tx, mesh, jax.random.key(0))
  shape = (config.batch_size, *branch.item_shape)
  batch = {
    "images": jax.random.normal(jax.random.key(1), shape),
    "labels": jnp.arange(config.batch_size) % branch.num_classes,
  }
  batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
  keys = state.item_keys(0, jnp.int32(0), config.batch_size)
  forward = flops.count(branch.loss, current.params, batch, keys)

  begin = time.monotonic()
  compiled = step.lower(current, batch).compile()
  compile_time = time.monotonic() - begin
  current, _ = jax.block_until_ready(compiled(current, batch))
  matrix = jax.random.normal(jax.random.key(2), (_SIDE, _SIDE))
  matrix = matrix.astype(config.model.dtype)
  full = "highest" if config.model.dtype == "float32" else None
  product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=full))
  jax.block_until_ready(product(matrix, matrix))

  def product_time():
    calls = lambda: [product(matrix, matrix) for _ in range(4)]
    return _seconds(calls)[0] / 4

  times, rates = [], []
  before = product_time()
  for _ in range(repeats):
    seconds, (current, _) = _seconds(compiled, current, batch)
    after = product_time()
    times.append(seconds)
    rates.append(2 * _SIDE**3 / statistics.mean([before, after]))
    before = after
  images = config.batch_size * branch.item_shape[0]
  return TrainSpeed(compile_time, times, images, 3 * forward, rates)


def _seconds(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
  begin = time.monotonic()
  result = jax.block_until_ready(call(*args))
  return time.monotonic() - begin, result


def report(speed: TrainSpeed) -> str:
  """The measurements as a table."""
  times = speed.step_times
  step = statistics.median(times)
  rate = statistics.median(speed.product_rates)
  rows = {
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "compile time": f"{speed.compile_time:.1f} s",
    "step time": f"{step:.4f} s ({min(times):.4f} to {max(times):.4f}, median"
    f" of {len(times)})",
    "images/s": f"{speed.images / step:,.1f}",
    "model FLOPs per step": f"{speed.flops / 1e9:,.1f} G",
    "step rate": f"{speed.flops / step / 1e9:,.1f} GFLOP/s",
    "matrix-product rate": f"{rate / 1e9:,.1f} GFLOP/s",
    "share of it": f"{speed.share:.1%}",
  }
  return "\n".join(f"{name:22}{value}" for name, value in rows.items())
