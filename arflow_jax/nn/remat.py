"""What the backward pass of a block recomputes, by the name in the config."""

import functools

import jax

from arflow_jax.errors import ConfigError

POLICIES = {
  # Nothing: every intermediate stays in memory.
  "none": lambda f: f,
  # All but the results of the weight products: little memory, little work.
  "dots": functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
  # Each block from its input.
  "full": jax.checkpoint,
}


def check(name: str) -> None:
  """Raises ConfigError unless `name` is one of `POLICIES`."""
  if name not in POLICIES:
    raise ConfigError(
      f"model.remat={name!r} is unknown; choose from {sorted(POLICIES)}"
    )
