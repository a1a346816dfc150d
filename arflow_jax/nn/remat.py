"""What the backward pass of a block recomputes, by the name in the config."""

import functools

import jax

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
