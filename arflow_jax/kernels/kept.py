"""Names of results that the backward pass may keep where it keeps little else.

Which of them a policy of `model.remat` keeps is said in `nn.stack`; without
one a named result is like all others.
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # what it returns, and what its kernel saves
FEED_FORWARD = "feed_forward"  # what it returns

T = TypeVar("T")


def keep(tree: T, name: str) -> T:
  """The same arrays under a name, one of those above."""
  return jax.tree.map(lambda x: checkpoint_name(x, name), tree)
