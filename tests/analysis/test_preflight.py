"""Preflight: what fits, what does not and what would, a compiled program."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from arflow_jax import cli, preflight
from arflow_jax.analysis import chips, flops, footprint
from arflow_jax.analysis import preflight as examination
from tests.tiny import flags, tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def test_a_gpu_by_the_formula(tmp_path, capsys):
  out = tmp_path / "kept.json"
  args = [*flags(), "--topology=gpu:24GB", f"--out={out}"]
  assert cli.execute(preflight, args) == 0
  printed = capsys.readouterr().out
  assert "FITS: " in printed
  assert "DOES NOT" not in printed
  assert "Limits: " in printed
  found = json.loads(out.read_text())
  assert found["fits"]
  total = footprint.divide(tiny_config(), 1, tpu=False)["total"]
  assert found["formula"]["total"] == total
  assert found["hbm"] == 24 * 10**9


@pytest.mark.parametrize(
  "family", ["arflow", pytest.param("flowar", marks=pytest.mark.slow)]
)
def test_what_does_not_fit_exits_with_1_and_says_what_would(family, capsys):
  large = {"batch_size": 4096, "model__width": 64, "model__remat": "none"}
  args = [*flags(family, **large), "--topology=gpu:2GB"]
  assert cli.execute(preflight, args) == 1
  printed = capsys.readouterr().out
  assert "DOES NOT FIT" in printed
  (advice,) = [x for x in printed.splitlines() if "it fits with" in x]
  # What it says is true: the same command with these flags fits.
  added = [word for word in advice.split() if word.startswith("--config.")]
  assert added
  assert cli.execute(preflight, [*args, *added]) == 0


def test_where_nothing_fits_it_says_so(capsys):
  args = [*flags(model__width=8192), "--topology=gpu:1GB"]
  assert cli.execute(preflight, args) == 1
  assert "accumulation together: nothing that fits" in capsys.readouterr().out


def test_a_refusal_tells_the_bytes():
  import jax

  refused = lambda text: examination._refused(jax.errors.JaxRuntimeError(text))
  assert refused(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (16.50G) exceeds available HBM (15.75G)."
  ) == int(16.5 * 2**30)
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    refused("INTERNAL: no such HBM 3.0G")


@pytest.mark.slow
def test_the_smallest_slice_has_room():
  wide = {"model__width": 4096, "model__num_heads": 64, "model__depth": 8}
  config = tiny_config(batch_size=32, **wide)
  place = chips.parse("v5e:4x4")
  found = examination._smallest(config, place, 1.0)
  assert found is None  # weights, averages and moments on every chip
  config.mesh.fsdp = 8
  found = examination._smallest(config, place, 1.0)
  assert found["topology"] == "v5e:2x4"
  assert found["formula"] < 0.85 * place.hbm


def compiled(tmp_path, *args):
  """What is printed, by lines, and kept; libtpu needs a process of its own."""
  pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")
  out = tmp_path / "kept.json"
  done = subprocess.run(
    [sys.executable, "-m", "arflow_jax.preflight", *args, f"--out={out}"],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert max(map(len, lines)) < 100
  return lines, json.loads(out.read_text())


def test_a_sampler_is_refused_where_nothing_is_compiled(capsys):
  args = [*flags(), "--topology=gpu:24GB", "--what=sample"]
  assert cli.execute(preflight, args) == 1
  error = capsys.readouterr().err
  assert "--what=sample: nothing is compiled for --topology=gpu:24GB" in error


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_a_tiny_sampler_compiled_for_four_chips(family, tmp_path):
  wide = {"model__width": 32, "model__num_heads": 2}  # enough for a kernel
  few = {"sample__block_size": 6, "mesh__fsdp": 2}  # two images on each
  args = [*flags(family, **few, **wide), "--topology=v5e:2x2", "--what=sample"]
  lines, found = compiled(tmp_path, *args)
  # Weights are whole on each device, whatever the mesh of training.
  assert "v5e:2x2 (4 chips), data 4 x fsdp 1" in lines[0]
  assert lines[1].startswith("FITS: ")
  assert sum(found["bytes"].values()) == found["needed"] < found["hbm"]
  config = tiny_config(family, **wide)
  whole = footprint.divide(config, 1, tpu=False)["parameters"]
  assert found["bytes"]["parameters"] == whole
  assert found["work"]["images"] == 8
  assert found["work"]["flops"] == flops.sample(config, 8)
  assert found["cycles"]["xla"] > 0
  assert (found["cycles"]["kernels"] > 0) == (family == "arflow")
  hidden, in_turn = found["estimate"]["blocks"].values()
  assert 0 < hidden["seconds"] <= in_turn["seconds"]
  assert hidden["hours"] == pytest.approx(hidden["seconds"] * 6250 / 3600)


@pytest.mark.slow
def test_a_tiny_step_compiled_for_two_slices(tmp_path):
  args = [*flags(batch_size=8, mesh__fsdp=2), "--topology=2xv5e:2x2"]
  lines, found = compiled(tmp_path, *args)
  assert "(8 chips in 2 slices), data 4 x fsdp 2" in lines[0]
  sent = {row["axes"]: row["bytes"] for row in found["exchanges"][::-1]}
  # Weights stay in a slice; a device hands on its part of the gradients, in
  # tiles, which small ones do not fill.
  parameters = found["bytes"]["parameters"]
  assert parameters / 4 < sent["slices"] < 4 * parameters
  assert "network" in found["estimate"]["parts"]
  assert any("between slices" in line for line in lines)


def test_a_tiny_step_compiled_for_four_chips(tmp_path):
  args = [*flags(batch_size=8, mesh__fsdp=2), "--topology=v5e:2x2"]
  lines, found = compiled(tmp_path, *args)
  assert "v5e:2x2 (4 chips), data 2 x fsdp 2" in lines[0]
  assert lines[1].startswith("FITS: ")
  assert lines[3].startswith("hybrid attention takes the ")
  parts = found["bytes"]
  assert sum(parts.values()) == found["needed"] < found["hbm"]
  for name in ("parameters", "optimiser", "average", "batch"):
    assert parts[name] == found["formula"][name]
  axes = {row["axes"] for row in found["exchanges"]}
  assert {"data", "fsdp"} <= axes
  assert found["cycles"]["xla"] > 0
  hidden, in_turn = found["estimate"]["steps"].values()
  assert 0 < hidden["seconds"] < in_turn["seconds"]
  assert in_turn["mfu"] < hidden["mfu"] < 1
  assert hidden["images_per_second"] == pytest.approx(8 * 5 / hidden["seconds"])
  assert hidden["chip_hours"] == pytest.approx(hidden["days"] * 24 * 4)
