"""The table of all sizes: its rows, and what was compiled in place of a sum."""

import json

from arflow_jax.analysis import footprint, table
from tests.tiny import tiny_config


def test_every_size_of_both_papers_has_a_row():
  rows = dict(table.configs())
  assert len(rows) == 2 * 4 * 3 + 3
  assert rows["arflow imagenet256-xl2"].batch_size == 256
  assert rows["flowar imagenet256-h"].batch_size == 2048
  assert {config.model.dtype for config in rows.values()} == {"bfloat16"}


def test_a_cell_is_by_the_formula_or_as_compiled():
  wide = {"model__width": 1024, "model__num_heads": 16}
  config = tiny_config(batch_size=256, model__attention="xla", **wide)
  plain = [x.strip() for x in table.row("tiny", config, []).split("|")]
  totals = [
    footprint.divide(config, devices, tpu=True)["total"] / 2**30
    for devices in (256, 256, 128, 128)
  ]
  assert plain[5:-1] == [f"{total:,.2f}" for total in totals]
  kept = {
    "topology": "v5p:4x4x8",
    "config": json.loads(json.dumps(config.to_dict())),
    "needed": 3 * 2**30,
    "fits": True,
  }
  mine = [x.strip() for x in table.row("tiny", config, [kept]).split("|")]
  assert mine == [*plain[:7], "3.00 c", *plain[8:]]
  refused = kept | {"needed": 99 * 2**30, "fits": False}
  assert "no: 99.00 c" in table.row("tiny", config, [refused])
  config.batch_size = 512  # was not compiled
  assert "c |" not in table.row("tiny", config, [kept])
