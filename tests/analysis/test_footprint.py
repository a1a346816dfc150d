"""The memory formula: what changes it, how near the compiler's plan it is."""

import os
import pathlib
import subprocess
import sys

import pytest

from arflow_jax.analysis import footprint
from arflow_jax.errors import ConfigError
from arflow_jax.nn.stack import REMAT
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  "family", ["arflow", pytest.param("flowar", marks=pytest.mark.slow)]
)
def test_what_is_split_and_what_is_not(family):
  config = tiny_config(family, batch_size=16)
  one = footprint.divide(config, 1, tpu=False)
  four = footprint.divide(config, 4, tpu=False)
  config.mesh.fsdp = 4
  split = footprint.divide(config, 4, tpu=False)
  assert one["total"] == sum(one.values()) - one["total"]
  assert one["parameters"] == four["parameters"]
  assert one["batch"] == 4 * four["batch"] == 4 * split["batch"]
  assert split["parameters"] < 0.6 * one["parameters"]
  assert split["optimiser"] == pytest.approx(2 * split["parameters"], rel=0.01)
  # A checkpoint holds all shards: parameters, average and two moments.
  whole = footprint.checkpoint(config)
  assert whole == pytest.approx(4 * one["parameters"], rel=0.01)


@pytest.mark.parametrize(
  "family", ["arflow", pytest.param("flowar", marks=pytest.mark.slow)]
)
def test_remat_and_micro_batches_take_less(family):
  def needed(**changes):
    config = tiny_config(family, batch_size=256, **changes)
    return footprint.divide(config, 1, tpu=False)["temporaries"]

  sizes = [needed(model__remat=policy) for policy in REMAT]
  assert sizes == sorted(sizes, reverse=True)
  none = sizes[0]
  parts = needed(model__remat="none", optimizer__accumulation=4)
  assert none / 4 < parts < none / 3


def test_a_factor_is_on_temporaries_alone():
  config = tiny_config()
  plain = footprint.divide(config, 1, False)
  twice = footprint.divide(config, 1, False, factor=2.0)
  added = twice["total"] - plain["total"]
  assert added == pytest.approx(plain["temporaries"], abs=2)


def test_changes_begin_with_the_least():
  config = tiny_config(batch_size=16, model__remat="dots")
  assert footprint.options(config, 4) == {
    "model.remat": ["attention", "feed_forward", "full"],
    "mesh.fsdp": [2, 4],
    "optimizer.accumulation": [2, 4],
    "batch_size": [8, 4],
  }
  changes = list(footprint.changes(config, 4))
  assert changes[:3] == [
    {"model.remat": "attention"},
    {"model.remat": "feed_forward"},
    {"model.remat": "full"},
  ]
  assert changes[4] == {"mesh.fsdp": 2, "model.remat": "attention"}
  assert len(changes) == 4 * 3 * 3 - 1
  changed = footprint.changed(config, {"mesh.fsdp": 2})
  assert footprint.mesh(changed, 4).shape["data"] == 2


def test_what_does_not_divide_is_refused():
  with pytest.raises(ConfigError, match="batch_size=4"):
    footprint.divide(tiny_config(), 3, tpu=True)


# Config, remat, fsdp, batch, micro-batches, topology: all beyond the memory, so
# that the compiler tells in seconds what they need.
MEASURED = [
  ("arflow.py:imagenet256-xl2", "none", 16, 256, 1, "v5e:4x4"),
  ("arflow.py:imagenet256-b2", "full", 4, 1024, 1, "v5e:2x2"),
  ("arflow.py:imagenet256-b2", "dots", 4, 2048, 4, "v5e:2x2"),
  ("flowar.py:imagenet256-l", "full", 4, 2048, 1, "v5e:2x2"),
  ("flowar.py:imagenet256-l", "dots", 4, 2048, 2, "v5e:2x2"),
  ("flowar.py:imagenet256-s", "dots", 1, 2048, 1, "v5e:2x2"),
]
CHECK = """
import sys
from arflow_jax import config as config_lib
from arflow_jax.analysis import chips, footprint, preflight, tpu
from arflow_jax.training import program

file, remat, fsdp, batch, parts, name = sys.argv[1:]
config = config_lib.from_file(f"configs/{file}")
config = footprint.changed(config, {
  "model.remat": remat,
  "model.dtype": "bfloat16",
  "mesh.fsdp": int(fsdp),
  "batch_size": int(batch),
  "optimizer.accumulation": int(parts),
})
place = chips.parse(name)
with tpu.schedules() as dump:
  built = program.build(config, tpu.devices(name))
  needed = preflight.plan(built, place, dump)["needed"]
formula = footprint.divide(config, place.devices, tpu=True)["total"]
print(formula / needed)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "case", MEASURED, ids=lambda case: "-".join(map(str, case))
)
def test_the_formula_is_within_15_percent_of_the_compiler(case):
  pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")
  done = subprocess.run(
    [sys.executable, "-c", CHECK, *map(str, case)],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
  )
  assert float(done.stdout) == pytest.approx(1, abs=0.15)
