"""Checksums: of arrays, which no sharding changes, and of what JSON can hold.

The checksum of an array is a sum of 32 bits over all its numbers, each mixed
with its place (row-major, so that another cut into axes keeps it). The order of
a sum does not matter: every device adds up its own shards, on any mesh. A
change of one number of up to 32 bits always shows, any other change with a
probability of 1 - 2**-32.
"""

import json
import zlib
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


def digest(values: dict[str, Any]) -> int:
  """The checksum of what JSON can hold."""
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def seal(values: dict[str, Any]) -> dict[str, Any]:
  """The same with a checksum of itself."""
  return values | {"digest": digest(values)}


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `seal`; raises Damaged unless its checksum is right."""
  values = dict(sealed)
  if values.pop("digest", None) != digest(values):
    raise Damaged("the checksum of the list of checksums differs")
  return values


def of_array(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  """The checksum of one array of numbers of up to 32 bits."""
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


_sums = jax.jit(lambda tree: jax.tree.map(of_array, tree))
