"""Exchanges read from a program's text, with known answers."""

import types

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from arflow_jax.analysis import collectives
from arflow_jax.analysis.collectives import Exchange

MESH = AbstractMesh((2, 4), ("data", "fsdp"))
ROWS = "replica_groups=[2,4]<=[8]"  # along fsdp
COLUMNS = "replica_groups=[4,2]<=[2,4]T(1,0)"  # along data

PROGRAM = f"""HloModule step

%all-reduce-scatter.1 (input: bf16[64]) -> bf16[16] {{
  %all-reduce.9 = bf16[64]{{0}} all-reduce(%input), channel_id=3, {ROWS}
  ROOT %part = bf16[16]{{0}} dynamic-slice(%all-reduce.9, %where)
}}

%piece.1 (a: f32[4]) -> f32[16] {{
  ROOT %all-gather.7 = f32[16]{{0}} all-gather(%a), channel_id=4, {ROWS}
}}

%start.1 (a: f32[4]) -> f32[16] {{
  ROOT %all-gather.2 = f32[16]{{0}} all-gather(%a), channel_id=1, {ROWS}
}}

%async_collective_fusion.1 (a: f32[4]) -> f32[16] {{
  ROOT %all-gather.3 = f32[16]{{0}} all-gather(%a), channel_id=1, {ROWS}
}}

%done.1 (a: f32[4]) -> f32[16] {{
  ROOT %all-gather.4 = f32[16]{{0}} all-gather(%a), channel_id=1, {ROWS}
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %async-collective-start.1 = f32[16]{{0}} fusion(%x), calls=%start.1
  %fusion.4 = f32[16]{{0}} fusion(%x), calls=%async_collective_fusion.1
  %async-collective-done.1 = f32[16]{{0}} fusion(%x), calls=%done.1
  %all-gather.1 = f32[8,2]{{1,0:T(8,128)}} all-gather(%x), channel_id=1, {ROWS}
  %fusion.1 = bf16[16]{{0}} fusion(%x), calls=%all-reduce-scatter.1
  %fusion.2 = f32[16]{{0}} fusion(%x), calls=%piece.1
  %fusion.3 = f32[16]{{0}} fusion(%x), calls=%piece.1
}}

%cond (p: (s32[], f32[8])) -> pred[] {{
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %all-reduce.2 = (f32[4]{{0}}, /*index=1*/bf16[6]{{0}}) all-reduce(%a, %b), \
channel_id=5, {COLUMNS}
  %reduce-scatter.2 = f32[2]{{0}} reduce-scatter(%a), channel_id=6, {ROWS}
  %collective-permute-start.1 = (f32[4]{{0}}, f32[4]{{0}}, u32[]) \
collective-permute-start(%a), channel_id=7, source_target_pairs={{{{0,4}}}}
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %all-reduce.3 = f32[] all-reduce(%c), channel_id=8, \
replica_groups={{{{0,1,2,3,4,5,6,7}}}}
}}
"""


def test_what_slices_hand_to_the_network():
  program = """HloModule step

ENTRY %main (x: f32[8]) -> f32[8] {
  %send.8 = (f32[1,3,128]{2,1,0:T(1,128)}, u32[], token[]) send(%bitcast.22, \
%after-all.8), channel_id=16, is_host_transfer=true, frontend_attributes=\
{_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.9 = (f32[4], u32[], token[]) send(%y, %t), channel_id=17
  ROOT %done = token[] send-done(%send.8), channel_id=16
}
"""
  compiled = types.SimpleNamespace(as_text=lambda: program)
  found = collectives.sent(compiled, MESH, slices=4)
  handed = Exchange("all-reduce", "f32", collectives.SLICES)
  assert found == {handed: (3 * 128 * 4 * 2 * 3 // 4, 1)}


def test_bytes_by_kind_type_and_axis():
  compiled = types.SimpleNamespace(as_text=lambda: PROGRAM)
  assert collectives.sent(compiled, MESH) == {
    # Five times each; that of channel 4 stands there twice, one in pieces.
    Exchange("all-gather", "f32", "fsdp"): (5 * 3 * 16 * 4 * 3 // 4, 15),
    Exchange("reduce-scatter", "bf16", "fsdp"): (5 * 64 * 2 * 3 // 4, 5),
    Exchange("all-reduce", "f32", "data"): (4 * 4 * 2 // 2, 1),
    Exchange("all-reduce", "bf16", "data"): (6 * 2 * 2 // 2, 1),
    Exchange("reduce-scatter", "f32", "fsdp"): (4 * 2 * 4 * 3 // 4, 1),
    Exchange("collective-permute", "f32", "data"): (4 * 4, 1),
    Exchange("all-reduce", "f32", "data+fsdp"): (2 * 4 * 7 // 8, 1),
  }


@pytest.mark.parametrize(
  ("groups", "members"),
  [
    ("replica_groups={{1,3},{0,2}}", [1, 3]),
    ("replica_groups=[4,2]<=[8]", [0, 1]),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
    (
      "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
      [0, 1, 2, 3],
    ),
    ("replica_groups={}", list(range(8))),
  ],
)
def test_every_form_of_groups_is_read(groups, members):
  found = collectives._members(f"channel_id=1, {groups}, more={{1}}", 8)
  np.testing.assert_array_equal(found, members)
