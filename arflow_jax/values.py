"""What the values of settings must be: rules that refuse a value by its key.

A rule is called with the key, for the message, and the value. Every number has
bounds: what is beyond them runs out of memory, overflows or never ends.
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from arflow_jax.errors import ConfigError

Rule = Callable[[str, Any], None]

_COUNT = 2**31 - 1  # what a counter of 32 bits can hold


def whole(low: int = 1, high: int = _COUNT) -> Rule:
  """A whole number from `low` to `high`."""

  def rule(key: str, value: Any) -> None:
    # True would count as 1.
    number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not number or not low <= value <= high:
      raise ConfigError(
        f"{key}={value!r} must be a whole number from {low} to {high}"
      )

  return rule


def real(interval: str) -> Rule:
  """A number in an interval such as "(0, 1]"."""
  low, high = map(float, interval[1:-1].split(","))

  def rule(key: str, value: Any) -> None:
    inside = (
      isinstance(value, numbers.Real)
      and not isinstance(value, bool)
      and (low < value if interval[0] == "(" else low <= value)
      and (value < high if interval[-1] == ")" else value <= high)
    )
    if not inside:
      raise ConfigError(f"{key}={value!r} must be a number in {interval}")

  return rule


def one_of(*known: str) -> Rule:
  """One of some names."""

  def rule(key: str, value: Any) -> None:
    if value not in known:
      raise ConfigError(
        f"{key}={value!r} is unknown; choose from {', '.join(known)}"
      )

  return rule


def switch(key: str, value: Any) -> None:
  """True or False."""
  if type(value) is not bool:
    raise ConfigError(f"{key}={value!r} must be True or False")


def text(key: str, value: Any) -> None:
  """Text that is not empty."""
  if not isinstance(value, str) or not value:
    raise ConfigError(f"{key}={value!r} must be text that is not empty")


def each(rule: Rule) -> Rule:
  """A tuple (or the list that JSON made of it), of which each obeys `rule`."""

  def all_of(key: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f"{key}={value!r} must be a tuple, such as (1, 2)")
    for entry in value:
      try:
        rule(key, entry)
      except ConfigError as error:
        raise ConfigError(f"{key}={value!r}: in it {error}") from None

  return all_of


def optional(rule: Rule) -> Rule:
  """None, or what `rule` allows."""
  return lambda key, value: None if value is None else rule(key, value)


def check(
  group: str, values: Mapping[str, Any], rules: dict[str, Rule]
) -> None:
  """Raises ConfigError for the first value that breaks the rule of its key.

  Args:
    group: what stands before the keys in messages, such as "model.".
    values: by key; those without a rule are not looked at.
    rules: by key; those without a value count for nothing.
  """
  for key, rule in rules.items():
    if key in values:
      rule(group + key, values[key])


SEED = whole(0, 2**32 - 1)  # random keys tell these seeds from one another
SIZE = whole(1, 2**20)
SHARE = real("[0, 1]")
PROBABILITY = real("[0, 1)")

# What the values of the shared keys must be; `branches` and `optimizer` check
# their own names. Numbers of steps may be beyond the end of a run: "never".
SHARED = {
  "seed": SEED,
  "steps": whole(),
  "batch_size": whole(),
  "data.source": text,
  "data.dir": optional(text),
  "data.sequence_length": whole(1, 65_536),
  "data.flip": switch,
  "data.workers": whole(0, 128),
  "optimizer.peak_lr": real("(0, 1000]"),
  "optimizer.warmup_steps": whole(0),
  "optimizer.decay_steps": optional(whole()),
  "optimizer.final_fraction": SHARE,
  "optimizer.b1": PROBABILITY,
  "optimizer.b2": PROBABILITY,
  "optimizer.eps": real("(0, 1]"),
  "optimizer.weight_decay": real("[0, 1000]"),
  "optimizer.clip_threshold": real("(0, 1e30]"),
  "optimizer.skip_nonfinite": switch,
  "optimizer.accumulation": whole(),
  "ema.decay": PROBABILITY,
  **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor"), whole(-1)),
  "checkpoint.every": whole(),
  "checkpoint.minutes": real("[0, 100_000]"),
  "checkpoint.keep": whole(),
  "checkpoint.keep_every": optional(whole()),
  "checkpoint.failures": whole(),
  "eval.num_samples": whole(1, 10_000_000),
  "sample.block_size": whole(1, 65_536),
  "log.every": whole(),
  "debug.rows": switch,
  "debug.replicas": whole(0),
  "log.pictures": whole(0),
  "log.trace_start": whole(),
  "log.trace_steps": whole(0, 1000),  # the profiler holds them in memory
}
