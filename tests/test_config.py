"""Every key of a config against values that make no sense."""

import math

import pytest

from arflow_jax import config as config_lib
from arflow_jax.data import pipeline
from arflow_jax.errors import ConfigError
from arflow_jax.training import program
from tests.tiny import tiny_config

HUGE = 10**12
BAD = {
  int: (0, -1, HUGE, None),
  float: (0.0, -1.0, math.nan, math.inf, 1e30, None),
  str: ("", "nonsense", None),
  bool: (None,),
  tuple: ((0,), (-1,), (HUGE,), (1.5,), (True,), ("x",), (None,), None),
}
# What is allowed, and why.
ALLOWED = {
  "mesh.data": {-1: "takes the devices that are left"},
  "mesh.fsdp": {0: "follows from the number of devices"},
  "seed": {0: "a seed as good as any"},
  "data.dir": {"nonsense": "digits need no folder", None: "nor any name"},
  "data.workers": {0: "threads load"},
  "optimizer.warmup_steps": {0: "no warm-up"},
  "optimizer.weight_decay": {0: "none"},
  "optimizer.final_fraction": {0: "down to nothing"},
  "optimizer.b1": {0: "no momentum"},
  "optimizer.b2": {0: "the square of the last gradient"},
  "optimizer.clip_threshold": {1e30: "never clips"},
  "ema.decay": {0: "no average"},
  "checkpoint.minutes": {0: "by steps alone"},
  "log.pictures": {0: "none"},
  "log.trace_steps": {0: "none"},
  "checkpoint.keep_every": {None: "keeps none but the newest"},
  "debug.replicas": {0: "never"},
  "model.label_dropout": {0: "labels are never dropped"},
  "model.dropout": {0: "none"},
  "model.attention": {None: "the best known"},
  "sample.guidance": {0: "the unconditional model"},
  "sample.guidance_low": {0: "from the first step on"},
  "sample.guidance_high": {0: "at the first step alone"},
  "sample.guidance_channels": {None: "all"},
}


def _values(family):
  config = tiny_config(family)
  for key in config_lib.flatten(config.to_dict()):
    for value in BAD[config_lib.key_type(config, key)]:
      yield key, value


def _check(config):
  """All that a run checks before it compiles."""
  program.build(config)
  pipeline.open_items(config)


def _refused(config):
  """The error, or an empty text."""
  try:
    _check(config)
  except ConfigError as error:
    return str(error)
  return ""


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_values_that_make_no_sense_are_refused_by_key(family):
  """Every key, found by walking the config, so that none is left out."""
  wrong = []
  for key, value in _values(family):
    config = tiny_config(family, sample__guidance_low=0.0)
    config.update_from_flattened_dict({key: value})
    error = _refused(config)
    named = f"{key}={value}" in error or f"{key}={value!r}" in error
    if named == (value in ALLOWED.get(key, {})) or "\n" in error:
      wrong.append((key, value, error))
  assert not wrong
