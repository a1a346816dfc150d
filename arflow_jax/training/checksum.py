"""Checksums of arrays that no sharding changes, stored with every checkpoint.

A checksum is a sum of 32 bits over all numbers of an array, each mixed with its
place (row-major, so that another cut into axes keeps it). The order of a sum
does not matter: every device adds up its own shards, on any mesh. A change of
one number always shows, any other with a probability of 1 - 2**-32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from arflow_jax.training import relayout


class Damaged(Exception):
  """What was read is not what was written."""


def of(tree: Any) -> dict[str, int]:
  """The checksum of every array of a tree, by name: `params/blocks/...`.

  Every process of a job gets all of them.
  """
  sums = jax.device_get(_sums(tree))
  leaves = jax.tree_util.tree_leaves_with_path(sums)
  return {"/".join(relayout.name(path)): int(leaf) for path, leaf in leaves}


def check(tree: Any, stored: dict[str, int]) -> None:
  """Raises Damaged unless every array of a tree has its stored checksum."""
  wrong = [k for k, found in of(tree).items() if stored.get(k) != found]
  if wrong:
    more = f" and of {len(wrong) - 1} more arrays" if wrong[1:] else ""
    raise Damaged(f"the checksum of {wrong[0]}{more} differs")


def _sum(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
  x = jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place += index * np.uint32(stride % 2**32)
    stride *= x.shape[axis]
  x ^= place * np.uint32(0x9E3779B1)
  # The last mixing of MurmurHash3: different x stay different.
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)


_sums = jax.jit(lambda tree: jax.tree.map(_sum, tree))
