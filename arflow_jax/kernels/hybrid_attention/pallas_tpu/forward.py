"""The forward kernel: one image of a few lane groups a program.

Everything is computed transposed, features by queries: the softmax then reduces
over sublanes, and each number per query is a row, which broadcasts over
the keys without extra instructions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from arflow_jax.kernels.hybrid_attention.pallas_tpu import tiles
from arflow_jax.kernels.hybrid_attention.pallas_tpu.plan import Plan, pipelined

# Products of scores issued before their softmax: fewest static bundles on v5e.
_AHEAD = 3


def forward(
  plan: Plan, q, k, v, scales, read, decay, gate, initial, *, save, interpret
):
  """Runs the kernel over `plan.grid`.

  Args:
    plan: the problem.
    q: queries, `Arrays.tokens`; k and v likewise.
    k: keys, not scaled.
    v: values.
    scales: `Arrays.scales`.
    read: `Arrays.rows`, the factor exp(cumsum(g)) of each read of the memory.
    decay: `Arrays.features`, the factor exp(mean(g)) of each update.
    gate: `Arrays.tokens` if `plan.gated`, else None.
    initial: `Arrays.memory` if `plan.stateful`, else None.
    save: also return what the backward kernel wants.
    interpret: of `pallas_call`.

  Returns:
    The output, the final memory and, if `save`, the memory that each image
    reads (`Arrays.memories`), log2 of the softmax's denominators, the scores'
    maximum included (`Arrays.rows`), and, if `plan.gated`, the normalised
    output (`Arrays.tokens`) and the factor that made it so (`Arrays.rows`).
  """
  plan = dataclasses.replace(plan, held=6 if plan.gated else 4)
  blocks, arrays = plan.blocks(), plan.arrays
  given = [q, k, v, scales, read.reshape(arrays.rows.shape), decay]
  in_kinds = ["tokens"] * 3 + ["scales", "rows", "features"]
  out_kinds = ["tokens", "memory"]
  aliases = {}
  if plan.gated:
    given.append(gate)
    in_kinds.append("tokens")
  if plan.stateful:
    aliases[len(given)] = 1  # the memory is replaced in place
    given.append(initial)
    in_kinds.append("memory")
  if save:
    out_kinds += ["memories", "rows"] + ["tokens", "rows"] * plan.gated
  out_shape = [getattr(arrays, kind) for kind in out_kinds]
  return pl.pallas_call(
    functools.partial(_kernel, plan, save),
    grid=plan.grid,
    in_specs=[getattr(blocks, kind) for kind in in_kinds],
    out_specs=[getattr(blocks, kind) for kind in out_kinds],
    out_shape=out_shape,
    input_output_aliases=aliases,
    scratch_shapes=plan.scratch,
    compiler_params=plan.compiler_params,
    cost_estimate=plan.cost(2, 2, given + out_shape),
    interpret=interpret,
    name="hybrid_attention_forward",
  )(*given)


def _kernel(plan: Plan, save: bool, *refs):
  q, k, v, scales, read, decay, *refs = refs
  gate = refs.pop(0) if plan.gated else None
  initial = refs.pop(0) if plan.stateful else None
  out, final, *saved, memory = refs
  image = pl.program_id(2)
  lanes = tiles.Lanes(plan)
  scale = plan.head**-0.5
  tokens, dtype = plan.tokens, plan.dtype

  @pl.when(image == 0)
  def _():
    memory[...] = initial[0] if plan.stateful else jnp.zeros_like(memory)

  q_scale, k_scale, v_scale = (scales[0, 0, i : i + 1] for i in range(3))
  k_scale = lanes.across(k_scale)
  at = {}  # what the items of a group share

  def load(group):
    columns = pl.ds(group * plan.lanes, plan.lanes)
    keys = tiles.scaled(k[0, :, columns], k_scale)
    values_t = tiles.scaled(v[0, :, columns].T, v_scale)
    before = memory[group]
    memory[group] = before * decay[0, 0, :, columns] + scale * lanes.pack(
      tiles.product(values_t, keys)
    )
    before = before.astype(dtype)
    if save:
      saved[0][0, 0, group] = before
    # The memory reads the same queries as the keys do: one product for both.
    return jnp.concatenate([keys, before]), values_t, columns

  def scores(item):
    group, tile, head = item
    if group not in at:
      at[group] = load(group)
    keys_and_memory, _, columns = at[group]
    queries = lanes.only(q[0, tile, columns], head)
    return tiles.product(keys_and_memory, queries, b_transposed=True)

  parts = []  # of the output of one tile, a head each

  def attend(item, scores):
    group, tile, head = item
    _, values_t, columns = at[group]
    row = group * plan.per_group + head
    scores, crossed = scores[:tokens], scores[tokens:]
    factor = q_scale[:, tile] * (scale * tiles.LOG2_E)
    top = jnp.max(scores, axis=0, keepdims=True) * factor
    weights = jnp.exp2(scores * factor - top)
    total = jnp.sum(weights, axis=0, keepdims=True)
    if save:
      saved[1][0, 0, 0, row : row + 1, tile] = top + jnp.log2(total)
    inner = tiles.product(values_t[lanes.rows(head)], weights.astype(dtype))
    cross = crossed * (read[0, 0, 0, row : row + 1, tile] * q_scale[:, tile])
    whole = inner * (1 / total) + cross
    if plan.gated:
      square = jnp.mean(whole * whole, axis=0, keepdims=True)
      factor = jax.lax.rsqrt(square + tiles.EPSILON)
      whole *= factor
      if save:
        saved[3][0, 0, 0, row : row + 1, tile] = factor
    parts.append(whole)
    if head < plan.per_group - 1:
      return
    result = jnp.concatenate(parts).astype(dtype).T
    parts.clear()
    if plan.gated:
      if save:
        saved[2][0, tile, columns] = result
      gates = gate[0, tile, columns].astype(jnp.float32)
      result = (result * (gates * tiles.sigmoid(gates))).astype(dtype)
    out[0, tile, columns] = result

  pipelined(plan.items, _AHEAD, scores, attend)

  @pl.when(image == plan.images - 1)
  def _():
    final[0] = memory[...]
