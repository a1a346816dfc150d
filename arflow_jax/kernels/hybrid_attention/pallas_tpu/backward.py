"""The backward kernel: the images of a sequence from last to first.

The scores are computed again from q and k, the softmax from its saved
denominators; what is carried is the gradient of the memory. As in the forward
kernel, gradients are computed transposed, features by tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from arflow_jax.kernels.hybrid_attention.pallas_tpu import tiles
from arflow_jax.kernels.hybrid_attention.pallas_tpu.plan import Plan, pipelined

# Products of scores issued before their use: fewest static bundles on v5e.
_AHEAD = 2


def backward(
  plan: Plan,
  operands: list[jax.Array],
  saved: list[jax.Array],
  d_out,
  d_final,
  *,
  interpret,
):
  """Runs the kernel over `plan.grid`.

  Args:
    plan: the problem.
    operands: q, k, v, scales, read, decay and, if `plan.gated`, gate, as for
      `forward`.
    saved: what `forward` saved.
    d_out: `Arrays.tokens`, gradient of the output.
    d_final: `Arrays.memory`, gradient of the final memory.
    interpret: of `pallas_call`.

  Returns:
    Gradients of the operands (of decay, one per feature) and, if
    `plan.stateful`, of the initial memory.
  """
  plan = dataclasses.replace(plan, held=10 if plan.gated else 7)
  blocks, arrays = plan.blocks(reverse=True), plan.arrays
  given = [*operands, *saved, d_out, d_final]
  gated = ["tokens"] * plan.gated
  in_kinds = ["tokens"] * 3 + ["scales", "rows", "features", *gated]
  out_kinds = ["tokens"] * 3 + ["d_scales", "rows", "features", *gated]
  in_kinds += ["memories", "rows"] + ["tokens", "rows"] * plan.gated
  in_kinds += ["tokens", "memory"]
  out_kinds += ["memory"] * plan.stateful
  out_shape = [getattr(arrays, kind) for kind in out_kinds]
  given = [
    x.reshape(arrays.rows.shape) if kind == "rows" else x
    for x, kind in zip(given, in_kinds)
  ]
  grads = pl.pallas_call(
    functools.partial(_kernel, plan),
    grid=plan.grid,
    in_specs=[getattr(blocks, kind) for kind in in_kinds],
    out_specs=[getattr(blocks, kind) for kind in out_kinds],
    out_shape=out_shape,
    scratch_shapes=plan.scratch,
    compiler_params=plan.compiler_params,
    cost_estimate=plan.cost(5, 4, given + out_shape),
    interpret=interpret,
    name="hybrid_attention_backward",
  )(*given)
  q, k, v, scales, read, *rest = grads
  return [q, k, v, scales.sum(2), read.reshape(operands[4].shape), *rest]


def _kernel(plan: Plan, *refs):
  q, k, v, scales, read, decay, *refs = refs
  gate = refs.pop(0) if plan.gated else None
  memories, totals, *refs = refs
  normed, factor = (refs.pop(0), refs.pop(0)) if plan.gated else (None, None)
  d_out, d_final, dq, dk, dv, d_scales, d_read, d_decay, *refs = refs
  d_gate = refs.pop(0) if plan.gated else None
  d_initial = refs.pop(0) if plan.stateful else None
  (d_memory,) = refs
  step = pl.program_id(2)
  lanes = tiles.Lanes(plan)
  scale = plan.head**-0.5
  tokens, dtype = plan.tokens, plan.dtype
  heads = range(plan.per_group)

  @pl.when(step == 0)
  def _():
    d_memory[...] = d_final[0]

  q_scale, k_scale, v_scale = (scales[0, 0, i : i + 1] for i in range(3))
  k_across, v_across = lanes.across(k_scale), lanes.across(v_scale)
  at = {}  # what the items of a group share

  def add_scale(which, tile, group, d_scaled, raw):
    """Adds a group's part to the gradient of the scale of q, k or v."""
    where = (0, 0, 0, slice(which, which + 1), tile)
    part = jnp.sum(d_scaled * raw, axis=0, keepdims=True)
    d_scales[where] = part if group == 0 else d_scales[where] + part

  def spread(rows, group):
    """A row of each head of the group, over the features of the head."""
    first = group * plan.per_group
    return jnp.concatenate(
      [
        jnp.broadcast_to(
          rows[0, 0, 0, first + head : first + head + 1], (plan.head, tokens)
        )
        for head in heads
      ]
    )

  def ungate(group, columns):
    """Through gate and norm: writes d_gate, returns what d_out was before."""
    d_gated = d_out[0, :, columns].T.astype(jnp.float32)
    gates = gate[0, :, columns].T.astype(jnp.float32)
    unit = normed[0, :, columns].T.astype(jnp.float32)
    sigmoid = tiles.sigmoid(gates)
    slope = sigmoid * (1 + gates * (1 - sigmoid))
    d_gate[0, :, columns] = (d_gated * unit * slope).astype(dtype).T
    d_unit = d_gated * (gates * sigmoid)
    along = jnp.concatenate(
      [
        jnp.broadcast_to(
          jnp.mean((d_unit * unit)[lanes.rows(head)], axis=0, keepdims=True),
          (plan.head, tokens),
        )
        for head in heads
      ]
    )
    return ((d_unit - unit * along) * spread(factor, group)).astype(dtype)

  def load(group):
    columns = pl.ds(group * plan.lanes, plan.lanes)
    keys = tiles.scaled(k[0, :, columns], k_across)
    values = tiles.scaled(v[0, :, columns], v_across)
    queries = q[0, :, columns]
    keys_t, queries_t = k[0, :, columns].T, queries.T
    d_outs_t = ungate(group, columns) if plan.gated else d_out[0, :, columns].T
    before, d_after = memories[0, 0, group], d_memory[group]
    d_read_out = tiles.scaled(d_outs_t, spread(read, group) * q_scale)
    d_memory[group] = d_after * decay[0, 0, :, columns] + lanes.pack(
      tiles.product(d_read_out, queries)
    )
    d_decay[0, 0, :, columns] = jnp.sum(d_after * before, axis=0, keepdims=True)
    d_after = lanes.unpack(d_after.astype(dtype))
    memory = lanes.pack(lanes.unpack(before).T)  # [d, (h, e)]
    return dict(
      columns=columns,
      keys=keys,
      keys_t=keys_t,
      queries_t=queries_t,
      scaled_keys_t=tiles.scaled(keys_t, k_scale),
      scaled_queries_t=tiles.scaled(queries_t, q_scale),
      d_outs_t=d_outs_t,
      values_and_memory=jnp.concatenate([values, memory]),
      # Of the update of the memory; the softmax adds its own.
      dk=tiles.product(d_after.T, values, b_transposed=True),
      dv=tiles.product(d_after, keys, b_transposed=True) * scale,
      dq=[],
      dk_heads=[0.0 for _ in heads],
      dv_heads=[0.0 for _ in heads],
    )

  def scores(item):
    group, tile, head = item
    if group not in at:
      at[group] = load(group)
    this = at[group]
    queries = lanes.only(q[0, tile, this["columns"]], head)
    d_outs_t = lanes.only_rows(this["d_outs_t"][:, tile], head)
    return (
      tiles.product(this["keys"], queries, b_transposed=True),
      tiles.product(this["values_and_memory"], d_outs_t),
    )

  def differentiate(item, scores):
    group, tile, head = item
    this, features = at[group], lanes.rows(head)
    row = group * plan.per_group + head
    row = slice(row, row + 1)
    scores, d_weights = scores
    d_weights, d_crossed = d_weights[:tokens], d_weights[tokens:]
    factor = q_scale[:, tile] * (scale * tiles.LOG2_E)
    weights = jnp.exp2(scores * factor - totals[0, 0, 0, row, tile])
    d_scores = weights * d_weights
    d_total = jnp.sum(d_scores, axis=0, keepdims=True)
    d_scores = (d_scores - weights * d_total).astype(dtype)

    d_read[0, 0, 0, row, tile] = q_scale[:, tile] * jnp.sum(
      this["queries_t"][features, tile] * d_crossed, axis=0, keepdims=True
    )
    inner = tiles.product(this["scaled_keys_t"][features], d_scores) * scale
    this["dq"].append(inner + d_crossed * read[0, 0, 0, row, tile])
    this["dk_heads"][head] += tiles.product(
      this["scaled_queries_t"][features, tile], d_scores, b_transposed=True
    )
    this["dv_heads"][head] += tiles.product(
      this["d_outs_t"][features, tile],
      weights.astype(dtype),
      b_transposed=True,
    )
    if head < plan.per_group - 1:
      return
    columns = this["columns"]
    d_queries = jnp.concatenate(this["dq"])
    this["dq"].clear()
    add_scale(0, tile, group, d_queries, this["queries_t"][:, tile])
    dq[0, tile, columns] = (d_queries * q_scale[:, tile]).astype(dtype).T
    if tile == plan.tiles[-1]:
      d_keys = (this["dk"] + jnp.concatenate(this["dk_heads"])) * scale
      add_scale(1, slice(None), group, d_keys, this["keys_t"])
      dk[0, :, columns] = (d_keys * k_scale).astype(dtype).T
      d_values = this["dv"] + jnp.concatenate(this["dv_heads"])
      add_scale(2, slice(None), group, d_values, v[0, :, columns].T)
      dv[0, :, columns] = (d_values * v_scale).astype(dtype).T

  pipelined(plan.items, _AHEAD, scores, differentiate)

  if plan.stateful:

    @pl.when(step == plan.images - 1)
    def _():
      d_initial[0] = d_memory[...]
