"""Every number of a config against values that make no sense."""

import math

import pytest

from arflow_jax import config as config_lib
from arflow_jax.data import pipeline
from arflow_jax.errors import ConfigError
from arflow_jax.training import program
from tests.tiny import tiny_config

# What is allowed, and why.
ALLOWED = {
  "mesh.data": {-1: "takes the devices that are left"},
  "seed": {0: "a seed as good as any"},
  "data.workers": {0: "threads load"},
  "optimizer.warmup_steps": {0: "no warm-up"},
  "optimizer.weight_decay": {0: "none", 1e30: "left to the user"},
  "optimizer.final_fraction": {0: "down to nothing"},
  "optimizer.b1": {0: "no momentum"},
  "optimizer.b2": {0: "the square of the last gradient"},
  "ema.decay": {0: "no average"},
  "model.label_dropout": {0: "labels are never dropped"},
  "model.dropout": {0: "none"},
  "sample.guidance": {0: "the unconditional model"},
  "sample.guidance_low": {0: "from the first step on"},
  "sample.guidance_high": {0: "at the first step alone"},
  "sample.guidance_channels": {},
  # Large, but nothing overflows: they change what is computed, not whether.
  "optimizer.peak_lr": {1e30: "left to the user"},
  "optimizer.eps": {1e30: "left to the user"},
  "optimizer.clip_threshold": {1e30: "never clips"},
  "sample.diffusion_norm": {1e30: "left to the user"},
  "model.rope_stretch": {1e30: "left to the user"},
}
BAD = {int: (0, -1), float: (0.0, -1.0, math.nan, math.inf, 1e30)}


def _numbers(family):
  config = tiny_config(family)
  flat = config_lib.flatten(config.to_dict())
  for key in flat:
    kind = config_lib.key_type(config, key)
    if kind in BAD:
      for value in BAD[kind]:
        yield key, value


def _check(config):
  """All that a run checks before it compiles."""
  built = program.build(config)
  built.branch.settings(config.sample)
  pipeline.open_items(config)


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_numbers_that_make_no_sense_are_refused_by_key(family):
  """Every key that holds a number, found by walking the config."""
  wrong = []
  for key, value in _numbers(family):
    config = tiny_config(family, sample__guidance_low=0.0)
    config.update_from_flattened_dict({key: value})
    error = ""
    try:
      _check(config)
    except ConfigError as refused:
      error = str(refused)
    if (f"{key}={value}" not in error) != (value in ALLOWED.get(key, {})):
      wrong.append((key, value, error))
  assert not wrong
