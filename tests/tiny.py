"""Digits configs of each family, small enough to train in a test."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from arflow_jax.data import pipeline
from arflow_jax.training import checkpoint
from arflow_jax.training import program as program_lib

COMMON = {
  "batch_size": 4,
  "steps": 4,
  "checkpoint.every": 2,
  "log.every": 2,
  "sample.num_steps": 3,
  "sample.block_size": 8,
}
MODEL = {
  "arflow": {"model.width": 16, "model.depth": 2, "model.num_heads": 2},
  "flowar": {
    "model.width": 16,
    "model.num_heads": 2,
    "model.head_depth": 1,
    "model.dropout": 0.1,
  },
}


def tiny_config(family="arflow", **overrides):
  """A digits config, small, then `group__key=value` overrides."""
  config = importlib.import_module(f"configs.{family}").get_config("digits")
  changes = {key.replace("__", "."): v for key, v in overrides.items()}
  config.update_from_flattened_dict(COMMON | MODEL[family] | changes)
  return config


def batches(config, start=0, rows=None):
  """The batches of a config's data from a step on, or some of their rows."""
  items = pipeline.open_items(config)
  rows = np.arange(config.batch_size) if rows is None else rows
  return pipeline.batches(items, config, start, rows)


def stored_state(config, workdir):
  """The train state that a run would go on with."""
  program = program_lib.build(config)
  found = checkpoint.restore(str(workdir), program.abstract_state, program.init)
  return found[0]


def random_params(abstract, scale=0.15):
  """Random values for every leaf, by NumPy: there is nothing to compile."""
  rs = np.random.RandomState(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      scale * rs.standard_normal(leaf.shape), jnp.float32
    ),
    abstract,
  )


def flags(family="arflow", **overrides):
  """The same as command-line flags."""
  changes = {key.replace("__", "."): v for key, v in overrides.items()}
  pairs = (COMMON | MODEL[family] | changes).items()
  return [f"--config=configs/{family}.py:digits"] + [
    f"--config.{key}={value}" for key, value in pairs
  ]


def trainer(workdir, *args, **kwargs):
  """The main that trains, as a process whose output is one pipe."""
  return subprocess.Popen(
    [sys.executable, "-m", "arflow_jax.train", f"--workdir={workdir}", *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **kwargs,
  )
