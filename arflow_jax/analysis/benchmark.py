"""Times a config's train step and its sampler beside the matrix-product rate.

A program and a large matrix product run in turn in one process, because the
speed of a shared machine drifts: the share is the median of the pairs. Model
FLOPs are those of the products in the jaxpr (`flops.count`), 3x the forward
pass for a train step: what remat computes twice counts once.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.analysis import flops
from arflow_jax.data import pipeline
from arflow_jax.data.sequences import ClassSequences
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement, processes
from arflow_jax.training import program as program_lib
from arflow_jax.training import state
from arflow_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class Speed:
  """What was measured of one program; seconds, bytes and FLOP/s.

  Attributes:
    compile_time: of lowering and compiling.
    step_times: of each call, one train step or one block of images.
    images: per call; a sequence counts as all its images.
    flops: model FLOPs per call.
    product_rates: of the matrix product around each call, all devices.
    peak_memory: arguments, results and temporaries of the compiled program, on
      one device.
    input_wait: seconds per step that the train loop waits for its batch.
    input_source: where those batches came from.
  """

  compile_time: float
  step_times: list[float]
  images: int
  flops: int
  product_rates: list[float]
  peak_memory: int
  input_wait: float | None = None
  input_source: str | None = None

  @property
  def step_time(self) -> float:
    """Median seconds per call."""
    return statistics.median(self.step_times)

  @property
  def share(self) -> float:
    """Median, over the pairs, of program rate over matrix-product rate."""
    pairs = zip(self.step_times, self.product_rates)
    return statistics.median(self.flops / t / rate for t, rate in pairs)

  def summary(self) -> dict[str, float | None]:
    """The figures by name, one number each."""
    return {
      "compile_time": self.compile_time,
      "step_time": self.step_time,
      "images": self.images,
      "images_per_second": self.images / self.step_time,
      "flops": self.flops,
      "flops_per_second": self.flops / self.step_time,
      "product_rate": statistics.median(self.product_rates),
      "share": self.share,
      "peak_memory": self.peak_memory,
      "input_wait": self.input_wait,
    }


def measure(
  config: ConfigDict, what: list[str], repeats: int = 10
) -> dict[str, Speed]:
  """Measures the programs named in `what`; all processes call it.

  "input" is left to `loading`.

  Raises:
    ConfigError: an unknown program or none, or a config that cannot run here.
  """
  known = ("train", "sample", "input")
  if not what:
    raise ConfigError(f"--what= is empty; choose from {','.join(known)}")
  for name in what:
    if name not in known:
      raise ConfigError(
        f"--what={name} is unknown; choose from {','.join(known)}"
      )
  config_lib.check(config)
  # Processes share a train step; each draws on a device of its own.
  alone = lambda *args: agreement.together(lambda: _sample_speed(*args))
  programs = {"train": _train_speed, "sample": alone}
  return {n: programs[n](config, repeats) for n in what if n in programs}


def _train_speed(config: ConfigDict, repeats: int) -> Speed:
  """The whole train step, update included, on random images."""
  config, source = config.copy_and_resolve_references(), config.data.source
  if source == "latents":  # no cache of them can be made yet
    config.data.source, source = "random", "random, for latents"
  items, program = agreement.together(
    lambda: (pipeline.open_items(config), program_lib.build(config))
  )
  with jax.set_mesh(program.mesh):  # as in the trainer
    speed = _step_speed(program, items, repeats)
  return dataclasses.replace(speed, input_source=source)


def _step_speed(program: Program, items: ClassSequences, repeats: int) -> Speed:
  config, branch = program.config, program.branch
  current = program.init()
  draw = np.random.default_rng(1)
  shape = (len(program.rows), *branch.item_shape)
  batch = program.place(
    {
      "images": draw.standard_normal(shape, np.float32),
      "labels": (program.rows % branch.num_classes).astype(np.int32),
    }
  )
  compiled, compile_time = _compile(program.step, current, batch)

  def advance():
    nonlocal current
    current, _ = jax.block_until_ready(compiled(current, batch))

  times, rates = _in_turn("train", advance, config.model.dtype, repeats)
  wait = _input_wait(compiled, current, program, items, repeats)
  images = config.batch_size * branch.item_shape[0]
  rates = [rate * program.mesh.size for rate in rates]
  return Speed(
    compile_time,
    times,
    images,
    flops.train_step(config),
    rates,
    planned_memory(compiled),
    wait,
  )


def _sample_speed(config: ConfigDict, repeats: int) -> Speed:
  """One block of images by the config's sample settings, on one device."""
  branch = branches.build(config)
  settings = branch.settings(config.sample)
  images = config.sample.block_size
  params = jax.jit(branch.init)(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), images)
  labels = jnp.arange(images) % branch.num_classes
  sample = lambda params, keys, labels: branch.sample(
    params, keys, labels, settings
  )
  counted = flops.count(sample, params, keys, labels)
  compiled, compile_time = _compile(jax.jit(sample), params, keys, labels)
  call = lambda: jax.block_until_ready(compiled(params, keys, labels))
  times, rates = _in_turn("sample", call, config.model.dtype, repeats)
  memory = planned_memory(compiled)
  return Speed(compile_time, times, images, counted, rates, memory)


def _compile(jitted: Any, *args: Any) -> tuple[Any, float]:
  begin = time.monotonic()
  compiled = jitted.lower(*args).compile()
  return compiled, time.monotonic() - begin


def planned_memory(compiled: Any) -> int:
  """Bytes on one device: arguments, results, temporaries, shared ones once."""
  sizes = compiled.memory_analysis()
  return (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    + sizes.temp_size_in_bytes
    - sizes.alias_size_in_bytes
  )


def product_side() -> int:
  """Side of the matrix product that sets the scale: large enough to peak."""
  return 2048 if jax.default_backend() == "cpu" else 8192


def product(dtype: str) -> tuple[Callable[[], jax.Array], int]:
  """The matrix product that sets the scale, and its FLOPs."""
  side = product_side()
  matrix = jax.random.normal(jax.random.key(2), (side, side)).astype(dtype)
  full = "highest" if dtype == "float32" else None
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=full))
  return lambda: multiply(matrix, matrix), 2 * side**3


def _in_turn(
  name: str, call: Callable[[], Any], dtype: str, repeats: int
) -> tuple[list[float], list[float]]:
  """Seconds of each call, and the product rate of one device around it."""
  multiply, work = product(dtype)

  def products():
    jax.block_until_ready([multiply() for _ in range(4)])

  call()
  products()
  times, rates = [], []
  before = _seconds(products) / 4
  quiet = not processes.speaks()
  for _ in tqdm.trange(
    repeats, desc=name, unit="call", leave=False, disable=quiet
  ):
    times.append(_seconds(call))
    after = _seconds(products) / 4
    rates.append(work / statistics.mean([before, after]))
    before = after
  return times, rates


def _seconds(call: Callable[[], Any]) -> float:
  begin = time.monotonic()
  call()
  return time.monotonic() - begin


def _input_wait(
  compiled: Any,
  current: state.TrainState,
  program: Program,
  items: ClassSequences,
  repeats: int,
) -> float:
  """Mean wait for a batch in a loop like the trainer's."""
  config = program.config.copy_and_resolve_references()
  config.steps = repeats + 2
  waits = []
  with contextlib.closing(
    pipeline.batches(items, config, 0, program.rows)
  ) as batches:
    for _ in range(repeats + 1):
      begin = time.monotonic()
      batch = next(batches)
      waits.append(time.monotonic() - begin)
      # As in the trainer: the next batch is fetched while this step runs.
      current, _ = compiled(current, program.place(batch))
    jax.block_until_ready(current)
  return statistics.mean(waits[1:])  # the first one starts the loader
