"""A digits config small enough to train in a test."""

from configs.arflow import get_config

MODEL = {
  "model.width": 16,
  "model.depth": 2,
  "model.num_heads": 2,
  "batch_size": 4,
  "steps": 4,
  "checkpoint.every": 2,
  "log.every": 2,
  "sample.num_steps": 3,
  "sample.block_size": 8,
}


def tiny_config(**overrides):
  """The digits config with `MODEL`, then `group__key=value` overrides."""
  config = get_config("digits")
  changes = {key.replace("__", "."): v for key, v in overrides.items()}
  config.update_from_flattened_dict(MODEL | changes)
  return config


def flags(**overrides):
  """The same as command-line flags."""
  changes = {key.replace("__", "."): v for key, v in overrides.items()}
  pairs = (MODEL | changes).items()
  return ["--config=configs/arflow.py:digits"] + [
    f"--config.{key}={value}" for key, value in pairs
  ]
